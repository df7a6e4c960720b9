"""Batch generation against transformers, and against itself without cache and neighbours; streaming as a property."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.engine.generate import Decoder, TextStream, generate_text, generate_tokens, stream_text
from danlu.engine.sampling import SamplingParams
from danlu.errors import DanluError
from danlu.models.causal_lm import CausalLM
from danlu.nn.config import ModelConfig, Rope

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
    """A tiny random model whose logits are far enough apart that rounding does not change the choice."""
    config = ModelConfig(
        qk_norm="head",
        rope=Rope(),
        vocab_size=258,
        n_layers=2,
        dim=32,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        ffn_dim=64,
        context=64,
    )
    model = CausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3, generator=generator)
    return model.eval()


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


def test_a_cache_changes_nothing(model: CausalLM) -> None:
    prompt = [BOS, *b"def f(x):"]
    assert list(generate_tokens(model, prompt, GREEDY)) == without_cache(model, prompt, 20)


def test_a_prompt_longer_than_a_prefill_piece(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [c.token_ids for c in generate_text(model, TOKENIZER, PROMPTS, GREEDY)]
    monkeypatch.setattr("danlu.engine.generate.PREFILL_TOKENS", 4)
    assert [c.token_ids for c in generate_text(model, TOKENIZER, PROMPTS, GREEDY)] == expected


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
        Decoder(model, prompts, [GREEDY] * len(prompts))
    with pytest.raises(DanluError):
        generate_text(model, TOKENIZER, prompts, GREEDY)


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
