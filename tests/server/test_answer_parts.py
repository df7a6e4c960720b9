"""Reasoning, answers and tool calls, found in text however it is cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.server.api.answer_parts import AnswerParser, Part, Reasoning, Said, ToolCallArguments, ToolCallBegun
from danlu.server.api.tool_calls import scanner_for
from danlu.server.protocol import ToolFormat

NAMES = ("get_weather", "f")
FORMATS: tuple[ToolFormat, ...] = ("hermes", "llama3", "mistral")


def parsed(pieces: Sequence[str], form: ToolFormat | None = "hermes", thinking: bool = False) -> list[Any]:
    """Parts without ids, neighbours of one kind joined."""
    parser = AnswerParser(thinking=thinking, calls=form and scanner_for(form, NAMES))
    parts: list[Part] = []
    for piece in pieces:
        parts += parser.push(piece)
    parts += parser.finish()
    assert all(part.text for part in parts if not isinstance(part, ToolCallBegun)), "an empty part"
    joined: list[Any] = []
    for part in parts:
        match part:
            case ToolCallBegun(call, _, name):
                joined.append(("call", call, name, ""))
            case ToolCallArguments(call, text):
                kind, begun, name, arguments = joined[-1]
                assert (kind, begun) == ("call", call), "arguments without a call"
                joined[-1] = (kind, call, name, arguments + text)
            case Reasoning(text) | Said(text):
                kind = type(part).__name__
                if joined and joined[-1][0] == kind:
                    joined[-1] = (kind, joined[-1][1] + text)
                else:
                    joined.append((kind, text))
    return joined


def call(name: str, arguments: Any, key: str = "arguments") -> str:
    return json.dumps({"name": name, key: arguments})


# What the parser looks for, whole and broken.
fragments = st.sampled_from(
    [
        *("<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>"),
        *("<", "</", "think>", "tool_call>", " ", "\n", "Hi", "你好", "{", "}", "[", "]", ",", ";", ":", '"', "\\"),
        *('"name"', '"f"', '{"name": "f"}', '{"name": "f", "parameters": {}}', '{"name": "f", "arguments": '),
        '{"name": "f", "arguments": {"a": [1, "}"]}}',
        '{"name": "unknown", "arguments": {}}',
        '{"name": "f", "city": "Paris"}',
        '{"arguments": {"a": "\\""}, "name": "f"}',
        '{"name": "f", "arguments": "{\\"a\\": \\"\\u00e9\\ud83d\\ude00\\"}"}',
        '{"name": "f", "arguments": null, "id": "x"}',
    ]
)
texts = st.lists(fragments, max_size=12).map("".join)
values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8), st.lists, max_leaves=4)


@settings(max_examples=300, deadline=None)
@given(
    text=texts,
    cuts=st.lists(st.integers(0, 200), max_size=30),
    form=st.sampled_from([*FORMATS, None]),
    thinking=st.booleans(),
)
def test_parts_do_not_depend_on_how_the_text_is_cut(
    text: str, cuts: list[int], form: ToolFormat | None, thinking: bool
) -> None:
    whole = parsed([text], form, thinking)
    places = sorted({min(cut, len(text)) for cut in cuts})
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    assert parsed(pieces, form, thinking) == whole
    assert parsed(list(text), form, thinking) == whole


@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_nothing_of_a_text_without_calls_is_lost(text: str) -> None:
    """Without tools, all that is no thought is said, character for character."""
    parts = parsed([text], None)
    said = "".join(part[1] for part in parts if part[0] == "Said")
    if not text.lstrip().startswith("<think>"):
        assert said == text
    else:
        _, closed, answer = text.partition("</think>")
        assert said == (answer.lstrip() if closed else "")


@settings(max_examples=100, deadline=None)
@given(
    text=st.text("ab </\n", max_size=20),
    arguments=st.dictionaries(st.text(max_size=5), values, max_size=4),
    form=st.sampled_from(FORMATS),
    ascii_only=st.booleans(),
    as_text=st.booleans(),
    indent=st.sampled_from([None, 2]),
)  # fmt: skip
def test_a_call_is_found_with_the_exact_text_of_its_arguments(
    text: str, arguments: dict[str, Any], form: ToolFormat, ascii_only: bool, as_text: bool, indent: int | None
) -> None:
    written = json.dumps(arguments, ensure_ascii=ascii_only, indent=indent)
    value = json.dumps(written, ensure_ascii=ascii_only) if as_text else written
    key = "parameters" if form == "llama3" else "arguments"
    one = f'{{"name": "f", "{key}": {value}}}'
    if form == "hermes":
        parts = parsed([f"{text}<tool_call>\n{one}\n</tool_call>\n<tool_call>{one}</tool_call>"])
        before = text.rstrip()
        expected = [("Said", before)] if before else []
    else:
        parts = parsed([f"[TOOL_CALLS][{one}, {one}]" if form == "mistral" else f"{one}; {one}"], form)
        expected = []
    assert parts == [*expected, ("call", 0, "f", written), ("call", 1, "f", written)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nSo.\n</think>\n\nHi", [("Reasoning", "So."), ("Said", "Hi")]),
        ("<think>never ended", [("Reasoning", "never ended")]),
        ("<think></think>Hi", [("Said", "Hi")]),
        ("Hi <think>no thought</think>", [("Said", "Hi <think>no thought</think>")]),
        ("Hi <tool_ca", [("Said", "Hi <tool_ca")]),
        ("<think>a </thi", [("Reasoning", "a </thi")]),
        ("<thi", [("Said", "<thi")]),
    ],
)
def test_thoughts(text: str, expected: list[Any]) -> None:
    assert parsed(list(text)) == expected


def test_a_thought_that_the_prompt_has_opened() -> None:
    assert parsed(["Let me ", "see.\n</thi", "nk>\nYes"], thinking=True) == [
        ("Reasoning", "Let me see."),
        ("Said", "Yes"),
    ]
    assert parsed(["<tool_call>{"], thinking=True) == [("Reasoning", "<tool_call>{")]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{}</tool_call>",
        "<tool_call>nonsense</tool_call>",
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {"a": 1}}</tool_call>',
        '<tool_call>{"arguments": [1], "name": "f"}</tool_call>',
        '<tool_call>{"name": "f',
        "<tool_call>",
        '{"name": "f", "arguments": {}}',
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert parsed(list(text)) == [("Said", text)]


def test_a_broken_call_does_not_hide_the_next() -> None:
    fine = f"<tool_call>{call('f', {'a': 1})}</tool_call>"
    assert parsed([f'<tool_call>{{"name": "x"<tool_call>{{oops {fine}']) == [
        ("Said", '<tool_call>{"name": "x"<tool_call>{oops'), ("call", 0, "f", '{"a": 1}'),
    ]  # fmt: skip


def test_a_call_is_told_while_it_is_written() -> None:
    parser = AnswerParser(calls=scanner_for("hermes", NAMES))
    assert parser.push('Look: <tool_call>{"name": "get_wea') == [Said("Look:")]
    assert parser.push('ther", "argu') == []
    begun, arguments = parser.push('ments": {"city": "Par')
    assert isinstance(begun, ToolCallBegun)
    assert (begun.call, begun.name) == (0, "get_weather")
    assert arguments == ToolCallArguments(0, '{"city": "Par')
    assert parser.push('is"}') == [ToolCallArguments(0, 'is"}')]
    assert parser.push("}</tool_call>") + parser.finish() == []


def test_arguments_may_be_missing_or_empty() -> None:
    for written in (
        '{"name": "f"}',
        '{"name": "f", "arguments": null}',
        '{"arguments": "", "name": "f"}',
        '{"name": "f", "arguments": {}}',
    ):
        for form in FORMATS:
            text = f"<tool_call>{written}</tool_call>" if form == "hermes" else written
            assert parsed(list(text), form) == [("call", 0, "f", "{}")], (written, form)


def test_a_list_or_an_object_that_is_no_call_is_an_answer() -> None:
    for form in ("llama3", "mistral"):
        for text in (
            '{"city": "Paris"}',
            '[{"name": "Ann"}]',
            "[1, 2]",
            "{",
            "[",
            "",
            "  ",
            '{"name": "f", "city": "Paris"}',
        ):
            assert parsed(list(text), form) == ([("Said", text)] if text else []), (text, form)


def test_marks_before_calls() -> None:
    one = call("f", {"a": 1})
    expected = [("call", 0, "f", '{"a": 1}')]
    assert parsed([f"[TOOL_CALLS] [{one}]"], "mistral") == expected
    assert parsed([f"[{one}]"], "mistral") == expected
    assert parsed([f"<|python_tag|>{call('f', {'a': 1}, 'parameters')}"], "llama3") == expected


def test_ids_are_what_templates_take() -> None:
    for form, length in (("hermes", 29), ("mistral", 9)):
        text = f"<tool_call>{call('f', {})}</tool_call>" if form == "hermes" else f"[{call('f', {})}, {call('f', {})}]"
        parser = AnswerParser(calls=scanner_for(form, NAMES))
        begun = [part for part in parser.push(text) if isinstance(part, ToolCallBegun)]
        assert all(len(part.id) == length for part in begun)
        assert len({part.id for part in begun}) == len(begun)
