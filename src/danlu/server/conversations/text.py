"""A conversation as a Markdown file that people can read and that reads back as it was: what is shown of it, without
other branches and token probabilities.

What belongs to a part stands in a comment before it, which Markdown does not show:

    <!-- danlu:conversation {"title": "Poems", ...} -->
    # Poems

    <!-- danlu:message {"role": "user", ...} -->
    ## User

    Write one.

A line of a text that looks like such a comment gets a backslash in front, so every text comes back exactly.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from danlu.server.conversations.schema import WholeConversation
from danlu.server.errors import ApiError
from danlu.server.schema import JsonObject

PARTS = ("conversation", "system", "message", "reasoning", "answer")
MARK = re.compile(rf"<!-- danlu:({'|'.join(PARTS)}) (\{{.*\}}) -->")
LIKE_A_MARK = re.compile(r"^(?=\\*<!-- danlu:)", re.MULTILINE)
ESCAPED = re.compile(r"^\\(?=\\*<!-- danlu:)", re.MULTILINE)

OF_CONVERSATION = ("title", "models", "parameters", "created_at", "updated_at")
OF_MESSAGE = ("role", "model", "reasoning_seconds", "tool_calls", "finish_reason", "stats", "created_at")


def shown_branch(conversation: JsonObject, messages: Iterable[JsonObject], leaf: str | None = None) -> list[JsonObject]:
    """The messages from the first to a leaf: the one named, else the first that is shown, else the newest.

    Raises:
        ApiError: there is no such message.
    """
    known = {message["id"]: message for message in messages}
    if leaf is None:
        leaf = next(iter(conversation["leaves"]), next(reversed(known), None))
    if leaf is not None and leaf not in known:
        raise ApiError(404, f"the conversation has no message {leaf}", code="message_not_found")
    branch = []
    while leaf is not None:
        branch.append(known[leaf])
        leaf = known[leaf]["parent"]
    return branch[::-1]


def to_markdown(conversation: JsonObject, branch: Iterable[JsonObject]) -> str:
    """A conversation's branch as Markdown."""
    title = _on_one_line(conversation["title"]) or "Conversation"
    parts = [_part("conversation", _some(conversation, OF_CONVERSATION), f"# {title}", "")]
    if conversation["system"]:
        parts.append(_part("system", {}, "## System", conversation["system"]))
    for message in branch:
        heading = "## User" if message["role"] == "user" else "## Assistant"
        if message["model"]:
            heading += f" ({_on_one_line(message['model'])})"
        thought = message["reasoning"]
        about = _some(message, OF_MESSAGE)
        parts.append(_part("message", about, heading, message["content"] if thought is None else ""))
        if thought is not None:
            parts.append(_part("reasoning", {}, "<details><summary>Reasoning</summary>", thought))
            parts.append(_part("answer", {}, "</details>", message["content"]))
    return "".join(parts)


def from_markdown(text: str) -> JsonObject:
    """The conversation of a file that `to_markdown` wrote, with new ids for its messages.

    Raises:
        ApiError: it is not such a file; the message names the line.
    """
    if text.partition("\n")[0].endswith("\r"):  # an editor or a mail put these line ends in
        text = text.replace("\r\n", "\n")
    found: JsonObject | None = None
    messages: list[JsonObject] = []
    before = ""
    for line, name, about, body in _parts(text):
        allowed = {"": ("conversation",), "conversation": ("system", "message"), "reasoning": ("answer",)}
        allowed["message"] = ("message", "reasoning") if messages and not messages[-1]["content"] else ("message",)
        if name not in allowed.get(before, ("message",)):
            raise _wrong(line, f"a part {name!r} has no place {f'after {before!r}' if before else 'at the beginning'}")
        if name == "conversation":
            found = about
        elif name == "system":
            assert found is not None
            found["system"] = body
        elif name == "message":
            parent = messages[-1]["id"] if messages else None
            messages.append({**about, "id": str(uuid.uuid4()), "parent": parent, "content": body})
        else:
            messages[-1]["reasoning" if name == "reasoning" else "content"] = body
        before = name
    if found is None:
        raise _wrong(1, "it does not begin with <!-- danlu:conversation {...} -->, as an exported file does")
    if before == "reasoning":
        raise _wrong(text.count("\n") + 1, "the answer after the reasoning is missing")
    found |= {"messages": messages, "leaves": [message["id"] for message in messages[-1:]]}
    try:
        return WholeConversation.model_validate(found).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ApiError(400, f"text: {where}: {first['msg'].removeprefix('Value error, ')}", param="text",
                       code="invalid_value") from error  # fmt: skip


def _part(name: str, about: JsonObject, heading: str, body: str) -> str:
    packed = json.dumps(about, ensure_ascii=False).replace(">", "\\u003e")  # nothing in it ends the comment
    escaped = LIKE_A_MARK.sub(r"\\", body)
    return f"<!-- danlu:{name} {packed} -->\n{heading}\n\n" + (f"{escaped}\n\n" if body else "")


def _parts(text: str) -> Iterator[tuple[int, str, dict[str, Any], str]]:
    """Line, name, comment and text of each part."""
    lines = text.split("\n")
    marks = [i for i, line in enumerate(lines) if MARK.fullmatch(line)]
    if not marks or any(line.strip() for line in lines[: marks[0]]):
        return
    for start, end in zip(marks, [*marks[1:], len(lines)], strict=True):
        mark = MARK.fullmatch(lines[start])
        assert mark is not None
        try:
            about = from_json(mark[2], allow_inf_nan=False)
        except ValueError as error:
            raise _wrong(start + 1, f"the comment holds no JSON ({error})") from error
        if end < start + 3 or lines[start + 2]:
            raise _wrong(start + 2, "a heading and an empty line have to follow the comment")
        # An empty line ends a part. The last one has a line end more, which an editor may have taken away.
        body = "\n".join(lines[start + 3 : end]).removesuffix("\n")
        if end == len(lines):
            body = body.removesuffix("\n")
        yield start + 1, mark[1], about, ESCAPED.sub("", body)


def _wrong(line: int, what: str) -> ApiError:
    return ApiError(400, f"text: line {line}: {what}", param="text", code="invalid_value")


def _some(fields: JsonObject, names: Iterable[str]) -> JsonObject:
    return {name: fields[name] for name in names if fields[name] is not None}


def _on_one_line(text: str) -> str:
    return " ".join(text.split())
