"""What `danlu align` and `danlu reward` take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from danlu.adapters.config import AdapterOptions
from danlu.config import REQUIRED, option
from danlu.posttraining.policy_config import GRPO_ONLY, POLICY_ONLY, PPO_ONLY, PolicyOptions
from danlu.training.config import TrainingConfig
from danlu.training.heldout_config import HeldOutOptions

Loss = Literal["sigmoid", "ipo", "hinge", "robust", "kto", "orpo", "simpo"]

REFERENCE_FREE: Final = ("orpo", "simpo")
"""Losses that know no model to stay near."""


@dataclass(frozen=True, kw_only=True)
class JudgedConfig(TrainingConfig, HeldOutOptions, AdapterOptions):
    """Options of whatever is learned from judged answers."""

    model: Path = option(REQUIRED, "Model folder, GGUF file or name (smollm2) to start from.", positional=True)
    data: Path = option(
        REQUIRED,
        "JSON Lines, JSON, CSV, TSV or Parquet files: prompt, chosen, rejected; prompt, answers, ranks or scores; or "
        "prompt, completion, label.",
    )
    batch_size: int = option(
        0, "Rows (pairs, rankings, judged answers) per optimizer step; 0: 16.", unit="rows", ge=0, le=65536
    )
    lr_scale: float | None = option(
        None,
        "Multiplies the default learning rates: at a width of 768, dpo 5e-6, grpo and ppo 1e-5, reward 2e-5 (its head "
        "2e-4); of adapters, whatever the width, 1e-4, of a reward model 5e-4.",
        gt=0,
        le=100,
    )

    def problems(self) -> list[str]:
        """What cannot be right between the options."""
        found = [*super().problems(), *self.adapter_problems()]
        if self.batch_tokens:
            found.append("batch_tokens is not for judged answers, which are counted in rows; give batch_size")
        if self.compile == "always":
            found.append("compile=always is for rows of one length; judged answers are of all lengths")
        found += self.heldout_problems()
        if self.adapter != "none" and self.optimizer == "muon":
            found.append("optimizer=muon is for whole matrices; an adapter's are learned with adamw")
        return found


@dataclass(frozen=True, kw_only=True)
class AlignConfig(JudgedConfig, PolicyOptions):
    """Teach a model to answer as people prefer."""

    method: Literal["dpo", "grpo", "ppo"] = option(
        "dpo",
        "dpo: from preferences between given answers, with any of the losses below. grpo, ppo: from the model's own "
        "answers to prompts, judged by what --reward names; grpo compares answers to one prompt, ppo trains a critic.",
    )
    loss: Loss = option(
        "sigmoid",
        "sigmoid: DPO; ipo, hinge, robust (to wrong labels): its variants; kto: from answers that are good or bad by "
        "themselves; orpo, simpo: without a reference model.",
    )
    beta: float | None = option(
        None,
        "How strongly the reference holds the model back, or, without one, the weight of the preference; default 0.1, "
        "for simpo 2.",
        gt=0,
        le=1000,
    )
    label_smoothing: float = option(
        0.0, "Share of the preferences taken to be wrong (sigmoid, robust, simpo).", ge=0, lt=0.5
    )
    length_average: bool | None = option(
        None,
        "Judge an answer by the mean instead of the sum of its tokens' log-probabilities; default: for ipo only "
        "(orpo and simpo always do, kto never).",
    )
    target_margin: float = option(
        1.0, "simpo: the lead that the chosen answer shall have (gamma), half of beta by default of its authors.", ge=0
    )
    sft_weight: float = option(
        0.0, "Weight of the ordinary loss on the chosen answer, a mean over its tokens (sigmoid, ipo, hinge, robust).",
        ge=0,
    )  # fmt: skip
    desirable_weight: float = option(1.0, "kto: weight of the good answers.", ge=0)
    undesirable_weight: float = option(
        1.0, "kto: weight of the bad answers; weight times number should be about equal for both.", ge=0
    )
    reference: Path | None = option(
        None, "Model folder to stay near, with the same tokenizer; default: the model as it starts."
    )
    precompute: Literal["always", "never"] = option(
        "always",
        "Log-probabilities of the reference: always: once before training, kept on disk; never: at each step, from the "
        "model without its adapter.",
    )

    @property
    def strength(self) -> float:
        """``beta``, with its default."""
        return self.beta if self.beta is not None else 2.0 if self.loss == "simpo" else 0.1

    @property
    def averages(self) -> bool:
        """Whether log-probs of answers are means over their tokens."""
        return self.loss in ("ipo", *REFERENCE_FREE) if self.length_average is None else self.length_average

    def problems(self) -> list[str]:
        """What cannot be right between the options."""
        found = super().problems()
        for name, methods in _ONLY.items():
            if self.method not in methods and self._is_given(name):
                found.append(f"{name} is for method={' or '.join(methods)}, not {self.method}")
        for name, losses in _ONLY_LOSSES.items():
            if self.loss not in losses and self._is_given(name):
                found.append(f"{name} is for loss={' or '.join(losses)}, not {self.loss}")
        if self.method != "dpo":
            found += self.policy_problems(self.method)
            if self.dropout:
                found.append(
                    f"dropout is for method=dpo: {self.method} learns from the log-probabilities of answers that were "
                    "written without it"
                )
            if self.new_tokens:
                found.append(
                    f"new_tokens are for method=dpo: {self.method} learns from what the model writes, and it writes "
                    "none that it was not taught; fine-tune it with them first"
                )
        if self.loss == "robust" and not self.label_smoothing:
            found.append("loss=robust needs label_smoothing, the share of wrong labels; without it, it is sigmoid")
        if self.precompute == "never" and (self.adapter == "none" or self.reference is not None):
            found.append("precompute=never takes the model without its adapter as reference; add adapter, no reference")
        return found

    def _is_given(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).__dataclass_fields__[name].default)


_PREFERENCE_OPTIONS = (
    "loss", "beta", "label_smoothing", "length_average", "target_margin", "sft_weight", "desirable_weight",
    "undesirable_weight", "reference", "precompute", "batch_size", "seq_len", "heldout_tokens",
)  # fmt: skip

_ONLY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_PREFERENCE_OPTIONS, ("dpo",)),
    **dict.fromkeys(POLICY_ONLY, ("grpo", "ppo")),
    **dict.fromkeys(GRPO_ONLY, ("grpo",)),
    **dict.fromkeys(PPO_ONLY, ("ppo",)),
}
"""Options that mean something for some methods only; given for another they are refused, not passed over."""

_PAIR_LOSSES = ("sigmoid", "ipo", "hinge", "robust")

_ONLY_LOSSES: dict[str, tuple[str, ...]] = {
    "label_smoothing": ("sigmoid", "robust", "simpo"),
    "length_average": _PAIR_LOSSES,
    "target_margin": ("simpo",),
    "sft_weight": _PAIR_LOSSES,
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "reference": (*_PAIR_LOSSES, "kto"),
    "precompute": (*_PAIR_LOSSES, "kto"),
}
"""The same for losses."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig(JudgedConfig):
    """Train a reward model: one number for how good an answer is, learned from comparisons."""

    rankings: Literal["pairs", "plackett-luce"] = option(
        "pairs",
        "What is learned of several ranked answers: each pair of them (Bradley-Terry), a mean over the pairs; or the "
        "whole order (Plackett-Luce).",
    )
    margins: bool = option(
        False, "The chosen answer shall lead by the row's margin: its field margin, or score_chosen - score_rejected."
    )
    centring: float = option(
        0.0, "Weight of the loss that keeps rewards near 0, (chosen + rejected)^2; 0.01 is usual.", ge=0, le=100
    )

    def problems(self) -> list[str]:
        """What cannot be right between the options."""
        found = super().problems()
        if self.new_tokens:
            found.append("new_tokens are for models that write; a reward model only reads")
        if self.margins and self.rankings != "pairs":
            found.append("margins are for rankings=pairs, not plackett-luce")
        return found
