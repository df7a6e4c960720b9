"""Items of the Responses API: as they are kept, and the messages of a chat that they stand for."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from danlu.server.api.response_schema import (
    FunctionCall,
    FunctionCallOutput,
    InputMessage,
    Item,
    Part,
    ReasoningItem,
)
from danlu.server.errors import ApiError

ItemDict = dict[str, Any]
"""An item as it is kept and handed out."""


def new_id(prefix: str) -> str:
    """An id that nobody guesses, such as ``msg_5f0c...``."""
    return f"{prefix}_{secrets.token_hex(24)}"


def input_items(asked: str | list[Item]) -> list[ItemDict]:
    """The input of a request, each item with its id."""
    if isinstance(asked, str):
        return [_message("user", asked)]
    return [_input_item(item) for item in asked]


def _input_item(item: Item) -> ItemDict:
    status = item.status or "completed"
    match item:
        case InputMessage():
            return _message(item.role, item.content, item.id, status)
        case FunctionCall():
            called = {"call_id": item.call_id, "name": item.name, "arguments": item.arguments}
            return {"id": item.id or new_id("fc"), "type": "function_call", **called, "status": status}
        case FunctionCallOutput(output=output):
            given = output if isinstance(output, str) else [_part(part) for part in output]
            answered = {"call_id": item.call_id, "output": given}
            return {"id": item.id or new_id("fc"), "type": "function_call_output", **answered, "status": status}
        case ReasoningItem():
            thought = {} if item.content is None else {"content": [part.model_dump() for part in item.content]}
            summary = [part.model_dump() for part in item.summary]
            return {"id": item.id or new_id("rs"), "type": "reasoning", "summary": summary, **thought, "status": status}


def _message(role: str, content: str | list[Part], id: str | None = None, status: str = "completed") -> ItemDict:
    if not isinstance(content, str):
        parts = [_part(part) for part in content]
    elif role == "assistant":
        parts = [{"type": "output_text", "text": content, "annotations": []}]
    else:
        parts = [{"type": "input_text", "text": content}]
    return {"id": id or new_id("msg"), "type": "message", "role": role, "status": status, "content": parts}


def _part(part: Part) -> dict[str, Any]:
    return part.model_dump(exclude_none=True)


def messages_of(items: Sequence[ItemDict], instructions: str | None = None) -> list[dict[str, Any]]:
    """The conversation as OpenAI's chat messages. What the model did in one turn (reasoning, text, calls) becomes one.

    Raises:
        ApiError: a function's output belongs to no call.
    """
    messages: list[dict[str, Any]] = [] if instructions is None else [{"role": "system", "content": instructions}]
    calls: set[str] = set()
    for item in items:
        kind = item["type"]
        if kind == "message" and item["role"] != "assistant":
            messages.append({"role": item["role"], "content": _text(item["content"])})
        elif kind == "function_call_output":
            if item["call_id"] not in calls:
                message = f"input: an output belongs to the call {item['call_id']!r}, which nobody made before it"
                raise ApiError(400, message, param="input", code="invalid_value")
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": _text(item["output"])})
        else:
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            _add_to_turn(messages[-1], item)
            if kind == "function_call":
                calls.add(item["call_id"])
    return messages


def _add_to_turn(message: dict[str, Any], item: ItemDict) -> None:
    if item["type"] == "message":
        text = _text(item["content"])
        message["content"] += f"\n\n{text}" if message["content"] else text
    elif item["type"] == "reasoning":
        thought = "\n\n".join(part["text"] for part in item.get("content") or item["summary"])
        if thought:
            message["reasoning_content"] = "\n\n".join(filter(None, [message.get("reasoning_content"), thought]))
    else:
        function = {"name": item["name"], "arguments": item["arguments"]}
        message.setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": function})


def _text(content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part["refusal"] if part["type"] == "refusal" else part["text"] for part in content)
