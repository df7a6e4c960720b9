"""POST /v1/chat/completions through the clients that people use, against real servers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import httpx
import jsonschema
import pydantic
import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from server_process import serving

from danlu.engine.config import SamplingParams
from danlu.engine.engine import Engine
from danlu.engine.engine_config import EngineConfig
from danlu.files import read_json, write_json
from danlu.tokenizer.tokenizer import Tokenizer

ASK: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]

ROLL: Any = {
    "type": "function",
    "function": {
        "name": "roll",
        "description": "Roll a die.",
        "parameters": {
            "type": "object",
            "properties": {"sides": {"enum": [4, 6, 20]}, "fair": {"type": "boolean"}},
            "required": ["sides", "fair"],
            "additionalProperties": False,
        },
    },
}
NOW: Any = {"type": "function", "function": {"name": "now", "strict": True}}
CLOSING = "5"
"""Id of </think> in the tiny model's vocabulary."""

SCHEMAS = {"roll": ROLL["function"]["parameters"], "now": {"type": "object", "maxProperties": 0}}


@pytest.fixture(scope="module")
def tiny(tiny_url: str) -> OpenAI:
    return OpenAI(base_url=f"{tiny_url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def small(smollm2_url: str) -> OpenAI:
    return OpenAI(base_url=f"{smollm2_url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def thinker(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    """A model whose prompts open a thought, unless they are told not to."""
    folder = tmp_path_factory.mktemp("models") / "thinker"
    folder.mkdir()
    for file in model_folder.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    config = read_json(folder / "tokenizer_config.json")
    header = "{{- '<|im_start|>assistant\\n' }}\n{%- endif %}"
    assert header in config["chat_template"]
    thinks = "('<think>\\n' if enable_thinking is not defined or enable_thinking)"
    opened = header.replace("assistant\\n'", f"assistant\\n' ~ {thinks}")
    config["chat_template"] = config["chat_template"].replace(header, opened)
    write_json(folder / "tokenizer_config.json", config)
    with serving(f"--model=thinker={folder}", data=tmp_path_factory.mktemp("thinker-server")) as server:
        yield OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def create(client: OpenAI, messages: Any = ASK, **options: Any) -> Any:
    return client.chat.completions.create(
        model=options.pop("model", None) or _model(client), messages=messages, **options
    )


def _model(client: OpenAI) -> str:
    return client.models.list().data[0].id


class Streamed:
    """The chunks of a stream, put together as clients do."""

    def __init__(self, chunks: Sequence[Any]) -> None:
        self.chunks = chunks
        self.texts: dict[int, str] = {}
        self.calls: dict[int, list[dict[str, Any]]] = {}
        self.reasons: dict[int, list[str]] = {}
        self.logprobs: list[Any] = []
        for chunk in chunks:
            for choice in chunk.choices:
                index, delta = choice.index, choice.delta
                if index not in self.texts:
                    assert delta.role == "assistant"
                    self.texts[index], self.calls[index], self.reasons[index] = "", [], []
                assert not self.reasons[index], "a choice goes on after its finish_reason"
                self.texts[index] += delta.content or ""
                for call in delta.tool_calls or ():
                    if call.index == len(self.calls[index]):
                        assert call.type == "function"
                        self.calls[index].append({"id": call.id, "name": call.function.name, "arguments": ""})
                    assert call.index == len(self.calls[index]) - 1
                    self.calls[index][-1]["arguments"] += call.function.arguments
                if choice.finish_reason:
                    self.reasons[index].append(choice.finish_reason)
                if choice.logprobs:
                    self.logprobs += choice.logprobs.content


def test_an_answer_is_the_engines(tiny: OpenAI, model_folder: Path) -> None:
    tokenizer = Tokenizer.load(model_folder)
    messages = [{"role": "system", "content": "丹炉"}, {"role": "user", "content": "def f1(x):"}]
    ids = tokenizer.encode_chat(messages, add_generation_prompt=True)
    engine = Engine(model_folder, EngineConfig())
    (expected,) = engine.generate([ids], SamplingParams(temperature=0, max_new_tokens=24))
    engine.close()
    answer = create(tiny, messages, temperature=0, max_tokens=24)
    (choice,) = answer.choices
    assert choice.message.content == expected.completions[0].text
    assert choice.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 24)
    assert answer.object == "chat.completion"
    assert answer.system_fingerprint
    again = create(tiny, messages, temperature=0, max_completion_tokens=24)
    assert again.choices[0].message.content == choice.message.content
    assert again.usage.prompt_tokens_details.cached_tokens > 0
    assert again.id != answer.id


def test_a_stream_adds_up_to_the_whole_answer(small: OpenAI) -> None:
    options: dict[str, Any] = {"seed": 7, "n": 3, "max_tokens": 12, "temperature": 0.8}
    whole = create(small, **options)
    chunks = list(create(small, stream=True, stream_options={"include_usage": True}, **options))
    streamed = Streamed(chunks)
    assert [streamed.texts[i] for i in range(3)] == [choice.message.content for choice in whole.choices]
    assert [streamed.reasons[i] for i in range(3)] == [[choice.finish_reason] for choice in whole.choices]
    assert len({chunk.id for chunk in chunks}) == 1
    *others, last = chunks
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens
    assert last.timings["tokens_per_second"] > 0
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in others)
    without = list(create(small, stream=True, **options))
    assert all(chunk.choices and "usage" not in chunk.model_fields_set for chunk in without)


def test_a_stream_on_the_wire(tiny_url: str) -> None:
    body = {"messages": ASK, "max_tokens": 2, "stream": True, "stream_options": {"include_obfuscation": False}}
    response = httpx.post(f"{tiny_url}/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert json.loads(events[0].removeprefix("data: "))["choices"][0]["delta"]["role"] == "assistant"


def test_logprobs_are_those_of_the_answers_tokens(small: OpenAI) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "logprobs": True}
    whole = create(small, top_logprobs=3, **options)
    tokens = whole.choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == whole.choices[0].message.content
    for token in tokens:
        assert bytes(token.bytes).decode() == token.token
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == max(one.logprob for one in token.top_logprobs)
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)  # greedy
    plain = create(small, **options)
    assert [token.top_logprobs for token in plain.choices[0].logprobs.content] == [[]] * len(tokens)
    streamed = Streamed(list(create(small, stream=True, **options)))
    assert [token.token for token in streamed.logprobs] == [token.token for token in tokens]


def test_stop_strings_never_show(small: OpenAI) -> None:
    text = create(small, temperature=0, max_tokens=10).choices[0].message.content
    stop = text[8:12]
    answer = create(small, temperature=0, max_tokens=10, stop=[stop, "never"])
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    streamed = Streamed(list(create(small, temperature=0, max_tokens=10, stop=stop, stream=True)))
    assert streamed.texts[0] == answer.choices[0].message.content


@pytest.mark.parametrize("choice", ["required", "named"])
@pytest.mark.parametrize("which", ["tiny", "small"])
def test_forced_calls_always_follow_their_schemas(which: str, choice: str, request: pytest.FixtureRequest) -> None:
    client: OpenAI = request.getfixturevalue(which)
    wanted = "required" if choice == "required" else {"type": "function", "function": {"name": "roll"}}
    options: dict[str, Any] = {
        "tools": [ROLL, NOW],
        "tool_choice": wanted,
        "parallel_tool_calls": False,
        "max_tokens": 200,
    }
    names = set()
    for seed in range(2):
        answer = create(client, seed=seed, **options).choices[0]
        (call,) = answer.message.tool_calls
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
        assert answer.finish_reason == "tool_calls"
        assert answer.message.content is None
        names.add(call.function.name)
        (streamed,) = Streamed(list(create(client, seed=seed, stream=True, **options))).calls.values()
        assert [(one["name"], one["arguments"]) for one in streamed] == [(call.function.name, call.function.arguments)]
    assert choice == "required" or names == {"roll"}


def test_several_calls_in_one_answer(small: OpenAI) -> None:
    streamed = Streamed(list(create(small, tools=[ROLL, NOW], tool_choice="required", seed=1, stream=True)))
    (calls,) = streamed.calls.values()
    assert len(calls) > 1
    assert len({call["id"] for call in calls}) == len(calls)
    for call in calls:
        jsonschema.validate(json.loads(call["arguments"]), SCHEMAS[call["name"]])
    assert streamed.reasons == {0: ["tool_calls"]}


SPELLED = {"regex": 'Sure\\. <tool_call>\\{"name": "roll", "arguments": \\{"sides": 6\\}\\}</tool_call>'}


def test_a_call_that_the_model_makes_by_itself(small: OpenAI) -> None:
    options: dict[str, Any] = {"tools": [ROLL], "extra_body": {"structured_outputs": SPELLED}}
    answer = create(small, **options).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("Sure.", "tool_calls")
    assert answer.message.tool_calls[0].function.arguments == '{"sides": 6}'
    streamed = Streamed(list(create(small, stream=True, **options)))
    assert streamed.texts[0] == "Sure."
    assert [call["arguments"] for call in streamed.calls[0]] == ['{"sides": 6}']
    none = create(small, tool_choice="none", **options).choices[0]
    assert none.message.content == 'Sure. <tool_call>{"name": "roll", "arguments": {"sides": 6}}</tool_call>'
    assert (none.message.tool_calls, none.finish_reason) == (None, "stop")


@pytest.mark.parametrize("which", ["tiny", "small"])
def test_results_of_tools_are_read(which: str, request: pytest.FixtureRequest) -> None:
    client: OpenAI = request.getfixturevalue(which)
    first = create(client, tools=[ROLL], tool_choice="required", parallel_tool_calls=False).choices[0].message
    calls = [call.model_dump() for call in first.tool_calls]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "rolled a 3"} for call in calls]
    history = [*ASK, first.model_dump(), *results]
    more = create(client, history, tools=[ROLL], max_tokens=4)
    fewer = create(client, ASK, tools=[ROLL], max_tokens=4)
    assert more.usage.prompt_tokens > fewer.usage.prompt_tokens + 5 * len(calls)
    with pytest.raises(BadRequestError, match="answers no call") as refused:
        create(client, [*ASK, results[0]], tools=[ROLL])
    assert refused.value.param == "messages.1.tool_call_id"
    with pytest.raises(BadRequestError, match="has no message that tells its result"):
        create(client, [*ASK, first.model_dump(), *ASK], tools=[ROLL])


def test_functions_of_the_time_before_tools(small: OpenAI) -> None:
    function = ROLL["function"]
    answer = create(small, functions=[function], function_call={"name": "roll"}).choices[0]
    assert answer.finish_reason == "function_call"
    jsonschema.validate(json.loads(answer.message.function_call.arguments), SCHEMAS["roll"])
    chunks = list(create(small, functions=[function], function_call={"name": "roll"}, stream=True))
    pieces = [chunk.choices[0].delta.function_call for chunk in chunks if chunk.choices[0].delta.function_call]
    assert pieces[0].name == "roll"
    jsonschema.validate(json.loads("".join(piece.arguments for piece in pieces)), SCHEMAS["roll"])
    assert chunks[-1].choices[0].finish_reason == "function_call"
    history = [
        *ASK,
        {"role": "assistant", "content": None, "function_call": {"name": "roll", "arguments": '{"sides": 6}'}},
        {"role": "function", "name": "roll", "content": "3"},
    ]
    assert create(small, history, functions=[function], max_tokens=3).choices[0].message.function_call is None


def of_schema(schema: dict[str, Any]) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}


class Weather(pydantic.BaseModel, extra="forbid"):
    """What a client parses answers into."""

    sky: Literal["clear", "cloudy"]
    warm: bool


@pytest.mark.parametrize("which", ["tiny", "small"])
def test_answers_of_a_schema(which: str, request: pytest.FixtureRequest) -> None:
    client: OpenAI = request.getfixturevalue(which)
    parsed = client.chat.completions.parse(model=_model(client), messages=ASK, response_format=Weather)
    assert isinstance(parsed.choices[0].message.parsed, Weather)


def test_answers_that_are_objects(small: OpenAI) -> None:
    answer = create(small, response_format={"type": "json_object"}, temperature=0, max_tokens=100).choices[0]
    assert answer.finish_reason == "length" or isinstance(json.loads(answer.message.content), dict)
    assert answer.message.content.startswith("{")
    assert create(small, response_format={"type": "text"}, max_tokens=2).choices[0].message.content


def test_an_answer_of_a_schema_or_a_call(small: OpenAI) -> None:
    form = of_schema(Weather.model_json_schema())
    found = set()
    for seed in range(2):
        options: dict[str, Any] = {"tools": [NOW], "response_format": form, "parallel_tool_calls": False}
        message = create(small, seed=seed, temperature=2, **options).choices[0].message
        if message.tool_calls:
            found.add(message.tool_calls[0].function.name)
        else:
            found.add(type(Weather.model_validate_json(message.content)).__name__)
    assert found <= {"now", "Weather"}
    assert found


def test_thoughts_are_apart(tiny: OpenAI) -> None:
    options: dict[str, Any] = {
        "extra_body": {"structured_outputs": {"regex": "<think>\nSo x\n</think>\n\nHello, 丹炉"}},
        "logprobs": True,
    }
    answer = create(tiny, **options)
    message = answer.choices[0].message
    assert (message.reasoning_content, message.content) == ("So x", "Hello, 丹炉")
    told = b"".join(bytes(token.bytes) for token in answer.choices[0].logprobs.content).decode()
    assert told.strip() == "Hello, 丹炉"
    assert 0 < answer.usage.completion_tokens_details.reasoning_tokens < answer.usage.completion_tokens
    streamed = Streamed(chunks := list(create(tiny, stream=True, **options)))
    assert streamed.texts[0] == "Hello, 丹炉"
    thoughts = [getattr(choice.delta, "reasoning_content", None) or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(thoughts) == "So x"


def test_structure_begins_behind_the_thought_that_the_prompt_opens(thinker: OpenAI) -> None:
    form = of_schema(Weather.model_json_schema())
    thinking = create(thinker, max_tokens=20).choices[0].message
    assert (thinking.content, bool(thinking.reasoning_content)) == ("", True)
    closing = {CLOSING: 100}
    behind = create(thinker, response_format=form, logit_bias=closing).choices[0].message
    Weather.model_validate_json(behind.content)
    at_once = create(thinker, response_format=form, reasoning_effort="none").choices[0].message
    Weather.model_validate_json(at_once.content)
    assert getattr(at_once, "reasoning_content", None) is None
    switched = create(thinker, response_format=form, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    Weather.model_validate_json(switched.choices[0].message.content)
    with pytest.raises(BadRequestError, match="thinks first"):
        create(thinker, extra_body={"structured_outputs": {"regex": "a"}})
    with pytest.raises(BadRequestError) as refused:
        create(thinker, reasoning_effort="high")
    assert refused.value.param == "reasoning_effort"


def test_the_last_message_is_continued(tiny: OpenAI) -> None:
    begun = [*ASK, {"role": "assistant", "content": "<think>So"}]
    form = of_schema(Weather.model_json_schema())
    go_on = {"continue_final_message": True}
    message = create(tiny, begun, response_format=form, logit_bias={CLOSING: 100}, extra_body=go_on).choices[0].message
    Weather.model_validate_json(message.content)
    begun[-1]["content"] = "Hello"
    said = {"structured_outputs": {"regex": " world"}}
    assert create(tiny, begun, extra_body=go_on | said).choices[0].message.content == " world"
    with pytest.raises(BadRequestError, match="can be continued only if") as refused:
        create(tiny, ASK, extra_body={"continue_final_message": True})
    assert refused.value.param == "continue_final_message"


def named(name: str, schema: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema}}


HOSTILE: list[tuple[dict[str, Any], str | None]] = [
    ({"n": 1_000_000}, "n"),
    ({"n": True}, "n"),
    ({"n": "2"}, "n"),
    ({"n": 0}, "n"),
    ({"best_of": 10**9}, "best_of"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 10**15}, "max_tokens"),
    ({"max_tokens": 1_000_000}, "max_tokens"),
    ({"max_completion_tokens": 1_000_000}, "max_completion_tokens"),
    ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"),
    ({"logprobs": True, "top_logprobs": 1000}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": float("nan")}, None),  # no JSON
    ({"top_p": float("inf")}, None),
    ({"logit_bias": {"99999999": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
    ({"logit_bias": {"1": 1000}}, "logit_bias.1"),
    ({"stop_token_ids": [2**40]}, "stop_token_ids.0"),
    ({"stop_token_ids": [999_999_999]}, "stop_token_ids"),
    ({"stop": ""}, "stop"),
    ({"seed": 2**70}, "seed"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "wizard", "content": "a"}]}, "messages.0"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
    ({"messages": [{"role": "assistant"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///"}}]}]},
     "messages.0.content.0"),
    ({"tools": [named("a b")]}, "tools.0.function.name"),
    ({"tools": [ROLL, ROLL]}, "tools.1"),
    ({"tools": [{"type": "custom", "custom": {"name": "c"}}]}, "tools.0"),
    ({"tools": [named("f", "x")]}, "tools.0.function.parameters"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [ROLL], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"tools": [ROLL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    ({"tools": [named("f", {"pattern": 3})], "tool_choice": "required"}, "tools"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": of_schema({"$ref": "#"})}, "response_format"),
    ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": "foo**"}}, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": "(?<=x)*"}}, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": "(a{1,100000}){1,100000}"}}, "structured_outputs.regex"),
    ({"structured_outputs": {"grammar": "start: " + "(" * 6000}}, "structured_outputs.grammar"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"reasoning_effort": "vast"}, "reasoning_effort"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"add_generation_prompt": False}, "add_generation_prompt"),
    ({"model": ""}, "model"),
]  # fmt: skip

UNSUPPORTED: dict[str, Any] = {
    "audio": {"voice": "alloy", "format": "wav"}, "modalities": ["text", "audio"], "store": True, "moderation": {},
    "prediction": {"type": "content", "content": "a"}, "service_tier": "priority", "verbosity": "low",
    "web_search_options": {}, "prompt_cache_retention": "24h", "prompt_cache_options": {}, "mystery": 1,
}  # fmt: skip


def refusal(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The error that a body is answered with."""
    begun = time.monotonic()
    limit = {} if "max_completion_tokens" in body else {"max_tokens": 2}
    text = json.dumps({"messages": ASK} | limit | body)  # NaN as only Python writes it
    response = httpx.post(f"{url}/v1/chat/completions", content=text, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert time.monotonic() - begun < 5
    error: dict[str, Any] = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize(("body", "param"), HOSTILE, ids=[json.dumps(body)[:50] for body, _ in HOSTILE])
def test_impossible_requests_are_refused_by_name(smollm2_url: str, body: dict[str, Any], param: str | None) -> None:
    error = refusal(smollm2_url, body)
    assert error["param"] == param, error


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name(tiny_url: str, name: str) -> None:
    error = refusal(tiny_url, {name: UNSUPPORTED[name]})
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")


def test_what_changes_nothing_is_taken(tiny: OpenAI) -> None:
    create(
        tiny, max_tokens=1, user="u", metadata={"a": "b"}, safety_identifier="s", prompt_cache_key="p", store=False,
        service_tier="auto", verbosity="medium", modalities=["text"], prompt_cache_retention="in_memory", tools=[],
    )  # fmt: skip


def test_options_beyond_openais(tiny: OpenAI) -> None:
    more = {
        "top_k": 5,
        "min_p": 0.1,
        "typical_p": 0.9,
        "repetition_penalty": 1.1,
        "count_penalty": 0.5,
        "min_tokens": 3,
    }
    answer = create(tiny, max_tokens=4, extra_body=more)
    assert answer.usage.completion_tokens == 4
    beams = create(tiny, max_tokens=4, n=2, extra_body={"use_beam_search": True, "best_of": 3})
    assert len(beams.choices) == 2
    choice = create(tiny, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}).choices[0].message.content
    assert choice in ("yes", "no")


def test_unknown_models(tiny: OpenAI) -> None:
    with pytest.raises(NotFoundError) as refused:
        create(tiny, model="gpt-5")
    assert refused.value.code == "model_not_found"


def test_langchain(small: OpenAI) -> None:
    from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    @tool
    def roll(sides: Literal[4, 6]) -> str:
        """Roll a die."""
        return str(sides)

    model = ChatOpenAI(
        model="smollm2", base_url=str(small.base_url), api_key="none", max_retries=0, temperature=0, max_tokens=64
    )
    question = HumanMessage("Roll a die.")
    assert model.invoke([question]).content
    assert "".join(str(chunk.content) for chunk in model.stream([question])) == model.invoke([question]).content
    asked = model.bind_tools([roll], tool_choice="required", parallel_tool_calls=False).invoke([question])
    assert isinstance(asked, AIMessage)
    (call,) = asked.tool_calls
    result = roll.invoke(call)
    assert isinstance(result, ToolMessage)
    assert model.bind_tools([roll]).invoke([question, asked, result]).content is not None
    structured = model.with_structured_output(Weather).invoke([question])
    assert isinstance(structured, Weather)


def test_llama_index(small: OpenAI) -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    model = OpenAILike(
        model="smollm2", api_base=str(small.base_url), api_key="none", is_chat_model=True, max_retries=0,
        temperature=0, max_tokens=12,
    )  # fmt: skip
    question = [ChatMessage(role="user", content="Say hello.")]
    whole = model.chat(question).message.content
    assert whole
    assert "".join(piece.delta or "" for piece in model.stream_chat(question)) == whole
