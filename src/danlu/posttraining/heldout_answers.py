"""Held-out prompts, answered and judged while a policy is trained; and when its rewards are to be doubted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch

from danlu.data.prompts import Prompt
from danlu.engine.config import SamplingParams
from danlu.posttraining.experience import Judged, judge
from danlu.posttraining.policy_config import PolicyOptions
from danlu.posttraining.rollouts import RolloutEngine
from danlu.posttraining.verifiers import Verifiers
from danlu.training.loop import LossSum
from danlu.training.metrics import Numbers


class HeldOutAnswers:
    """Greedy answers to held-out prompts (:class:`danlu.training.loop.Measurement`).

    Args:
        verifiers: what is rewarded.
        others: what is looked at besides, or None.
    """

    def __init__(
        self,
        options: PolicyOptions,
        engine: RolloutEngine,
        verifiers: Verifiers,
        others: Verifiers | None,
        prompts: Sequence[Prompt],
    ) -> None:
        self.options, self.engine, self.verifiers, self.others = options, engine, verifiers, others
        self.prompts = prompts
        self.watch = RewardWatch() if others is not None else None
        self.last: list[list[Judged]] = []
        """The answers of the last measurement, with those of ``others`` behind."""

    def measure(self, loss_sum: LossSum, micro_rows: int, device: torch.device) -> Numbers:
        """Mean rewards, and what the others say."""
        params = SamplingParams(temperature=0.0, max_new_tokens=self.options.max_new_tokens)
        drawn = self.engine.draw(self.prompts, params, seed=0)
        self.last = judge(drawn, self.verifiers, self.options)
        rewards = [one.reward for group in self.last for one in group if one.reward is not None]
        found: Numbers = {"heldout_reward": statistics.fmean(rewards) if rewards else None}
        if self.others is not None:
            judged = judge(drawn, self.others, PolicyOptions())
            scores = [one.reward for group in judged for one in group if one.reward is not None]
            found["heldout_other"] = statistics.fmean(scores) if scores else None
            assert self.watch is not None
            self.watch.observe(rewards, scores)
        return found

    def suspicion(self) -> str | None:
        """Why training should stop, if it should."""
        return None if self.watch is None else self.watch.suspicion


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


def _difference(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """The difference of two means, and its standard error."""
    error = math.sqrt(statistics.variance(before) / len(before) + statistics.variance(after) / len(after))
    return statistics.fmean(after) - statistics.fmean(before), error
