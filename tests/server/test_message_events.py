"""What a model writes, as events of a message; the types of Anthropic's client, and its sums, are the oracle."""

from __future__ import annotations

import json
from typing import Any

from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from sdk_types import sse_events, validated, validated_event

from danlu.server.api.answer_parts import Part, Reasoning, Said, ToolCallArguments, ToolCallBegun
from danlu.server.api.message_events import MessageWriter
from danlu.server.api.message_schema import MessageReply
from danlu.server.api.turn import TurnEvent

USAGE = {
    "input_tokens": 5, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 2, "output_tokens": 3,
    "output_tokens_details": {"thinking_tokens": 1},
}  # fmt: skip


def written(*events: list[Part]) -> tuple[list[Any], dict[str, Any]]:
    """The events, each validated, and the message that the writer holds."""
    writer = MessageWriter(
        {"id": "msg_1", "type": "message", "role": "assistant", "model": "tiny", "content": [], "stop_reason": None,
         "stop_sequence": None, "usage": USAGE | {"output_tokens": 0}}
    )  # fmt: skip
    sent = writer.begin()
    for parts in events:
        sent += writer.push(TurnEvent(0, parts))
    sent += writer.finish("end_turn", None, USAGE)
    MessageReply.model_validate(writer.message)
    validated(Message, writer.message)
    told = sse_events(b"".join(sent).decode().split("\n"))
    return [validated_event(RawMessageStreamEvent, data) for name, data in told if name != "ping"], writer.message


def test_the_sequence_of_thought_text_and_use() -> None:
    call: list[Part] = [ToolCallBegun(0, "call_a", "f"), ToolCallArguments(0, '{"x":'), ToolCallArguments(0, "1}")]
    events, message = written([Reasoning("h"), Reasoning("m")], [Said("I ask."), *call])
    assert [(event.type.removeprefix("content_block_"), getattr(event, "index", None)) for event in events] == [
        ("message_start", None),
        ("start", 0), ("delta", 0), ("delta", 0), ("stop", 0),
        ("start", 1), ("delta", 1), ("stop", 1),
        ("start", 2), ("delta", 2), ("delta", 2), ("stop", 2),
        ("message_delta", None), ("message_stop", None),
    ]  # fmt: skip
    assert message["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "text", "text": "I ask."},
        {"type": "tool_use", "id": "call_a", "name": "f", "input": {"x": 1}},
    ]


def test_arguments_that_were_cut_off_are_none() -> None:
    _, message = written([ToolCallBegun(0, "call_a", "f"), ToolCallArguments(0, '{"x":')])
    assert message["content"][0]["input"] == {}


parts = st.lists(
    st.one_of(
        st.builds(Reasoning, st.text(min_size=1)),
        st.builds(Said, st.text(min_size=1)),
        st.tuples(st.dictionaries(st.text(max_size=3), st.integers(), max_size=3), st.integers(1, 20)),
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(parts)
def test_the_client_adds_the_events_up_to_the_message(drawn: list[Any]) -> None:
    turns: list[list[Part]] = []
    calls = 0
    for part in drawn:
        if isinstance(part, tuple):
            text, width = json.dumps(part[0]), part[1]
            pieces = [text[i : i + width] for i in range(0, len(text), width)]
            turns.append(
                [ToolCallBegun(calls, f"c{calls}", "f"), *(ToolCallArguments(calls, piece) for piece in pieces)]
            )
            calls += 1
        else:
            turns.append([part])
    events, message = written(*turns)
    snapshot = None
    buffers: dict[int, bytes] = {}
    for event in events:
        snapshot = accumulate_event(event=event, current_snapshot=snapshot, json_bufs=buffers)
    assert snapshot is not None
    told = [
        {key: block.model_dump()[key] for key in own}
        for block, own in zip(snapshot.content, message["content"], strict=True)
    ]
    assert told == message["content"]
    assert snapshot.usage.model_dump(exclude_none=True) == message["usage"]
    assert snapshot.stop_reason == message["stop_reason"]
