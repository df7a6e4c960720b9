"""Forced and strict tool calls: whatever a model that knows nothing writes under the grammar is read back as calls that
follow their schemas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from danlu.engine.config import SamplingParams
from danlu.engine.grammar import Grammar
from danlu.server.api.answer_parts import AnswerParser, Part, Reasoning, Said, ToolCallArguments, ToolCallBegun
from danlu.server.api.tool_calls import scanner_for
from danlu.server.api.tool_grammar import answer_grammar, forced_calls, json_rule, strict_calls
from danlu.server.protocol import ToolFormat
from danlu.tokenizer.tokenizer import Tokenizer
from random_answers import random_answer

SCHEMAS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "$defs": {"unit": {"enum": ["c", "f", 'a "quoted" unit']}},
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 5}, "unit": {"$ref": "#/$defs/unit"}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
    "roll": {
        "type": "object",
        "properties": {
            "dice": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 6}, "maxItems": 3}
        },
        "required": ["dice"],
        "additionalProperties": False,
    },
    "now": {"type": "object", "properties": {}, "additionalProperties": False},
}
TOOLS = [
    {"type": "function", "function": {"name": name, "strict": True} | ({"parameters": schema} if name != "now" else {})}
    for name, schema in SCHEMAS.items()
]
FORMATS: tuple[ToolFormat, ...] = ("hermes", "llama3", "mistral")


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer.load(model_folder)


def written(tokenizer: Tokenizer, lark: str, seed: int, liked: str = '"}]<,;') -> str | None:
    """What a random model writes under a grammar, with a liking for some characters and the end; None: cut off."""
    grammar = Grammar.compile(SamplingParams(grammar=lark), tokenizer)
    return random_answer(tokenizer, grammar, seed, lambda token: token[:1].decode("latin-1") in liked, 250)


def read(text: str, form: ToolFormat, thinking: bool = False) -> tuple[str, str, list[tuple[str, str]]]:
    """Reasoning, answer, and calls with their arguments."""
    parser = AnswerParser(thinking=thinking, calls=scanner_for(form, SCHEMAS))
    parts: list[Part] = [*parser.push(text), *parser.finish()]
    calls: list[tuple[str, str]] = []
    for part in parts:
        if isinstance(part, ToolCallBegun):
            calls.append((part.name, ""))
        elif isinstance(part, ToolCallArguments):
            calls[-1] = (calls[-1][0], calls[-1][1] + part.text)
    reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
    return reasoning, "".join(part.text for part in parts if isinstance(part, Said)), calls


def require_valid(calls: list[tuple[str, str]]) -> None:
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])


@pytest.mark.parametrize("most", [1, 4])
@pytest.mark.parametrize("form", FORMATS)
def test_forced_calls_are_calls_and_nothing_else(tokenizer: Tokenizer, form: ToolFormat, most: int) -> None:
    lark = answer_grammar(forced_calls(form, TOOLS, most), thought=False, may_think=False)
    numbers, names = set(), set()
    ended = [text for seed in range(24) if (text := written(tokenizer, lark, seed)) is not None]
    assert len(ended) > 12
    for text in ended:
        reasoning, said, calls = read(text, form)
        assert (reasoning, said) == ("", ""), text
        require_valid(calls)
        numbers.add(len(calls))
        names |= {name for name, _ in calls}
    assert min(numbers) >= 1
    assert max(numbers) <= most
    assert len(names) > 1
    assert most == 1 or len(numbers) > 1


@pytest.mark.parametrize("opened", [True, False])
def test_a_thought_comes_before_the_calls(tokenizer: Tokenizer, opened: bool) -> None:
    lark = answer_grammar(forced_calls("hermes", TOOLS, 1), thought=opened, may_think=not opened)
    thoughts = 0
    for seed in range(8):
        text = written(tokenizer, lark, seed)
        if text is None:
            continue  # a thought without end
        reasoning, said, calls = read(text, "hermes", thinking=opened)
        assert said == ""
        require_valid(calls)
        assert len(calls) == 1
        thoughts += bool(reasoning)
    assert thoughts


def test_an_answer_of_a_schema_or_calls(tokenizer: Tokenizer) -> None:
    lark = answer_grammar(
        forced_calls("hermes", TOOLS, 2), json_rule({"enum": ["yes", "no"]}), thought=False, may_think=False
    )
    answers, calls_made = set(), 0
    for seed in range(8):
        text = written(tokenizer, lark, seed, liked='"}]<,' if seed % 2 else '"')
        assert text is not None
        _, said, calls = read(text, "hermes")
        assert bool(said) != bool(calls)
        require_valid(calls)
        answers |= {json.loads(said)} if said else set()
        calls_made += len(calls)
    assert answers <= {"yes", "no"}
    assert answers
    assert calls_made


def test_calls_of_strict_tools_follow_their_schemas_amid_free_text(tokenizer: Tokenizer) -> None:
    grammar = Grammar.compile(SamplingParams(grammar=strict_calls(TOOLS)), tokenizer)
    assert grammar is not None

    def admits(text: str) -> bool:
        """Whether the model may write the text and end."""
        matcher = grammar.fork()._matcher
        ids = tokenizer.encode(text, allow_special=True)
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())

    def call(arguments: str, name: str = "roll") -> str:
        return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'

    assert admits("Free text <tool, {} and no call.")
    assert admits(call('{"dice": [1, 6]}'))
    now = call("{}", "now")
    assert admits("Let me see. " + call('{"dice": []}') + f"\n{now} There.")
    assert not admits(call('{"dice": [7]}'))
    assert not admits(call("{}"))
    assert not admits(call("{}", "unknown"))
    assert not admits(f"{now} and then " + call('{"dice": 3}'))
    assert not admits("A call that is not made: <tool_call>")


def test_only_strict_tools_are_held_to_their_schemas(tokenizer: Tokenizer) -> None:
    free = {"type": "function", "function": {"name": "roll", "parameters": SCHEMAS["roll"]}}
    grammar = Grammar.compile(SamplingParams(grammar=strict_calls([free, TOOLS[2]])), tokenizer)
    assert grammar is not None
    for name, admitted in (("roll", True), ("now", False)):
        text = f'<tool_call>\n{{"name": "{name}", "arguments": {{"a": 1}}}}\n</tool_call>'
        ids = tokenizer.encode(text, allow_special=True)
        assert (grammar.fork()._matcher.try_consume_tokens(ids) == len(ids)) == admitted


def test_arguments_that_are_not_declared_are_not_invented(tokenizer: Tokenizer) -> None:
    def admits(schema: dict[str, Any]) -> bool:
        tool = {"type": "function", "function": {"name": "now", "strict": True, "parameters": schema}}
        grammar = Grammar.compile(SamplingParams(grammar=strict_calls([tool])), tokenizer)
        assert grammar is not None
        text = '<tool_call>\n{"name": "now", "arguments": {"b": 1}}\n</tool_call>'
        ids = tokenizer.encode(text, allow_special=True)
        return bool(grammar.fork()._matcher.try_consume_tokens(ids) == len(ids))

    declared = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert not admits(declared)
    assert admits(declared | {"additionalProperties": {"type": "integer"}})
    assert admits({"type": "object", "anyOf": [declared, {"properties": {"b": {"type": "integer"}}}]})


def test_large_schemas_fit(tokenizer: Tokenizer) -> None:
    """Agents bring tools of 50 KB, whose descriptions weigh nothing in a grammar."""
    properties = {f"p{i}": {"type": "boolean", "description": "text " * 60} for i in range(100)}
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": properties}}}
    lark = answer_grammar(forced_calls("hermes", [tool] * 2, 1), thought=False, may_think=False)
    assert len(lark) > 60_000
    assert Grammar.compile(SamplingParams(grammar=lark), tokenizer) is not None
