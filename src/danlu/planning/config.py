"""Options of `danlu numbers` and `danlu plan`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from danlu.config import REQUIRED, option


@dataclass(frozen=True, kw_only=True)
class NumbersConfig:
    """What `danlu numbers` takes."""

    number: str = option(
        REQUIRED, "A decimal number, a fraction such as 1/3, inf or nan. A negative one goes behind dashes: -- -0.1.",
        positional=True,
    )  # fmt: skip
    absmax: float = option(
        1.0,
        "Largest magnitude among the numbers that are quantized together; it sets the scale of INT8 and INT4. "
        "A larger number sets it itself.",
        gt=0,
    )
    json: bool = option(False, "Print JSON instead of a table.")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What `danlu plan` takes."""

    model: str = option(
        REQUIRED,
        "Model folder, GGUF file, name (smollm2), or a size such as 7B (in the shape of Llama).",
        positional=True,
    )
    context: int = option(4096, "Tokens in the key-value cache, and in a training sequence.", unit="tokens", ge=1)
    batch: int = option(1, "Sequences at a time.", ge=1)
    optimizer: Literal["adamw", "muon"] = option("adamw", "Optimizer of full training; adapters use AdamW.")
    gradient_checkpointing: bool = option(False, "Keep only the input of each block, and compute the rest again.")
    lora_rank: int = option(16, "Rank of the adapters.", ge=1)
    tokens: float = option(1e9, "Training tokens for the time estimate.", unit="tokens", gt=0)
    json: bool = option(False, "Print JSON instead of tables.")
