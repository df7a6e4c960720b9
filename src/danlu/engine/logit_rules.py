"""Everything of one sequence that changes its logits, with its state, and the next tokens of a batch of sequences.

bias -> penalties -> bars -> grammar      (here)      -> temperature -> filters -> draw      (sampling.py)

A token that the model itself forces, as some encoder-decoders do, comes before all of these.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from danlu.engine.banned_strings import BannedStrings
from danlu.engine.config import SamplingParams
from danlu.engine.grammar import Grammar
from danlu.engine.logprobs import Sampled, TokenLogprobs, token_logprobs
from danlu.engine.sampling import (
    GREEDY_BELOW,
    LARGEST,
    Candidates,
    Ids,
    Row,
    draw,
    draw_rows,
    penalise_counts,
    penalise_repetition,
    sanitize,
    truncate,
)
from danlu.engine.seq2seq import NO_DEMANDS, Demands, repeating
from danlu.errors import DanluError

if TYPE_CHECKING:
    from danlu.tokenizer.tokenizer import Tokenizer


class SequenceSampler:
    """How the next token of one sequence is chosen.

    Args:
        stop_ids: the model's own stop tokens.
        seed: of this sequence's draws; ``params.seed`` is not read.
        grammar: this sequence's own, see :meth:`Grammar.compile`.
        tokenizer: only ``banned_strings`` need it.
        demands: what the model asks of every answer.
        limit: tokens that the answer may have; only demands need it.

    Attributes:
        stop_ids: tokens that end this sequence: the model's, unless they are ignored, and those of ``params``.
        generator: a generator on the CPU, so that a seed means the same draws on every device. Each draw takes one
            number from it.

    Raises:
        DanluError: ``params`` name tokens outside the vocabulary, or ban texts and there is no tokenizer.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        vocab_size: int,
        stop_ids: Sequence[int],
        seed: int,
        grammar: Grammar | None = None,
        tokenizer: Tokenizer | None = None,
        demands: Demands = NO_DEMANDS,
        limit: int | None = None,
    ) -> None:
        _require_ids(params, vocab_size)
        own = [i for i in stop_ids if i < vocab_size] if not params.ignore_eos else []
        self.params = params
        self.stop_ids = frozenset([*own, *params.stop_ids])
        self.generator = torch.Generator().manual_seed(seed)
        self.grammar = grammar
        self.n_accepted = 0
        self._demands, self._limit = demands, limit
        self._least = max(params.min_new_tokens, demands.least)
        self._ruled_until = max(self._least, 1 if demands.first else 0)  # so many tokens at the start have a rule
        self._read = list(prompt_ids) if demands.no_repeat_ngram else []  # all that the next token follows
        self._stop_ids = _ids(self.stop_ids)
        self._bias_ids, self._biases = _ids(params.logit_bias), np.array([*params.logit_bias.values()], np.float32)
        self._barred = _barred(params, self.stop_ids, vocab_size)
        self._prompt_ids = np.unique(_ids(prompt_ids)) if params.repetition_penalty != 1 else _ids(())
        self._counts: dict[int, int] = {}
        self._banned: BannedStrings | None = None
        if params.banned_strings:
            if tokenizer is None:
                raise DanluError("banned_strings: there is no tokenizer to tell which tokens write them; ban tokens")
            self._banned = BannedStrings(params.banned_strings, tokenizer)
        self._penalises_counts = bool(params.frequency_penalty or params.presence_penalty or params.count_penalty)
        self._always_rules = bool(
            self._penalises_counts
            or params.repetition_penalty != 1
            or params.logit_bias
            or len(self._barred)
            or self._banned is not None
            or grammar is not None
            or demands.no_repeat_ngram
            or demands.last
        )

    @property
    def greedy(self) -> bool:
        return self.params.temperature < GREEDY_BELOW

    @property
    def rules(self) -> bool:
        """Whether the logits of the next token are changed before the temperature."""
        return self._always_rules or self.n_accepted < self._ruled_until

    @property
    def finished(self) -> bool:
        """The grammar admits nothing more: the answer is complete."""
        return self.grammar is not None and self.grammar.finished

    @property
    def _forced(self) -> tuple[int, ...]:
        """One of these comes next, whatever the request says; empty: nothing is forced."""
        return self._demands.forced(self.n_accepted, self._limit)

    def forces_end(self, n_tokens: int) -> bool:
        """Whether an answer of so many tokens has a last one that was forced, because there was room for no more."""
        return bool(self._demands.last) and n_tokens == self._limit

    def apply(self, row: Row) -> None:
        """Change logits, (vocab,), in place; what is barred becomes -inf.

        Raises:
            DanluError: no token is left, or the grammar became too complex to follow.
        """
        params = self.params
        if forced := self._forced:
            row.fill(-np.inf)
            row[list(forced)] = 0
            return
        row[self._bias_ids] += self._biases
        if params.repetition_penalty != 1:
            penalise_repetition(row, np.union1d(self._prompt_ids, _ids(self._counts)), params.repetition_penalty)
        if self._counts and self._penalises_counts:
            penalise_counts(
                row,
                _ids(self._counts),
                _ids(self._counts.values()),
                frequency=params.frequency_penalty,
                presence=params.presence_penalty,
                count=params.count_penalty,
            )
        row[self._barred] = -np.inf
        if self._demands.no_repeat_ngram:
            row[repeating(self._read, self._demands.no_repeat_ngram)] = -np.inf
        if self.n_accepted < self._least:
            row[self._stop_ids] = -np.inf
        if self._banned is not None:
            ids = self._banned.completing()
            row[ids[ids < len(row)]] = -np.inf
        if self.grammar is not None:
            self.grammar.mask(row, self._stop_ids)
        if row.max() == -np.inf:
            raise DanluError("the rules of the request leave no token to choose from; loosen what it bans or demands")

    def accept(self, token_id: int) -> None:
        """The token was chosen.

        Raises:
            DanluError: the grammar does not admit it.
        """
        forced = self._forced
        self.n_accepted += 1
        if self._demands.no_repeat_ngram:
            self._read.append(token_id)
        if self._penalises_counts or self.params.repetition_penalty != 1:
            self._counts[token_id] = self._counts.get(token_id, 0) + 1
        if self._banned is not None:
            self._banned.accept(token_id)
        if self.grammar is not None and token_id not in self.stop_ids and not forced:
            self.grammar.accept(token_id)

    def fork(self, seed: int) -> SequenceSampler:
        """Another sequence with the same past and draws of its own."""
        other = copy.copy(self)
        other.generator = torch.Generator().manual_seed(seed)
        other._counts, other._read = dict(self._counts), list(self._read)
        other._banned = None if self._banned is None else self._banned.fork()
        other.grammar = None if self.grammar is None else self.grammar.fork()
        return other


_overflow_is_never_drawn = np.errstate(over="ignore")
"""A logit near the lowest number may become -inf under penalties and temperature."""


@_overflow_is_never_drawn
def sample_rows(logits_rv: Tensor, samplers: Sequence[SequenceSampler]) -> list[Sampled]:
    """The next token of each sequence; they do not accept it yet.

    Args:
        logits_rv: (rows, vocab) one row for each sampler, on any device; it is not changed.

    Raises:
        DanluError: a row has no number in it, or its rules leave no token. Nothing has been drawn then, so the rows can
            be tried again one by one.
    """
    if logits_rv.device.type != "cpu" and all(map(_plainly_greedy, samplers)):  # spares moving whole rows
        largest_r, ids_r = logits_rv.max(dim=-1)
        if bool((largest_r.abs() < LARGEST).all()):
            return [Sampled(token_id) for token_id in ids_r.tolist()]
    rows = _rows(logits_rv)
    unfiltered = [_unfiltered(sampler) for sampler in samplers]
    choices = [None if u else _choice(row, s) for row, s, u in zip(rows, samplers, unfiltered, strict=True)]
    together = [sampler for sampler, u in zip(samplers, unfiltered, strict=True) if u]
    as_they_are = all(unfiltered) and not any(sampler.rules for sampler in together)  # spares a copy
    whole = _all_sane(rows if as_they_are else rows[unfiltered])
    for row, sampler in zip(whole, together, strict=True):
        if sampler.rules:
            sampler.apply(row)
    drawn = iter(draw_rows(whole, [s.params.temperature for s in together], [s.generator for s in together]))
    found = []
    for row, choice, sampler in zip(rows, choices, samplers, strict=True):
        n, told_at, told = sampler.params.logprobs, sampler.params.logprobs_temperature, None
        if choice is None:
            token_id, logprob = next(drawn)
            if n == 0 and told_at == sampler.params.temperature and not sampler.rules:
                told = TokenLogprobs(token_id, logprob)
        else:
            token_id = choice if isinstance(choice, int) else draw(choice, sampler.generator)
        if n is not None and told is None:
            told = token_logprobs(_sane(row), token_id, n, told_at)
        found.append(Sampled(token_id, told))
    return found


@_overflow_is_never_drawn
def rows_logprobs(logits_rv: Tensor, samplers: Sequence[SequenceSampler]) -> Tensor:
    """(rows, vocab) fp32 log-probabilities that each sequence's next token is drawn by: after rules, temperature and
    filters, -inf for what they leave out. Where the temperature is 0: after the rules alone. Errors as
    :func:`sample_rows`."""
    logprobs = []
    for row, sampler in zip(_rows(logits_rv), samplers, strict=True):
        row = _ruled(row, sampler)
        if not sampler.greedy:
            kept = truncate(row / np.float32(sampler.params.temperature), sampler.params)
            row = np.full_like(row, -np.inf) if kept.row is None else kept.row
            row[kept.ids] = kept.logits
        logprobs.append(torch.from_numpy(row).log_softmax(dim=-1))
    return torch.stack(logprobs).to(logits_rv.device)


def _plainly_greedy(sampler: SequenceSampler) -> bool:
    return sampler.greedy and not sampler.rules and sampler.params.logprobs is None


def _unfiltered(sampler: SequenceSampler) -> bool:
    """Drawn among all tokens."""
    params = sampler.params
    return (
        not sampler.greedy and params.top_k <= 0 and params.top_p >= 1 and params.min_p <= 0 and params.typical_p >= 1
    )


def _rows(logits_rv: Tensor) -> Row:
    rows: Row = logits_rv.detach().float().cpu().numpy()
    return rows


def _choice(row: Row, sampler: SequenceSampler) -> int | Candidates:
    """The token, where it is certain, or those to draw it from."""
    if _plainly_greedy(sampler) and abs(row[best := int(row.argmax())]) < LARGEST:
        return best
    row = _ruled(row, sampler)
    if sampler.greedy:
        return int(row.argmax())
    return truncate(row / np.float32(sampler.params.temperature), sampler.params)


def _ruled(row: Row, sampler: SequenceSampler) -> Row:
    """The row after the rules, which change a copy."""
    row = _sane(row)
    if sampler.rules:
        row = row.copy()
        sampler.apply(row)
    return row


def _sane(row: Row) -> Row:
    """The row without NaN and +inf; a copy where it had any."""
    if abs(row[row.argmax()]) < LARGEST:  # argmax finds a NaN wherever there is one, and is faster than max
        return row
    sane: Row = sanitize(torch.from_numpy(row)).numpy()
    return sane


def _all_sane(rows: Row) -> Row:
    """The same of many."""
    if bool((np.abs(rows.max(axis=1)) < LARGEST).all()):
        return rows
    sane: Row = sanitize(torch.from_numpy(rows)).numpy()
    return sane


def _ids(ids: object) -> Ids:
    return np.fromiter(ids, dtype=np.int64)  # type: ignore[call-overload, no-any-return]


def _barred(params: SamplingParams, stop_ids: frozenset[int], vocab_size: int) -> Ids:
    """Tokens that are never used."""
    barred = np.zeros(vocab_size, dtype=bool)
    if params.allowed_tokens:
        barred[:] = True
        barred[[*params.allowed_tokens, *stop_ids]] = False
    barred[list(params.banned_tokens)] = True
    return np.flatnonzero(barred)


def _require_ids(params: SamplingParams, vocab_size: int) -> None:
    for name in ("logit_bias", "allowed_tokens", "banned_tokens", "stop_ids"):
        strange = next((i for i in getattr(params, name) if not 0 <= i < vocab_size), None)
        if strange is not None:
            raise DanluError(f"{name}: token id {strange} is outside the model's vocabulary of {vocab_size}")
