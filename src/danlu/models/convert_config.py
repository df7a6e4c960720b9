"""Options of `danlu convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from danlu.config import REQUIRED, option

Target = Literal["auto", "hf", "gguf"]
Dtype = Literal["keep", "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q4_k"]


@dataclass(frozen=True)
class ConvertConfig:
    """What `danlu convert` takes."""

    source: Path = option(REQUIRED, "Model folder, GGUF file or name (smollm2).", positional=True)
    out: Path = option(REQUIRED, "GGUF file, or model folder, to write.", positional=True, affects_result=False)
    to: Target = option(
        "auto", "hf: a folder in the Hugging Face layout; gguf: one file; auto: gguf if the output ends in .gguf."
    )
    dtype: Dtype = option(
        "keep", "Type of the weights. keep: as stored; what is quantized becomes f32 in a folder. q*: in GGUF only."
    )
    shard_size: float = option(5.0, "Most bytes of tensors in one file of a folder.", unit="GB", gt=0)
    overwrite: bool = option(False, "Replace another result at the output.", affects_result=False)

    @property
    def to_gguf(self) -> bool:
        """Whether a GGUF file is asked for."""
        return self.to == "gguf" or (self.to == "auto" and self.out.suffix == ".gguf")

    def problems(self) -> list[str]:
        """What no bound of a single field can tell."""
        found = []
        if self.to_gguf and self.out.suffix != ".gguf":
            found.append(f"out: {self.out} must end in .gguf")
        if not self.to_gguf and self.out.suffix == ".gguf":
            found.append(f"out: {self.out} is the name of a GGUF file; with to=hf give a folder")
        if not self.to_gguf and self.dtype.startswith("q"):
            found.append(f"dtype: {self.dtype} exists in GGUF files only; choose f32, f16 or bf16")
        return found
