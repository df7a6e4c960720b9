"""Endless streams over epochs, from a position that can be saved and restored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")


class EpochStream(ABC, Generic[T]):
    """Takes what each epoch has in the order that :meth:`order` gives it, epoch after epoch. As that follows from the
    number of the epoch alone, two whole numbers say where the stream is."""

    def __init__(self) -> None:
        self.epoch, self.row = 0, 0
        self._order = self.order(0)

    @abstractmethod
    def order(self, epoch: int) -> list[T]:
        """All of an epoch; the same whenever it is asked for."""

    @property
    def rows_per_epoch(self) -> int:
        """How many the current epoch has."""
        return len(self._order)

    def state(self) -> dict[str, int]:
        """Where the stream is."""
        return {"epoch": self.epoch, "row": self.row}

    def restore(self, state: dict[str, int]) -> None:
        """Go to a saved position."""
        if state["epoch"] != self.epoch:
            self._order = self.order(state["epoch"])
        self.epoch, self.row = state["epoch"], state["row"]

    def take(self, n: int) -> list[T]:
        """The next ``n``, running into the next epoch where this one ends."""
        taken: list[T] = []
        while len(taken) < n:
            if self.row >= len(self._order):
                self.restore({"epoch": self.epoch + 1, "row": 0})
            part = self._order[self.row : self.row + n - len(taken)]
            self.row += len(part)
            taken += part
        return taken


def shuffled(n: int, seed: int, epoch: int) -> list[int]:
    """The numbers below ``n`` in an order of the epoch's own."""
    found: list[int] = np.random.default_rng((seed, epoch)).permutation(n).tolist()
    return found
