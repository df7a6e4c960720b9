"""The Responses API through OpenAI's client; its types are the oracle of every shape."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest
from guarded_app import make_key
from openai import OpenAI
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.response_item_list import ResponseItemList
from pydantic import BaseModel
from sdk_types import sse_events, validated, validated_event
from server_process import ServerProcess, serving

from danlu.server.access.database import Database
from danlu.server.api.response_store import ResponseStore

WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Beijing"]}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather.",
    "parameters": WEATHER,
    "strict": True,
}
OTHER: Any = {"type": "function", "name": "noop", "parameters": {"type": "object", "properties": {}}, "strict": False}


class Reading(BaseModel):
    kind: Literal["warm", "cold"]
    sure: bool


@pytest.fixture(scope="module")
def client(tiny_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{tiny_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def create(client: OpenAI, **asked: Any) -> Response:
    """A response, its JSON checked against the client's type."""
    given = {"model": "tiny", "max_output_tokens": 12, "temperature": 0, **asked}
    raw = client.responses.with_raw_response.create(**given)
    validated(Response, raw.http_response.json())
    return raw.parse()


def streamed(url: str, body: dict[str, Any]) -> list[Any]:
    """All events of a stream, each checked against the client's type."""
    body = {"model": "tiny", "max_output_tokens": 12, "temperature": 0, "stream": True, **body}
    with httpx.stream("POST", f"{url}/v1/responses", json=body, timeout=60) as reply:
        return checked(reply)


def checked(reply: httpx.Response) -> list[Any]:
    assert reply.status_code == 200, reply.read()
    assert reply.headers["content-type"].startswith("text/event-stream")
    return [validated_event(ResponseStreamEvent, data) for _, data in sse_events(reply.iter_lines())]


def outcome(response: Response) -> tuple[Any, ...]:
    """What two responses to the same input have in common."""
    return response.status, response.output_text, response.usage, [item.type for item in response.output]


# ------------------------------------------------------------------------------------------------ one response


def test_a_response_is_kept_until_it_is_deleted(client: OpenAI) -> None:
    response = create(client, input="hello", instructions="Be brief.", metadata={"a": "b"}, user="u", store=True)
    assert response.status == "incomplete"  # the tiny model never ends by itself
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage is not None
    assert response.usage.output_tokens == 12
    assert response.usage.total_tokens == response.usage.input_tokens + 12
    assert (response.instructions, response.metadata, response.user) == ("Be brief.", {"a": "b"}, "u")

    assert client.responses.retrieve(response.id) == response
    items = client.responses.input_items.list(response.id)
    assert [item.content[0].text for item in items] == ["hello"]
    client.responses.delete(response.id)
    for ask in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError):
            ask(response.id)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the client's own
def test_items_come_back_as_the_client_tells_them(client: OpenAI) -> None:
    asked: Any = {"model": "tiny", "temperature": 0, "max_output_tokens": 400, "text_format": Reading}
    parsed = client.responses.parse(**asked, input="x")
    called = create(client, input="x", tools=[TOOL], tool_choice="required", max_output_tokens=400)
    said = create(client, input="x")
    for items in (parsed.output, called.output, said.output, [item.model_dump() for item in said.output]):
        assert create(client, input=[{"role": "user", "content": "x"}, *items]).output_text


def test_what_is_not_to_be_stored_is_not(client: OpenAI) -> None:
    response = create(client, input="hello", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_a_stream_tells_the_same(client: OpenAI, tiny_url: str) -> None:
    plain = create(client, input="hello")
    events = streamed(tiny_url, {"input": "hello"})
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]
    assert last.type == "response.incomplete"
    assert outcome(last.response)[:2] == outcome(plain)[:2]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == plain.output_text
    assert client.responses.retrieve(last.response.id).output_text == plain.output_text


def test_the_client_s_own_stream(smollm2_url: str) -> None:
    with (
        OpenAI(base_url=f"{smollm2_url}/v1", api_key="none") as client,
        client.responses.stream(model="smollm2", input="Say hi.", temperature=0, max_output_tokens=60) as stream,
    ):
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        response = stream.get_final_response()
    assert response.status == "completed"
    assert response.output_text == text != ""


def test_log_probabilities(client: OpenAI, tiny_url: str) -> None:
    asked: dict[str, Any] = {"input": "hello", "top_logprobs": 3, "include": ["message.output_text.logprobs"]}
    part = create(client, **asked).output[0].content[0]
    assert b"".join(bytes(one.bytes) for one in part.logprobs).decode(errors="replace") == part.text
    for one in part.logprobs:
        assert len(one.top_logprobs) == 3
        assert one.logprob == one.top_logprobs[0].logprob <= 0  # greedy
    events = streamed(tiny_url, asked)
    told = [one.token for event in events if event.type == "response.output_text.delta" for one in event.logprobs]
    assert told == [one.token for one in part.logprobs]


def test_input_tokens_are_counted_as_the_model_reads_them(client: OpenAI) -> None:
    asked: Any = {"input": "hello", "instructions": "Be brief.", "tools": [TOOL]}
    counted = client.responses.input_tokens.count(model="tiny", **asked)
    response = create(client, **asked, tool_choice="none")
    assert response.usage is not None
    assert counted.input_tokens == response.usage.input_tokens


# ------------------------------------------------------------------------------------------------ conversations


def test_going_on_is_the_same_as_sending_everything(client: OpenAI) -> None:
    first = create(client, input="hello", instructions="Not carried over.")
    second = create(client, input=[{"role": "user", "content": "and then?"}], previous_response_id=first.id)
    third = create(client, input="more", instructions="Now.", previous_response_id=second.id)
    everything = [
        {"role": "user", "content": "hello"},
        *[item.model_dump(exclude_none=True) for item in first.output],
        {"role": "user", "content": [{"type": "input_text", "text": "and then?"}]},
        *[item.model_dump(exclude_none=True) for item in second.output],
        {"role": "user", "content": "more"},
    ]
    whole = create(client, input=everything, instructions="Now.")
    assert whole.output_text == third.output_text
    assert whole.usage is not None
    assert third.usage is not None
    assert whole.usage.input_tokens == third.usage.input_tokens

    data = httpx.get(f"{client.base_url}responses/{third.id}/input_items?order=asc").json()
    listed = validated(ResponseItemList, data).data
    assert [item.role for item in listed] == ["user", "assistant", "user", "assistant", "user"]
    pages = client.responses.input_items.list(third.id, limit=2)
    assert [item.id for item in pages] == [item.id for item in reversed(listed)]


def test_a_conversation_that_is_gone(client: OpenAI) -> None:
    first = create(client, input="hello")
    client.responses.delete(first.id)
    with pytest.raises(openai.BadRequestError) as found:
        create(client, input="more", previous_response_id=first.id)
    assert found.value.code == "previous_response_not_found"
    assert found.value.param == "previous_response_id"


# ------------------------------------------------------------------------------------------------ tools, structure


def test_a_loop_of_tools(client: OpenAI, tiny_url: str) -> None:
    asked: Any = {"input": "Weather?", "tools": [TOOL, OTHER], "tool_choice": "required", "max_output_tokens": 400}
    response = create(client, **asked, parallel_tool_calls=False)
    assert response.status == "completed"
    (call,) = response.output
    assert call.type == "function_call"
    schema = {"get_weather": WEATHER, "noop": OTHER["parameters"]}[call.name]
    jsonschema.validate(json.loads(call.arguments), schema)

    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    then = create(client, input=[result], previous_response_id=response.id)
    whole = create(client, input=[{"role": "user", "content": "Weather?"}, call.model_dump(exclude_none=True), result])
    assert then.output_text == whole.output_text

    events = streamed(tiny_url, {**asked, "parallel_tool_calls": False})
    deltas = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    assert deltas == call.arguments
    done = next(event for event in events if event.type == "response.function_call_arguments.done")
    assert (done.name, done.arguments) == (call.name, call.arguments)


def test_which_tool_is_called(client: OpenAI) -> None:
    asked: Any = {"input": "Weather?", "tools": [TOOL, OTHER], "max_output_tokens": 400}
    for choice in (
        {"type": "function", "name": "get_weather"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]},
    ):
        response = create(client, **asked, tool_choice=choice)
        assert {item.name for item in response.output} == {"get_weather"}
        for item in response.output:
            jsonschema.validate(json.loads(item.arguments), WEATHER)
        assert response.tool_choice.model_dump(exclude_none=True) == choice


def test_structured_answers(client: OpenAI) -> None:
    response = client.responses.parse(model="tiny", input="x", text_format=Reading, max_output_tokens=400)
    assert isinstance(response.output_parsed, Reading)
    with client.responses.stream(model="tiny", input="x", text_format=Reading, max_output_tokens=400) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Reading)


# ------------------------------------------------------------------------------------------------ in the background


def until_ended(client: OpenAI, response_id: str) -> Response:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        response = client.responses.retrieve(response_id)
        if response.status not in ("queued", "in_progress"):
            return response
        time.sleep(0.02)
    raise AssertionError("it did not end")


def test_one_in_the_background(client: OpenAI, tiny_url: str) -> None:
    begun = create(client, input="hello", background=True, max_output_tokens=200)
    assert begun.status == "in_progress"
    assert begun.background
    response = until_ended(client, begun.id)
    assert response.status == "incomplete"
    assert response.output_text == create(client, input="hello", max_output_tokens=200).output_text
    assert client.responses.cancel(begun.id) == response  # too late: it stays as it is

    with httpx.stream("GET", f"{tiny_url}/v1/responses/{begun.id}?stream=true") as reply:
        events = checked(reply)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text == response.output_text
    with httpx.stream("GET", f"{tiny_url}/v1/responses/{begun.id}?stream=true&starting_after=7") as reply:
        assert checked(reply) == events[8:]


def test_a_stream_that_was_cut_off_is_taken_up_again(client: OpenAI) -> None:
    asked: Any = {"model": "tiny", "input": "hello", "temperature": 0, "max_output_tokens": 300}
    seen = []
    with client.responses.create(**asked, background=True, stream=True) as stream:
        for event in stream:
            seen.append(event)
            if len(seen) == 10:
                break
    response_id = seen[0].response.id
    for event in client.responses.retrieve(response_id, stream=True, starting_after=seen[-1].sequence_number):
        seen.append(event)
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    text = "".join(event.delta for event in seen if event.type == "response.output_text.delta")
    assert text == until_ended(client, response_id).output_text == seen[-1].response.output_text


def test_cancelling(client: OpenAI) -> None:
    begun = create(client, input="hello", background=True, max_output_tokens=900)
    cancelled = client.responses.cancel(begun.id)
    assert cancelled.status == "cancelled"
    assert client.responses.cancel(begun.id) == cancelled == client.responses.retrieve(begun.id)
    events = list(client.responses.retrieve(begun.id, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        create(client, input="more", previous_response_id=begun.id)

    plain = create(client, input="hello")
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(plain.id)


def test_deleting_ends_what_runs(client: OpenAI) -> None:
    begun = create(client, input="hello", background=True, max_output_tokens=900)
    client.responses.delete(begun.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(begun.id)


def test_a_client_that_goes_away_ends_its_stream(client: OpenAI) -> None:
    asked: Any = {"model": "tiny", "input": "hello", "max_output_tokens": 900, "temperature": 0}
    with client.responses.create(**asked, stream=True) as stream:
        response_id = next(iter(stream)).response.id
    response = until_ended(client, response_id)
    assert response.status == "cancelled"
    assert all(item.status == "incomplete" for item in response.output)


# ------------------------------------------------------------------------------------------------ refusals

REFUSED = [
    ({"input": []}, "input"),
    ({"input": ""}, "input"),
    ({}, "input"),
    ({"input": "x", "model": "nobody"}, "model"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "file:///etc/passwd"}]}]},
     "input.0.content.0"),
    ({"input": [{"role": "assistant", "content": [{"type": "input_text", "text": "x"}]}]}, "input.0"),
    ({"input": [{"type": "function_call_output", "call_id": "nobodys", "output": "x"}]}, "input"),
    ({"input": "x", "tools": [{"type": "web_search"}]}, "tools.0"),
    ({"input": "x", "tool_choice": "required"}, "tool_choice"),
    ({"input": "x", "tools": [OTHER], "tool_choice": {"type": "function", "name": "another"}}, "tool_choice"),
    ({"input": "x", "tools": [OTHER, OTHER]}, "tools.1.name"),
    ({"input": "x", "conversation": "conv_1"}, "conversation"),
    ({"input": "x", "prompt": {"id": "p"}}, "prompt"),
    ({"input": "x", "max_tool_calls": 1}, "max_tool_calls"),
    ({"input": "x", "truncation": "auto"}, "truncation"),
    ({"input": "x", "service_tier": "priority"}, "service_tier"),
    ({"input": "x", "reasoning": {"effort": "high"}}, "reasoning.effort"),
    ({"input": "x", "reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    ({"input": "x", "include": ["reasoning.encrypted_content"]}, "include.0"),
    ({"input": "x", "background": True, "store": False}, "background"),
    ({"input": "x", "stream_options": {"include_obfuscation": False}}, "stream_options"),
    ({"input": "x", "stream": True, "stream_options": {"include_obfuscation": True}},
     "stream_options.include_obfuscation"),
    ({"input": "x", "top_logprobs": 1000}, "top_logprobs"),
    ({"input": "x", "temperature": True}, "temperature"),
    ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
    ({"input": "x", "max_output_tokens": 1_000_000}, "max_output_tokens"),
    ({"input": "x", "text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "nothing"}}}},
     "text.format"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "param"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_honoured_is_refused_by_name(tiny_url: str, asked: dict[str, Any], param: str) -> None:
    body = {"model": "tiny", **asked}
    reply = httpx.post(f"{tiny_url}/v1/responses", json=body, timeout=20)
    assert reply.status_code == (404 if param == "model" else 400), reply.text
    error = reply.json()["error"]
    assert error["param"] == param
    assert error["message"]


def test_questions_about_a_response_are_checked(client: OpenAI, tiny_url: str) -> None:
    url = f"{tiny_url}/v1/responses/{create(client, input='x').id}"
    logprobs: Any = ["message.output_text.logprobs"]
    assert client.responses.retrieve(url.rpartition("/")[2], include=logprobs).output_text
    for query, param in (
        ("?include[]=code_interpreter_call.outputs", "include"),
        ("?starting_after=1", "starting_after"),
        ("?stream=true", "stream"),
        ("?stream=true&include_obfuscation=true", "include_obfuscation"),
        ("/input_items?limit=0", "limit"),
        ("/input_items?after=msg_none", "after"),
    ):
        reply = httpx.get(url + query)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


# ------------------------------------------------------------------------------------------------ what outlives it


def stored(data: Path, caller: str, response_id: str) -> dict[str, Any]:
    """A response in the database of a server that has ended."""

    async def read() -> dict[str, Any]:
        database = Database(data / "server.sqlite3")
        try:
            return (await ResponseStore(database).get(caller, response_id)).response
        finally:
            await database.close()

    return asyncio.run(read())


@pytest.mark.slow
def test_kill_dash_nine_loses_nothing_that_was_told(model_folder: Path, tmp_path: Path) -> None:
    asked: Any = {"model": "tiny", "input": "hello", "temperature": 0}
    server = ServerProcess(f"--model=tiny={model_folder}", data=tmp_path).wait_until_ready()
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        running = client.responses.create(**asked, background=True, max_output_tokens=900)
        events = list(client.responses.create(**asked, max_output_tokens=5, stream=True))
        whole = events[-1].response
        server.kill()
    with (
        serving(f"--model=tiny={model_folder}", "--drain=0", data=tmp_path) as again,
        OpenAI(base_url=f"{again.url}/v1", api_key="none") as client,
    ):
        assert client.responses.retrieve(whole.id) == whole
        lost = client.responses.retrieve(running.id)
        assert lost.status == "failed"
        assert lost.error is not None
        assert lost.error.code == "server_error"
        (event,) = client.responses.retrieve(running.id, stream=True, starting_after=5)
        assert (event.type, event.sequence_number) == ("response.failed", 6)
        assert create(client, input="more", previous_response_id=whole.id).output_text

        cut_off = client.responses.create(**asked, background=True, max_output_tokens=900)
        assert again.stop() == 0
    assert stored(tmp_path, "local", cut_off.id)["status"] == "failed"


@pytest.mark.slow
def test_another_key_knows_nothing_of_it(model_folder: Path, tmp_path: Path) -> None:
    secrets = [make_key(tmp_path, name) for name in ("alice", "bob")]
    with serving(f"--model=tiny={model_folder}", "--drain=30", data=tmp_path) as server:
        alice, bob = (OpenAI(base_url=f"{server.url}/v1", api_key=secret, max_retries=0) for secret in secrets)
        mine = create(alice, input="secret", background=True, max_output_tokens=900)
        for ask in (
            bob.responses.retrieve,
            bob.responses.delete,
            bob.responses.cancel,
            bob.responses.input_items.list,
            lambda id: bob.responses.retrieve(id, stream=True),
        ):
            with pytest.raises(openai.NotFoundError):
                ask(mine.id)
        with pytest.raises(openai.BadRequestError):
            create(bob, input="more", previous_response_id=mine.id)
        assert alice.responses.cancel(mine.id).status == "cancelled"

        running = create(alice, input="hello", background=True, max_output_tokens=900)
        assert server.stop() == 0  # it had the time to come to its end
    alices = json.loads((tmp_path / "keys.json").read_text())["keys"][0]["id"]
    assert stored(tmp_path, alices, running.id)["status"] in ("completed", "incomplete")
