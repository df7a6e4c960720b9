"""What the server and the process of a model say to each other: JSON objects, each behind its length.

The server asks with ``{"id": n, "op": name, ...}``. It is answered with ``{"id": n, "result": ...}`` or
``{"id": n, "error": message, "user": whether the asker is to blame}``; a generation then goes on with
``{"pieces": [...], "stats": {...}}``, in which each piece tells its id. The first message of all is a result with the
model's :class:`ModelInfo` (or an error), of id 0.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from danlu.engine.config import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]
Kind = Literal["generate", "embed", "rank"]
ToolFormat = Literal["hermes", "llama3", "mistral"]

HEADER = struct.Struct("<I")
LONGEST = 1 << 30
"""Bytes of a message; more is no message."""


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation, in OpenAI's messages, whose next turn is asked for.

    Attributes:
        continue_last: the last message is the beginning of the answer.
        generation_prompt: what opens the answer is added.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    continue_last: bool = False
    generation_prompt: bool = True


@dataclass(frozen=True)
class TextPrompt:
    """Text to continue, or with a suffix: to fill the gap before it.

    Attributes:
        special_tokens: with those that the model has round a text.
    """

    text: str
    suffix: str | None = None
    special_tokens: bool = True


@dataclass(frozen=True)
class TokenPrompt:
    """Token ids to continue."""

    ids: list[int]


Prompt = ChatPrompt | TextPrompt | TokenPrompt
_PROMPTS: dict[str, type[Any]] = {"chat": ChatPrompt, "text": TextPrompt, "tokens": TokenPrompt}


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its bytes and log probability; the most likely ones in its place, most likely first."""

    token_id: int
    text: bytes
    logprob: float
    top: list[tuple[int, bytes, float]]


@dataclass(frozen=True)
class Piece:
    """What has become certain of one answer. The last one of an answer has a finish_reason, and stop_text where a stop
    string ended it."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_text: str | None = None


@dataclass(frozen=True)
class ModelInfo:
    """What the server knows of a model.

    Attributes:
        kind: "generate": a language model; "embed": texts to vectors; "rank": pairs of texts to scores.
        context: tokens that prompt and answer can have together.
        dim: of an embedding.
        chat: it has a chat template.
        fills_middle: its tokenizer has the tokens for filling gaps.
        thinks: its template knows about reasoning.
        template_has_tools: its template writes tools itself.
        template_options: variables of the template that switch reasoning (enable_thinking, reasoning_effort, ...).
        tool_format: how it writes calls.
        kernels: what computes it.
    """

    name: str
    kind: Kind
    context: int
    vocab_size: int
    dim: int
    chat: bool = False
    fills_middle: bool = False
    thinks: bool = False
    template_has_tools: bool = False
    template_options: tuple[str, ...] = ()
    tool_format: ToolFormat = "hermes"
    kernels: str = ""


def pack(message: dict[str, Any]) -> bytes:
    """A message as it is sent."""
    body = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode()
    return HEADER.pack(len(body)) + body


def pack_prompt(prompt: Prompt) -> dict[str, Any]:
    """A prompt as JSON."""
    kind = next(name for name, one in _PROMPTS.items() if isinstance(prompt, one))
    return {"kind": kind} | {f.name: getattr(prompt, f.name) for f in dataclasses.fields(prompt)}


def unpack_prompt(packed: dict[str, Any]) -> Prompt:
    """The prompt of :func:`pack_prompt`."""
    prompt: Prompt = _PROMPTS[packed["kind"]](**{name: value for name, value in packed.items() if name != "kind"})
    return prompt


def pack_params(params: SamplingParams) -> dict[str, Any]:
    """What differs from the defaults."""
    packed = {}
    for one in dataclasses.fields(params):
        value = getattr(params, one.name)
        if one.name == "logit_bias":
            value = list(value.items())  # JSON has no keys that are numbers
        if value != getattr(_DEFAULTS, one.name) and value != []:
            packed[one.name] = value
    return packed


def unpack_params(packed: dict[str, Any]) -> SamplingParams:
    """The parameters of :func:`pack_params`."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in packed.items()
    }
    if "logit_bias" in packed:
        values["logit_bias"] = dict(packed["logit_bias"])
    return SamplingParams(**values)


_DEFAULTS = SamplingParams()


def pack_logprobs(logprobs: Sequence[TokenLogprob | None]) -> list[Any]:
    """Log probabilities as JSON; bytes are spelled as the first 256 characters."""
    return [
        None
        if one is None
        else [
            one.token_id,
            one.text.decode("latin-1"),
            one.logprob,
            [[i, t.decode("latin-1"), p] for i, t, p in one.top],
        ]
        for one in logprobs
    ]


def unpack_logprobs(packed: list[Any]) -> list[TokenLogprob | None]:
    """The log probabilities of :func:`pack_logprobs`."""
    return [
        None
        if one is None
        else TokenLogprob(one[0], one[1].encode("latin-1"), one[2], [(i, t.encode("latin-1"), p) for i, t, p in one[3]])
        for one in packed
    ]
