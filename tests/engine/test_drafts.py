"""Guesses against what they are by definition: a search of the whole text, and the small model run on all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from danlu.engine.config import SamplingParams
from danlu.engine.drafts import (
    LONGEST_PAUSE,
    PREFILL_TOKENS,
    DraftLength,
    DraftModel,
    ModelDrafter,
    NGramDrafter,
)
from danlu.engine.logit_rules import SequenceSampler, rows_logprobs
from danlu.errors import DanluError
from danlu.models.causal_lm import CausalLM
from danlu.nn.config import ModelConfig, Rope
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.tokenizer.train import train_on

VOCAB = 23
GREEDY = SamplingParams(temperature=0)


def sampler_for(params: SamplingParams = GREEDY, prompt: Sequence[int] = (1,)) -> SequenceSampler:
    return SequenceSampler(params, prompt, VOCAB, (), 0, None)


def looked_up(ids: list[int], k: int) -> list[int]:
    """Prompt lookup by its definition."""
    for n in (4, 3, 2):
        for start in range(len(ids) - n - 1, -1, -1):
            if len(ids) > n and ids[start : start + n] == ids[-n:]:
                copied = list(ids)
                for i in range(k):
                    copied.append(copied[start + n + i])
                return copied[len(ids) :]
    return []


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=20), st.integers(1, 9))
def test_an_ngram_guess_is_what_followed_the_last_time(pieces: list[list[int]], k: int) -> None:
    drafter, ids = NGramDrafter(), list[int]()
    for piece in pieces:
        ids += piece
        drafter.length.observe(16, 16)
        assert drafter.propose(ids, k, sampler_for()).ids == looked_up(ids, k)


def test_an_ngram_guess_costs_the_new_tokens_alone() -> None:
    """However long the text is."""

    class Counted(list[int]):
        read = 0

        def __getitem__(self, place: Any) -> Any:
            found = super().__getitem__(place)
            Counted.read += len(found) if isinstance(place, slice) else 1
            return found

    generator = torch.Generator().manual_seed(0)
    ids = Counted(torch.randint(0, 40, (20_000,), generator=generator).tolist())
    drafter = NGramDrafter()
    drafter.propose(ids, 8, sampler_for())
    guesses = 0
    for token_id in ids[:200]:
        ids.append(token_id)
        drafter.length.observe(8, 8)
        before = Counted.read
        guesses += len(drafter.propose(ids, 8, sampler_for()).ids)
        assert Counted.read - before < 60
    assert guesses > 1000


def test_a_guesser_that_is_always_wrong_falls_silent() -> None:
    length, asked = DraftLength(), []
    for _ in range(1000):
        if drafted := length.next():
            length.observe(drafted, 0)
        asked.append(drafted)
    assert sum(asked[:10]) < 12
    assert sum(asked[100:]) <= 900 // LONGEST_PAUSE
    assert (length.drafted, length.accepted) == (sum(asked), 0)


def test_a_guesser_that_is_right_again_is_heard_again() -> None:
    length = DraftLength()
    for _ in range(200):
        if drafted := length.next():
            length.observe(drafted, 0)
    heard = []
    for _ in range(LONGEST_PAUSE + 8):
        heard.append(length.next())
        if heard[-1]:
            length.observe(heard[-1], heard[-1])
    assert heard[-1] >= 64
    length.observe(64, 3)
    assert length.next() == 4


def small_model(seed: int, vocab_size: int = VOCAB, context: int = 4096) -> CausalLM:
    config = ModelConfig(
        vocab_size=vocab_size, n_layers=2, dim=16, n_heads=2, n_kv_heads=1, head_dim=8, ffn_dim=24,
        rope=Rope(), context=context,
    )  # fmt: skip
    model = CausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.6, generator=generator)
    return model.eval()


class AnyTokenizer:
    """Tokens have their number for a name."""

    def __init__(self, vocab_size: int, where: str = "a") -> None:
        self.vocab_size, self.where = vocab_size, where

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return str(list(ids)).encode()


ANY: Any = AnyTokenizer(VOCAB)


def drafter_for(model: CausalLM, max_tokens: int = 4096, params: SamplingParams = GREEDY) -> ModelDrafter:
    return ModelDrafter(DraftModel(model, ANY, ANY, VOCAB), max_tokens, seed=3)


@torch.no_grad()
def said_by(model: CausalLM, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([ids]))[0, -1]
    return logits


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3)), max_size=8))
def test_a_models_guesses_are_its_own_whatever_was_right_before(rounds: list[tuple[int, list[int]]]) -> None:
    """Each round takes some of the guesses and something else behind them, as verification does."""
    model = small_model(0)
    drafter, ids = drafter_for(model), [5, 6, 7]
    for n_right, others in rounds:
        drafter.length.observe(16, 16)
        draft = drafter.propose(ids, 5, sampler_for(SamplingParams()))
        assert draft.probs_kv is not None
        for i, probs in enumerate(draft.probs_kv):
            expected = said_by(model, ids + draft.ids[:i]).softmax(dim=-1)
            torch.testing.assert_close(probs, expected, rtol=1e-4, atol=1e-6)
        ids += draft.ids[:n_right] + others


def test_greedy_guesses_are_the_likeliest_tokens() -> None:
    model, ids = small_model(0), [5, 6, 7]
    draft = drafter_for(model).propose(ids, 4, sampler_for())
    assert draft.probs_kv is None
    for i, guess in enumerate(draft.ids):
        assert guess == int(said_by(model, ids + draft.ids[:i]).argmax())


def test_guesses_know_nothing_of_the_draws_that_judge_them() -> None:
    """Or the right ones would be chosen by more than their odds. Both come from one seed."""
    draft_model = DraftModel(small_model(1), ANY, ANY, VOCAB)
    params = SamplingParams(temperature=100, allowed_tokens=(0, 1))
    guesses, draws = [], []
    for seed in range(300):
        sampler = SequenceSampler(params, [1], VOCAB, (), seed, None)
        guesses += ModelDrafter(draft_model, 8, seed).propose([3, 4], 1, sampler).ids
        draws.append(float(torch.rand((), dtype=torch.float64, generator=sampler.generator)))
    some, others = (
        [d for g, d in zip(guesses, draws, strict=True) if (g == guesses[0]) is same] for same in (True, False)
    )
    assert min(len(some), len(others)) > 40
    assert ks_2samp(some, others).pvalue > 0.01


def test_sampled_guesses_come_with_what_they_were_drawn_from() -> None:
    """By the rules of the request, at each place."""
    model, ids = small_model(1), [3, 4]
    params = SamplingParams(temperature=0.7, top_k=5, frequency_penalty=1.5)
    drafter, sampler = drafter_for(model), sampler_for(params, ids)
    for _ in range(10):
        drafter.length.observe(4, 4)
        draft = drafter.propose(ids, 4, sampler)
        assert draft.probs_kv is not None
        assert draft.probs_kv.shape == (4, VOCAB)
        rules = sampler.fork(0)
        for i, (guess, probs) in enumerate(zip(draft.ids, draft.probs_kv, strict=True)):
            expected = rows_logprobs(said_by(model, ids + draft.ids[:i])[None], [rules])[0].exp()
            torch.testing.assert_close(probs, expected, rtol=1e-4, atol=1e-6)
            assert probs[guess] > 0
            rules.accept(guess)
        new = [*draft.ids[:2], 9]
        for token_id in new:
            sampler.accept(token_id)
        ids += new


def test_a_long_prompt_is_read_over_several_steps() -> None:
    """So that other requests do not wait for it."""
    model = small_model(2)
    ids = torch.randint(0, VOCAB, (2 * PREFILL_TOKENS + 10,), generator=torch.Generator().manual_seed(0)).tolist()
    drafter = drafter_for(model)
    assert [len(drafter.propose(ids, 2, sampler_for()).ids) for _ in range(3)] == [0, 0, 2]


def test_guesses_end_where_the_small_models_context_does() -> None:
    drafter = drafter_for(small_model(0, context=8))
    assert len(drafter.propose([1] * 5, 4, sampler_for()).ids) == 3
    assert drafter.propose([1] * 8, 4, sampler_for()).ids == []
    assert drafter.propose([1] * 9, 4, sampler_for()).ids == []


@pytest.mark.parametrize("width", [VOCAB - 3, VOCAB + 5])
def test_the_two_models_may_pad_their_vocabularies_otherwise(width: int) -> None:
    """What only one of them has is never guessed, and not read."""
    tokenizer: Any = AnyTokenizer(VOCAB - 4)
    model = small_model(4, width)
    drafter = ModelDrafter(DraftModel(model, tokenizer, tokenizer, VOCAB), 64, seed=0)
    sampler = sampler_for(SamplingParams(temperature=5.0))
    draft = drafter.propose([1, 2, 3], 4, sampler)
    assert draft.probs_kv is not None
    assert draft.probs_kv.shape == (4, VOCAB)
    torch.testing.assert_close(draft.probs_kv.sum(dim=-1), torch.ones(4))
    assert not draft.probs_kv[:, width:].any()
    drafter.length.observe(4, 4)
    assert bool(drafter.propose([1, 2, 3, VOCAB - 1], 4, sampler).ids) == (width > VOCAB)


def test_models_with_other_vocabularies_are_refused() -> None:
    def tokenizer(text: str, vocab_size: int) -> Tokenizer:
        return train_on([text * 50], vocab_size, 2)

    model, one = small_model(0, 300), tokenizer("the same words again and again ", 280)
    DraftModel(model, one, tokenizer("the same words again and again ", 280), 300)
    with pytest.raises(DanluError, match=r"vocabulary of 281 tokens, .* one of 280; take a draft model of the same"):
        DraftModel(model, tokenizer("the same words again and again ", 281), one, 300)
    with pytest.raises(DanluError, match=r"token \d+ of the draft model is b'.*', that of .* is b'.*'; take a draft"):
        DraftModel(model, tokenizer("quite another text was read ", 280), one, 300)
