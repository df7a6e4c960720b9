"""`danlu align --method grpo`: each answer is compared with other answers to the same prompt (Shao et al. 2024,
arXiv:2402.03300), and its kin: DAPO, Dr. GRPO, RLOO, REINFORCE++."""

from __future__ import annotations

import torch

from danlu.objectives.advantages import group_advantages, whiten
from danlu.posttraining.experience import Experience, Judged, Lesson


class GroupExperience(Experience):
    """Answers in groups: an answer is as good as it is better than its group."""

    def learn(self, groups: list[list[Judged]]) -> list[Lesson]:
        mask_gn = torch.tensor([[one.reward is not None for one in group] for group in groups])
        rewards_gn = torch.tensor([[one.reward or 0.0 for one in group] for group in groups])
        advantages_gn = self._advantages(rewards_gn, mask_gn)
        judged = [(one.rollout, advantage) for group, row in zip(groups, advantages_gn.tolist(), strict=True)
                  for one, advantage in zip(group, row, strict=True) if one.reward is not None]  # fmt: skip
        rollouts = [rollout for rollout, _ in judged]
        old = None if self.on_policy else self.score(self.model, rollouts)
        reference = self.reference_scores(rollouts)
        return [
            Lesson(
                rollout.example,
                torch.full((len(rollout.answer_ids),), advantage),
                torch.tensor(rollout.logprobs, dtype=torch.float32),
                None if old is None else old[i],
                None if reference is None else reference[i],
            )
            for i, (rollout, advantage) in enumerate(judged)
        ]

    def _advantages(self, rewards_gn: torch.Tensor, mask_gn: torch.Tensor) -> torch.Tensor:
        how = self.options.settings()["advantages"]
        if how == "whitened":
            return whiten(group_advantages(rewards_gn, mask_gn, scale="none"), mask_gn)
        if how == "others":
            return group_advantages(rewards_gn, mask_gn, scale="none", leave_one_out=True)
        return group_advantages(rewards_gn, mask_gn, scale="none" if how == "mean" else how)
