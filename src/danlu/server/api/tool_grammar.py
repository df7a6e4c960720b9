"""Answers that have to be tool calls, or that may hold some whose arguments follow a schema, as Lark grammars."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from danlu.server.protocol import ToolFormat
from danlu.tokenizer.special import THINK, TOOL_CALL

MOST_CALLS = 8
"""In an answer that has to be tool calls: a small model may never find an end by itself."""

NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

TEXT = "TEXT: /(?s:.*)/"
THOUGHT = f'thought[suffix="{THINK[1]}"]: '


def forced_calls(form: ToolFormat, tools: Sequence[dict[str, Any]], most: int) -> list[str]:
    """Rules, the first of them `calls`: one to ``most`` calls of any of the tools, and nothing else.

    Args:
        tools: in OpenAI's shape.
    """
    key = "parameters" if form == "llama3" else "arguments"
    calls = " | ".join(_call(tool["function"], key, free=False) for tool in tools)
    begin, between, end = _AROUND[form]
    more = f"({_quoted(between)} call){{0,{most - 1}}}" if most > 1 else ""
    row = " ".join(filter(None, [begin and _quoted(begin), "call", more, end and _quoted(end)]))
    return [f"calls: {row}", f"call: {calls}"]


def strict_calls(tools: Sequence[dict[str, Any]]) -> str:
    """A grammar: free text, in which a call in the hermes format follows the schema of its tool if that is strict."""
    calls = " | ".join(_call(tool["function"], "arguments", free=True) for tool in tools)
    return "\n".join((
        "start: spoken* TEXT",
        f'spoken: opening "\\n" ({calls}) {_quoted(chr(10) + TOOL_CALL[1])}',
        f"opening[lazy]: TEXT {_quoted(TOOL_CALL[0])}",
        TEXT,
    ))  # fmt: skip


def answer_grammar(*alternatives: list[str], thought: bool, may_think: bool) -> str:
    """A grammar: one of the alternatives, behind a thought.

    Args:
        alternatives: rules each, of which the first is the alternative.
        thought: one has been opened by the prompt.
        may_think: there may be one.
    """
    names = " | ".join(rules[0].partition(":")[0] for rules in alternatives)
    rules = [rule for rules in alternatives for rule in rules]
    if not (thought or may_think):
        return "\n".join([f"start: {names}", *rules])
    begin = f"{THOUGHT}TEXT" if thought else f"{THOUGHT}{_quoted(THINK[0])} TEXT"
    lead = "thought SPACE" if thought else "(thought SPACE)?"
    return "\n".join([f"start: {lead} ({names})", begin, TEXT, r"SPACE: /[ \n]{0,4}/", *rules])


def json_rule(schema: dict[str, Any]) -> list[str]:
    """The rule `json`: JSON of a schema."""
    return [f"json: {_json(schema)}"]


_AROUND: dict[ToolFormat, tuple[str, str, str]] = {
    "hermes": (f"{TOOL_CALL[0]}\n", f"\n{TOOL_CALL[1]}\n{TOOL_CALL[0]}\n", f"\n{TOOL_CALL[1]}"),
    "llama3": ("", "; ", ""),
    "mistral": ("[", ", ", "]"),
}
"""What is written before, between and behind the calls."""


def _call(function: dict[str, Any], key: str, free: bool) -> str:
    begin = f'{{"name": {json.dumps(function["name"])}, "{key}": '
    schema = _closed(function.get("parameters") or NO_ARGUMENTS)
    if free and not function.get("strict"):
        schema = {"type": "object"}
    return f'{_quoted(begin)} {_json(schema)} "}}"'


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema of arguments without such as are not declared, unless it speaks of them: no function has a use for them,
    and a small model may invent them without end."""
    if schema.get("type") == "object" and schema.keys() <= _DECLARES_ALL:
        return schema | {"additionalProperties": False}
    return schema


_DECLARES_ALL = {"$defs", "$schema", "definitions", "description", "properties", "required", "title", "type"}


def _json(schema: dict[str, Any]) -> str:
    return f"%json {json.dumps(schema, ensure_ascii=False)}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
