"""What the next tokens might be, guessed cheaply, for :mod:`danlu.engine.speculative` to check in one forward pass.

Two guessers: text that copies itself (prompt lookup), and a small model that has the same vocabulary. Neither changes
what is answered, only how soon; so a guesser that is mostly wrong keeps silent, longer and longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from danlu.engine.logit_rules import SequenceSampler, rows_logprobs
from danlu.errors import DanluError
from danlu.models.causal_lm import CausalLM
from danlu.nn.kv_cache import KVCache

if TYPE_CHECKING:
    from danlu.tokenizer.tokenizer import Tokenizer

MAX_NGRAM, MIN_NGRAM = 4, 2

FIRST_DRAFT = 4
"""Tokens of a request's first draft."""

LONGEST_PAUSE = 16
"""Steps: a guesser that is always wrong costs one wasted token in so many steps, and one that becomes right again (a
passage is copied after one was not) is heard before long."""

SEED_OFFSET = 0x5851F42D4C957F2D  # any large odd number: keeps the guesses' draws apart from the answer's

PREFILL_TOKENS = 512  # prompt tokens a draft model reads in one step: others wait meanwhile


@dataclass(frozen=True)
class Draft:
    """Guessed tokens, possibly none.

    Attributes:
        probs_kv: (tokens, vocab) what each was drawn from; None: it was no draw, each token was certain.
    """

    ids: list[int]
    probs_kv: Tensor | None = None


class DraftLength:
    """How many tokens to guess, learned from how many were right.

    All right: twice as many. Some: one more than were right. None: half as many, after a pause that doubles each time.

    Attributes:
        drafted: tokens guessed so far; ``accepted`` of them were right.
    """

    def __init__(self) -> None:
        self.drafted = self.accepted = 0
        self._length = FIRST_DRAFT
        self._pause = self._paused = 0

    def next(self) -> int:
        """Tokens to guess in this step, 0 for none."""
        if self._paused:
            self._paused -= 1
            return 0
        return self._length

    def observe(self, drafted: int, accepted: int) -> None:
        """What became of a draft of one token or more."""
        self.drafted += drafted
        self.accepted += accepted
        if accepted == 0:
            self._length = max(1, self._length // 2)
            self._pause = self._paused = min(max(1, 2 * self._pause), LONGEST_PAUSE)
        elif accepted < drafted:
            self._length = accepted + 1
            self._pause //= 2
        else:
            self._length = max(self._length, 2 * drafted)
            self._pause = 0


class Drafter(Protocol):
    """Guesses for one sequence.

    Attributes:
        length: how many to guess; counts what was drafted and accepted.
    """

    length: DraftLength

    def propose(self, token_ids: Sequence[int], k: int, sampler: SequenceSampler) -> Draft:
        """Guess at most ``k`` tokens that follow ``token_ids``, which only ever grows from call to call. Tell
        ``length.observe`` what became of them."""


class NGramDrafter:
    """Prompt lookup (Saxena 2023): what followed the last time that the newest tokens were seen.

    The longest end of the sequence, of 4 tokens down to 2, that occurred before; of its occurrences the last. Where
    that is so near that the copy runs into the end, it goes on with itself: text that repeats with a period is guessed
    to any length. Each n-gram is entered once, so that a guess costs the new tokens and not the whole text.
    """

    def __init__(self) -> None:
        self.length = DraftLength()
        self._ends: dict[int, dict[tuple[int, ...], int]] = {n: {} for n in range(MAX_NGRAM, MIN_NGRAM - 1, -1)}
        """For each n, where the n-gram last ended."""
        self._entered = 0  # all n-grams that end up to here are in

    def propose(self, token_ids: Sequence[int], k: int, sampler: SequenceSampler) -> Draft:
        """As in :class:`Drafter`."""
        k = min(k, self.length.next())
        if k < 1:
            return Draft([])
        end = len(token_ids)
        self._enter(token_ids, end - 1)  # not the end itself: it would be its own last occurrence
        for n, ends in self._ends.items():
            if (found := ends.get(tuple(token_ids[end - n :]))) is not None:
                period = end - found
                ids = list(token_ids[found : found + k])
                while len(ids) < k:
                    ids.append(ids[len(ids) - period])
                return Draft(ids)
        return Draft([])

    def _enter(self, token_ids: Sequence[int], end: int) -> None:
        for n, ends in self._ends.items():
            first = max(0, self._entered + 1 - n)
            grams = zip(*(token_ids[first + i : end] for i in range(n)), strict=False)
            ends.update(zip(grams, range(first + n, end + 1), strict=False))
        self._entered = max(self._entered, end)


class DraftModel:
    """A small model whose guesses another can check, because their vocabularies are one.

    Args:
        tokenizer, target_tokenizer: of the small model and of the one that answers.
        vocab_size: width of the logits of the one that answers. Models pad their vocabularies: widths may differ.

    Raises:
        DanluError: an id means one token here and another there.
    """

    def __init__(self, model: CausalLM, tokenizer: Tokenizer, target_tokenizer: Tokenizer, vocab_size: int) -> None:
        check_vocabularies(tokenizer, target_tokenizer)
        self.model, self.vocab_size = model.eval(), vocab_size

    def logits(self, ids: Sequence[int], cache: KVCache) -> Tensor:
        """(vocab,) of the token after ``ids``, as wide as the other model's."""
        hidden_btd = self.model.hidden_states(torch.tensor([ids], device=self.model.device), cache=cache)
        logits_v: Tensor = self.model.head(hidden_btd[:, -1])[0].float()
        return F.pad(logits_v, (0, self.vocab_size - len(logits_v)), value=-torch.inf)  # a negative pad cuts


def check_vocabularies(draft: Tokenizer, target: Tokenizer) -> None:
    """Raises:
    DanluError: the two tokenizers do not have the same tokens under the same ids.
    """
    if draft.vocab_size != target.vocab_size:
        raise DanluError(
            f"{draft.where}: the draft model has a vocabulary of {draft.vocab_size} tokens, {target.where} one of "
            f"{target.vocab_size}; take a draft model of the same family"
        )
    for token_id in range(target.vocab_size):
        theirs, ours = draft.decode_bytes([token_id]), target.decode_bytes([token_id])
        if theirs != ours:
            raise DanluError(
                f"{draft.where}: token {token_id} of the draft model is {theirs!r}, that of {target.where} is "
                f"{ours!r}; take a draft model with the same tokenizer"
            )


class ModelDrafter:
    """Guesses of a small model for one sequence, with a cache of its own.

    A greedy request gets the model's most likely tokens. For one that is sampled they are drawn by the request's own
    rules, which makes the two models' distributions as alike as they can be.

    Args:
        max_tokens: tokens that the sequence may grow to.
        seed: of the request. Guesses are drawn by another one made from it: they must know nothing of the draws that
            judge them.
    """

    def __init__(self, draft_model: DraftModel, max_tokens: int, seed: int) -> None:
        self.length = DraftLength()
        self._draft_model, self._seed = draft_model, (seed + SEED_OFFSET) % 2**63
        self._generator = torch.Generator().manual_seed(self._seed)
        model = draft_model.model
        self._most = min(max_tokens, model.config.context)
        self._cache = KVCache(model.config, 1, self._most, device=model.device, dtype=model.dtype)
        self._sure = 0  # tokens of the sequence in the cache
        self._guessed: list[int] = []  # those that were guessed and are in the cache behind them

    @torch.inference_mode()
    def propose(self, token_ids: Sequence[int], k: int, sampler: SequenceSampler) -> Draft:
        """As in :class:`Drafter`. A long prompt is read over several calls, which guess nothing."""
        k = min(k, self.length.next(), self._most - len(token_ids))
        if k < 1:
            return Draft([])
        if max(token_ids[self._sure :]) >= self._draft_model.model.config.vocab_size:
            self._most = 0  # a padded vocabulary, of which the small model has less: it cannot read on
            return Draft([])
        self._roll_back(token_ids)
        new = token_ids[self._sure :]
        logits_v = self._draft_model.logits(new[:PREFILL_TOKENS], self._cache)
        self._sure = self._cache.length
        return self._guess(logits_v, k, sampler) if len(new) <= PREFILL_TOKENS else Draft([])

    def _roll_back(self, token_ids: Sequence[int]) -> None:
        """Keep what the cache holds of the sequence, guesses that proved right included, but for the last token, which
        has to be run for its logits."""
        right = 0
        for guess, token_id in zip(self._guessed, token_ids[self._sure : -1], strict=False):
            if guess != token_id:
                break
            right += 1
        self._guessed = []
        self._sure = self._cache.length = min(self._sure + right, len(token_ids) - 1)

    def _guess(self, logits_v: Tensor, k: int, sampler: SequenceSampler) -> Draft:
        rules = sampler.fork(self._seed)
        ids: list[int] = []
        probs: list[Tensor] = []
        while True:
            probs_v = rows_logprobs(logits_v[None], [rules])[0].exp().cpu()
            probs.append(probs_v)
            guess = probs_v.argmax() if rules.greedy else torch.multinomial(probs_v, 1, generator=self._generator)
            ids.append(int(guess))
            rules.accept(ids[-1])
            if len(ids) == k or rules.finished or ids[-1] in rules.stop_ids:
                return Draft(ids, None if rules.greedy else torch.stack(probs))
            self._guessed.append(ids[-1])
            logits_v = self._draft_model.logits(ids[-1:], self._cache)
