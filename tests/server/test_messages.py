"""The Messages API through Anthropic's client; its types are the oracle of every shape."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import httpx
import jsonschema
import pytest
from anthropic import Anthropic
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from openai import OpenAI
from pydantic import BaseModel
from sdk_types import sse_events, validated, validated_event

WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Beijing"]}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL: Any = {"name": "get_weather", "description": "Weather.", "input_schema": WEATHER}
OTHER: Any = {"type": "custom", "name": "noop", "input_schema": {"type": "object", "properties": {}}}
ASK: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def client(tiny_url: str) -> Iterator[Anthropic]:
    with Anthropic(base_url=tiny_url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def openai_client(tiny_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{tiny_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def greedy(**asked: Any) -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": 12, "messages": ASK, "extra_body": {"temperature": 0}, **asked}


def create(client: Anthropic, **asked: Any) -> Message:
    """A message, its JSON checked against the client's type."""
    raw = client.messages.with_raw_response.create(**greedy(**asked))
    validated(Message, raw.http_response.json())
    return raw.parse()


def streamed(url: str, **asked: Any) -> list[Any]:
    """All events of a stream but pings, each checked against the client's type."""
    body = greedy(**asked)
    body |= body.pop("extra_body")
    with httpx.stream("POST", f"{url}/v1/messages", json=body | {"stream": True}, timeout=60) as reply:
        assert reply.status_code == 200, reply.read()
        events = sse_events(reply.iter_lines())
    assert events[1] == ("ping", {"type": "ping"})
    return [validated_event(RawMessageStreamEvent, data) for name, data in events if name != "ping"]


def text_of(message: Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


# ------------------------------------------------------------------------------------------------ one message


def test_a_message(client: Anthropic, openai_client: OpenAI) -> None:
    message = create(client, system="Be brief.", metadata={"user_id": "u"})
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 12
    assert message._request_id
    other = openai_client.chat.completions.create(
        model="tiny", temperature=0, max_tokens=12,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}],
    )  # fmt: skip
    assert text_of(message) == other.choices[0].message.content
    usage = message.usage
    assert other.usage is not None
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == other.usage.prompt_tokens


def test_a_stream_tells_the_same(client: Anthropic, tiny_url: str) -> None:
    message = create(client)
    events = streamed(tiny_url)
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert "".join(event.delta.text for event in events[2:-3]) == text_of(message)
    assert events[-2].delta.stop_reason == "max_tokens"
    assert events[-2].usage.output_tokens == 12

    with client.messages.stream(**greedy()) as stream:
        assert "".join(stream.text_stream) == text_of(message)
        final = stream.get_final_message()
    assert (final.stop_reason, text_of(final)) == (message.stop_reason, text_of(message))
    assert final.usage.output_tokens == 12


def test_the_context_can_be_full(client: Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="context of") as found:
        create(client, max_tokens=20_000)
    context = int(str(found.value).split("context of ")[1].split()[0])

    def long(n: int) -> tuple[Any, int]:
        messages: Any = [{"role": "user", "content": "7" * n}]
        return messages, client.messages.count_tokens(model="tiny", messages=messages).input_tokens

    _, short = long(1)
    messages, counted = long(context - short - 4)
    assert context - 12 < counted < context
    message = create(client, messages=messages)
    assert message.stop_reason == "model_context_window_exceeded"
    assert message.usage.output_tokens == context - counted


def test_tokens_are_counted_as_the_model_reads_them(client: Anthropic) -> None:
    asked: Any = {"system": [{"type": "text", "text": "Be brief."}], "tools": [TOOL], "tool_choice": {"type": "none"}}
    raw = client.messages.with_raw_response.count_tokens(model="tiny", messages=ASK, **asked)
    counted = validated(MessageTokensCount, raw.http_response.json()).input_tokens
    usage = create(client, **asked).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_a_conversation_is_the_same_through_every_api(client: Anthropic, openai_client: OpenAI) -> None:
    """The model reads as many tokens: reasoning, calls and results are where they belong."""
    arguments = {"city": "Paris", "days": 1}
    use: Any = {"type": "tool_use", "id": "call_1", "name": "get_weather", "input": arguments}
    messages: Any = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Let me look.", "signature": ""}, {"type": "text", "text": "I look."}, use,
        ]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1", "content": "sunny"}]},
        {"role": "assistant", "content": "It is sunny."},
        {"role": "user", "content": "more"},
    ]  # fmt: skip
    counted = client.messages.count_tokens(model="tiny", messages=messages, system="Be brief.", tools=[TOOL])
    items: Any = [
        {"role": "user", "content": "hello"},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Let me look."}],
        },
        {"role": "assistant", "content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
        {"type": "function_call", "call_id": "call_1", "name": "get_weather", "arguments": json.dumps(arguments)},
        {"type": "function_call_output", "call_id": "call_1", "output": [{"type": "input_text", "text": "sunny"}]},
        {"role": "assistant", "content": "It is sunny."},
        {"role": "user", "content": "more"},
    ]
    function: Any = {"name": "get_weather", "description": "Weather.", "parameters": WEATHER}
    responses = openai_client.responses.input_tokens.count(
        model="tiny", input=items, instructions="Be brief.", tools=[{"type": "function", "strict": False, **function}]
    )
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": json.dumps(arguments)}}
    said: Any = {"role": "assistant", "content": "I look.", "reasoning_content": "Let me look.", "tool_calls": [call]}
    chat = openai_client.chat.completions.create(
        model="tiny", max_tokens=1, tools=[{"type": "function", "function": function}], tool_choice="none",
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hello"},
            said,
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
            {"role": "assistant", "content": "It is sunny."},
            {"role": "user", "content": "more"},
        ],
    )  # fmt: skip
    assert chat.usage is not None
    assert counted.input_tokens == responses.input_tokens == chat.usage.prompt_tokens


def test_stop_sequences(client: Anthropic) -> None:
    text = text_of(create(client))
    stop = text[4:6]
    message = create(client, stop_sequences=[stop, "never at all"])
    assert message.stop_reason == "stop_sequence"
    assert message.stop_sequence == stop
    assert text_of(message) == text[: text.index(stop)]


def test_an_answer_that_has_begun_goes_on(client: Anthropic) -> None:
    text = text_of(create(client))
    begun = [*ASK, {"role": "assistant", "content": "def f"}]
    assert text_of(create(client, messages=begun)) != text
    counts = [client.messages.count_tokens(model="tiny", messages=m).input_tokens for m in (ASK, begun)]
    assert counts[0] < counts[1] <= counts[0] + 5  # no turn was ended


def test_top_k_of_one_is_greedy(client: Anthropic) -> None:
    text = text_of(create(client))
    assert text_of(create(client, extra_body={"temperature": 1, "top_k": 1})) == text
    assert text_of(create(client, extra_body={"temperature": 1, "top_p": 0})) == text


def test_blocks_are_read_as_text(client: Anthropic) -> None:
    cached = {"type": "ephemeral"}
    blocks: Any = [{"type": "text", "text": "he", "cache_control": cached}, {"type": "text", "text": "llo"}]
    system: Any = [{"type": "text", "text": "Be brief.", "cache_control": cached}]
    one = create(client, system=system, messages=[{"role": "user", "content": blocks}], cache_control=cached)
    other = create(client, system="Be brief.", messages=[{"role": "user", "content": "he\n\nllo"}])
    assert one.content == other.content


def test_smollm2_answers(smollm2_url: str) -> None:
    with Anthropic(base_url=smollm2_url, api_key="none") as client:
        message = client.messages.create(
            model="smollm2", max_tokens=60, messages=[{"role": "user", "content": "Say hi."}], extra_body={"top_k": 1}
        )
    assert message.stop_reason == "end_turn"
    assert message.stop_sequence is None
    assert text_of(message)


# ------------------------------------------------------------------------------------------------ tools, structure


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}], ids=["any", "tool"])
def test_a_loop_of_tools(client: Anthropic, openai_client: OpenAI, tiny_url: str, choice: dict[str, Any]) -> None:
    asked: Any = {
        "tools": [TOOL, OTHER],
        "tool_choice": {**choice, "disable_parallel_tool_use": True},
        "max_tokens": 400,
    }
    message = create(client, **asked)
    assert message.stop_reason == "tool_use"
    (use,) = message.content
    assert use.type == "tool_use"
    schema = {"get_weather": WEATHER, "noop": OTHER["input_schema"]}[use.name]
    jsonschema.validate(use.input, schema)

    events = streamed(tiny_url, **asked)
    assert events[1].content_block.input == {}
    assert json.loads("".join(event.delta.partial_json for event in events[2:-3])) == use.input
    with client.messages.stream(**greedy(**asked)) as stream:
        assert stream.get_final_message().content[0].input == use.input

    result = {
        "type": "tool_result",
        "tool_use_id": use.id,
        "content": [{"type": "text", "text": "no"}],
        "is_error": True,
    }
    answered: Any = {"role": "user", "content": [result, {"type": "text", "text": "Well?"}]}
    then = create(client, messages=[*ASK, {"role": "assistant", "content": message.content}, answered])
    call: Any = {"id": use.id, "type": "function", "function": {"name": use.name, "arguments": json.dumps(use.input)}}
    other = openai_client.chat.completions.create(
        model="tiny", temperature=0, max_tokens=12,
        messages=[
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": use.id, "content": "Error: no"},
            {"role": "user", "content": "Well?"},
        ],
    )  # fmt: skip
    assert text_of(then) == other.choices[0].message.content


class Reading(BaseModel):
    kind: Literal["warm", "cold"]
    sure: bool


def test_structured_answers(client: Anthropic) -> None:
    message = client.messages.parse(model="tiny", max_tokens=400, messages=ASK, output_format=Reading)
    assert isinstance(message.parsed_output, Reading)
    again: Any = [*ASK, {"role": "assistant", "content": message.content}, *ASK]
    assert text_of(create(client, messages=again))
    schema = Reading.model_json_schema() | {"additionalProperties": False}
    config: Any = {"format": {"type": "json_schema", "schema": schema}}
    jsonschema.validate(json.loads(text_of(create(client, output_config=config, max_tokens=400))), schema)


# ------------------------------------------------------------------------------------------------ refusals

REFUSED = [
    ({"max_tokens": None}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "file:///x"}}]}]},
     "image"),
    ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "document"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "nobodys"}]}]}, "nobodys"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}]},
     "tool_use"),
    ({"model": "nobody"}, "nobody"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "enabled"),
    ({"output_config": {"effort": "high"}}, "output_config.effort"),
    ({"output_config": {"effort": "high"}, "thinking": {"type": "disabled"}}, "output_config.effort"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
    ({"tools": [OTHER, OTHER]}, "tools.1.name"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "another"}}, "tool_choice.name"),
    ({"service_tier": "auto"}, "service_tier"),
    ({"container": "c"}, "container"),
    ({"mcp_servers": []}, "mcp_servers"),
    ({"temperature": 1.5}, "temperature"),
    ({"top_k": -1}, "top_k"),
    ({"stop_sequences": [""]}, "stop_sequences"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "name"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_honoured_is_refused_by_name(tiny_url: str, asked: dict[str, Any], name: str) -> None:
    body = {key: value for key, value in (greedy() | asked).items() if value is not None and key != "extra_body"}
    reply = httpx.post(f"{tiny_url}/v1/messages", json=body, timeout=20)
    assert reply.status_code == (404 if name == "nobody" else 400), reply.text
    told = reply.json()
    assert told["type"] == "error"
    assert told["error"]["type"] in ("invalid_request_error", "not_found_error")
    assert name in told["error"]["message"]


def test_the_client_raises_its_own_errors(client: Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        create(client, model="nobody")
    with pytest.raises(anthropic.BadRequestError):
        create(client, messages=[])
