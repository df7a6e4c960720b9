"""Verification against choosing one token at a time: the same tokens where a choice is certain, else the same odds."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from danlu.engine.config import SamplingParams
from danlu.engine.logit_rules import SequenceSampler, rows_logprobs, sample_rows
from danlu.engine.speculative import verify

VOCAB = 5
PROMPT = [1, 3]
TABLE = torch.randn(VOCAB, VOCAB, VOCAB, generator=torch.Generator().manual_seed(0)) * 1.5
"""The logits of a toy model: by the last two tokens."""

PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.9, top_p=0.9),
    SamplingParams(temperature=1.4, repetition_penalty=1.3, frequency_penalty=0.8, top_k=4),
]

Drafting = Callable[[list[int], int, torch.Generator], tuple[list[int], Tensor | None]]


def logits_after(ids: Sequence[int]) -> Tensor:
    return TABLE[ids[-2], ids[-1]]


def sampler_for(params: SamplingParams, seed: int = 0, stop_ids: Sequence[int] = ()) -> SequenceSampler:
    return SequenceSampler(params, PROMPT, VOCAB, stop_ids, seed, None)


def certain(ids: list[int], k: int, generator: torch.Generator) -> tuple[list[int], None]:
    """Guesses that are no draws: likely ones, for the most part."""
    guesses = list(ids)
    for _ in range(k):
        guesses.append(int(logits_after(guesses).argsort()[-1 - len(guesses) % 2]))
    return guesses[len(ids) :], None


def drawn(ids: list[int], k: int, generator: torch.Generator) -> tuple[list[int], Tensor]:
    """Guesses of a model that is alike, but not the same, and knows nothing of the request's rules."""
    guesses, probs = list(ids), []
    for _ in range(k):
        probs.append((logits_after(guesses).flip(0) * 0.3 + logits_after(guesses) * 0.7).softmax(dim=-1))
        guesses.append(int(torch.multinomial(probs[-1], 1, generator=generator)))
    return guesses[len(ids) :], torch.stack(probs)


def answer(sampler: SequenceSampler, n: int, drafting: Drafting, k: int, generator: torch.Generator) -> list[int]:
    """``n`` tokens, found with guesses."""
    ids = list(PROMPT)
    while len(ids) < len(PROMPT) + n:
        draft_ids, probs = drafting(ids, k, generator)
        logits = torch.stack([logits_after(ids + draft_ids[:i]) for i in range(k + 1)])
        ids += [sampled.token_id for sampled in verify(logits, draft_ids, probs, sampler)]
    return ids[len(PROMPT) : len(PROMPT) + n]


def plain_answer(sampler: SequenceSampler, n: int) -> list[int]:
    """One token at a time."""
    ids = list(PROMPT)
    for _ in range(n):
        ids.append(sample_rows(logits_after(ids)[None], [sampler])[0].token_id)
        sampler.accept(ids[-1])
    return ids[len(PROMPT) :]


def probability(params: SamplingParams, tokens: Sequence[int]) -> float:
    """Of an answer that begins with these."""
    sampler, ids, found = sampler_for(params), list(PROMPT), 1.0
    for token_id in tokens:
        found *= float(rows_logprobs(logits_after(ids)[None], [sampler])[0, token_id].exp())
        if found == 0:
            return 0.0
        sampler.accept(token_id)
        ids.append(token_id)
    return found


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.lists(st.integers(0, VOCAB - 1), min_size=6, max_size=6), st.booleans())
def test_a_greedy_answer_is_the_same(k: int, others: list[int], penalised: bool) -> None:
    """Whatever is guessed, and whether or not it was drawn."""
    params = SamplingParams(temperature=0, repetition_penalty=1.8 if penalised else 1, presence_penalty=0.5 * penalised)

    def anything(ids: list[int], k: int, generator: torch.Generator) -> tuple[list[int], Tensor | None]:
        right = certain(ids, k, generator)[0]
        return [g if other else r for r, g, other in zip(right, others, others, strict=False)], None

    expected = plain_answer(sampler_for(params), 12)
    for drafting in (anything, drawn):
        assert answer(sampler_for(params), 12, drafting, k, torch.Generator().manual_seed(k)) == expected


@pytest.mark.parametrize("params", PARAMS)
def test_with_guesses_that_are_no_draws_a_seed_means_the_same_answer(params: SamplingParams) -> None:
    for seed in range(20):
        ours = answer(sampler_for(params, seed), 12, certain, 3, torch.Generator())
        assert ours == plain_answer(sampler_for(params, seed), 12)


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("drafting", [certain, drawn])
def test_a_sampled_answer_has_the_same_odds(params: SamplingParams, drafting: Drafting) -> None:
    """Three tokens together, so that a place is judged after right guesses and after wrong ones."""
    n = 800
    generator = torch.Generator().manual_seed(1)
    seen = Counter(tuple(answer(sampler_for(params, seed), 3, drafting, 2, generator)) for seed in range(n))
    expected = {ids: n * probability(params, ids) for ids in itertools.product(range(VOCAB), repeat=3)}
    assert set(seen) <= {ids for ids, times in expected.items() if times > 0}
    often = [ids for ids, times in expected.items() if times >= 5]
    rare = [n - sum(counts[ids] for ids in often) for counts in (seen, expected)]
    observed = [seen[ids] for ids in often] + rare[:1]
    assert len(often) > 8
    assert chisquare(observed, [expected[ids] for ids in often] + rare[1:]).pvalue > 0.01


def test_guesses_that_are_drawn_are_right_as_often_as_they_can_be() -> None:
    """Leviathan et al., theorem 3.5: with probability sum of min(p, q)."""
    p = logits_after(PROMPT).softmax(dim=-1)
    logits = torch.stack([logits_after(PROMPT), torch.zeros(VOCAB)])
    generator, n, right = torch.Generator().manual_seed(2), 1500, 0
    for seed in range(n):
        guess, q = drawn(PROMPT, 1, generator)
        right += len(verify(logits, guess, q, sampler_for(SamplingParams(), seed))) - 1
    expected = float(torch.minimum(p, drawn(PROMPT, 1, generator)[1][0]).sum())
    assert right / n == pytest.approx(expected, abs=3 * (expected * (1 - expected) / n) ** 0.5)


@pytest.mark.parametrize("drafting", [certain, drawn])
def test_nothing_follows_a_stop_token(drafting: Drafting) -> None:
    for seed in range(50):
        sampler = sampler_for(SamplingParams(), seed, stop_ids=[2, 4])
        draft_ids, probs = drafting(PROMPT, 4, torch.Generator().manual_seed(seed))
        logits = torch.stack([logits_after(PROMPT + draft_ids[:i]) for i in range(5)])
        ids = [sampled.token_id for sampled in verify(logits, draft_ids, probs, sampler)]
        assert not {2, 4} & set(ids[:-1])
