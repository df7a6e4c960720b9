"""Each step against the transformers processor of that name, a closed form, or the distribution it must draw from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from danlu.config import load, validate
from danlu.engine import sampling
from danlu.engine.config import SamplingParams
from danlu.engine.sampling import Candidates, everything, shortlist, truncate
from danlu.errors import Problems

SMALL, LARGE = 50, 20_000
"""Vocabularies that are looked at as a whole, and by their likeliest tokens first."""


def logits_for(seed: int, vocab: int = SMALL, scale: float = 4.0) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * scale


def ids_for(seed: int, length: int = 9) -> torch.Tensor:
    return torch.randint(0, SMALL, (length,), generator=torch.Generator().manual_seed(seed))


def probabilities(candidates: Candidates, vocab: int) -> torch.Tensor:
    """As a whole row."""
    row = np.full(vocab, -np.inf, dtype=np.float32) if candidates.row is None else candidates.row.copy()
    row[candidates.ids] = candidates.logits
    return torch.from_numpy(row).softmax(dim=-1)


FILTERS = [
    *[({"top_k": k}, hf.TopKLogitsWarper(k)) for k in (1, 2, 7, 300, 5000)],
    *[({"top_p": p}, hf.TopPLogitsWarper(p)) for p in (1e-6, 0.1, 0.5, 0.9, 0.999)],
    *[({"min_p": p}, hf.MinPLogitsWarper(p)) for p in (1e-9, 0.01, 0.2, 0.9, 1.0)],
    *[({"typical_p": p}, hf.TypicalLogitsWarper(p)) for p in (1e-6, 0.1, 0.5, 0.9, 0.999)],
]


@pytest.mark.parametrize("vocab", [SMALL, LARGE])
@pytest.mark.parametrize("scale", [0.3, 4.0])
@pytest.mark.parametrize(
    ("options", "theirs"), FILTERS, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
def test_filters_keep_what_those_of_transformers_keep(
    options: dict[str, float], theirs: hf.LogitsProcessor, vocab: int, scale: float
) -> None:
    logits = logits_for(0, vocab, scale)
    expected = theirs(torch.zeros(1, 1, dtype=torch.long), logits[None].double())[0].softmax(dim=-1)  # exact sums
    ours = probabilities(truncate(logits.numpy(), validate(SamplingParams(**options))), vocab).double()
    odd = (ours > 0) != (expected > 0)
    assert int(odd.sum()) <= (1 if vocab == LARGE else 0)  # one may lie on the threshold to the last bit of fp32
    torch.testing.assert_close(ours[~odd], expected[~odd], rtol=1e-4, atol=0)


def test_tokens_that_tie_with_the_last_of_top_k_stay() -> None:
    logits = logits_for(1)
    logits[:10] = 20.0
    assert set(truncate(logits.numpy(), SamplingParams(top_k=3)).ids.tolist()) == set(range(10))
    flat = np.zeros(LARGE, dtype=np.float32)
    assert len(truncate(flat, SamplingParams(top_k=3)).ids) == LARGE


@settings(max_examples=60, deadline=None)
@given(
    vocab=st.integers(1, 6000),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.0, 0.5, 3.0]),
    barred=st.sampled_from([0.0, 0.5, 0.999]),
    options=st.fixed_dictionaries(
        {
            "top_k": st.sampled_from([0, 1, 40, 1000]),
            "top_p": st.sampled_from([1.0, 0.01, 0.9]),
            "min_p": st.sampled_from([0.0, 0.05]),
            "typical_p": st.sampled_from([1.0, 0.5]),
        }
    ),
)
def test_the_shortlist_gives_what_the_whole_vocabulary_gives(
    vocab: int, seed: int, scale: float, barred: float, options: dict[str, float]
) -> None:
    rng = np.random.default_rng(seed)
    row = (rng.standard_normal(vocab) * scale).round(1).astype(np.float32)  # with ties
    row[1:][rng.random(vocab - 1) < barred] = -np.inf
    short = shortlist(row)
    assert len(short.ids) >= min(sampling.SHORTLIST, int(np.sum(row > -np.inf)))
    assert short.row is not None or len(short.ids) == np.sum(row > -np.inf)
    assert set(short.ids) == set(np.flatnonzero(row >= short.logits[-1]))
    assert np.array_equal(row[short.ids], short.logits)
    assert np.all(np.diff(short.logits) <= 0)
    params = SamplingParams(**options)
    ours, whole = truncate(row, params), sampling._filtered(everything(row), params)
    # Of tokens that tie at the threshold of top_p it does not matter which are kept.
    kept = ours.logits if ours.row is None else np.sort(ours.row[ours.row > -np.inf])[::-1]
    np.testing.assert_array_equal(kept, whole.logits)


def test_the_order_is_the_one_of_transformers() -> None:
    for vocab in (SMALL, LARGE):
        logits = logits_for(6, vocab)
        theirs = hf.LogitsProcessorList(
            [hf.TopKLogitsWarper(12), hf.TopPLogitsWarper(0.9), hf.MinPLogitsWarper(0.05), hf.TypicalLogitsWarper(0.8)]
        )(torch.zeros(1, 1, dtype=torch.long), logits[None])[0]
        ours = truncate(logits.numpy(), SamplingParams(top_k=12, top_p=0.9, min_p=0.05, typical_p=0.8))
        torch.testing.assert_close(probabilities(ours, vocab), theirs.softmax(dim=-1))


def test_what_is_off_changes_nothing() -> None:
    logits = logits_for(8, LARGE)
    logits[0] = -300.0  # its probability underflows to zero; top_p = 1 keeps it all the same
    kept = truncate(logits.numpy(), SamplingParams())
    assert kept.row is not None
    assert torch.equal(torch.from_numpy(kept.row), logits)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 5.0])
def test_repetition_penalty_is_the_transformers_one(penalty: float) -> None:
    logits, used = logits_for(3), ids_for(3)
    ours = logits.numpy().copy()
    sampling.penalise_repetition(ours, np.unique(used.numpy()), penalty)
    theirs = hf.RepetitionPenaltyLogitsProcessor(penalty)(used[None], logits[None])[0]
    torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-6, atol=0)


def test_penalties_by_count_have_their_closed_forms() -> None:
    logits = logits_for(5)
    ids, counts = np.array([2, 7]), np.array([1, 3])
    ours = logits.numpy().copy()
    sampling.penalise_counts(ours, ids, counts, frequency=0.5, presence=0.25)
    expected = logits.clone()
    expected[2] -= 0.5 + 0.25
    expected[7] -= 3 * 0.5 + 0.25
    torch.testing.assert_close(torch.from_numpy(ours), expected)

    ours = logits.numpy().copy()
    sampling.penalise_counts(ours, ids, counts, count=2.0)
    weights = logits.double().softmax(dim=-1)
    weights[ids] /= torch.tensor([1 + 2.0 * 1, 1 + 2.0 * 3], dtype=torch.float64)
    torch.testing.assert_close(torch.from_numpy(ours).double().softmax(dim=-1), weights / weights.sum())


@pytest.mark.parametrize("options", [{"top_p": 0.8}, {"top_k": 6}, {"min_p": 0.3}, {"typical_p": 0.7}])
def test_draws_follow_the_distribution(options: dict[str, float]) -> None:
    """Pearson's chi-square of 4,000 draws; 99.99th percentile for 9 degrees of freedom: 33.7."""
    row = np.linspace(-2, 2, 10, dtype=np.float32)
    kept = truncate(row, SamplingParams(**options))
    generator = torch.Generator().manual_seed(0)
    drawn = np.bincount([sampling.draw(kept, generator) for _ in range(4_000)], minlength=10)
    expected = probabilities(kept, 10).double().numpy() * drawn.sum()
    possible = expected > 0
    assert drawn[~possible].sum() == 0
    assert np.sum((drawn - expected)[possible] ** 2 / expected[possible]) < 33.7


@pytest.mark.parametrize("vocab", [10, 200])
def test_draws_without_filters_follow_it_too(vocab: int) -> None:
    """10 groups of tokens, some of which cannot come. With what is told of their log-probability."""
    row = np.repeat(np.linspace(-2, 2, 10, dtype=np.float32), vocab // 10)
    row[-1] = -np.inf
    rows, temperatures = np.repeat(row[None], 4_000, axis=0), [0.7] * 4_000
    drawn = sampling.draw_rows(rows, temperatures, [torch.Generator().manual_seed(0)] * 4_000)
    logprobs = (torch.from_numpy(row).double() / 0.7).log_softmax(dim=-1)
    expected = logprobs.exp().numpy().reshape(10, -1).sum(axis=1) * 4_000
    counts = np.bincount([token_id * 10 // vocab for token_id, _ in drawn], minlength=10)
    assert counts[expected == 0].sum() == 0
    assert np.sum((counts - expected)[expected > 0] ** 2 / expected[expected > 0]) < 33.7
    told = torch.tensor([logprob for _, logprob in drawn], dtype=torch.float64)
    torch.testing.assert_close(told, logprobs[[token_id for token_id, _ in drawn]], atol=1e-6, rtol=0)


@pytest.mark.parametrize("vocab", [3, 64, 65, 1000])
def test_a_row_is_drawn_alone_as_among_others(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).normal(0, 3, (17, vocab)).astype(np.float32)
    temperatures = np.linspace(0.1, 2, 17).tolist()

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(i) for i in range(17)]

    together = sampling.draw_rows(rows, temperatures, generators())
    alone = [
        sampling.draw_rows(rows[i : i + 1], temperatures[i : i + 1], [generator])[0]
        for i, generator in enumerate(generators())
    ]
    assert together == alone
    monkeypatch.setattr(sampling, "NEAR", 3 * vocab)
    assert sampling.draw_rows(rows, temperatures, generators()) == together


@given(
    place=st.floats(0, 1, exclude_max=True), vocab=st.sampled_from([3, LARGE]), far=st.sampled_from([1.0, 80.0, 1e30])
)
def test_every_place_of_a_row_has_a_token_that_is_possible(place: float, vocab: int, far: float) -> None:
    row = np.full((1, vocab), -far, dtype=np.float32)
    row[0, 0], row[0, -1] = 0.0, -np.inf
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *_, **__: torch.tensor(place, dtype=torch.float64))
        [(token_id, logprob)] = sampling.draw_rows(row, [1.0], [torch.Generator()])
    assert np.exp(row[0, token_id]) > 0
    assert logprob <= 0


@settings(max_examples=100, deadline=None)
@given(
    place=st.floats(0, 1, exclude_max=True), vocab=st.sampled_from([3, LARGE]), far=st.sampled_from([1.0, 80.0, 1e30])
)
def test_every_place_of_the_distribution_has_a_token_that_is_possible(place: float, vocab: int, far: float) -> None:
    row = np.full(vocab, -far, dtype=np.float32)
    row[0], row[1] = 0.0, -np.inf
    candidates = everything(row)
    found = sampling._at(candidates.probabilities().cumsum(), place * float(candidates.probabilities().sum()))
    assert candidates.probabilities()[found] > 0
    generator = torch.Generator().manual_seed(int(place * 1e9))
    assert row[sampling.draw(candidates, generator)] > -np.inf


def test_bounds_are_checked_together() -> None:
    with pytest.raises(Problems) as error:
        validate(SamplingParams(temperature=-1, top_p=0, seed=-1, stop=("a",)))
    assert len(error.value.problems) == 3
    with pytest.raises(Problems, match="empty text"):
        validate(SamplingParams(stop=("",)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["n=1000000"], "too large"),
        (["n=true"], "not a whole number"),
        (["best_of=2", "n=3"], "less than n"),
        (["beams=4"], "temperature to 0"),
        (["beams=4", "temperature=0", "n=5"], "more than beams"),
        (["beams=4", "temperature=0", "top_p=0.5"], "leave out top_p"),
        (["beams=1000", "temperature=0"], "too large"),
        (["logprobs=101"], "too large"),
        (["typical_p=0"], "more than 0"),
        (["typical_p=nan"], "finite"),
        (["min_new_tokens=9", "max_new_tokens=3"], "more than max_new_tokens"),
        (["logit_bias={5: 101}"], "too large"),
        (["logit_bias={5: .nan}"], "finite"),
        (["logit_bias={-5: 1}"], "not negative"),
        (["logit_bias=[5]"], "not a mapping"),
        (["banned_strings=['']"], "empty"),
        (["choice=[a, '']"], "empty"),
        (["regex=a", "grammar=b"], "together"),
        (["regex=a", "min_new_tokens=3"], "ends where its structure ends"),
        (["stop=[" + ",".join(f"t{i}" for i in range(257)) + "]"], "at most 256"),
    ],
)
def test_what_cannot_be_asked_for_is_told(overrides: list[str], message: str) -> None:
    with pytest.raises(Problems, match=message):
        load(SamplingParams, overrides=overrides)


def test_options_read_from_the_command_line() -> None:
    params = load(
        SamplingParams,
        overrides=["logit_bias={42: 5, 7: -3.5}", "allowed_tokens=[1, 2]", "stop_ids=3", "regex=a: [b]"],
        values={"banned_strings": ["x"]},
    )
    assert params.logit_bias == {42: 5.0, 7: -3.5}
    assert (params.allowed_tokens, params.stop_ids, params.regex) == ((1, 2), (3,), "a: [b]")
    assert (params.banned_strings, params.structure) == (("x",), "regex")
    assert load(SamplingParams, values={"logit_bias": "{42: 5}"}).logit_bias == {42: 5.0}  # behind --logit-bias
    schema = {"type": "object"}
    assert load(SamplingParams, values={"json_schema": schema}).json_schema == schema
    assert load(SamplingParams, overrides=['json_schema={"type": "object"}']).json_schema == '{"type": "object"}'
