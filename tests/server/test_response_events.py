"""What a model writes, as events of a response; the types of OpenAI's client are the oracle."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from sdk_types import sse_events, validated, validated_event

from danlu.server.api.answer_parts import Part, Reasoning, Said, ToolCallArguments, ToolCallBegun
from danlu.server.api.response_events import ResponseWriter
from danlu.server.api.response_replies import ResponseReply
from danlu.server.api.response_schema import CreateResponse
from danlu.server.api.responses import new_response
from danlu.server.api.turn import TurnEvent
from danlu.server.protocol import TokenLogprob

USAGE = {
    "input_tokens": 5, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0}, "output_tokens": 3,
    "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 8,
}  # fmt: skip


def begun() -> dict[str, Any]:
    return new_response(CreateResponse.model_validate({"input": "hi"}), "tiny")


def written(*events: TurnEvent, status: str = "completed", logprobs: bool = False) -> tuple[list[Any], Response]:
    """The events, each validated, and the response that the last one holds."""
    writer = ResponseWriter(begun(), logprobs=logprobs)
    sent = writer.begin()
    for event in events:
        sent += writer.push(event)
    sent += writer.finish(status, USAGE)
    found = [validated_event(ResponseStreamEvent, data) for _, data in sse_events(b"".join(sent).decode().split("\n"))]
    assert [event.sequence_number for event in found] == list(range(len(found)))
    assert writer.last == len(found) - 1
    ResponseReply.model_validate(writer.response)
    assert validated(Response, writer.response) == found[-1].response
    return found, found[-1].response


def turn(*parts: Part, logprobs: list[TokenLogprob] | None = None) -> TurnEvent:
    return TurnEvent(0, list(parts), logprobs)


def test_the_sequence_of_a_text() -> None:
    events, response = written(turn(Said("Hel")), turn(Said("lo")))
    assert [event.type.removeprefix("response.") for event in events] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert response.output_text == "Hello"
    assert events[0].response.output == []
    assert events[2].item.content == []
    assert events[2].item.status == "in_progress"
    assert events[-2].item.status == "completed"
    assert response.completed_at is not None


def test_reasoning_then_text_then_two_calls() -> None:
    events, response = written(
        turn(Reasoning("hm")),
        turn(Said("I ask."), ToolCallBegun(0, "call_a", "f"), ToolCallArguments(0, '{"x":')),
        turn(ToolCallArguments(0, "1}"), ToolCallBegun(1, "call_b", "g"), ToolCallArguments(1, "{}")),
    )
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
    assert response.output[0].content[0].text == "hm"
    assert [(call.name, call.call_id, call.arguments) for call in response.output[2:]] == [
        ("f", "call_a", '{"x":1}'),
        ("g", "call_b", "{}"),
    ]
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [(event.name, event.arguments, event.output_index) for event in done] == [
        ("f", '{"x":1}', 2),
        ("g", "{}", 3),
    ]
    ids = [item.id for item in response.output]
    assert len(set(ids)) == 4
    for event in events:
        if hasattr(event, "item_id"):
            assert event.item_id == ids[event.output_index]


parts = st.lists(
    st.one_of(
        st.builds(Reasoning, st.text(min_size=1)),
        st.builds(Said, st.text(min_size=1)),
        st.lists(st.text(min_size=1), max_size=3),  # the pieces of a call's arguments
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(parts)
def test_deltas_add_up_to_what_is_told_in_the_end(drawn: list[Any]) -> None:
    turns, calls, said, thought = [], [], "", ""
    for part in drawn:
        if isinstance(part, list):
            number = len(calls)
            turns.append(turn(ToolCallBegun(number, f"c{number}", "f"), *(ToolCallArguments(number, p) for p in part)))
            calls.append("".join(part))
        else:
            turns.append(turn(part))
            said += part.text if isinstance(part, Said) else ""
            thought += part.text if isinstance(part, Reasoning) else ""
    events, response = written(*turns)
    told: dict[tuple[int, str], str] = {}
    for event in events:
        if event.type.endswith(".delta"):
            key = (event.output_index, event.type.removesuffix(".delta"))
            told[key] = told.get(key, "") + event.delta
        elif event.type in ("response.output_text.done", "response.reasoning_text.done"):
            assert told.get((event.output_index, event.type.removesuffix(".done")), "") == event.text
        elif event.type == "response.output_item.done":
            assert event.item == response.output[event.output_index]
    assert response.output_text == said
    reasoning = [item for item in response.output if item.type == "reasoning"]
    assert "".join(item.content[0].text for item in reasoning) == thought
    assert [item.arguments for item in response.output if item.type == "function_call"] == calls


def test_log_probabilities_are_those_of_the_text() -> None:
    tokens = [
        TokenLogprob(i, text, -0.5, [(9, b"x", float("-inf"))]) for i, text in enumerate([b"He", b"y", b"<call>"])
    ]
    events, response = written(
        turn(logprobs=tokens[:1]),
        turn(Said("Hey"), logprobs=tokens[1:2]),
        turn(ToolCallBegun(0, "c", "f"), logprobs=tokens[2:]),
        turn(ToolCallArguments(0, "{}"), logprobs=tokens[2:]),
        turn(Said("y"), logprobs=tokens[1:2]),
        logprobs=True,
    )
    assert [one.token for one in response.output[2].content[0].logprobs] == ["y"]
    logprobs = response.output[0].content[0].logprobs
    assert [one.token for one in logprobs] == ["He", "y"]
    assert bytes(logprobs[0].bytes) == b"He"
    assert logprobs[0].top_logprobs[0].logprob == -9999
    delta = next(event for event in events if event.type == "response.output_text.delta")
    assert [(one.token, one.logprob) for one in delta.logprobs] == [("He", -0.5), ("y", -0.5)]


def test_an_empty_answer_has_a_message() -> None:
    _, response = written()
    assert [item.type for item in response.output] == ["message"]
    assert response.output_text == ""


def test_what_was_cut_off_is_incomplete() -> None:
    events, response = written(turn(Said("Hel")), status="incomplete")
    assert events[-1].type == "response.incomplete"
    assert response.status == response.output[0].status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"


@pytest.mark.parametrize("parts", [[], [Said("Hel")], [ToolCallBegun(0, "c", "f")]])
def test_a_failure_closes_what_is_open(parts: list[Part]) -> None:
    writer = ResponseWriter(begun(), logprobs=False)
    sent = writer.begin() + writer.push(TurnEvent(0, parts)) + writer.fail("the model failed")
    events = [validated_event(ResponseStreamEvent, data) for _, data in sse_events(b"".join(sent).decode().split("\n"))]
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.message == "the model failed"
    assert all(item.status == "incomplete" for item in events[-1].response.output)
    ResponseReply.model_validate(writer.response)
