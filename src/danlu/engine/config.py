"""Options of `danlu generate` and `danlu chat`, and how the next token is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from danlu.config import REQUIRED, option

Precision = Literal["auto", "fp32", "bf16", "fp16"]

DEVICE_HELP = "Where the model runs: auto, cpu, cuda or cuda:N."
PRECISION_HELP = "Dtype of weights and cache; auto: bf16 where the hardware computes it, else fp32."


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is decoded. The defaults leave the model's own distribution as it is."""

    max_new_tokens: int = option(256, "Stop after this many new tokens.", unit="tokens", ge=1)
    temperature: float = option(1.0, "Divides the logits; 0 is greedy: always the most likely token.", ge=0, le=100)
    top_k: int = option(0, "Keep only the k most likely tokens; 0 keeps all.", ge=0)
    top_p: float = option(
        1.0, "Keep the fewest most likely tokens whose probabilities sum to p; 1 keeps all.", gt=0, le=1
    )
    min_p: float = option(
        0.0, "Drop tokens less likely than this share of the most likely one; 0 keeps all.", ge=0, le=1
    )
    repetition_penalty: float = option(
        1.0, "Divides positive and multiplies negative logits of tokens in prompt or answer; 1 is off.", ge=0.01, le=100
    )
    frequency_penalty: float = option(0.0, "Taken off a token's logit each time the answer used it.", ge=-2, le=2)
    presence_penalty: float = option(0.0, "Taken off a token's logit once the answer has used it.", ge=-2, le=2)
    seed: int | None = option(None, "Makes sampling repeatable; none draws a new seed each time.", ge=0, lt=2**63)
    stop: tuple[str, ...] = option((), "Texts that end the answer; they are not part of it.")

    def problems(self) -> list[str]:
        """What no bound of a single field can tell."""
        return ["stop: an empty text would stop at once; leave it out"] if "" in self.stop else []


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingParams):
    """What `danlu generate` takes."""

    model: Path = option(REQUIRED, "Model folder.", positional=True)
    prompt: str | None = option(None, "Text to continue; without it the text is read from standard input.")
    prompts_file: Path | None = option(
        None,
        'File with one JSON text, or {"prompt": text}, a line; the answers come out as JSON lines in the same order.',
    )
    json: bool = option(
        False, "Print a JSON object with the answer, its tokens and why it ended, in place of streamed text."
    )
    batch_size: int = option(32, "Prompts of a file that are decoded together.", ge=1)
    temperature: float = option(0.8, "Divides the logits; 0 is greedy: always the most likely token.", ge=0, le=100)
    device: str = option("auto", DEVICE_HELP)
    precision: Precision = option("auto", PRECISION_HELP)

    def problems(self) -> list[str]:
        """As in :class:`SamplingParams`; also, there is one source of prompts."""
        both = self.prompt is not None and self.prompts_file is not None
        return super().problems() + (["prompt and prompts_file are both given; choose one"] if both else [])


@dataclass(frozen=True, kw_only=True)
class ChatConfig(SamplingParams):
    """What `danlu chat` takes."""

    model: Path = option(REQUIRED, "Model folder.", positional=True)
    system: str | None = option(None, "System message that opens the conversation.")
    max_new_tokens: int = option(512, "Longest answer.", unit="tokens", ge=1)
    temperature: float = option(0.7, "Divides the logits; 0 is greedy: always the most likely token.", ge=0, le=100)
    top_p: float = option(
        0.95, "Keep the fewest most likely tokens whose probabilities sum to p; 1 keeps all.", gt=0, le=1
    )
    device: str = option("auto", DEVICE_HELP)
    precision: Precision = option("auto", PRECISION_HELP)
