"""`danlu align --method ppo`: an actor that writes and a critic that expects (Schulman et al. 2017, arXiv:1707.06347;
for language models: Ziegler et al. 2019, arXiv:1909.08593, Ouyang et al. 2022, arXiv:2203.02155)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from danlu.data.packed_examples import PackedExamples, pack_examples
from danlu.models.causal_lm import CausalLM
from danlu.models.heads import RewardModel
from danlu.objectives.advantages import gae, whiten
from danlu.objectives.kl import AdaptiveKL, kl_k1, score_at_end
from danlu.objectives.logprobs import masked_sum
from danlu.posttraining.experience import PACKED_TOKENS, Experience, Judged, Lesson
from danlu.posttraining.policy_config import PolicyOptions
from danlu.posttraining.rollouts import Rollout
from danlu.training.logprobs import hidden_at_targets


class ActorCritic(nn.Module):
    """Two models that are trained together; what the training loop asks of a model, it asks of both.

    Args:
        details: what the critic's card shall say.
    """

    def __init__(self, actor: CausalLM, critic: RewardModel, details: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.actor, self.critic, self.details = actor, critic, details or {}
        self.config = actor.config

    @property
    def compute_dtype(self) -> torch.dtype | None:
        return self.actor.compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype | None) -> None:
        self.actor.compute_dtype = self.critic.compute_dtype = dtype

    @property
    def gradient_checkpointing(self) -> bool:
        return self.actor.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, wanted: bool) -> None:
        self.actor.gradient_checkpointing = self.critic.gradient_checkpointing = wanted

    def num_parameters(self) -> int:
        """Number of weights of both."""
        return self.actor.num_parameters() + self.critic.num_parameters()

    def estimate_flops(self, seq_len: int) -> int:
        """FLOPs of training on one token, of both."""
        return self.actor.estimate_flops(seq_len) + self.critic.estimate_flops(seq_len)

    def values(self, packed: PackedExamples) -> Tensor:
        """What the critic expects before each target is drawn, (answers, width) fp32, 0 behind the end of an answer."""
        return packed.by_example(self.critic.head(hidden_at_targets(self.critic, packed)).squeeze(-1))


class CriticExperience(Experience):
    """Answers by themselves: a token is as good as things went on better than the critic expected. KL to the reference
    is paid in the reward, token by token."""

    def __init__(self, options: PolicyOptions, pair: ActorCritic, *arguments: Any, **more: Any) -> None:
        super().__init__(options, pair.actor, *arguments, **more)
        self.pair = pair
        self.kl = AdaptiveKL(options.kl, options.kl_target) if options.kl_target is not None else None

    @property
    def kl_weight(self) -> float:
        """Reward that a nat costs now."""
        return self.options.kl if self.kl is None else self.kl.coefficient

    def learn(self, groups: list[list[Judged]]) -> list[Lesson]:
        judged = [one for group in groups for one in group if one.reward is not None]
        if not judged:
            return []
        rollouts = [one.rollout for one in judged]
        old = self.score(self.model, rollouts)
        reference = self.reference_scores(rollouts)
        values = self._expected(rollouts)
        mask_bt = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in old], batch_first=True)
        old_bt, values_bt = pad_sequence(old, batch_first=True), pad_sequence(values, batch_first=True)
        kl_bt = torch.zeros_like(old_bt)
        if reference is not None:
            kl_bt = kl_k1(old_bt, pad_sequence(reference, batch_first=True))
        scores_b = torch.tensor([one.reward for one in judged])
        rewards_bt = score_at_end(scores_b, kl_bt, mask_bt, self.kl_weight)
        advantages_bt, returns_bt = gae(rewards_bt, values_bt, mask_bt, self.options.gamma, self.options.gae_lambda)
        advantages_bt = whiten(advantages_bt, mask_bt)
        if self.kl is not None and reference is not None:
            self.kl.update(float(masked_sum(kl_bt, mask_bt).mean()), len(judged))
        return [
            Lesson(
                rollout.example,
                advantages_bt[i, :n],
                torch.tensor(rollout.logprobs, dtype=torch.float32),
                old[i],
                None if reference is None else reference[i],
                values[i],
                returns_bt[i, :n],
            )
            for i, rollout in enumerate(rollouts)
            for n in (len(rollout.answer_ids),)
        ]

    def _tell(self, groups: Sequence[Sequence[Judged]], n_drawn: int) -> None:
        super()._tell(groups, n_drawn)
        if self.kl is not None:
            self.numbers["kl_weight"] = self.kl_weight

    def _expected(self, rollouts: list[Rollout]) -> list[Tensor]:
        """The critic's values at the tokens of each answer."""
        found: list[Tensor] = []
        each = max(1, PACKED_TOKENS // self.row_len)
        with torch.no_grad():
            for start in range(0, len(rollouts), each):
                packed = pack_examples([one.example for one in rollouts[start : start + each]]).to(self.model.device)
                values_bt = self.pair.values(packed).float().cpu()
                found += [row[:n] for row, n in zip(values_bt, packed.lengths_b.tolist(), strict=True)]
        return found

    def state(self) -> dict[str, Any]:
        return {**super().state(), "kl": self.kl_weight}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        if self.kl is not None:
            self.kl.coefficient = state["kl"]
