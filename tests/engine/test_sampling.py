"""Each step against the transformers processor of that name, a closed form, or the distribution it must draw from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from danlu.config import validate
from danlu.engine import sampling
from danlu.engine.sampling import Sampler, SamplingParams
from danlu.errors import DanluError, Problems

VOCAB = 50


def logits_for(seed: int, batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4


def ids_for(seed: int, batch: int = 4, length: int = 9) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def counts_of(ids_bt: torch.Tensor) -> torch.Tensor:
    return torch.stack([row.bincount(minlength=VOCAB) for row in ids_bt])


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("k", [1, 2, 7, VOCAB, 1000])
def test_top_k_is_the_transformers_one(k: int) -> None:
    logits = logits_for(0)
    logits[0, :10] = logits[0].max()  # ties
    torch.testing.assert_close(sampling.top_k(logits, k), hf.TopKLogitsWarper(k)(ids_for(0), logits), rtol=0, atol=0)


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_is_the_transformers_one(p: float) -> None:
    logits = logits_for(1)
    torch.testing.assert_close(sampling.top_p(logits, p), hf.TopPLogitsWarper(p)(ids_for(0), logits), rtol=0, atol=0)


@pytest.mark.parametrize("p", [0.01, 0.2, 0.9, 1.0])
def test_min_p_is_the_transformers_one(p: float) -> None:
    logits = logits_for(2)
    torch.testing.assert_close(sampling.min_p(logits, p), hf.MinPLogitsWarper(p)(ids_for(0), logits), rtol=0, atol=0)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 5.0])
def test_repetition_penalty_is_the_transformers_one(penalty: float) -> None:
    logits, prompt, answer = logits_for(3), ids_for(3), ids_for(4)
    ours = sampling.apply_penalties(logits, counts_of(prompt) > 0, counts_of(answer), repetition_penalty=penalty)
    theirs = hf.RepetitionPenaltyLogitsProcessor(penalty)(torch.cat((prompt, answer), dim=1), logits)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_frequency_and_presence_penalties_are_the_additive_ones_and_ignore_the_prompt() -> None:
    logits, prompt = logits_for(5, batch=1), torch.tensor([[1, 2]])
    answer = torch.tensor([[2, 7, 7, 7]])
    ours = sampling.apply_penalties(
        logits, counts_of(prompt) > 0, counts_of(answer), frequency_penalty=0.5, presence_penalty=0.25
    )
    expected = logits.clone()
    expected[0, 7] -= 3 * 0.5 + 0.25
    expected[0, 2] -= 1 * 0.5 + 0.25
    torch.testing.assert_close(ours, expected)


def test_the_order_is_the_one_of_transformers() -> None:
    """Penalty, temperature, top-k, top-p and min-p together leave the same tokens with the same logits."""
    logits, prompt = logits_for(6), ids_for(6)
    theirs = hf.LogitsProcessorList(
        [
            hf.RepetitionPenaltyLogitsProcessor(1.7),
            hf.TemperatureLogitsWarper(0.6),
            hf.TopKLogitsWarper(12),
            hf.TopPLogitsWarper(0.9),
            hf.MinPLogitsWarper(0.05),
        ]
    )(prompt, logits)
    ours = sampling.apply_penalties(
        logits, counts_of(prompt) > 0, torch.zeros(4, VOCAB, dtype=torch.int), repetition_penalty=1.7
    )
    ours = sampling.top_k(sampling.temper(ours, 0.6), 12)
    ours = sampling.min_p(sampling.top_p(ours, 0.9), 0.05)
    torch.testing.assert_close(ours, theirs)

    params = SamplingParams(repetition_penalty=1.7, temperature=0.6, top_k=12, top_p=0.9, min_p=0.05, seed=11)
    sampler = Sampler([params] * 4, prompt.tolist(), VOCAB, torch.device("cpu"))
    expected = sampling.sample(theirs, 0.6, generators([11] * 4))
    assert sampler(logits).tolist() == expected.tolist()


def test_a_value_for_each_row_is_the_same_as_each_row_alone() -> None:
    logits = logits_for(7)
    for function, values in [
        (sampling.top_k, [0, 1, 5, 400]),
        (sampling.top_p, [1.0, 0.3, 0.9, 1e-9]),
        (sampling.min_p, [0.0, 0.1, 1.0, 0.5]),
        (sampling.temper, [0.0, 0.5, 1.0, 2.0]),
    ]:
        together = function(logits, torch.tensor(values))
        alone = torch.cat([function(logits[i : i + 1], value) for i, value in enumerate(values)])
        torch.testing.assert_close(together, alone, rtol=0, atol=0)


def test_what_is_off_changes_nothing() -> None:
    logits = logits_for(8)
    logits[0, 0] = -300.0  # its probability underflows to zero; top_p = 1 keeps it all the same
    for same in (sampling.top_k(logits, 0), sampling.top_p(logits, 1.0), sampling.min_p(logits, 0.0)):
        assert torch.equal(same, logits)


def test_greedy_takes_the_maximum_whatever_the_filters_say() -> None:
    logits = logits_for(9)
    params = SamplingParams(temperature=0, top_k=3, top_p=0.1, min_p=1.0, seed=1)
    sampler = Sampler([params] * 4, [[0]] * 4, VOCAB, torch.device("cpu"))
    assert sampler(logits).tolist() == logits.argmax(dim=-1).tolist()


def test_draws_follow_the_distribution() -> None:
    """Pearson's chi-square of 20,000 draws against the softmax; 9 degrees of freedom, 99.99th percentile 33.7."""
    logits = torch.linspace(-2, 2, 10).repeat(20_000, 1)
    ids = sampling.sample(logits, 1.0, [torch.Generator().manual_seed(0)] * len(logits))
    expected = logits[0].softmax(dim=-1) * len(logits)
    assert float(((ids.bincount(minlength=10) - expected) ** 2 / expected).sum()) < 33.7


def test_a_draw_depends_on_its_own_seed_and_not_on_its_neighbours() -> None:
    logits = logits_for(10)
    together = sampling.sample(logits, 1.0, generators([3, 4, 5, 6]))
    alone = [sampling.sample(logits[i : i + 1], 1.0, generators([3 + i])).item() for i in range(4)]
    assert together.tolist() == alone
    mixed = sampling.sample(logits, torch.tensor([1.0, 0.0, 1.0, 0.0]), generators([3, 4, 5, 6]))
    assert mixed.tolist() == [alone[0], logits[1].argmax(), alone[2], logits[3].argmax()]


def test_rows_keep_their_state_when_others_leave() -> None:
    params = [SamplingParams(seed=i, frequency_penalty=1.0 if i == 2 else 0.0) for i in range(4)]
    whole = Sampler(params, [[0]] * 4, VOCAB, torch.device("cpu"))
    part = Sampler(params, [[0]] * 4, VOCAB, torch.device("cpu"))
    first = logits_for(11)
    assert whole(first).tolist() == part(first).tolist()
    part.select([2, 0])
    for seed in range(12, 20):
        logits = logits_for(seed)
        expected = whole(logits).tolist()
        assert part(logits[[2, 0]]).tolist() == [expected[2], expected[0]]


VALUES = st.sampled_from([float("nan"), float("inf"), float("-inf"), 3.4e38, -3.4e38, 0.0, 1.0, 1.0, -5.0])


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.lists(VALUES, min_size=6, max_size=6), min_size=1, max_size=3),
    temperature=st.sampled_from([0.0, 1e-5, 0.7, 100.0]),
    k=st.sampled_from([0, 1, 3, 99]),
    p=st.sampled_from([1e-9, 0.5, 1.0]),
    least=st.sampled_from([0.0, 0.3, 1.0]),
    penalty=st.sampled_from([0.01, 1.0, 100.0]),
    additive=st.sampled_from([-2.0, 0.0, 2.0]),
)
def test_a_token_that_can_be_drawn_is_drawn_or_the_damage_is_told(
    rows: list[list[float]], temperature: float, k: int, p: float, least: float, penalty: float, additive: float
) -> None:
    logits = torch.tensor(rows)
    possible = (logits > -torch.inf) & ~logits.isnan()
    params = SamplingParams(
        temperature=temperature, top_k=k, top_p=p, min_p=least, seed=0,
        repetition_penalty=penalty, frequency_penalty=additive, presence_penalty=additive,
    )  # fmt: skip
    sampler = Sampler([params] * len(rows), [[0, 1]] * len(rows), 6, torch.device("cpu"))
    if not bool(possible.any(dim=-1).all()):
        with pytest.raises(DanluError, match="damaged"):
            sampler(logits)
        return
    for _ in range(3):
        ids = sampler(logits)
        assert bool(possible[torch.arange(len(rows)), ids].all())


def test_bounds_are_checked_together() -> None:
    with pytest.raises(Problems) as error:
        validate(SamplingParams(temperature=-1, top_p=0, seed=-1, stop=("a",)))
    assert len(error.value.problems) == 3
    with pytest.raises(Problems, match="empty text"):
        validate(SamplingParams(stop=("",)))
