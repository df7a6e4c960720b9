"""What /v1/completions takes and gives."""

from __future__ import annotations

import dataclasses
from typing import Final, Literal

from pydantic import Field

from danlu.engine.config import SamplingParams
from danlu.server.api.inputs import Inputs, ModelName, as_list, is_single
from danlu.server.api.sampling_fields import MOST_TOKENS, SamplingFields, StreamOptions
from danlu.server.errors import ApiError
from danlu.server.protocol import TextPrompt, TokenPrompt
from danlu.server.schema import Reply, Text

MOST_PROMPTS: Final = 128
DEFAULT_MAX_TOKENS: Final = 16
"""As OpenAI has it."""


class CompletionRequest(SamplingFields):
    """Texts to continue."""

    model: ModelName | None = Field(None, description="The first one served, if none is named.")
    prompt: Inputs | None = Field(
        None, description=f"Up to {MOST_PROMPTS} texts or lists of token ids. None: the start of a document."
    )
    suffix: Text | None = Field(None, description="What follows the gap to be filled; for models with tokens for that.")
    max_tokens: int | None = Field(
        None, ge=0, le=MOST_TOKENS, description=f"Default: {DEFAULT_MAX_TOKENS}. 0 writes nothing: only with echo."
    )
    logprobs: int | None = Field(
        None, ge=0, le=20, description="Log probabilities, with so many of the most likely tokens."
    )
    echo: bool | None = Field(None, description="The prompt is given back in front of the answer.")
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    user: str | None = Field(None, max_length=512, description="Accepted, and of no effect.")


class CompletionLogprobs(Reply):
    """An entry for each token. One that is no text by itself is told as ``bytes:\\xe4``; offsets count characters of
    the choice's text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Reply):
    """One answer. Those to the first prompt come first."""

    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class PromptTokensDetails(Reply):
    """Tokens of the prompt that were in the cache."""

    cached_tokens: int


class CompletionUsage(Reply):
    """Tokens of all prompts and all answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Completion(Reply):
    """Answers; in a stream, a part of them."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage | None = None


def prompts_of(body: CompletionRequest) -> list[tuple[str, TextPrompt | TokenPrompt]]:
    """Each prompt, and the field that holds it.

    Raises:
        ApiError: there are too many, one is empty, or it cannot have a suffix.
    """
    if body.suffix and body.echo:
        raise refused("echo", "a gap that is filled has text on both sides; leave out echo or suffix")
    given = [] if body.prompt is None else as_list(body.prompt)
    if len(given) > MOST_PROMPTS:
        raise refused("prompt", f"has {len(given)} texts; at most {MOST_PROMPTS} are answered together")
    prompts: list[tuple[str, TextPrompt | TokenPrompt]] = []
    for number, one in enumerate(given):
        where = "prompt" if body.prompt is None or is_single(body.prompt) else f"prompt.{number}"
        if body.suffix and not isinstance(one, str):
            raise refused("suffix", "goes with a prompt that is text, not token ids")
        if not one and not body.suffix:
            raise refused(where, "is empty; leave it out to begin a document")
        prompts.append((where, TextPrompt(one, body.suffix or None) if isinstance(one, str) else TokenPrompt(one)))
    return prompts or [("prompt", TextPrompt("", body.suffix or None))]


def params_of(body: CompletionRequest) -> SamplingParams:
    """How the answers are sampled.

    Raises:
        ApiError: fields contradict each other.
    """
    if body.stream_options is not None and not body.stream:
        raise refused("stream_options", "is only for streams; set stream, or leave it out")
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise refused("max_tokens", "is 0, and without echo there would be nothing to tell")
    params = body.params(
        max_new_tokens=max(1, max_tokens),
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    if body.echo and body.logprobs is not None and max_tokens == 1 and params.structure is None:
        # Who scores texts asks for one token and leaves away the last entry: there has to be one, even if it is a
        # stop token, which is no part of an answer.
        return dataclasses.replace(params, ignore_eos=True)
    return params


def refused(field: str, reason: str) -> ApiError:
    """An error that names the field."""
    return ApiError(400, f"{field}: {reason}", param=field, code="invalid_value")
