"""The loss of a batch of judged answers, for GRPO and its kin and for PPO, and what is watched while it falls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from danlu import console
from danlu.data.packed_examples import PackedExamples
from danlu.models.causal_lm import CausalLM
from danlu.objectives.kl import kl_k3
from danlu.objectives.logprobs import masked
from danlu.objectives.policy import aggregate, clipped_share, importance_weights, policy_losses, value_losses
from danlu.posttraining.experience import PolicyBatch
from danlu.posttraining.policy_config import PolicyOptions
from danlu.training.logprobs import target_logprobs
from danlu.training.metrics import Numbers

TOLERANCE: Final = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}
"""Nats that the engine's log-probs may be from the trainer's before losses are corrected for it, by the dtype of the
activations."""

WEIGHT_CAP: Final = 2.0
"""Of that correction (truncated importance sampling)."""

ALARMING: Final = 0.1
"""Nats on average: not rounding, but two different models."""

Values = Callable[[PackedExamples], Tensor]
"""The critic: what it expects before each target is drawn, (answers, width) fp32."""


class PolicyLoss:
    """Sum of the losses of a :class:`PolicyBatch`; its :attr:`numbers` are of the step so far.

    Args:
        kl: weight of the distance to the reference in the loss (k3); 0 where it is in the reward.
        values: the critic; None: there is none.
    """

    def __init__(
        self, options: PolicyOptions, model: CausalLM, *, kl: float = 0.0, values: Values | None = None
    ) -> None:
        self.options, self.model, self.kl, self.values = options, model, kl, values
        self.clip_high = options.settings()["clip_high"] if values is None else options.clip_high or options.clip_low
        self._sums: dict[str, float] = {}
        self._n_tokens = 0
        self._farthest = 0.0
        self._told = self._warned = False

    def __call__(self, batch: PolicyBatch) -> Tensor:
        packed, options = batch.packed(), self.options
        logps_bt, entropy_bt = target_logprobs(self.model, packed, temperature=options.temperature, with_entropy=True)
        mask_bt, advantages_bt = packed.mask_bt, batch.laid_out("advantages")
        rollout_bt, old_bt = batch.laid_out("rollout"), batch.laid_out("old")
        assert advantages_bt is not None
        assert rollout_bt is not None
        assert entropy_bt is not None
        old_bt = logps_bt.detach() if old_bt is None else old_bt
        clips = {"clip_low": options.clip_low, "clip_high": self.clip_high}
        losses_bt = policy_losses(logps_bt, old_bt, advantages_bt, mask_bt=mask_bt, **clips)
        apart_bt = masked((old_bt - rollout_bt).abs(), mask_bt)
        if float(apart_bt.max()) > TOLERANCE[self.model.dtype]:
            losses_bt = losses_bt * importance_weights(old_bt, rollout_bt, cap=WEIGHT_CAP)
        reference_bt = batch.laid_out("reference")
        told = {
            "entropy": entropy_bt,
            "clipped": clipped_share(logps_bt, old_bt, advantages_bt, mask_bt, **clips).expand(mask_bt.shape),
            "rollout_mismatch": apart_bt,
        }
        if reference_bt is not None:
            distance_bt = kl_k3(masked(logps_bt, mask_bt), reference_bt)
            told["kl"] = distance_bt.detach()
            if self.kl:
                losses_bt = losses_bt + self.kl * distance_bt
        if self.values is not None:
            old_values_bt, returns_bt = batch.laid_out("values"), batch.laid_out("returns")
            assert old_values_bt is not None
            assert returns_bt is not None
            errors_bt = value_losses(self.values(packed), old_values_bt, returns_bt, options.value_clip, mask_bt)
            told["value_loss"] = errors_bt.detach()
            losses_bt = losses_bt + options.value_weight * errors_bt
        if torch.is_grad_enabled():
            self._tell(told, mask_bt)
        return aggregate(losses_bt, mask_bt, batch.aggregation, float(options.max_new_tokens))[0]

    def _tell(self, told: dict[str, Tensor], mask_bt: Tensor) -> None:
        n = int(mask_bt.sum())
        self._n_tokens += n
        for name, values_bt in told.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(masked(values_bt, mask_bt).sum())
        self._farthest = max(self._farthest, float(told["rollout_mismatch"].max()))

    def take_numbers(self) -> Numbers:
        """Means over the tokens since the last call; ``rollout_mismatch`` is the largest."""
        n = max(1, self._n_tokens)
        found: Numbers = {name: total / n for name, total in self._sums.items()}
        apart = self._sums.get("rollout_mismatch", 0.0) / n
        if self._farthest > TOLERANCE[self.model.dtype] and not self._told:
            self._told = True
            console.note(
                f"the engine's log-probabilities are up to {self._farthest:.2g} nats from the trainer's (its sums are "
                "rounded otherwise); losses are corrected for it. rollout_mismatch in metrics.jsonl"
            )
        if apart > ALARMING and not self._warned:
            self._warned = True
            console.warn(
                f"the log-probabilities of the engine are {apart:.2g} nats off on average; losses are corrected for "
                "it, but the two do not compute the same model"
            )
        found["rollout_mismatch"] = self._farthest
        self._sums, self._n_tokens, self._farthest = {}, 0, 0.0
        return found
