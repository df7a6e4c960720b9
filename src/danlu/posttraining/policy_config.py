"""Options of the methods that learn from the model's own answers: GRPO and its kin, and PPO."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from danlu.config import option
from danlu.posttraining.verifiers.config import SandboxOptions

Variant = Literal["grpo", "dapo", "dr-grpo", "rloo", "reinforce++"]

VARIANTS: Final[dict[str, dict[str, Any]]] = {
    "grpo": {"advantages": "group", "aggregate": "sequence", "clip_high": 0.2, "resample": False},
    "dapo": {"advantages": "group", "aggregate": "token", "clip_high": 0.28, "resample": True},
    "dr-grpo": {"advantages": "mean", "aggregate": "constant", "clip_high": 0.2, "resample": False},
    "rloo": {"advantages": "others", "aggregate": "constant", "clip_high": 0.2, "resample": False},
    "reinforce++": {"advantages": "whitened", "aggregate": "token", "clip_high": 0.2, "resample": False},
}
"""What each variant stands for; an option that is given goes before."""


@dataclass(frozen=True, kw_only=True)
class PolicyOptions(SandboxOptions):
    """What GRPO and PPO have in common, then what each has alone."""

    reward: tuple[str, ...] = option(
        (),
        "grpo, ppo: what is rewarded: python-parses, python-tests, math-equal, json-schema, regex=..., think-format, "
        "module:function, model=FOLDER, each with a weight where it is not 1, as 0.5*think-format.",
    )
    heldout_reward: tuple[str, ...] = option(
        (), "grpo, ppo: what held-out answers are judged by besides; training stops when it falls as rewards rise."
    )
    prompts_per_step: int = option(8, "grpo, ppo: prompts that are answered for a step.", ge=1, le=65536)
    group_size: int = option(8, "grpo, ppo: answers to each prompt; ppo needs only 1.", ge=1, le=128)
    max_prompt: int | None = option(
        None,
        "grpo, ppo: longest prompt; longer ones are left out; default 512, or what the context leaves.",
        unit="tokens",
        ge=1,
    )
    max_new_tokens: int = option(256, "grpo, ppo: longest answer.", unit="tokens", ge=1)
    temperature: float = option(1.0, "grpo, ppo: of the answers that are learned from.", gt=0, le=10)
    minibatches: int = option(1, "grpo, ppo: steps that the answers to one draw of prompts are split into.", ge=1)
    passes: int = option(1, "grpo, ppo: times that each answer is learned from; the first may be on-policy.", ge=1)
    clip_low: float = option(0.2, "grpo, ppo: how much less likely a token may get in one draw.", gt=0, lt=1)
    clip_high: float | None = option(
        None, "grpo, ppo: how much likelier; default clip_low, of dapo 0.28 (clip-higher).", gt=0, le=10
    )
    kl: float = option(
        0.0, "grpo, ppo: weight of the distance to the model it started as; ppo starts at this.", ge=0, le=10
    )
    kl_target: float | None = option(
        None, "ppo: nats an answer that the weight of KL is moved for; none: it stays as it is.", gt=0
    )
    overlong_margin: int = option(
        0, "grpo, ppo: answers are punished where fewer tokens than these are left to the longest.", unit="tokens", ge=0
    )
    missing_eos_penalty: float = option(0.0, "grpo, ppo: taken off the reward of an answer that was cut off.", ge=0)
    variant: Variant = option("grpo", "grpo: grpo, dapo, dr-grpo, rloo or reinforce++; sets the next three.")
    advantages: Literal["group", "batch", "mean", "others", "whitened"] | None = option(
        None,
        "grpo: a reward less its group's mean, over the deviation of the group or of the batch, or alone (mean), less "
        "the mean of the others, or whitened over the batch.",
    )
    aggregate: Literal["token", "sequence", "constant"] | None = option(
        None, "grpo: what weighs the same: a token, an answer, or a token by the longest answer (constant)."
    )
    resample: bool | None = option(
        None, "grpo: prompts whose answers are all rewarded alike teach nothing; draw others in their place."
    )
    curriculum: str = option("", "grpo, ppo: field of the rows by which the first pass goes from low to high.")
    heldout_prompts: int = option(64, "grpo, ppo: held-out prompts that are answered to measure.", ge=0)
    gamma: float = option(1.0, "ppo: discount a token.", gt=0, le=1)
    gae_lambda: float = option(0.95, "ppo: 0 trusts the critic, 1 the rewards (GAE).", ge=0, le=1)
    value_clip: float | None = option(0.2, "ppo: how far a value may move in one draw; none: as far as it will.", gt=0)
    value_weight: float = option(0.1, "ppo: weight of the critic's loss.", ge=0)
    critic: Path | None = option(None, "ppo: reward model that the critic starts as; none: the model, with a new head.")

    def policy_problems(self, method: str) -> list[str]:
        """What cannot be right between these options."""
        found = []
        if not self.reward:
            found.append(f"reward: {method} needs something that judges answers, such as --reward python-parses")
        if method == "grpo" and self.group_size < 2:
            found.append("group_size: grpo compares answers to one prompt; it needs at least 2")
        if self.prompts_per_step * self.group_size < self.minibatches:
            found.append(f"minibatches ({self.minibatches}) are more than the answers of a step")
        if self.overlong_margin > self.max_new_tokens:
            found.append(f"overlong_margin ({self.overlong_margin}) is more than max_new_tokens")
        if self.kl_target is not None and not self.kl:
            found.append("kl_target moves the weight kl, which is 0; give kl a start such as 0.05")
        return found

    def settings(self) -> dict[str, Any]:
        """The variant's settings, with those that were given in their place."""
        given = {name: getattr(self, name) for name in VARIANTS[self.variant]}
        return {
            name: default if given[name] is None else given[name] for name, default in VARIANTS[self.variant].items()
        }


POLICY_ONLY: Final = tuple(PolicyOptions.__dataclass_fields__)
"""Options that mean nothing to methods that learn from given answers."""

PPO_ONLY: Final = ("kl_target", "gamma", "gae_lambda", "value_clip", "value_weight", "critic")
GRPO_ONLY: Final = ("variant", "advantages", "aggregate", "resample")
