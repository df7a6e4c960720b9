"""Options of `danlu merge` and `danlu adapters diff`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from danlu.config import REQUIRED, option


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """What `danlu merge` takes."""

    base: Path = option(REQUIRED, "Model folder, GGUF file or name (smollm2) that the adapter is for.", positional=True)
    adapter: Path = option(REQUIRED, "Adapter folder in PEFT's layout.", positional=True)
    out: Path = option(REQUIRED, "Model folder to write.", affects_result=False)
    dtype: Literal["keep", "f32", "f16", "bf16"] = option(
        "keep", "Type of the weights; keep: that of most of the base's, fp32 for packed ones."
    )
    quantize: Literal["auto", "none", "4bit"] = option(
        "auto",
        "4bit: the adapter is added to the base as it is in 4 bits, unpacked; auto: where it was trained so. What is "
        "written is not packed.",
    )
    data: Path | None = option(
        None, "Data folder or file of texts on which the merged model is compared with the base and the adapter."
    )
    text_tokens: int = option(20_000, "Tokens of it that are read.", unit="tokens", ge=1)
    overwrite: bool = option(False, "Replace another result in the output folder.", affects_result=False)


@dataclass(frozen=True, kw_only=True)
class AdaptersDiffConfig:
    """What `danlu adapters diff` takes."""

    first: Path = option(REQUIRED, "Adapter folder in PEFT's layout.", positional=True)
    second: Path = option(REQUIRED, "Another.", positional=True)
    json: bool = option(False, "Print one JSON object instead of tables.")
