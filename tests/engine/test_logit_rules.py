"""What a sequence's rules do to its logits and draws, alone and beside others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from danlu.engine.config import SamplingParams
from danlu.engine.logit_rules import SequenceSampler, rows_logprobs, sample_rows
from danlu.engine.logprobs import logprobs_of
from danlu.errors import DanluError
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.tokenizer.train import train_on

VOCAB = 3000
STOP = (0, 2)


def logits_for(seed: int, rows: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def sampler_of(seed: int = 0, prompt: tuple[int, ...] = (5, 6), vocab: int = VOCAB, **options: Any) -> SequenceSampler:
    return SequenceSampler(SamplingParams(**options), prompt, vocab, STOP, seed)


def run(samplers: list[SequenceSampler], seed: int, steps: int = 8) -> list[list[int]]:
    """Tokens of each, over the same logits whoever is there."""
    found: list[list[int]] = [[] for _ in samplers]
    for step in range(steps):
        logits = logits_for(100 * seed + step).expand(len(samplers), -1)
        for place, sampled in enumerate(sample_rows(logits, samplers)):
            samplers[place].accept(sampled.token_id)
            found[place].append(sampled.token_id)
    return found


OPTIONS = [
    {"temperature": 0},
    {},
    {"top_p": 0.9, "temperature": 0.8},
    {"top_k": 20, "repetition_penalty": 1.5},
    {"min_p": 0.1, "frequency_penalty": 1.0, "logit_bias": {9: 4.0}},
    {"typical_p": 0.6, "count_penalty": 3.0},
    {"allowed_tokens": (3, 4, 5), "logprobs": 2},
    {"temperature": 0, "banned_tokens": (1, 2, 3), "min_new_tokens": 4, "presence_penalty": 2.0},
]


def test_a_sequence_does_not_depend_on_those_beside_it() -> None:
    together = run([sampler_of(i, **options) for i, options in enumerate(OPTIONS)], 1)
    for i, options in enumerate(OPTIONS):
        assert run([sampler_of(i, **options)], 1) == [together[i]], options
    backwards = [(i, OPTIONS[i]) for i in reversed(range(len(OPTIONS)))]
    assert run([sampler_of(i, **options) for i, options in backwards], 1) == together[::-1]


def test_a_seed_repeats_its_draws_and_another_does_not() -> None:
    first, again, other = run([sampler_of(7), sampler_of(7), sampler_of(8)], 2)
    assert first == again != other


def test_the_given_logits_are_not_changed() -> None:
    logits = logits_for(3, len(OPTIONS))
    before = logits.clone()
    samplers = [sampler_of(i, **options) for i, options in enumerate(OPTIONS)]
    sample_rows(logits, samplers)
    rows_logprobs(logits, samplers)
    assert torch.equal(logits, before)


def test_penalties_count_what_was_accepted_and_the_order_is_the_one_of_transformers() -> None:
    prompt, answer = (5, 6, 6), (9, 9, 5)
    options = {"repetition_penalty": 1.7, "temperature": 0.6, "top_k": 500, "top_p": 0.9, "min_p": 0.001}
    sampler = sampler_of(prompt=prompt, **options)
    for token_id in answer:
        sampler.accept(token_id)
    logits = logits_for(4)
    theirs = hf.LogitsProcessorList(
        [
            hf.RepetitionPenaltyLogitsProcessor(1.7),
            hf.TemperatureLogitsWarper(0.6),
            hf.TopKLogitsWarper(500),
            hf.TopPLogitsWarper(0.9),
            hf.MinPLogitsWarper(0.001),
        ]
    )(torch.tensor([[*prompt, *answer]]), logits)
    torch.testing.assert_close(rows_logprobs(logits, [sampler]), theirs.log_softmax(dim=-1))

    sampler = sampler_of(prompt=prompt, frequency_penalty=0.5, presence_penalty=0.25, count_penalty=2.0)
    for token_id in answer:
        sampler.accept(token_id)
    expected = logits.clone()
    expected[0, 9] -= 2 * 0.5 + 0.25 + np.log(1 + 2.0 * 2)
    expected[0, 5] -= 1 * 0.5 + 0.25 + np.log(1 + 2.0 * 1)  # the prompt does not count
    torch.testing.assert_close(rows_logprobs(logits, [sampler]), expected.log_softmax(dim=-1))


def test_biases_and_bars() -> None:
    logits = logits_for(5)
    biased = logits.clone()
    biased[0, 7] += 50.0
    torch.testing.assert_close(
        rows_logprobs(logits, [sampler_of(logit_bias={7: 50.0})]), biased.log_softmax(dim=-1)
    )  # fmt: skip
    kept = rows_logprobs(logits, [sampler_of(allowed_tokens=(4, 8, 9), banned_tokens=(8,))])[0] > -torch.inf
    assert kept.nonzero()[:, 0].tolist() == [0, 2, 4, 9]  # and the tokens that may end the answer


def test_stop_tokens_are_barred_until_the_answer_is_long_enough() -> None:
    sampler = sampler_of(min_new_tokens=2, stop_ids=(11,), temperature=0)
    logits = torch.zeros(1, VOCAB)
    logits[0, [0, 2, 11]] = 9.0
    for expected in (1, 1, 0):
        (sampled,) = sample_rows(logits, [sampler])
        assert sampled.token_id == expected
        sampler.accept(sampled.token_id)
    assert sampler.stop_ids == {0, 2, 11}
    assert sampler_of(ignore_eos=True, stop_ids=(11,)).stop_ids == {11}


def test_forks_count_for_themselves_and_draw_for_themselves() -> None:
    logits = torch.zeros(1, VOCAB)
    first = sampler_of(frequency_penalty=2.0, repetition_penalty=1.3)
    first.accept(9)
    second = first.fork(1)
    for _ in range(3):
        second.accept(10)
    ours, theirs = rows_logprobs(logits, [first])[0], rows_logprobs(logits, [second])[0]
    assert ours[9] < ours[10] == ours[11]
    assert theirs[10] < theirs[9] < theirs[11]
    assert run([first.fork(3), first.fork(3)], 5)[0] == run([first.fork(3)], 5)[0]
    assert len({tuple(tokens) for tokens in run([first.fork(i) for i in range(5)], 5)}) == 5


@pytest.mark.parametrize("options", [{}, {"top_p": 0.8, "frequency_penalty": 0.7}, {"typical_p": 0.7}])
def test_draws_follow_the_log_probabilities(options: dict[str, float]) -> None:
    """Pearson's chi-square of 3,000 draws; 99.99th percentile for 11 degrees of freedom: 37.4."""
    sampler = sampler_of(vocab=12, **options)
    sampler.accept(11)
    logits = torch.linspace(-2, 2, 12)[None]
    expected = rows_logprobs(logits, [sampler])[0].double().exp() * 3000
    drawn = torch.tensor([sample_rows(logits, [sampler])[0].token_id for _ in range(3000)]).bincount(minlength=12)
    possible = expected > 0
    assert int(drawn[~possible].sum()) == 0
    assert float(((drawn - expected)[possible] ** 2 / expected[possible]).sum()) < 37.4


def test_log_probabilities_are_those_of_the_model_itself() -> None:
    logits = logits_for(6, 2)
    raw = logits.log_softmax(dim=-1)
    params = {"logprobs": 5, "temperature": 0.5, "top_k": 3, "banned_tokens": (int(logits[0].argmax()),)}
    for sampled, expected in zip(sample_rows(logits, [sampler_of(i, **params) for i in range(2)]), raw, strict=True):
        assert sampled.logprobs is not None
        assert sampled.logprobs.token_id == sampled.token_id
        assert sampled.logprobs.logprob == pytest.approx(float(expected[sampled.token_id]), abs=1e-5)
        top = expected.topk(5)
        assert [i for i, _ in sampled.logprobs.top] == top.indices.tolist()
        assert [value for _, value in sampled.logprobs.top] == pytest.approx(top.values.tolist(), abs=1e-5)
    prompt = logprobs_of(logits, [17, 4], 0)
    assert [one.logprob for one in prompt] == pytest.approx([float(raw[0, 17]), float(raw[1, 4])], abs=1e-5)
    assert prompt[0].top == ()


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
    options = {
        "temperature": temperature, "top_k": k, "top_p": p, "min_p": least, "typical_p": p, "logprobs": 3,
        "repetition_penalty": penalty, "frequency_penalty": additive, "presence_penalty": additive,
    }  # fmt: skip
    samplers = [sampler_of(i, prompt=(0, 1), vocab=6, **options) for i in range(len(rows))]
    if not bool(possible.any(dim=-1).all()):
        with pytest.raises(DanluError, match="damaged"):
            sample_rows(logits, samplers)
        return
    for _ in range(3):
        for row, sampled in enumerate(sample_rows(logits, samplers)):
            assert bool(possible[row, sampled.token_id])
            samplers[row].accept(sampled.token_id)


def test_an_error_of_one_row_costs_the_others_no_draw() -> None:
    logits = logits_for(7, 2)
    bad = torch.cat((logits[:1], torch.full((1, VOCAB), float("nan"))))
    first, second = sampler_of(1), sampler_of(2)
    with pytest.raises(DanluError, match="damaged"):
        sample_rows(bad, [first, second])
    assert sample_rows(logits[:1], [first]) == sample_rows(logits[:1], [sampler_of(1)])
    with pytest.raises(DanluError, match="leave no token"):
        sample_rows(logits[:1], [sampler_of(allowed_tokens=(4,), banned_tokens=(0, 2, 4))])


@pytest.mark.parametrize(
    "options",
    [{"logit_bias": {VOCAB: 1.0}}, {"banned_tokens": (VOCAB,)}, {"allowed_tokens": (10**12,)}, {"stop_ids": (VOCAB,)}],
)
def test_tokens_outside_the_vocabulary_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(DanluError, match="outside the model's vocabulary"):
        sampler_of(**options)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [f"the theatre {i} there; then 丹炉 thesis bathe\n" for i in range(100)]
    return train_on(texts, 290, 2)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    banned=st.sampled_from([("the",), ("e t", "丹"), ("炉",), ("a", "th", "\n"), ("he th",)]),
)
def test_banned_strings_never_occur(tokenizer: Tokenizer, seed: int, banned: tuple[str, ...]) -> None:
    """Whatever is sampled, across the borders of tokens and characters; and nothing else is barred."""
    vocab = tokenizer.vocab_size
    params = SamplingParams(banned_strings=banned)
    sampler = SequenceSampler(params, [1], vocab, (), seed, tokenizer=tokenizer)
    rng = np.random.default_rng(seed)
    favoured = [
        i for i in range(vocab) if tokenizer.decode_bytes([i]).strip(b"the at\n\xe4\xb8\xb9\xe7\x82\x89") == b""
    ]
    ids: list[int] = []
    for _ in range(40):
        logits = torch.zeros(1, vocab)
        logits[0, favoured] = 8.0
        barred = set(np.flatnonzero(rows_logprobs(logits, [sampler])[0].numpy() == -np.inf))
        text = b"".join(tokenizer.decode_bytes([i]) for i in ids if not tokenizer.is_special(i))
        for i in rng.integers(0, vocab, 20).tolist():
            more = text if tokenizer.is_special(i) else text + tokenizer.decode_bytes([i])
            assert (i in barred) == any(one.encode() in more for one in banned)
        (sampled,) = sample_rows(logits, [sampler])
        sampler.accept(sampled.token_id)
        ids.append(sampled.token_id)
    text = tokenizer.decode(ids, skip_special=True)
    assert not any(one in text for one in banned)
    assert sampler.fork(0)._banned is not sampler._banned


def test_banned_strings_need_a_tokenizer() -> None:
    with pytest.raises(DanluError, match="no tokenizer"):
        sampler_of(banned_strings=("x",))
