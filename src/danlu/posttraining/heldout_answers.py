"""Held-out prompts, answered and judged while a policy is trained."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from danlu.data.prompts import Prompt
from danlu.engine.config import SamplingParams
from danlu.posttraining.answer_log import AnswerLog
from danlu.posttraining.experience import Judged, judge, parts
from danlu.posttraining.policy_config import PolicyOptions
from danlu.posttraining.reward_watch import RewardWatch
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
        """The answers of the last measurement."""
        self.log: AnswerLog | None = None
        """Where some of them are written down, once there is a run that counts steps."""

    def measure(self, loss_sum: LossSum, micro_rows: int, device: torch.device) -> Numbers:
        """Mean rewards, and what the others say."""
        params = SamplingParams(temperature=0.0, max_new_tokens=self.options.max_new_tokens)
        drawn = self.engine.draw(self.prompts, params, seed=0)
        self.last = judge(drawn, self.verifiers, self.options)
        if self.log is not None:
            self.log.write(self.last)
        answers = [one for group in self.last for one in group]
        rewards = [one.reward for one in answers if one.reward is not None]
        found: Numbers = {"heldout_reward": statistics.fmean(rewards) if rewards else None}
        found |= {f"heldout_{name}": score for name, score in parts(answers).items()}
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
