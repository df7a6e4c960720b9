"""A request on its way through the engine, and what comes out of it."""

from __future__ import annotations

import operator
import time
from collections.abc import Hashable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from danlu.engine.batch import Source
from danlu.engine.blocks import BlockTable
from danlu.engine.config import SamplingParams
from danlu.engine.text_stream import TextStream
from danlu.errors import DanluError

if TYPE_CHECKING:
    from danlu.engine.beam import BeamSearch
    from danlu.engine.drafts import Drafter
    from danlu.engine.logit_rules import SequenceSampler
    from danlu.engine.logprobs import Sampled, TokenLogprobs
    from danlu.tokenizer.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "abort", "error"]
Prompt = str | Items[int]

Task = Literal["generate", "score", "embed"]

COUNTS = ("prompt_tokens", "cached_tokens", "new_tokens", "preemptions", "drafted", "accepted")
"""What is counted of requests and of the whole engine."""

GOLDEN = 0x9E3779B97F4A7C15
"""Steps of this size, 2^64 by the golden ratio, keep seeds far apart."""


@dataclass(frozen=True)
class Completion:
    """An answer. ``token_ids`` leaves out the stop token, but not the tokens of a stop string, which ``text`` does.

    ``finish_reason`` is "stop" (a stop token, a stop string, or a grammar that is complete), "length"
    (`max_new_tokens`, or the context is full), "abort" or "error". ``logprobs`` has an entry for each of ``token_ids``
    where they were asked for. ``stop_text`` is the stop string that ended it, ``stop_token`` the stop token.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None = None
    stop_text: str | None = None
    stop_token: Sampled | None = None


@dataclass(frozen=True)
class RequestStats:
    """What a request cost. Seconds count from its submission; None: it never came so far.

    Attributes:
        prompt_tokens: an encoder-decoder's are those of its source.
        cached_tokens: tokens of the prompt that were in the cache when it was first begun.
        new_tokens: tokens of all its sequences, stop tokens included.
        preemptions: how often one of its sequences had to give up its blocks and was computed again.
        drafted, accepted: guessed tokens, and those of them that were right.
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    preemptions: int
    drafted: int
    accepted: int
    queued_seconds: float | None
    first_token_seconds: float | None
    total_seconds: float


@dataclass(frozen=True)
class Generation:
    """All answers to one prompt: `n` of them, the best first where `best_of` or `beams` chose among more.

    Attributes:
        prompt_ids: of the prompt as it was given, also where the encoder has read it.
        prompt_logprobs: an entry for each token of the prompt, None for the first, where they were asked for.
        embedding: (dim,) fp32, of a text that was to be embedded.
        error: why the answers end with "error".
    """

    prompt_ids: list[int]
    completions: list[Completion]
    stats: RequestStats
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    error: str | None = None
    embedding: Tensor | None = None


@dataclass(frozen=True)
class Event:
    """News of one answer: what has become certain of it since the last one.

    Attributes:
        index: which of the request's `n` answers.
        stop_text: the stop string that ended it.
        generation: on the last event of a request, all of it.
    """

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None
    generation: Generation | None = None
    stop_text: str | None = None


@dataclass(eq=False, slots=True)
class Sequence:
    """One line of tokens: the prompt, and an answer that grows.

    Attributes:
        n_computed: how many of the tokens have their keys and values in the cache.
        table: where; None while the sequence waits.
        unit: what it is scheduled with.
        sampler: how its next token is chosen; only answers have one.
        logprob: sum of the answer's log probabilities, where they were asked for.
    """

    request: Request
    index: int
    token_ids: list[int]
    stream: TextStream | None = None
    n_computed: int = 0
    table: BlockTable | None = None
    drafter: Drafter | None = None
    finish_reason: FinishReason | None = None
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    logprob: float = 0.0
    n_chosen: int = 0
    stop_token: Sampled | None = None
    unit: Unit = field(init=False)
    sampler: SequenceSampler = field(init=False)

    @property
    def answer_ids(self) -> list[int]:
        return self.token_ids[len(self.request.prompt_ids) :]

    def completion(self) -> Completion:
        """What the sequence has come to."""
        assert self.finish_reason is not None
        logprobs = self.logprobs if self.request.params.logprobs is not None else None
        text = "".join(self.text)
        return Completion(text, self.answer_ids, self.finish_reason, logprobs, self.stop_text, self.stop_token)

    @property
    def stop_text(self) -> str | None:
        """The stop string that ended it."""
        return None if self.stream is None else self.stream.stop_text

    @property
    def mean_logprob(self) -> float:
        """What `best_of` compares, stop token included."""
        return self.logprob / max(1, self.n_chosen)


@dataclass(eq=False, slots=True)
class Unit:
    """What is scheduled and preempted as a whole: one sequence, or all beams of a search."""

    request: Request
    sequences: list[Sequence]


@dataclass(eq=False, slots=True)
class Request:
    """What was submitted, and how far it has come.

    Attributes:
        prompt_ids: what its sequences begin with; of an encoder-decoder, the decoder's start token.
        source: what the encoder reads, of encoder-decoders only: the prompt as it was given.
        max_len: tokens that a sequence may grow to, the prompt included.
        salt: what its cache depends on beside the tokens.
        observes: whether all positions of the prompt are looked at, not only the last: for log probabilities or a mean.
        observed: how many of them have been.
        pooled: sum (or last) of the hidden states, of a request that is embedded.
        completions: those that are done, by index.
    """

    id: str
    prompt_ids: list[int]
    params: SamplingParams
    task: Task
    seed: int
    max_len: int
    salt: Hashable
    source: Source | None = None
    adapter: str | None = None
    observes: bool = False
    observed: int = 0
    pooled: Tensor | None = None
    units: list[Unit] = field(default_factory=list)
    search: BeamSearch | None = None
    finished: list[Sequence] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    cached_tokens: int | None = None
    preemptions: int = 0
    drafted: int = 0
    accepted: int = 0
    new_tokens: int = 0
    submitted_at: float = field(default_factory=time.perf_counter)
    begun_at: float | None = None
    first_token_at: float | None = None

    @property
    def asked_ids(self) -> list[int]:
        """The prompt as it was given."""
        return self.prompt_ids if self.source is None else self.source.ids_s.tolist()

    @property
    def width(self) -> int:
        """Sequences that advance together."""
        return self.params.beams

    @property
    def n_answers(self) -> int:
        """Sequences that are written beside each other."""
        return 1 if self.search is not None else self.params.best_of or self.params.n

    @property
    def streams(self) -> bool:
        """Whether its answers can be told while they are written: not where the best are chosen in the end."""
        return self.search is None and self.n_answers == self.params.n

    def seed_of(self, index: int) -> int:
        """Each answer draws for itself, the first as if it were alone."""
        return (self.seed + index * GOLDEN) % 2**63

    def counts(self) -> dict[str, int]:
        """What it has cost so far."""
        return {
            "prompt_tokens": len(self.prompt_ids if self.source is None else self.source.ids_s),
            "cached_tokens": self.cached_tokens or 0,
            "new_tokens": self.new_tokens,
            "preemptions": self.preemptions,
            "drafted": self.drafted,
            "accepted": self.accepted,
        }

    def stats(self) -> RequestStats:
        """The same, with the time it took."""

        def since(moment: float | None) -> float | None:
            return None if moment is None else moment - self.submitted_at

        return RequestStats(
            **self.counts(),
            queued_seconds=since(self.begun_at),
            first_token_seconds=since(self.first_token_at),
            total_seconds=time.perf_counter() - self.submitted_at,
        )


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Token ids as they are, or text as the start of a document: behind the token that the family begins one with."""
    if not isinstance(prompt, str):
        return list(prompt)
    ids = tokenizer.encode(prompt)
    return [tokenizer.bos_id, *ids] if tokenizer.add_bos or not ids else ids


def token_ids(prompt: Prompt, tokenizer: Tokenizer | None, which: str, *, for_encoder: bool = False) -> list[int]:
    """As :func:`prompt_ids`; for an encoder, text with all the special tokens that the family puts round it.

    Args:
        which: the prompt's name in errors.

    Raises:
        DanluError: it is text and there is no tokenizer, or no tokens at all.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise DanluError(f"{which}: is text, and the engine has no tokenizer; give token ids")
        return tokenizer.encode_for_encoder(prompt)[0] if for_encoder else prompt_ids(tokenizer, prompt)
    try:
        return [operator.index(token_id) for token_id in prompt]
    except TypeError:
        raise DanluError(f"{which}: holds something that is no token id; expected whole numbers") from None


def require_known(ids: Items[int], vocab_size: int, which: str) -> None:
    """Raises DanluError where the model has no such tokens."""
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise DanluError(
            f"{which}: has token ids outside the model's vocabulary of {vocab_size}; use the model's tokenizer"
        )
