"""Conversations as templates get them, with and without a place for tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from danlu.server.api.chat_prompt import for_template
from danlu.server.protocol import ModelInfo
from danlu.tokenizer.tokenizer import Tokenizer

KNOWS = ModelInfo("m", "generate", 100, 100, 8, chat=True, template_has_tools=True)
KNOWS_NOT = ModelInfo("m", "generate", 100, 100, 8, chat=True)
MISTRAL = ModelInfo("m", "generate", 100, 100, 8, chat=True, template_has_tools=True, tool_format="mistral")

TOOL = {"type": "function", "function": {"name": "f", "description": "Does.", "strict": True}}


def call(id: str, arguments: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "f", "arguments": arguments}}


CONVERSATION = [
    {"role": "developer", "content": "Be brief."},
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Do it twice."},
    {"role": "assistant", "content": None, "tool_calls": [call("call_1", '{"a": 1}'), call("call_2", '{"a": 2}')]},
    {"role": "tool", "content": "one", "tool_call_id": "call_1"},
    {"role": "tool", "content": "two", "tool_call_id": "call_2"},
    {"role": "assistant", "content": None, "refusal": "No more."},
]


def test_a_template_that_knows_tools_gets_them() -> None:
    messages, tools = for_template(CONVERSATION, [TOOL], KNOWS)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool", "tool", "assistant"]
    assert messages[0]["content"] == "Be brief.\n\nBe kind."
    assert messages[2]["tool_calls"][1]["function"]["arguments"] == {"a": 2}
    assert messages[5] == {"role": "assistant", "content": "No more."}
    assert tools is not None
    assert tools[0]["function"].keys() == {"name", "description", "parameters"}
    assert for_template(CONVERSATION, [], KNOWS)[1] is None


def test_elsewhere_tools_and_calls_are_text(smollm2: Path) -> None:
    tokenizer = Tokenizer.load(smollm2)
    messages, tools = for_template(CONVERSATION, [TOOL], KNOWS_NOT)
    assert tools is None
    text = tokenizer.render_chat(messages, add_generation_prompt=True)
    system, *_ = text.split("<|im_end|>")
    signature = next(line for line in system.splitlines() if line.startswith("{"))
    assert json.loads(signature)["function"]["name"] == "f"
    assert "Be brief.\n\nBe kind.\n\n" in system
    assert '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>\n' in text
    assert "user\n<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response><|im_end|>" in text
    assert CONVERSATION[0]["content"] == "Be brief.", "what was given is left as it was"


def test_tools_make_a_system_message_where_there_is_none() -> None:
    messages, _ = for_template([{"role": "user", "content": "Hi"}], [TOOL], KNOWS_NOT)
    assert [message["role"] for message in messages] == ["system", "user"]
    assert for_template([{"role": "user", "content": "Hi"}], [], KNOWS_NOT)[0] == [{"role": "user", "content": "Hi"}]


def test_arguments_that_are_no_object_stay_text() -> None:
    for arguments in ("[1]", "{broken", "3"):
        history = [{"role": "assistant", "content": None, "tool_calls": [call("x", arguments)]}]
        messages, _ = for_template(history, [], KNOWS)
        assert messages[0]["tool_calls"][0]["function"]["arguments"] == arguments


def test_ids_are_made_as_the_template_wants_them() -> None:
    """Templates of Mistral take ids of nine letters and digits, and those of a call and its result are the same."""
    messages, _ = for_template(CONVERSATION, [TOOL], MISTRAL)
    ids = [one["id"] for one in messages[2]["tool_calls"]]
    assert all(len(id) == 9 and id.isalnum() for id in ids)
    assert len(set(ids)) == 2
    assert [messages[3]["tool_call_id"], messages[4]["tool_call_id"]] == ids
    own = [{"role": "tool", "content": "", "tool_call_id": "abcdef123"}]
    assert for_template(own, [], MISTRAL)[0][0]["tool_call_id"] == "abcdef123"
