"""Options of `danlu inspect`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from danlu.config import REQUIRED, option


@dataclass(frozen=True)
class InspectConfig:
    """What `danlu inspect` takes."""

    path: Path = option(REQUIRED, "Model folder, .safetensors or .gguf file, or a name (smollm2).", positional=True)
    context: int | None = option(
        None, "Context length that the KV cache is told for; by default the model's own.", unit="tokens", ge=1, le=2**31
    )
    tensors: int | Literal["all"] = option(10, "How many tensors to list, in the order of the file, or all.", ge=0)
    json: bool = option(False, "Print JSON instead of tables.")
