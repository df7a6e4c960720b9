"""/v1/completions through the official client, against the engine itself."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion

from danlu.engine.config import SamplingParams
from danlu.engine.engine import Engine
from danlu.engine.engine_config import EngineConfig
from danlu.tokenizer.tokenizer import Tokenizer

PROMPT = "def f1(x):\n    return x"
MULTIBYTE = "# 丹炉 😀 naïve"
http = httpx.Client(trust_env=False, timeout=60)  # one: each would read the system's certificates


@pytest.fixture(scope="module")
def client(tiny_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{tiny_url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def engine(model_folder: Path) -> Iterator[Engine]:
    with Engine(model_folder, EngineConfig(kv_memory=64)) as engine:
        yield engine


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer.load(model_folder)


def post(url: str, **body: Any) -> httpx.Response:
    return http.post(f"{url}/v1/completions", json=body)


def refused(url: str, **body: Any) -> dict[str, Any]:
    answer = post(url, **body)
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


def merged(chunks: list[Completion]) -> dict[int, dict[str, Any]]:
    """The choices of a stream, put together."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            one = choices.setdefault(choice.index, {"text": "", "finish_reason": None, "logprobs": None})
            assert one["finish_reason"] is None, "nothing comes after the end"
            one["text"] += choice.text
            one["finish_reason"] = choice.finish_reason
            if choice.logprobs is not None:
                new = choice.logprobs.model_dump()
                one["logprobs"] = new if one["logprobs"] is None else {k: one["logprobs"][k] + new[k] for k in new}
    return choices


def test_an_answer_is_the_engines(client: openai.OpenAI, engine: Engine, tokenizer: Tokenizer) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, temperature=0)
    (expected,) = engine.generate([PROMPT], SamplingParams(max_new_tokens=12, temperature=0))
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == "tiny"
    assert [choice.text for choice in answer.choices] == [expected.completions[0].text]
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs is None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(expected.prompt_ids)
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == len(expected.prompt_ids) + 12


def test_the_default_is_sixteen_tokens_from_the_start_of_a_document(client: openai.OpenAI, engine: Engine) -> None:
    answer = client.post("/completions", body={"seed": 3, "ignore_eos": True}, cast_to=Completion)
    (expected,) = engine.generate([""], SamplingParams(max_new_tokens=16, seed=3, ignore_eos=True))
    assert answer.choices[0].text == expected.completions[0].text
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (1, 16)


def test_prompts_may_be_texts_or_ids(client: openai.OpenAI, engine: Engine) -> None:
    texts = [PROMPT, "return 12", MULTIBYTE]
    found = engine.generate(texts, SamplingParams(max_new_tokens=6, temperature=0))
    expected = [one.completions[0].text for one in found]
    ids = [one.prompt_ids for one in found]
    for prompt in (texts, ids):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0)  # type: ignore[arg-type]
        assert [choice.text for choice in answer.choices] == expected
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    alone = client.completions.create(model="tiny", prompt=ids[1], max_tokens=6, temperature=0)
    assert [choice.text for choice in alone.choices] == expected[1:2]


def test_a_stream_is_the_same_answers_in_pieces(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "prompt": [PROMPT, MULTIBYTE], "n": 2, "seed": 5, "max_tokens": 20, "logprobs": 2,
    }  # fmt: skip
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert len({choice.text for choice in whole.choices}) == 4
    found = merged(chunks)
    assert found == {
        one.index: {
            "text": one.text,
            "finish_reason": one.finish_reason,
            "logprobs": one.logprobs.model_dump() if one.logprobs else None,
        }
        for one in whole.choices
    }
    assert len({chunk.id for chunk in chunks}) == 1
    *others, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.model_dump(exclude={"prompt_tokens_details"}) == whole.usage.model_dump(
        exclude={"prompt_tokens_details"}
    )
    assert all(chunk.usage is None for chunk in others)
    assert len(chunks) > 8


def test_the_wire_of_a_stream(tiny_url: str) -> None:
    answer = post(tiny_url, prompt=PROMPT, max_tokens=3, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, end, nothing = answer.content.split(b"\n\n")
    assert (end, nothing) == (b"data: [DONE]", b"")
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events]
    assert all(chunk.keys() == {"id", "object", "created", "model", "choices"} for chunk in chunks)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "length"


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("prompt", [PROMPT, MULTIBYTE])
def test_echo_gives_the_prompt_and_its_log_probabilities(
    client: openai.OpenAI, engine: Engine, tokenizer: Tokenizer, prompt: str, as_ids: bool
) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)] if tokenizer.add_bos else tokenizer.encode(prompt)
    answer = client.completions.create(
        model="tiny", prompt=ids if as_ids else prompt, max_tokens=4, temperature=0, echo=True, logprobs=3
    )
    choice = answer.choices[0]
    given_back = tokenizer.decode(ids) if as_ids else prompt
    (written,) = engine.generate([ids], SamplingParams(max_new_tokens=4, temperature=0, logprobs=0))
    assert choice.text == given_back + written.completions[0].text
    assert choice.logprobs is not None
    told, tops, offsets = choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, choice.logprobs.text_offset
    assert told is not None
    assert tops is not None
    assert offsets is not None
    (scored,) = engine.score([ids])
    expected = [one and one.logprob for one in [*scored, *(written.completions[0].logprobs or [])]]
    assert told == pytest.approx(expected, abs=1e-4)
    assert told[0] is tops[0] is None
    names = choice.logprobs.tokens or []
    assert len(names) == len(tops) == len(offsets) == len(ids) + 4
    for name, logprob, top in list(zip(names, told, tops, strict=True))[1:]:
        assert 3 <= len(top) <= 4
        assert top[name] >= logprob
    assert offsets == sorted(offsets)
    for name, offset in zip(names, offsets, strict=True):
        if not name.startswith("bytes:") and not (name == "<|endoftext|>" and not as_ids):
            assert choice.text.startswith(name, offset)


def test_harnesses_score_texts_by_echo(client: openai.OpenAI, engine: Engine, tokenizer: Tokenizer) -> None:
    """What lm-evaluation-harness sends and reads: lists of ids, one token more, whose entry it leaves away."""
    contexts = [tokenizer.encode(text) for text in ("def f1(x):", "丹炉 refines", "x")]
    endings = [tokenizer.encode(text) for text in ("\n    return x + 1", " text", "y")]
    ids = [context + ending for context, ending in zip(contexts, endings, strict=True)]
    answer = client.completions.create(
        model="tiny", prompt=ids, max_tokens=1, temperature=0, echo=True, logprobs=1, seed=1234,
        extra_body={"logit_bias": {str(tokenizer.eos_id): 100}},  # the answer is a stop token
    )  # fmt: skip
    choices = sorted(answer.choices, key=lambda choice: choice.index)
    for choice, context, scored in zip(choices, contexts, engine.score(ids), strict=True):
        assert choice.logprobs is not None
        found = (choice.logprobs.token_logprobs or [])[len(context) : -1]
        expected = [one.logprob for one in scored[len(context) :] if one is not None]
        assert found == pytest.approx(expected, abs=1e-4)


def test_the_likeliest_token_has_the_same_number_in_both_places(client: openai.OpenAI) -> None:
    """Harnesses compare them to tell whether an answer is greedy."""
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=40, temperature=0, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == [max(top.values()) for top in logprobs.top_logprobs or []]


def test_nothing_is_written_for_zero_tokens_with_echo(client: openai.OpenAI, engine: Engine) -> None:
    texts = [PROMPT, MULTIBYTE]
    plain = client.completions.create(model="tiny", prompt=texts, max_tokens=0, echo=True, n=2)
    assert [(choice.index, choice.text) for choice in plain.choices] == list(enumerate([PROMPT] * 2 + [MULTIBYTE] * 2))
    assert plain.choices[0].logprobs is None
    assert plain.usage is not None
    assert plain.usage.completion_tokens == 0
    scored = client.completions.create(model="tiny", prompt=texts, max_tokens=0, echo=True, logprobs=2)
    for choice, expected in zip(scored.choices, engine.score(texts), strict=True):
        assert choice.finish_reason == "length"
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs == pytest.approx([one and one.logprob for one in expected], abs=1e-4)
    asked: dict[str, Any] = {"model": "tiny", "prompt": texts, "max_tokens": 0, "echo": True, "logprobs": 2}
    found = merged(list(client.completions.create(**asked, stream=True)))
    assert [found[i]["text"] for i in range(2)] == texts
    assert [found[i]["logprobs"] for i in range(2)] == [
        choice.logprobs.model_dump() for choice in scored.choices if choice.logprobs
    ]


def test_echo_in_a_stream_comes_first(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 5, "temperature": 0, "echo": True}
    for more in ({}, {"logprobs": 1}):
        whole = client.completions.create(**asked, **more)
        found = merged(list(client.completions.create(**asked, **more, stream=True)))
        assert found[0]["text"] == whole.choices[0].text
        assert whole.choices[0].text.startswith(PROMPT)


def test_a_suffix_fills_the_gap(client: openai.OpenAI, engine: Engine, tokenizer: Tokenizer) -> None:
    prefix, middle, suffix = (tokenizer.id_of(f"<|fim_{name}|>") for name in ("prefix", "middle", "suffix"))
    begin = [tokenizer.bos_id] if tokenizer.add_bos else []
    ids = [*begin, prefix, *tokenizer.encode(PROMPT), suffix, *tokenizer.encode("\n# end"), middle]
    (expected,) = engine.generate([ids], SamplingParams(max_new_tokens=8, temperature=0))
    answer = client.completions.create(model="tiny", prompt=PROMPT, suffix="\n# end", max_tokens=8, temperature=0)
    assert answer.choices[0].text == expected.completions[0].text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)
    plain = client.completions.create(model="tiny", prompt=PROMPT, suffix="", max_tokens=8, temperature=0)
    assert plain.usage is not None
    assert plain.usage.prompt_tokens == len(engine.tokenizer.encode(PROMPT)) + len(begin)  # type: ignore[union-attr]


def test_stop_texts_and_stop_ids(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 30, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    stop = text[5:8]
    for given in (stop, [stop, "never said"]):
        choice = client.completions.create(**asked, stop=given).choices[0]
        assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")
    first = client.completions.create(**asked, logprobs=0).choices[0].logprobs
    assert first is not None
    ended = client.completions.create(**asked, extra_body={"stop_token_ids": [*range(30, 320)]}).choices[0]
    assert ended.finish_reason == "stop"
    assert len(ended.text) < len(text)


def test_structures_and_other_extras(client: openai.OpenAI) -> None:
    def ask(**extra: Any) -> list[str]:
        answer = client.completions.create(model="tiny", prompt="x", max_tokens=60, seed=1, extra_body=extra)
        return [choice.text for choice in answer.choices]

    assert ask(structured_outputs={"choice": ["丹炉"]}) == ["丹炉"]
    assert re.fullmatch("[ab]{4}", *ask(structured_outputs={"regex": "[ab]{4}"}))
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    (text,) = ask(structured_outputs={"json": schema})
    assert isinstance(json.loads(text)["a"], bool)
    assert re.fullmatch("(yes|no)+", *ask(structured_outputs={"grammar": 'start: ("yes" | "no")~3'}))
    assert ask(top_k=1) == ask(temperature=0) == ask(min_p=1.0) == ask(top_p=0)


def test_beam_search_and_the_best_of_many(client: openai.OpenAI, engine: Engine) -> None:
    extra = {"use_beam_search": True, "length_penalty": 0.5}
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=6, n=2, best_of=3, extra_body=extra)
    params = SamplingParams(max_new_tokens=6, n=2, beams=3, length_penalty=0.5, temperature=0)
    (expected,) = engine.generate([PROMPT], params)
    assert [choice.text for choice in answer.choices] == [one.text for one in expected.completions]
    best = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=6, n=1, best_of=4, seed=3, logprobs=0)
    all_four = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=6, n=4, seed=3, logprobs=0)
    sums = [sum(choice.logprobs.token_logprobs or []) for choice in all_four.choices if choice.logprobs]  # type: ignore[arg-type]
    assert best.choices[0].text == all_four.choices[sums.index(max(sums))].text
    assert best.usage is not None
    assert best.usage.completion_tokens == 24


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt.1"),
        ({"prompt": [[]]}, "prompt.0"),
        ({"prompt": [1, "a"]}, "prompt.1"),
        ({"prompt": [True]}, "prompt.0"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [[1], [10**6]]}, "prompt.1"),
        ({"prompt": [[1], [10**6]], "echo": True}, "prompt.1"),
        ({"prompt": "x" * 100_000}, "prompt"),
        ({"prompt": ["x"] * 129}, "prompt"),
        ({"prompt": ["x"] * 65, "n": 2}, "prompt"),
        ({"prompt": [1], "suffix": "y"}, "suffix"),
        ({"suffix": "y", "echo": True}, "echo"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"max_tokens": 10**12}, "max_tokens"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"n": 10**6}, "n"),
        ({"n": 2, "best_of": 1}, None),
        ({"best_of": 10**6}, "best_of"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop.1"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "foo**"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "(?<=x)*"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"json": {"$ref": "#"}}}, "structured_outputs.json"),
        ({"structured_outputs": {"guidance": "x"}}, "structured_outputs.guidance"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"use_beam_search": True, "n": 2, "temperature": 1}, "use_beam_search"),
        ({"use_beam_search": True, "n": 2, "logprobs": 1}, "logprobs"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"messages": []}, "messages"),
        ({"grammar": "x"}, "grammar"),
        ({"min_tokens": 20}, None),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(tiny_url: str, body: dict[str, Any], param: str | None) -> None:
    error = refused(tiny_url, **({"prompt": "x"} | body))
    assert error["param"] == param
    assert error["message"].startswith(param or ("best_of", "min_tokens"))


@pytest.mark.parametrize(
    "raw",
    [
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "\\ud800"}',
        b"[]",
        b"nothing",
        b'{"prompt": "x", "prompt": 3}',
    ],
)
def test_bodies_that_are_no_request_are_refused(tiny_url: str, raw: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = http.post(f"{tiny_url}/v1/completions", content=raw, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_a_model_that_is_not_there(tiny_url: str) -> None:
    answer = post(tiny_url, model="gpt-4", prompt="x")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


def test_a_client_that_goes_away_ends_all_its_answers(tiny_url: str) -> None:
    def becomes(busy: bool) -> bool:
        """The server tells what the engine does a few times a second."""
        until = time.monotonic() + 20
        while time.monotonic() < until:
            text = http.get(f"{tiny_url}/metrics").text
            counts = re.findall(r"^danlu_(?:running|queue|cache_blocks_used){.*} (.*)$", text, re.MULTILINE)
            assert len(counts) == 3
            if any(map(float, counts)) == busy:
                return True
            time.sleep(0.05)
        return False

    body = {"prompt": [PROMPT, "x", "y"], "n": 4, "max_tokens": 4000, "stream": True, "ignore_eos": True}
    with http.stream("POST", f"{tiny_url}/v1/completions", json=body) as stream:
        lines = stream.iter_lines()  # the stream is closed with it
        assert next(lines).startswith("data: ")
        assert becomes(busy=True)
    assert becomes(busy=False)
