"""Batch generation against transformers, and against itself without cache and neighbours; streaming as a property."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.engine.config import SamplingParams
from danlu.engine.engine import Engine
from danlu.engine.engine_config import EngineConfig
from danlu.engine.generate import generate_text, generate_tokens, stream_text
from danlu.engine.text_stream import TextStream
from danlu.errors import DanluError
from danlu.models.causal_lm import CausalLM
from random_lm import random_lm

BOS, STOP = 256, 257


class ByteTokenizer:
    """What generation needs of a tokenizer, at one byte a token."""

    bos_id, stop_ids, vocab_size, add_bos = BOS, (STOP,), 258, True

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode_bytes(self, ids: list[int]) -> bytes:
        return bytes(i for i in ids if i < 256)

    def is_special(self, token_id: int) -> bool:
        return token_id >= 256


TOKENIZER = ByteTokenizer()
GREEDY = SamplingParams(temperature=0, max_new_tokens=20)
PROMPTS = ["a", "def f(x):", "丹炉 refines", "0123456789" * 3]


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return random_lm(258, context=64)


def without_cache(model: CausalLM, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(n):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_is_what_transformers_generates(model: CausalLM, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from danlu.models.load import save_model

    save_model(model, tmp_path)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    completions = generate_text(model, TOKENIZER, PROMPTS, GREEDY)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = torch.tensor([[BOS, *prompt.encode()]])
        theirs = peer.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=STOP, pad_token_id=STOP)
        theirs = theirs[0, ids.shape[1] :].tolist()
        assert completion.token_ids == [i for i in theirs if i != STOP]
        assert completion.finish_reason == ("stop" if STOP in theirs else "length")


def test_beams_are_those_of_transformers(model: CausalLM, tmp_path: Path) -> None:
    """Several searches beside a greedy answer, in few blocks."""
    from transformers import AutoModelForCausalLM

    from danlu.models.load import save_model

    save_model(model, tmp_path)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    params = replace(GREEDY, beams=3, n=3, max_new_tokens=10, length_penalty=0.5)
    with Engine(model, EngineConfig(max_running=8, step_tokens=16), TOKENIZER) as engine:
        generations = engine.generate(PROMPTS + PROMPTS[:1], [params] * len(PROMPTS) + [GREEDY])
        engine.check()
        assert engine.stats.blocks_used == 0
    for prompt, generation in zip(PROMPTS, generations, strict=False):
        ids = torch.tensor([[BOS, *prompt.encode()]])
        theirs = peer.generate(
            ids, num_beams=3, num_return_sequences=3, length_penalty=0.5, max_new_tokens=10, do_sample=False,
            eos_token_id=STOP, pad_token_id=STOP,
        )  # fmt: skip
        expected = [[i for i in row if i != STOP] for row in theirs[:, ids.shape[1] :].tolist()]
        assert [completion.token_ids for completion in generation.completions] == expected
    assert generations[-1].completions == generate_text(model, TOKENIZER, PROMPTS[:1], GREEDY)


def test_a_cache_changes_nothing(model: CausalLM) -> None:
    prompt = [BOS, *b"def f(x):"]
    assert list(generate_tokens(model, prompt, GREEDY)) == without_cache(model, prompt, 20)


@pytest.mark.parametrize(
    "options",
    [
        {"max_running": 4, "step_tokens": 4},
        {"block_size": 1},
        {"draft": "ngram"},
        {"prefix_cache": False},
        {"kv_memory": 1, "block_size": 64},
    ],
)
def test_how_the_engine_runs_changes_nothing(model: CausalLM, options: dict[str, Any]) -> None:
    expected = generate_text(model, TOKENIZER, PROMPTS, GREEDY)
    with Engine(model, EngineConfig(**options), TOKENIZER) as engine:
        for _ in range(2):
            assert [g.completions[0] for g in engine.generate(PROMPTS, GREEDY)] == expected
        engine.check()


def test_an_engine_opens_a_folder_and_a_draft_model(model_folder: Path, model: CausalLM) -> None:
    from danlu.models.load import load_model
    from danlu.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(model_folder)
    prompts = ["def f", "return x +"]
    loaded = load_model(model_folder, CausalLM)
    expected = generate_text(loaded, tokenizer, prompts, GREEDY)
    for options in ({}, {"draft_model": model_folder}):
        with Engine(model_folder, EngineConfig(precision="fp32", **options)) as engine:
            generations = engine.generate(prompts, GREEDY)
            assert [g.completions[0] for g in generations] == expected
            assert (sum(g.stats.accepted for g in generations) > 0) == bool(options)
            ids = torch.tensor([tokenizer.encode(prompts[0])])
            with torch.inference_mode():
                logprobs = loaded(ids)[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].tolist()
                states = loaded.hidden_states(ids)[0].float()
            scores = [one.logprob for one in engine.score([ids[0].tolist()])[0][1:] if one is not None]
            assert scores == pytest.approx(logprobs, abs=1e-4)
            torch.testing.assert_close(engine.embed([ids[0].tolist()])[0], states.mean(0), atol=1e-4, rtol=1e-4)
    with pytest.raises(DanluError, match="no such model"):
        Engine(model_folder / "nothing")
    with pytest.raises(DanluError, match="tokenizer"):
        Engine(model, EngineConfig(draft_model=model_folder))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_neighbours_change_nothing(model: CausalLM, temperature: float) -> None:
    """Same answers alone, in one batch (padded, with rows that leave early), in batches of two, in another order."""
    params = [
        replace(GREEDY, temperature=temperature, seed=i, max_new_tokens=5 + 4 * i, stop=("e",))
        for i in range(len(PROMPTS))
    ]
    alone = [generate_text(model, TOKENIZER, [p], q)[0] for p, q in zip(PROMPTS, params, strict=True)]
    assert generate_text(model, TOKENIZER, PROMPTS, params) == alone
    assert generate_text(model, TOKENIZER, PROMPTS, params, batch_size=2) == alone
    assert generate_text(model, TOKENIZER, PROMPTS[::-1], params[::-1]) == alone[::-1]
    assert len({len(c.token_ids) for c in alone}) > 2  # they did leave at different times


def test_seeds_repeat_and_differ(model: CausalLM) -> None:
    params = SamplingParams(seed=5, max_new_tokens=12)
    first, second = generate_text(model, TOKENIZER, ["a", "a"], params)
    assert first == second == generate_text(model, TOKENIZER, ["a"], params)[0]
    assert generate_text(model, TOKENIZER, ["a"], replace(params, seed=6))[0] != first
    unseeded = generate_text(model, TOKENIZER, ["a"] * 4, replace(params, seed=None))
    assert len({c.text for c in unseeded}) == 4


def test_stop_token_and_stop_string_end_the_answer(model: CausalLM) -> None:
    plain = generate_text(model, TOKENIZER, ["a"], replace(GREEDY, max_new_tokens=12))[0]
    assert plain.finish_reason == "length"
    assert len(plain.token_ids) == 12
    third = plain.token_ids[3]

    class StopsThere(ByteTokenizer):
        stop_ids = (third,)

    stopped = generate_text(model, StopsThere(), ["a"], GREEDY)[0]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == plain.token_ids[: plain.token_ids.index(third)]

    stop = plain.text[1:3]
    cut = generate_text(model, TOKENIZER, ["a"], replace(GREEDY, stop=(stop,)))[0]
    assert cut.finish_reason == "stop"
    assert cut.text == plain.text[: plain.text.index(stop)]
    assert "".join(stream_text(model, TOKENIZER, "a", replace(GREEDY, stop=(stop,)))) == cut.text


def test_the_context_is_a_limit_and_not_an_error(model: CausalLM) -> None:
    prompts = [[BOS, *b"x" * 59], [BOS]]
    long, short = generate_text(model, TOKENIZER, prompts, replace(GREEDY, max_new_tokens=1000))
    assert (len(long.token_ids), long.finish_reason) == (4, "length")
    assert len(short.token_ids) == 63
    assert short.token_ids == without_cache(model, [BOS], 63)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[BOS] * 64], r"the prompt: has 64 tokens, the model's context 64"),
        ([[BOS], [BOS] * 70], r"prompt 2: has 70 tokens"),
        ([[]], "is empty"),
        ([[BOS, 258]], "outside the model's vocabulary of 258"),
        ([[BOS, -1]], "outside the model's vocabulary"),
    ],
)
def test_prompts_that_cannot_be_run_are_refused(model: CausalLM, prompts: list[list[int]], message: str) -> None:
    with pytest.raises(DanluError, match=message):
        generate_text(model, TOKENIZER, prompts, GREEDY)
    with pytest.raises(DanluError):
        list(generate_tokens(model, prompts[-1], GREEDY))


def test_progress_counts_every_prompt(model: CausalLM) -> None:
    seen: list[int] = []
    assert generate_text(model, TOKENIZER, [], GREEDY) == []
    generate_text(model, TOKENIZER, PROMPTS, GREEDY, batch_size=3, progress=seen.append)
    assert sum(seen) == len(PROMPTS)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(min(c, len(data)) for c in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(places)]


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="abc丹🔥\n", max_size=30),
    stop=st.lists(st.text(alphabet="abc丹🔥", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 80), max_size=20),
)
def test_streamed_text_ends_before_the_first_stop_string_however_it_is_cut(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    ends = [(text.index(s) + len(s), text.index(s)) for s in stop if s in text]
    expected = text[: min(ends)[1]] if ends else text
    stream = TextStream(TOKENIZER, stop)
    shown = ""
    for piece in pieces(text.encode(), cuts):
        shown += stream.push_bytes(piece)
        assert expected.startswith(shown)  # nothing was shown that had to be taken back
    assert shown + stream.finish() == expected
    assert stream.stopped == bool(ends)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=30), cuts=st.lists(st.integers(0, 30), max_size=10))
def test_any_bytes_stream_as_they_decode(data: bytes, cuts: list[int]) -> None:
    """Broken UTF-8 shows replacement characters; only a character whose end never came is left out."""
    stream = TextStream(TOKENIZER)
    shown = "".join(stream.push_bytes(piece) for piece in pieces(data, cuts)) + stream.finish()
    whole = data.decode("utf-8", errors="replace")
    assert whole.startswith(shown)
    assert whole[len(shown) :] in ("", "\N{REPLACEMENT CHARACTER}")


def test_half_a_character_is_held_back() -> None:
    stream = TextStream(TOKENIZER, ["🔥!"])
    assert [stream.push_bytes(bytes([b])) for b in "丹🔥x".encode()] == ["", "", "丹", "", "", "", "", "🔥x"]
