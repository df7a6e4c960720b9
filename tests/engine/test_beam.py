"""The search against transformers' `generate(num_beams=...)`, on causal models, without the engine around it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.engine.beam import Beams, BeamSearch, Hypothesis, beam_logprobs
from danlu.engine.config import SamplingParams
from danlu.engine.logit_rules import SequenceSampler
from danlu.errors import DanluError

VOCAB = 37
PROMPTS = [[5, 9, 30], [7], [11, 11, 12, 13, 14, 15, 16]]


def search(model: Any, prompt: list[int], beams: Beams, limit: int, stop_ids: list[int], least: int = 0) -> BeamSearch:
    """Ended, with the model run on whole sequences."""
    found = BeamSearch(beams, limit, stop_ids)
    while not found.done:
        rows = torch.tensor([prompt + running.token_ids for running in found.running])
        with torch.no_grad():
            logprobs = model(rows).logits[:, -1].log_softmax(dim=-1)
        if len(found.running[0].token_ids) < least:
            logprobs[:, stop_ids] = -torch.inf
        moves = found.advance(logprobs)
        assert [parent.tolist() for parent in rows[[parent for parent, _ in moves]]] == [
            prompt + running.token_ids[:-1] for running in found.running
        ]
        assert [token_id for _, token_id in moves] == [running.token_ids[-1] for running in found.running]
    return found


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize(("number", "length_penalty"), [(4, 1.0), (2, 0.0), (4, 2.5), (3, -1.0)])
@pytest.mark.parametrize(("stop_ids", "least"), [([1, 17, 30], 0), ([1, 17, 30], 6), ([], 0)])
def test_answers_are_those_of_transformers(
    llama: Any, early_stopping: Any, number: int, length_penalty: float, stop_ids: list[int], least: int
) -> None:
    """All that are returned, best first, with their scores."""
    for prompt in PROMPTS:
        found = search(llama, prompt, Beams(number, length_penalty, early_stopping), 14, stop_ids, least)
        theirs = llama.generate(
            torch.tensor([prompt]), num_beams=number, num_return_sequences=number, length_penalty=length_penalty,
            early_stopping=early_stopping, max_new_tokens=14, min_new_tokens=least or None, do_sample=False,
            eos_token_id=stop_ids or [-1], pad_token_id=2, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        for ours, row in zip(found.finished, theirs.sequences.tolist(), strict=True):
            answer = row[len(prompt) :]
            assert answer[: len(ours.token_ids)] == ours.token_ids
            assert set(answer[len(ours.token_ids) :]) <= {2}
        scores = torch.tensor([found.score(hypothesis) for hypothesis in found.finished])
        torch.testing.assert_close(scores, theirs.sequences_scores)


def test_the_fixed_set_tells_the_settings_apart(llama: Any) -> None:
    """Or the test above would pass with them ignored."""

    def answers(beams: Beams, stop_ids: list[int], least: int = 0) -> list[list[list[int]]]:
        found = [search(llama, prompt, beams, 14, stop_ids, least) for prompt in PROMPTS]
        return [[hypothesis.token_ids for hypothesis in each.finished] for each in found]

    plain = answers(Beams(4), [1, 17, 30])
    assert len({len(answer) for each in plain for answer in each}) > 3
    assert plain != answers(Beams(4), [1])
    assert plain != answers(Beams(4), [1, 17, 30], 6)
    assert plain != answers(Beams(4, 0.0), [1, 17, 30])
    assert plain != answers(Beams(4, early_stopping=True), [1, 17, 30])
    assert plain != answers(Beams(4, early_stopping="never"), [1, 17, 30])
    assert plain != answers(Beams(2), [1, 17, 30])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.sampled_from([0.0, 1.0, -0.5]))
def test_with_room_for_all_the_best_of_all_is_found(seed: int, limit: int, length_penalty: float) -> None:
    """Four tokens, one of which ends an answer: as many beams as there are beginnings leave nothing out."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(5, 4, generator=generator).mul(2).log_softmax(dim=-1)  # by the last token; row 4: the first
    found = BeamSearch(Beams(81, length_penalty, early_stopping="never"), limit, {0})
    while not found.done:
        found.advance(table[[running.token_ids[-1] if running.token_ids else 4 for running in found.running]])

    def score(answer: tuple[int, ...]) -> float:
        return found.score(
            Hypothesis(list(answer), sum(float(table[a, b]) for a, b in itertools.pairwise((4, *answer))))
        )

    whole = [
        answer
        for length in range(1, limit + 1)
        for answer in itertools.product(range(4), repeat=length)
        if 0 not in answer[:-1] and (answer[-1] == 0 or length == limit)
    ]
    expected = sorted(whole, key=score, reverse=True)[:81]
    assert len(found.finished) == len(expected)
    for ours, theirs in zip(found.finished, expected, strict=True):
        assert found.score(ours) == pytest.approx(score(theirs), rel=1e-5)


def test_what_is_barred_is_in_no_answer() -> None:
    """And fewer answers run than there are beams, where no more are allowed."""
    found = BeamSearch(Beams(4), 5, {0})
    lowest = torch.finfo(torch.float32).min
    assert found.advance(torch.tensor([[-torch.inf, -1.0, lowest, -3.0]])) == [(0, 1), (0, 3)]
    assert found.advance(torch.tensor([[-0.5, lowest, -1.0, -torch.inf], [lowest] * 4])) == [(0, 2)]
    assert [answer.token_ids for answer in found.finished] == [[1, 0]]


def test_rules_change_log_probabilities_without_normalising_them_again() -> None:
    """As in transformers. An answer with no token left ends; with no answer left, so does the request."""
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0))
    expected = logits.log_softmax(dim=-1)

    def sampler(**options: Any) -> SequenceSampler:
        return SequenceSampler(SamplingParams(temperature=0, **options), [1], VOCAB, [0], 0)

    torch.testing.assert_close(beam_logprobs(logits, [sampler(), sampler()]), expected)
    stuck = sampler(banned_tokens=tuple(range(VOCAB)))
    found = beam_logprobs(logits, [sampler(min_new_tokens=1, logit_bias={5: 2.0}), stuck])
    expected[0, 0] = -torch.inf
    expected[0, 5] += 2.0
    expected[1] = -torch.inf
    torch.testing.assert_close(found, expected)
    with pytest.raises(DanluError, match="leave no token"):
        beam_logprobs(logits, [stuck, stuck])


@pytest.mark.parametrize(
    ("beams", "message"),
    [
        ({"number": 0}, "0 are too few"),
        ({"number": 2, "length_penalty": float("nan")}, "length_penalty of nan is out of bounds"),
        ({"number": 2, "length_penalty": -1e6}, "out of bounds"),
        ({"number": 2, "early_stopping": "soon"}, "early_stopping is 'soon'"),
    ],
)
def test_mistakes_are_told(beams: dict[str, Any], message: str) -> None:
    with pytest.raises(DanluError, match=message):
        Beams(**beams)
