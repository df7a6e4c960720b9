"""The rows that a language model's student learns from: those of the data, or some whose answers the student wrote.

Rows are cut alike in every epoch and have numbers, so that what the teacher says of a row can be kept; only their order
changes. As in :class:`~danlu.data.packing.RowStream` everything follows from (seed, epoch).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from danlu.data.epochs import EpochStream, shuffled
from danlu.data.packed_examples import Example
from danlu.data.packing import IGNORE, Batch, MaskedSequences, RowStream, Sequences, pack_epoch


@dataclass
class TaughtBatch:
    """Packed rows.

    Attributes:
        numbers_b: (rows,) int64, on the CPU: the number of each row.
        own: the student wrote the answers, so its targets are nothing to learn by themselves.
    """

    batch: Batch
    numbers_b: Tensor
    own: bool = False

    @property
    def n_targets(self) -> int:
        """Tokens that carry loss."""
        return self.batch.n_targets

    @property
    def n_tokens(self) -> int:
        """Tokens that the model reads, padding included."""
        return self.batch.n_tokens

    def split(self, rows: int) -> Iterator[TaughtBatch]:
        """Micro-batches of at most ``rows`` rows."""
        for batch, numbers in zip(self.batch.split(rows), torch.split(self.numbers_b, rows), strict=True):
            yield TaughtBatch(batch, numbers, self.own)

    def to(self, device: torch.device) -> TaughtBatch:
        """The batch on a device."""
        return TaughtBatch(self.batch.to(device), self.numbers_b, self.own)


class TaughtRows(EpochStream[int]):
    """Endless rows of training sequences, which keep their numbers: each epoch has the same ones in another order."""

    def __init__(self, sequences: Sequences, row_len: int, *, seed: int, pad_id: int) -> None:
        self.sequences, self.row_len, self.seed = sequences, row_len, seed
        self.stream = RowStream(sequences, row_len, seed=seed, pad_id=pad_id)
        self.rows = pack_epoch(sequences.lengths, row_len, seed=seed, epoch=0)
        super().__init__()

    def order(self, epoch: int) -> list[int]:
        return shuffled(len(self.rows), self.seed, epoch)

    def next(self, n_rows: int) -> TaughtBatch:
        """The next rows."""
        return self.batch(self.take(n_rows))

    def batch(self, numbers: Sequence[int]) -> TaughtBatch:
        """The rows of these numbers."""
        return TaughtBatch(self.stream.assemble([self.rows[number] for number in numbers]), torch.tensor(numbers))

    def prompts(self, numbers: Iterable[int], prompt_tokens: int) -> list[list[int]]:
        """The prompts of the sequences in these rows; see :func:`prompt_of`."""
        found = []
        for number in numbers:
            for i, start, length in self.rows[number]:
                inputs, targets = (part[start : start + length].tolist() for part in self.sequences[i])
                if prompt := prompt_of(inputs, targets, prompt_tokens):
                    found.append(prompt)
        return found


def prompt_of(inputs: Sequence[int], targets: Sequence[int], prompt_tokens: int) -> list[int]:
    """The prompt of a training sequence: all up to its last answer; of a text, which is learned whole, the first
    ``prompt_tokens``, or half of it where it is shorter than twice as much.

    Args:
        targets: what each of the inputs predicts, IGNORE where nothing is learned.
    """
    learned = [target != IGNORE for target in targets]
    if all(learned):
        return list(inputs[: min(prompt_tokens, max(1, len(inputs) // 2))])
    last = max((at for at, is_learned in enumerate(learned) if is_learned), default=-1)
    first = last
    while first > 0 and learned[first - 1]:
        first -= 1
    return list(inputs[: first + 1]) if last >= 0 else []


Write = Callable[[list[list[int]], int], list[Example]]
"""Prompts, and a number to seed their answers with -> prompts with answers; as many, or fewer where one has no room."""


class OnPolicyRows:
    """The same stream, but a share of its steps has answers that the student writes to the prompts of its rows (GKD,
    Agarwal et al. 2023, arXiv:2306.13649, algorithm 1).

    Args:
        share: of the steps.
        write: has the student answer.
        prompt_tokens: of a text that is no chat, so many tokens are the prompt.
    """

    def __init__(self, rows: TaughtRows, share: float, write: Write, *, prompt_tokens: int, pad_id: int) -> None:
        self.rows, self.share, self.write = rows, share, write
        self.prompt_tokens, self.pad_id = prompt_tokens, pad_id
        self.step = 0

    @property
    def row_len(self) -> int:
        """Tokens of a row."""
        return self.rows.row_len

    @property
    def rows_per_epoch(self) -> int:
        """Rows of an epoch."""
        return self.rows.rows_per_epoch

    def state(self) -> dict[str, int]:
        """Where the stream is."""
        return {**self.rows.state(), "step": self.step}

    def restore(self, state: dict[str, int]) -> None:
        """Go to a saved position."""
        self.rows.restore(state)
        self.step = state["step"]

    def next(self, n_rows: int) -> TaughtBatch:
        """The next rows, as the data has them or as the student answers."""
        numbers = self.rows.take(n_rows)
        self.step += 1
        if np.random.default_rng((self.rows.seed, self.step)).random() >= self.share:
            return self.rows.batch(numbers)
        answered = self.write(self.rows.prompts(numbers, self.prompt_tokens), self.step)
        if not answered:
            return self.rows.batch(numbers)
        packed = RowStream(MaskedSequences(answered), self.row_len, seed=0, pad_id=self.pad_id)
        batch = packed.first_rows(packed.rows_per_epoch)
        return TaughtBatch(batch, torch.full((len(batch),), -1), own=True)
