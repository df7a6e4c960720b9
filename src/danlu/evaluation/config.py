"""Options of `danlu evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from danlu.config import REQUIRED, option

Task = Literal["bits_per_byte", "code", "compressors"]
PromptFormat = Literal["auto", "plain", "chat"]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What `danlu evaluate` takes. Model and data count by their content, wherever they lie."""

    model: Path = option(REQUIRED, "Model folder, GGUF file or name (smollm2).", positional=True, affects_result=False)
    data: Path = option(
        REQUIRED, "Data folder; its held-out documents are what the model is measured on.", affects_result=False
    )
    out: Path | None = option(None, "Folder for the results; none only prints them.", affects_result=False)
    tasks: tuple[Task, ...] = option(
        ("bits_per_byte", "code", "compressors"), "What to measure: bits_per_byte, code, compressors."
    )
    context: int | None = option(
        None,
        "Tokens the model sees at most while it is scored. None: the length it was trained on, or its context where "
        "danlu has not trained it.",
        unit="tokens",
        ge=1,
    )
    stride: int | None = option(
        None,
        "Tokens between windows over a long document; smaller is slower and kinder. None: half the context.",
        unit="tokens",
        ge=1,
    )
    functions: int = option(64, "Held-out functions whose bodies the model is asked to write.", ge=1)
    max_new_tokens: int = option(128, "Longest body.", unit="tokens", ge=1)
    temperature: float = option(0.6, "Sampling temperature of the bodies; 0 is greedy.", ge=0, le=100)
    prompt_format: PromptFormat = option(
        "auto",
        "plain: signature and docstring as source code; chat: the same as an instruction; auto: chat for models that "
        "danlu has taught to answer (finetune, align, distil).",
    )
    batch_size: int = option(64, "Functions written together.", ge=1, affects_result=False)
    seed: int = option(0, "Seed of the choice of functions and of sampling.", ge=0, lt=2**62)
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "Dtype of activations and products; auto: bf16 where the hardware computes it, else fp32."
    )
    overwrite: bool = option(False, "Replace another run in the output folder.", affects_result=False)

    def problems(self) -> list[str]:
        """What cannot be right between the options."""
        found = [] if self.tasks else ["tasks is empty; name at least one of bits_per_byte, code, compressors"]
        if self.context is not None and self.stride is not None and self.stride > self.context:
            found.append(f"stride ({self.stride}) is larger than context ({self.context}): tokens would be left out")
        return found
