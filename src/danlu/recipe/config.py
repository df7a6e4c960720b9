"""Options of `danlu run` and `danlu quickstart`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from danlu.config import REQUIRED, option


@dataclass(frozen=True)
class RunConfig:
    """What `danlu run` takes."""

    recipe: Path = option(
        REQUIRED,
        "Recipe file (YAML) with `vars` and `stages`, or the name of one that comes with danlu: quickstart, reasoning, "
        "distil-classify.",
        positional=True,
    )
    overrides: tuple[str, ...] = option((), "Values for the recipe's vars, as name=value.", positional=True)
    until: str | None = option(None, "Stop after the stage of this name.")


@dataclass(frozen=True)
class QuickstartConfig:
    """What `danlu quickstart` takes; the fields are the vars of `recipes/quickstart.yaml`."""

    out: Path = option(Path("danlu-quickstart"), "Folder for everything that is made.")
    corpus: tuple[str, ...] = option(
        ("stdlib",),
        "What to learn from: files, folders, globs, or `stdlib`, the Python standard library's source.",
        positional=True,
    )
    vocab_size: int = option(4096, "Size of the vocabulary.", unit="tokens", ge=300)
    size: int | None = option(
        None,
        "The dial: number of layers; the width is 64 times it. Default 4 where the CPU computes bf16, 3 elsewhere.",
        unit="layers",
        ge=1,
        le=128,
    )
    pretrain_minutes: float = option(2.75, "Time for pre-training.", unit="minutes", gt=0)
    finetune_minutes: float = option(1.0, "Time for fine-tuning.", unit="minutes", gt=0)
    ranked_prompts: int = option(128, "Prompts whose answers are ranked for the reward model.", ge=8)
    policy_steps: int = option(14, "Steps of learning from its own answers, for PPO and for GRPO.", ge=1)
    student_dim: int | None = option(None, "Width of the student at the end. Default: half of its teacher's.", ge=8)
    student_minutes: float = option(0.5, "Time for distillation.", unit="minutes", gt=0)
    functions: int = option(64, "Held-out functions that each stage is asked to write.", ge=1)
    compile: Literal["auto", "always", "never"] = option("auto", "torch.compile; auto: where it pays.")
    seed: int = option(0, "Seed of the split, the weights and the order of the data.", ge=0, lt=2**62)
