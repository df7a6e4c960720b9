"""Batch generation with a KV cache, and text that can be shown while it is made."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from danlu.config import validate
from danlu.engine.sampling import Sampler, SamplingParams
from danlu.errors import DanluError
from danlu.models.causal_lm import CausalLM
from danlu.nn.kv_cache import KVCache

if TYPE_CHECKING:
    from danlu.tokenizer.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]
Prompt = str | Sequence[int]

PREFILL_TOKENS = 512  # prompt positions run at once: bounds the memory that attention masks and activations take


@dataclass(frozen=True)
class Completion:
    """An answer. ``token_ids`` leaves out the stop token, but not the tokens of a stop string, which ``text`` does.

    ``finish_reason`` is "stop" (a stop token or a stop string) or "length" (`max_new_tokens`, or the context is full).
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason


class Decoder:
    """A batch of rows that advance one token at a time; rows may leave at any step.

    Args:
        prompts: token ids of each row, none empty.
        params: one for each row.

    Raises:
        DanluError: a prompt is empty, has ids the model does not know, or leaves no room in the context for an answer.
    """

    def __init__(self, model: CausalLM, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> None:
        context, vocab_size = model.config.context, model.config.vocab_size
        for number, prompt in enumerate(prompts):
            which = f"prompt {number + 1}" if len(prompts) > 1 else "the prompt"
            if not prompt:
                raise DanluError(f"{which}: is empty; start it with the tokenizer's bos_id")
            if len(prompt) >= context:
                raise DanluError(
                    f"{which}: has {len(prompt)} tokens, the model's context {context}, answer included; shorten it"
                )
            if not 0 <= min(prompt) <= max(prompt) < vocab_size:
                raise DanluError(
                    f"{which}: has token ids outside the model's vocabulary of {vocab_size}; use the model's tokenizer"
                )
        self.model = model
        self.rows = list(range(len(prompts)))
        """The rows still running, as indices into ``prompts``."""
        self.left = [min(p.max_new_tokens, context - len(prompt)) for prompt, p in zip(prompts, params, strict=True)]
        """Tokens that each running row may still get."""
        longest = max(map(len, prompts))
        left_pad_b = torch.tensor([longest - len(prompt) for prompt in prompts])
        self._input_bt = torch.tensor(
            [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=model.device
        )
        self._cache = KVCache(
            model.config,
            len(prompts),
            longest + max(self.left),
            device=model.device,
            dtype=model.compute_dtype or model.embed.weight.dtype,
            left_pad_b=left_pad_b,
        )
        self._sampler = Sampler(params, prompts, vocab_size, model.device)

    @torch.inference_mode()
    def step(self) -> list[int]:
        """The next token of each running row. A row whose ``left`` reaches 0 must leave before the next step."""
        for piece_bt in torch.split(self._input_bt, PREFILL_TOKENS, dim=1):
            hidden_btd = self.model.hidden_states(piece_bt, cache=self._cache)
        ids_b: Tensor = self._sampler(
            self.model.head(hidden_btd[:, -1])
        )  # the head is wide: only the last position needs it
        self._input_bt = ids_b[:, None]
        self.left = [n - 1 for n in self.left]
        return ids_b.tolist()

    @torch.inference_mode()
    def keep(self, places: Sequence[int]) -> None:
        """Let all rows leave but those at these places of ``rows``."""
        index = torch.tensor(places, dtype=torch.long, device=self.model.device)
        self.rows = [self.rows[place] for place in places]
        self.left = [self.left[place] for place in places]
        self._input_bt = self._input_bt[index]
        self._cache.select(index)
        self._sampler.select(places)


class TextStream:
    """Tokens in, text out, as early as it is certain.

    Held back are bytes that do not make a whole character yet (they are dropped if it never comes) and text that may
    turn out to be the start of a stop string. The text does not depend on how it is cut into tokens: it ends before the
    stop string that is complete first (of several that end at the same place: the longest). Special tokens are left
    out, but for those that structure an answer (thinking, tool calls), as in :meth:`Tokenizer.decode`.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._held = ""
        self.stopped = False
        """A stop string was found; nothing more will come."""

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is now certain (often empty)."""
        if self._tokenizer.is_special(token_id):
            return ""
        return self.push_bytes(self._tokenizer.decode_bytes([token_id]))

    def push_bytes(self, data: bytes) -> str:
        """Add the bytes of a token."""
        if self.stopped:
            return ""
        text = self._held + self._decode(data)
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """No more tokens: what was held back for a stop string that did not come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a start of ``stop`` (but not all of it)."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Token ids as they are, or text as the start of a document: behind the token that the family begins one with."""
    if not isinstance(prompt, str):
        return list(prompt)
    ids = tokenizer.encode(prompt)
    return [tokenizer.bos_id, *ids] if tokenizer.add_bos or not ids else ids


def generate_tokens(
    model: CausalLM, prompt: Sequence[int], params: SamplingParams, stop_ids: Sequence[int] = ()
) -> Iterator[int]:
    """Continue one prompt token by token, until a stop id (not yielded), `max_new_tokens` or the end of the context.

    Stop strings are for text: see :func:`stream_text`.

    Raises:
        DanluError: as :class:`Decoder`.
    """
    decoder = Decoder(model, [prompt], [validate(params)])
    while True:
        (token_id,) = decoder.step()
        if token_id in stop_ids:
            return
        yield token_id
        if decoder.left[0] == 0:
            return


def stream_text(model: CausalLM, tokenizer: Tokenizer, prompt: Prompt, params: SamplingParams) -> Iterator[str]:
    """Continue one prompt; yields text as soon as it is sure to be in the answer. Errors as :class:`Decoder`."""
    stream = TextStream(tokenizer, params.stop)
    for token_id in generate_tokens(model, prompt_ids(tokenizer, prompt), params, tokenizer.stop_ids):
        if text := stream.push(token_id):
            yield text
        if stream.stopped:
            return
    if text := stream.finish():
        yield text


def generate_text(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Continue prompts, many at a time.

    A completion depends on its own prompt and parameters alone, seed included: prompts that share a seed share their
    draws, so give each a seed of its own where samples should be independent.

    Args:
        prompts: texts (each the start of a document) or token ids.
        params: one for all, or one for each prompt.
        batch_size: rows decoded together; rows that finish leave the batch.
        progress: called with the number of prompts that have just been finished.

    Raises:
        DanluError: a prompt does not fit the model, or parameters are out of bounds.
    """
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    each = [validate(params)] * len(ids) if isinstance(params, SamplingParams) else [validate(p) for p in params]
    completions: dict[int, Completion] = {}
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # little padding in each batch
    for start in range(0, len(ids), batch_size):
        batch = by_length[start : start + batch_size]
        for row, completion in _generate_batch(model, tokenizer, [ids[i] for i in batch], [each[i] for i in batch]):
            completions[batch[row]] = completion
            if progress is not None:
                progress(1)
    return [completions[i] for i in range(len(ids))]


def _generate_batch(
    model: CausalLM, tokenizer: Tokenizer, prompts: list[list[int]], params: list[SamplingParams]
) -> Iterator[tuple[int, Completion]]:
    """(row, completion) in the order in which rows finish."""
    decoder = Decoder(model, prompts, params)
    streams = [TextStream(tokenizer, p.stop) for p in params]
    texts: list[list[str]] = [[] for _ in prompts]
    tokens: list[list[int]] = [[] for _ in prompts]
    stop_ids = frozenset(tokenizer.stop_ids)
    while decoder.rows:
        staying = []
        for place, (row, token_id) in enumerate(zip(decoder.rows, decoder.step(), strict=True)):
            stop_token = token_id in stop_ids
            if not stop_token:
                tokens[row].append(token_id)
                texts[row].append(streams[row].push(token_id))
            if stop_token or streams[row].stopped or decoder.left[place] == 0:
                reason: FinishReason = "stop" if stop_token or streams[row].stopped else "length"
                yield row, Completion("".join(texts[row]) + streams[row].finish(), tokens[row], reason)
            else:
                staying.append(place)
        if len(staying) < len(decoder.rows):
            decoder.keep(staying)
