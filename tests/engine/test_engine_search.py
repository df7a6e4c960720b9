"""Beam search and guesses inside the engine: blocks fork, die and roll back, and the answers are what they were."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from danlu.engine.batch import Runner
from danlu.engine.config import SamplingParams
from danlu.engine.engine import Engine
from danlu.engine.engine_config import EngineConfig
from danlu.engine.request import Generation
from danlu.engine.torch_runner import TorchRunner
from danlu.models.causal_lm import CausalLM
from danlu.models.load import load_model, save_model
from danlu.tokenizer.tokenizer import Tokenizer

VOCAB = 37
STOPS = (1, 17, 30)
PROMPTS = [[5, 9, 30], [7], [11, 11, 12, 13, 14, 15, 16], [5, 9, 30, 6, 3] * 4]
SMALL = {
    "precision": "fp32",
    "max_running": 16,
    "step_tokens": 64,
    "block_size": 4,
    "kv_memory": 4,
}  # fp32: an answer does not depend on what else runs
PERIODIC = [[40, 41, 42, 43] * 3, [50, 51] * 5, [*range(60, 75), *range(60, 70)]]
"""They repeat themselves, so that there is something to look up at once."""


@pytest.fixture(scope="module")
def opened(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    folder = tmp_path_factory.mktemp("llama")
    llama.save_pretrained(folder)
    return load_model(folder, CausalLM)


@pytest.fixture(scope="module")
def stranger(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the same tokenizer and other weights."""
    model = load_model(model_folder, CausalLM)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    folder = tmp_path_factory.mktemp("models") / "stranger"
    save_model(model, folder, Tokenizer.load(model_folder))
    return folder


def answers(
    model: Path | CausalLM | Runner,
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> list[Generation]:
    """All at once, with the accounts of the blocks checked after each step."""
    found = {}
    with Engine(model, EngineConfig(**{**SMALL, **options}), tokenizer) as engine:
        for number, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
            engine.submit(prompt, one, request_id=str(number))
        while engine.has_work:
            for event in engine.step():
                if event.generation is not None:
                    found[int(event.request_id)] = event.generation
            engine.check()
        assert engine.stats.blocks_used == 0
    return [found[number] for number in range(len(prompts))]


def token_ids(generations: Sequence[Generation]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in generation.completions] for generation in generations]


@pytest.mark.parametrize(("least", "length_penalty", "early_stopping"), [(0, 1.0, False), (6, 2.0, True)])
def test_beam_search_is_that_of_transformers(
    least: int, length_penalty: float, early_stopping: bool, llama: Any, opened: CausalLM
) -> None:
    """Beside other requests, in a cache that is too small for all of them."""
    params = SamplingParams(
        temperature=0, beams=4, n=4, max_new_tokens=14, min_new_tokens=least, stop_ids=STOPS,
        length_penalty=length_penalty, early_stopping=early_stopping,
    )  # fmt: skip
    sampled = SamplingParams(max_new_tokens=14, stop_ids=STOPS, seed=1)
    prompts, each = [*PROMPTS, *PROMPTS], [params] * len(PROMPTS) + [sampled] * len(PROMPTS)
    found = token_ids(answers(opened, prompts, each))
    for prompt, ours in zip(PROMPTS, found, strict=False):
        theirs = llama.generate(
            torch.tensor([prompt]), num_beams=4, num_return_sequences=4, length_penalty=length_penalty,
            early_stopping=early_stopping, max_new_tokens=14, min_new_tokens=least or None, do_sample=False,
            eos_token_id=list(STOPS), pad_token_id=2,
        )[:, len(prompt) :].tolist()  # fmt: skip
        ends = [next((i for i, token_id in enumerate(row) if token_id in STOPS), len(row)) for row in theirs]
        assert ours == [row[:end] for row, end in zip(theirs, ends, strict=True)]
    assert found[len(PROMPTS) :] == token_ids(answers(opened, PROMPTS, [sampled] * len(PROMPTS)))


@pytest.mark.parametrize("draft", ["ngram", "itself", "stranger"])
def test_a_greedy_answer_is_the_same_with_guesses(draft: str, model_folder: Path, stranger: Path) -> None:
    """Right ones and wrong ones."""
    options = {"draft": "ngram"} if draft == "ngram" else {"draft_model": {"itself": model_folder}.get(draft, stranger)}
    params = [
        SamplingParams(temperature=0, max_new_tokens=40),
        SamplingParams(temperature=0, max_new_tokens=33, repetition_penalty=1.02, frequency_penalty=0.01),
        SamplingParams(temperature=0, max_new_tokens=25, logprobs=2),
    ]
    plain = answers(model_folder, PERIODIC, params)
    guessed = answers(model_folder, PERIODIC, params, **options)
    assert token_ids(guessed) == token_ids(plain)
    assert [c.text for g in guessed for c in g.completions] == [c.text for g in plain for c in g.completions]
    for ours, theirs in zip(guessed[2].completions, plain[2].completions, strict=True):
        assert ours.logprobs is not None
        assert [one.token_id for one in ours.logprobs] == theirs.token_ids
    drafted, accepted = (sum(getattr(g.stats, name) for g in guessed) for name in ("drafted", "accepted"))
    assert all(generation.stats.drafted == 0 for generation in plain)
    if draft == "itself":
        assert accepted > 0.9 * drafted > 50
    else:
        assert 0 < accepted < drafted


def test_a_seed_means_the_same_answer_with_looked_up_guesses(model_folder: Path) -> None:
    params = [SamplingParams(temperature=0.3, max_new_tokens=40, seed=seed) for seed in range(len(PERIODIC))]
    plain, guessed = (answers(model_folder, PERIODIC, params, draft=draft) for draft in ("none", "ngram"))
    assert token_ids(guessed) == token_ids(plain)
    assert sum(generation.stats.drafted for generation in guessed) > 10


def test_sampled_answers_have_the_same_odds_with_a_draft_model(model_folder: Path, stranger: Path) -> None:
    """Three tokens together: the first is drawn without a guess, the others with one."""
    prompt, tokens, n = [40, 41, 42], (70, 71, 72), 300
    params = SamplingParams(max_new_tokens=4, temperature=0.8, allowed_tokens=tokens, ignore_eos=True)
    each = [replace(params, seed=seed) for seed in range(n)]
    found = answers(model_folder, [prompt] * n, each, draft_model=stranger)
    drafted, accepted = (sum(getattr(g.stats, name) for g in found) for name in ("drafted", "accepted"))
    assert 0.2 * drafted < accepted < 0.95 * drafted
    seen = Counter(tuple(answer[:3]) for (answer,) in token_ids(found))
    model = load_model(model_folder, CausalLM)

    def odds(ids: list[int]) -> dict[int, float]:
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1, list(tokens)]
        return dict(zip(tokens, (logits / 0.8).softmax(dim=-1).tolist(), strict=True))

    every = list(itertools.product(tokens, repeat=3))
    expected = [n * odds(prompt)[a] * odds([*prompt, a])[b] * odds([*prompt, a, b])[c] for a, b, c in every]
    observed = [seen[ids] for ids in every]
    often = [i for i, times in enumerate(expected) if times >= 5]
    assert len(often) > 5
    rare = [n - sum(counts[i] for i in often) for counts in (observed, expected)]
    assert chisquare([*(observed[i] for i in often), rare[0]], [*(expected[i] for i in often), rare[1]]).pvalue > 0.01


@pytest.mark.parametrize("draft", ["ngram", "stranger"])
def test_guesses_take_no_blocks_from_others(draft: str, model_folder: Path, stranger: Path) -> None:
    """Where the cache is full the answers are still the same, and every rejected block comes back."""
    options = {"draft": "ngram"} if draft == "ngram" else {"draft_model": stranger}
    prompts = [PERIODIC[i % 3][: 4 + i] for i in range(9)]
    params = [SamplingParams(temperature=0, max_new_tokens=30 + i) for i in range(9)]
    plain = answers(model_folder, prompts, params)

    class Tight(TorchRunner):
        def block_bytes(self, group: int) -> int:
            return (1 << 20) // 40

    runner = Tight(load_model(model_folder, CausalLM), block_size=4)
    guessed = answers(
        runner, prompts, params, Tokenizer.load(model_folder), context=60, max_running=9, kv_memory=1, **options
    )
    assert token_ids(guessed) == token_ids(plain)
    assert sum(generation.stats.preemptions for generation in guessed) > 0
    assert sum(generation.stats.drafted for generation in guessed) > 20
