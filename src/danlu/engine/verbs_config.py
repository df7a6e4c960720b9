"""Options of `danlu generate` and `danlu chat`: how the engine runs, how tokens are chosen, and what is asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from danlu.config import REQUIRED, option
from danlu.engine.config import SamplingParams
from danlu.engine.engine_config import EngineConfig

MODEL_HELP = "Model folder or GGUF file, or what `danlu pull` knows by name, such as smollm2."


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(EngineConfig, SamplingParams):
    """What `danlu generate` takes."""

    model: Path = option(REQUIRED, MODEL_HELP, positional=True)
    prompt: str | None = option(
        None, "Text to continue; without it the text is read from standard input.", positional=True
    )
    prompts_file: Path | None = option(
        None,
        'File with one JSON text, or {"prompt": text}, a line; the answers come out as JSON lines in the same order.',
    )
    json: bool = option(
        False, "Print a JSON object with the answer, its tokens and why it ended, in place of streamed text."
    )
    temperature: float = option(0.8, "Divides the logits; 0 is greedy: always the most likely token.", ge=0, le=100)

    def problems(self) -> list[str]:
        """Those of the parts; also, there is one source of prompts."""
        both = self.prompt is not None and self.prompts_file is not None
        own = ["prompt and prompts_file are both given; choose one"] if both else []
        return EngineConfig.problems(self) + SamplingParams.problems(self) + own


@dataclass(frozen=True, kw_only=True)
class ChatConfig(EngineConfig, SamplingParams):
    """What `danlu chat` takes."""

    model: Path = option(REQUIRED, MODEL_HELP, positional=True)
    system: str | None = option(None, "System message that opens the conversation.")
    max_new_tokens: int = option(512, "Longest answer.", unit="tokens", ge=1)
    temperature: float = option(0.7, "Divides the logits; 0 is greedy: always the most likely token.", ge=0, le=100)
    top_p: float = option(
        0.95, "Keep the fewest most likely tokens whose probabilities sum to p; 1 keeps all.", gt=0, le=1
    )

    def problems(self) -> list[str]:
        """Those of the parts; also, a conversation has one answer at a time."""
        own = ["n: a conversation has one answer at a time; leave it out"] if self.n > 1 else []
        return EngineConfig.problems(self) + SamplingParams.problems(self) + own
