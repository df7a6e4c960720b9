"""What `danlu rank` takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from danlu.config import REQUIRED, option
from danlu.engine.engine_config import DEVICE_HELP, PRECISION_HELP, Precision
from danlu.posttraining.verifiers.config import SandboxOptions


@dataclass(frozen=True, kw_only=True)
class RankConfig(SandboxOptions):
    """Have a model answer prompts several times, and rank its answers by what judges them."""

    model: Path = option(REQUIRED, "Model folder, GGUF file or name (smollm2) that answers.", positional=True)
    data: Path = option(REQUIRED, "Prompts, as `danlu align --method grpo` reads them.")
    out: Path = option(
        REQUIRED, "Folder to make: train.jsonl and heldout.jsonl, for `danlu reward` and `align`.", affects_result=False
    )
    reward: tuple[str, ...] = option(
        (), "What an answer is worth: verifiers or model=FOLDER, each with a weight where it is not 1."
    )
    n: int = option(4, "Answers to each prompt.", ge=2, le=128)
    limit: int | None = option(None, "Only so many prompts to learn from, drawn with the seed.", ge=1)
    heldout_limit: int | None = option(None, "Only so many held-out prompts.", ge=1)
    max_prompt: int | None = option(
        None, "Longest prompt; longer ones are left out; default 512, or what the context leaves.", unit="tokens", ge=1
    )
    max_new_tokens: int = option(256, "Longest answer.", unit="tokens", ge=1)
    temperature: float = option(1.0, "Of the answers.", gt=0, le=10)
    heldout: Path | None = option(None, "File of held-out prompts; else as the data are split, else a share of them.")
    heldout_share: float = option(0.1, "Share of the prompts held out, by a hash.", ge=0, lt=1)
    on_error: Literal["stop", "skip"] = option("stop", "At a broken row: stop, or skip it and count.")
    seed: int = option(0, "Seed of the answers and of the choice of prompts.", ge=0, lt=2**62)
    max_running: int = option(128, "Answers that are written at once.", ge=1, affects_result=False)
    device: str = option("auto", DEVICE_HELP)
    precision: Precision = option("auto", PRECISION_HELP)
    overwrite: bool = option(False, "Replace the folder when it holds another result.", affects_result=False)

    def problems(self) -> list[str]:
        """What no bound of a single field can tell."""
        return [] if self.reward else ["reward: nothing judges the answers; give some, such as --reward python-parses"]
