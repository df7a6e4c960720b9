"""Answers of a model in memory, in one call: an engine that lives as long as the call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from danlu.config import validate
from danlu.engine.config import SamplingParams
from danlu.engine.engine import Engine
from danlu.engine.engine_config import EngineConfig
from danlu.engine.request import Completion, Event, FinishReason, Prompt, prompt_ids
from danlu.engine.torch_runner import Writer
from danlu.errors import DanluError
from danlu.models.encoder_decoder import EncoderDecoder

if TYPE_CHECKING:
    from danlu.tokenizer.tokenizer import Tokenizer

__all__ = ["Completion", "FinishReason", "Prompt", "generate_text", "generate_tokens", "prompt_ids", "stream_text"]

STEP_TOKENS = 512  # bounds the memory that attention and activations take


def generate_text(
    model: Writer,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Continue prompts, or answer them with an encoder-decoder, many at a time.

    A completion depends on its own prompt and parameters alone, seed included: prompts that share a seed share their
    draws, so give each a seed of its own where samples should be independent.

    Args:
        prompts: texts (each the start of a document; of encoder-decoders, what is to be answered) or token ids.
        params: one for all, or one for each prompt.
        batch_size: answers that are written at the same time.
        progress: called with the number of prompts that have just been finished.

    Raises:
        DanluError: a prompt does not fit the model, or parameters are out of bounds.
    """
    ids = [_ids(model, tokenizer, prompt) for prompt in prompts]
    each = [validate(params)] * len(ids) if isinstance(params, SamplingParams) else [validate(p) for p in params]
    if any(p.n > 1 for p in each):
        raise DanluError("n: there is one answer to each prompt here; leave it out, or take danlu.engine.engine.Engine")
    if not ids:
        return []
    with _engine(model, tokenizer, ids, each, batch_size) as engine:
        generations = engine.generate(ids, each, progress=progress)
    for generation in generations:
        if generation.error is not None:
            raise DanluError(generation.error)
    return [generation.completions[0] for generation in generations]


def stream_text(model: Writer, tokenizer: Tokenizer, prompt: Prompt, params: SamplingParams) -> Iterator[str]:
    """Continue one prompt; yields text as soon as it is sure to be in the answer. Errors as :func:`generate_text`."""
    for event in _stream(model, tokenizer, _ids(model, tokenizer, prompt), params):
        if event.text:
            yield event.text


def generate_tokens(
    model: Writer, prompt: Sequence[int], params: SamplingParams, stop_ids: Sequence[int] = ()
) -> Iterator[int]:
    """Continue one prompt token by token, until a stop id (not yielded), `max_new_tokens` or the end of the context.

    Raises:
        DanluError: as :func:`generate_text`; also, stop strings and structures are for text.
    """
    params = replace(params, stop_ids=(*params.stop_ids, *stop_ids))
    for event in _stream(model, None, list(prompt), params):
        yield from event.token_ids


def _ids(model: Writer, tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str) and isinstance(model, EncoderDecoder):
        return tokenizer.encode_for_encoder(prompt)[0]
    return prompt_ids(tokenizer, prompt)


def _stream(model: Writer, tokenizer: Tokenizer | None, ids: list[int], params: SamplingParams) -> Iterator[Event]:
    params = validate(params)
    if params.n > 1:
        raise DanluError("n: one answer is streamed; leave it out, or take danlu.engine.engine.Engine")
    with _engine(model, tokenizer, [ids], [params], 1) as engine:
        for event in engine.stream(ids, params):
            yield event
            if event.generation is not None and event.generation.error is not None:
                raise DanluError(event.generation.error)


def _engine(
    model: Writer,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    batch_size: int,
) -> Engine:
    """An engine with as large a cache as these prompts can use."""
    starts = [1 if isinstance(model, EncoderDecoder) else len(ids) for ids in prompts]
    longest = max(n + p.max_new_tokens for n, p in zip(starts, params, strict=False))
    answers = sum(p.best_of or p.beams for p in params)
    running = max(min(batch_size, answers), *(p.beams for p in params))
    config = EngineConfig(max_running=running, step_tokens=max(STEP_TOKENS, running), context=longest)
    return Engine(model, config, tokenizer)
