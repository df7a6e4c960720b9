"""When the rewards of a policy are to be doubted: they rise, and what is not rewarded falls."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any


class RewardWatch:
    """Suspects that a reward is gamed: it has risen since the best of what is not rewarded, which has fallen, both by
    more than chance explains (two standard errors of the difference)."""

    def __init__(self) -> None:
        self.suspicion: str | None = None
        self._best: tuple[Sequence[float], Sequence[float]] | None = None

    def observe(self, rewards: Sequence[float], others: Sequence[float]) -> None:
        """The scores of one measurement, an answer each."""
        if len(rewards) < 2 or len(others) < 2:
            return
        if self._best is None or statistics.fmean(others) >= statistics.fmean(self._best[1]):
            self._best = (rewards, others)
            return
        gained, lost = _difference(self._best[0], rewards), _difference(others, self._best[1])
        if gained[0] > 2 * gained[1] and lost[0] > 2 * lost[1]:
            self.suspicion = (
                f"the reward has risen by {gained[0]:.3g} while the held-out verifier has fallen by {lost[0]:.3g}: "
                "the reward is probably gamed"
            )

    def state(self) -> dict[str, Any]:
        """What it has seen, as JSON."""
        return {"suspicion": self.suspicion, "best": None if self._best is None else [list(s) for s in self._best]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to what it had seen."""
        self.suspicion = state["suspicion"]
        self._best = None if state["best"] is None else (state["best"][0], state["best"][1])


def _difference(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """The difference of two means, and its standard error."""
    error = math.sqrt(statistics.variance(before) / len(before) + statistics.variance(after) / len(after))
    return statistics.fmean(after) - statistics.fmean(before), error
