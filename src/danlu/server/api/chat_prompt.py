"""A conversation in OpenAI's messages as the chat template of a model can write it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from danlu.server.api.tool_calls import ID_CHARS
from danlu.server.api.tool_grammar import NO_ARGUMENTS
from danlu.server.protocol import ModelInfo
from danlu.tokenizer.special import TOOL_CALL, TOOL_RESPONSE

Message = dict[str, Any]

TOOLS_BEGIN = "You may call these functions (one JSON signature a line):\n<tools>\n"
TOOLS_END = (
    f"\n</tools>\nA call is written as {TOOL_CALL[0]}\n"
    f'{{"name": ..., "arguments": {{...}}}}\n{TOOL_CALL[1]}. Its result comes back as {TOOL_RESPONSE[0]}.'
)


def for_template(
    messages: Sequence[Message], tools: Sequence[Message], info: ModelInfo
) -> tuple[list[Message], list[Message] | None]:
    """Messages and tools to be rendered.

    Instructions of the developer are the system's, and those at the beginning are one message, which is all that most
    templates take. Arguments of calls become objects. Where the template knows no tools, they and what was said with
    them become text, as Hermes writes it.
    """
    plain = _joined([_plain(message, info) for message in messages])
    described = [_described(tool) for tool in tools]
    if info.template_has_tools:
        return plain, described or None
    if described:
        signatures = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in described)
        text = f"{TOOLS_BEGIN}{signatures}{TOOLS_END}"
        if plain and plain[0]["role"] == "system":
            plain[0] = plain[0] | {"content": f"{plain[0]['content']}\n\n{text}"}
        else:
            plain.insert(0, {"role": "system", "content": text})
    return _as_text(plain), None


def _plain(message: Message, info: ModelInfo) -> Message:
    """A message without what says nothing."""
    plain = {key: value for key, value in message.items() if value is not None and value != []}
    if plain["role"] == "developer":
        plain["role"] = "system"
    refusal = plain.pop("refusal", None)
    plain["content"] = plain.get("content") or refusal or ""
    if "tool_calls" in plain:
        plain["tool_calls"] = [_call(call, info) for call in plain["tool_calls"]]
    if "tool_call_id" in plain:
        plain["tool_call_id"] = _id(plain["tool_call_id"], info)
    return plain


def _joined(messages: list[Message]) -> list[Message]:
    n = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if n < 2:
        return messages
    return [messages[0] | {"content": "\n\n".join(one["content"] for one in messages[:n])}, *messages[n:]]


def _call(call: Message, info: ModelInfo) -> Message:
    function = call["function"]
    arguments = function["arguments"]
    try:
        found = json.loads(arguments) if arguments.strip() else {}
    except ValueError:
        found = None
    if isinstance(found, dict):
        arguments = found
    return {
        "id": _id(call["id"], info),
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _id(id: str, info: ModelInfo) -> str:
    """An id of a call as the template takes it."""
    n = ID_CHARS.get(info.tool_format)
    if n is None or (len(id) == n and id.isalnum()):
        return id
    return hashlib.sha256(id.encode(errors="surrogatepass")).hexdigest()[:n]


def _described(tool: Message) -> Message:
    """A tool as models have learnt to read it."""
    function = {key: value for key, value in tool["function"].items() if value is not None and key != "strict"}
    return {"type": "function", "function": {"parameters": NO_ARGUMENTS} | function}


def _as_text(messages: list[Message]) -> list[Message]:
    found: list[Message] = []
    responding = False
    for message in messages:
        if message["role"] == "tool":
            text = f"{TOOL_RESPONSE[0]}\n{message['content']}\n{TOOL_RESPONSE[1]}"
            if responding:  # templates want the roles to take turns
                found[-1]["content"] += f"\n{text}"
            else:
                found.append({"role": "user", "content": text})
            responding = True
            continue
        responding = False
        calls = message.get("tool_calls")
        if calls:
            texts = [message["content"], *(_call_text(call["function"]) for call in calls)]
            content = "\n".join(filter(None, texts))
            message = {key: value for key, value in message.items() if key != "tool_calls"} | {"content": content}
        found.append(message)
    return found


def _call_text(function: Message) -> str:
    text = json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)
    return f"{TOOL_CALL[0]}\n{text}\n{TOOL_CALL[1]}"
