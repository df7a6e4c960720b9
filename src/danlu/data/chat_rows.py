"""Chat rows: which of the common formats a row is in, and its turns in one form.

    messages        {"messages": [{"role": "user", "content": "..."}, ...]}                  OpenAI
    conversations   {"conversations": [{"from": "human", "value": "..."}, ...]}              ShareGPT, Vicuna
    instruction     {"instruction": "...", "input": "...", "output": "..."}                  Alpaca
    prompt          {"prompt": "...", "completion": "..."}, or "response" for "completion"   prompt and completion
    text            {"text": "..."}                                                          no chat, plain text

A conversation may open with a system message. Then the user speaks and the assistant answers, in turns; an assistant
that called a tool is answered by one or more tool messages. Two turns of the user, or of the assistant, in a row are
an error rather than merged: in practice they are the trace of a row that was cut badly. A last turn of the user
without an answer is allowed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from danlu.console import warn
from danlu.errors import DanluError

if TYPE_CHECKING:
    from danlu.data.folder import Split

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Roles as data sets name them, and as messages name them here."""


@dataclass
class ChatRow:
    """One training example: ``messages`` of a chat, or ``text`` of a plain text row. ``where`` is for errors."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    where: str = ""
    text: str | None = None


def chat_messages(row: Mapping[str, Any], where: str, *, answered: bool = True) -> list[dict[str, Any]] | None:
    """The messages of a row, or None when its fields are those of no chat format.

    Args:
        row: a row of a data set.
        where: file and line, put in front of errors.
        answered: the assistant must have said something.

    Raises:
        DanluError: the row is a chat, and a broken one.
    """
    for keys, read in _FORMATS:
        if all(row.get(key) is not None for key in keys):
            messages = read(row, where)
            _check(messages, where)
            if answered and not any(message["role"] == "assistant" for message in messages):
                raise DanluError(f"{where}: no message is the assistant's; there is nothing to learn")
            return messages
    return None


def read_chat_rows(
    path: str | Path, on_error: Literal["stop", "skip"] = "stop", split: Split = "train"
) -> Iterator[ChatRow]:
    """The rows of JSON Lines, JSON, CSV or Parquet files (compressed or not), or of a data folder, in a stream.

    Args:
        path: a file, a folder of files, a glob, or a data folder.
        on_error: ``stop`` at the first broken row, or ``skip`` broken rows, and tell at the end how many there were.
        split: which split of a data folder.

    Raises:
        DanluError: a row is broken (``stop``), or there is no usable row.
    """
    from danlu.data.corpus import ErrorPolicy, find_sources
    from danlu.data.folder import DataFolder
    from danlu.data.readers import ReaderOptions, read_records
    from danlu.formats.card import CARD

    n_rows = 0
    policy = ErrorPolicy(on_error)
    if (Path(path) / CARD).exists():
        for document in DataFolder(path).documents(split):
            n_rows += 1
            where = f"{path}: {document.path or document.id}"
            if document.kind == "chat":
                yield ChatRow(document.messages(), where)
            else:
                yield ChatRow(where=where, text=document.text)
    else:
        for source in find_sources([str(path)], (), (), policy):
            for file in source.files:
                for record in read_records(file, ReaderOptions(), policy):
                    n_rows += 1
                    where = str(file.path)
                    if record.row is not None:
                        where += f":{record.row}" if file.format == "jsonl" else f": row {record.row}"
                    if record.type == "chat":
                        yield ChatRow(json.loads(record.text)["messages"], where)
                    else:
                        yield ChatRow(where=where, text=record.text)
    if policy.count:
        warn(f"{path}: {policy.count:,} of {policy.count + n_rows:,} rows skipped; the first: {policy.messages[0]}")
    if n_rows == 0:
        raise DanluError(f"{path}: holds no usable row; expected chats, instructions or plain text")


def _from_messages(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    messages = []
    for number, turn in _turns(row, "messages", where):
        if "role" not in turn:
            raise DanluError(f"{where}: message {number} has no role; expected {{'role': ..., 'content': ...}}")
        message = {"role": _role(turn["role"], number, where), "content": _content(turn.get("content"), number, where)}
        for key in ("reasoning_content", "tool_calls"):
            if turn.get(key):
                message[key] = turn[key]
        messages.append(message)
    return messages


def _from_sharegpt(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for number, turn in _turns(row, "conversations", where):
        speaker = turn.get("from", turn.get("role"))
        content = _content(turn.get("value", turn.get("content")), number, where)
        if speaker == "function_call":
            messages.append({"role": "assistant", "content": "", "tool_calls": [_tool_call(content, number, where)]})
        else:
            messages.append({"role": _role(speaker, number, where), "content": content})
    return messages


def _from_alpaca(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    instruction, given, output = (_text(row, key, where) for key in ("instruction", "input", "output"))
    messages = [{"role": "system", "content": _text(row, "system", where)}] if row.get("system") else []
    question = f"{instruction}\n\n{given}" if given.strip() else instruction
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": output}]


def _from_prompt(answer: str) -> Callable[[Mapping[str, Any], str], list[dict[str, Any]]]:
    def read(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
        if isinstance(row["prompt"], list) and isinstance(row[answer], list):  # both as messages
            return _from_messages({"messages": [*row["prompt"], *row[answer]]}, where)
        return [
            {"role": "user", "content": _text(row, "prompt", where)},
            {"role": "assistant", "content": _text(row, answer, where)},
        ]

    return read


# In this order: data sets that carry several formats put the richest into "messages".
_FORMATS: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any], str], list[dict[str, Any]]]], ...] = (
    (("messages",), _from_messages),
    (("conversations",), _from_sharegpt),
    (("instruction", "output"), _from_alpaca),
    (("prompt", "completion"), _from_prompt("completion")),
    (("prompt", "response"), _from_prompt("response")),
)


def _turns(row: Mapping[str, Any], key: str, where: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    turns = row[key]
    if not isinstance(turns, list) or not turns:
        raise DanluError(f"{where}: field {key!r} must be a list of turns, and not empty")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise DanluError(f"{where}: message {number} is not an object with a role and content")
        yield number, turn


def _role(name: Any, number: int, where: str) -> str:
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise DanluError(f"{where}: message {number} has the unknown role {name!r}; known are {', '.join(ROLES)}")
    return role


def _content(content: Any, number: int, where: str) -> str:
    """A message's text; the text parts of the OpenAI form are joined."""
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise DanluError(f"{where}: the content of message {number} is not text")
    return content


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DanluError(f"{where}: field {key!r} is not text")
    return value


def _tool_call(content: str, number: int, where: str) -> dict[str, Any]:
    try:
        call = json.loads(content)
        return {"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
    except (ValueError, KeyError, TypeError):
        raise DanluError(
            f"{where}: message {number} is a function_call without JSON of the form {{'name': ..., 'arguments': ...}}"
        ) from None


def _check(messages: list[dict[str, Any]], where: str) -> None:
    """The order of the turns, and that none is empty; an empty system message, which many sets carry, is dropped."""
    if messages[0]["role"] == "system" and not messages[0]["content"].strip():
        del messages[0]
    last = "system"
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role == "system" and number > 1:
            raise DanluError(f"{where}: message {number} is a system message; only the first may be")
        if role == "assistant" and last == "system":
            raise DanluError(f"{where}: message {number} is the assistant's, before the user said anything")
        if role == "tool" and last not in ("assistant", "tool"):
            raise DanluError(f"{where}: message {number} is a tool's answer, but no call of the assistant precedes it")
        if role == last and role in ("user", "assistant"):
            raise DanluError(f"{where}: messages {number - 1} and {number} are both the {role}'s; merge them into one")
        if role == "user" and last == "tool":
            raise DanluError(
                f"{where}: message {number} is the user's, but the assistant has not used the tool's answer"
            )
        if not message["content"].strip() and not message.get("tool_calls") and role != "tool":
            raise DanluError(f"{where}: message {number} ({role}) is empty")
        last = role
