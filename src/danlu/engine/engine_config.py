"""Options of the engine: how much it holds and runs at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from danlu.config import option

Precision = Literal["auto", "fp32", "bf16", "fp16"]

DEVICE_HELP = "Where the model runs: auto, cpu, cuda or cuda:N."
PRECISION_HELP = "Dtype of weights and cache; auto: bf16 where the hardware computes it, else fp32."
KVDtype = Literal["auto", "fp32", "bf16", "fp16", "int8"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an :class:`~danlu.engine.engine.Engine` runs its requests. None of it changes an answer."""

    max_running: int = option(64, "Answers that are written at the same time; others wait.", ge=1)
    step_tokens: int = option(
        512, "Tokens a step runs at most: less keeps running answers smoother, more reads prompts faster.", ge=1
    )
    context: int | None = option(
        None,
        "Longest prompt and answer together, or answer of an encoder-decoder; none: the model's.",
        unit="tokens",
        ge=2,
    )
    kv_memory: int | None = option(
        None, "Memory of the KV cache; none: kv_share of what there is, or less if that is enough.", unit="MiB", ge=1
    )
    kv_share: float = option(
        0.3, "Share of the machine's memory (of a GPU: of what is free) that the KV cache may take.", gt=0, lt=1
    )
    kv_reserve: bool = option(False, "Take the memory of the KV cache at once, not as it fills.")
    kv_dtype: KVDtype = option("auto", "Dtype of keys and values; auto: that of the activations.")
    block_size: int = option(16, "Tokens of a block of the KV cache.", unit="tokens", ge=1, le=1024)
    prefix_cache: bool = option(True, "Keep what was computed for prompts that begin alike.")
    draft: Literal["none", "ngram"] = option(
        "none", "Guess tokens, to check several in one step: ngram copies from what the text has said before."
    )
    draft_model: Path | None = option(None, "Folder of a small model with the same tokenizer, which guesses tokens.")
    draft_tokens: int = option(16, "Tokens guessed at once, at most.", unit="tokens", ge=1, le=256)
    kernels: Literal["auto", "native", "torch"] = option(
        "auto", "What computes on a CPU: native (danlu's own), torch; auto: native where they cover the model."
    )
    weights: Literal["stored", "int8", "int4"] = option(
        "stored", "Matrices of floats are kept as they are stored, or packed into 8 or 4 bits (native kernels only)."
    )
    threads: int | None = option(None, "Threads of the native kernels; none: as many as torch has.", ge=1, le=1024)
    device: str = option("auto", DEVICE_HELP)
    precision: Precision = option(
        "auto",
        "Dtype of weights and activations; auto: weights as they are stored with native kernels, else bf16 where the "
        "hardware computes it, else fp32.",
    )

    def problems(self) -> list[str]:
        """What no bound of a single field can tell."""
        found = []
        if self.step_tokens < self.max_running:
            found.append(
                f"step_tokens ({self.step_tokens}) is less than max_running ({self.max_running}): "
                "each running answer needs one token a step"
            )
        if self.draft_model is not None and self.draft != "none":
            found.append("draft and draft_model are both given; choose one")
        return found
