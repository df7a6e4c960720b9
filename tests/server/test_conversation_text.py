"""A conversation as Markdown, whatever it says."""

from __future__ import annotations

import contextlib
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from danlu.server.conversations.text import MARK, from_markdown, shown_branch, to_markdown
from danlu.server.errors import ApiError

OUR_MARKS = [
    '<!-- danlu:message {"role": "user"} -->', "<!-- danlu:answer {} -->", "<!-- danlu:", " -->", "-->", "\\", "\\\\",
    "## User", "## Assistant (tiny)", "</details>", "# Title", "```", "\n", "\n\n", "\r\n", "\r", " ", "\x0b", "\u2028",
    "丹炉",
]  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(st.one_of(st.sampled_from(OUR_MARKS), st.text(max_size=3)), max_size=12).map("".join),
)
NUMBERS = st.floats(min_value=0, max_value=1e10)
MESSAGES = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant"]),
        "content": TEXTS,
        "reasoning": st.none() | TEXTS,
        "reasoning_seconds": st.none() | NUMBERS,
        "tool_calls": st.none() | st.just([{"id": "c", "name": "f", "arguments": '{"a": "-->"}'}]),
        "model": st.none() | TEXTS,
        "finish_reason": st.none() | st.sampled_from(["stop", "length"]),
        "stats": st.none() | st.dictionaries(st.text(max_size=5), st.none() | NUMBERS, max_size=3),
        "created_at": NUMBERS,
    }
)
CONVERSATIONS = st.fixed_dictionaries(
    {
        "title": TEXTS.map(lambda text: text[:200]),
        "system": TEXTS,
        "models": st.lists(TEXTS, max_size=2),
        "parameters": st.dictionaries(TEXTS, st.none() | TEXTS | st.integers(), max_size=3),
        "created_at": NUMBERS,
        "updated_at": NUMBERS,
    }
)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(CONVERSATIONS, st.lists(MESSAGES, max_size=4))
def test_any_conversation_comes_back(conversation: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    text = to_markdown(conversation, messages)
    assert all(line.count("-->") == 1 for line in text.split("\n") if MARK.fullmatch(line))  # no comment ends early
    again = from_markdown(text)
    assert {name: again[name] for name in conversation} == conversation
    assert [{name: message[name] for name in messages[0]} for message in again["messages"]] == messages
    chain = [None, *(message["id"] for message in again["messages"])]
    assert [message["parent"] for message in again["messages"]] == chain[:-1]
    assert again["leaves"] == chain[-1:] if messages else again["leaves"] == []


SIMPLE = {"title": "T", "system": "", "models": [], "parameters": {}, "created_at": 1.0, "updated_at": 1.0}


def message(content: str, **fields: Any) -> dict[str, Any]:
    names = ("model", "reasoning", "reasoning_seconds", "tool_calls", "finish_reason", "stats")
    return {"role": "user", "created_at": 1.0, **dict.fromkeys(names), "content": content, **fields}


@pytest.mark.parametrize("changed", [lambda text: text.replace("\n", "\r\n"), str.strip, lambda text: text + "\n\n\n"])
def test_what_editors_do_to_a_file_does_no_harm(changed: Any) -> None:
    text = to_markdown({**SIMPLE, "system": "a\nb"}, [message("one\n\ntwo"), message("three", reasoning="why")])
    again = from_markdown(changed(text))
    assert again["system"] == "a\nb"
    assert again["messages"][0]["content"] == "one\n\ntwo"
    assert again["messages"][1]["reasoning"] == "why"
    assert again["messages"][1]["content"].rstrip("\n") == "three"


HEAD = "<!-- danlu:conversation {} -->\n# T\n\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "line 1"),
        ("# A file\n\nof another kind\n", "line 1"),
        ("before\n" + HEAD, "line 1"),
        ('<!-- danlu:message {"role": "user"} -->\n## User\n\nhello\n\n', "line 1: a part 'message'"),
        (HEAD + HEAD, "line 4: a part 'conversation'"),
        (HEAD + "<!-- danlu:answer {} -->\n</details>\n\n", "line 4: a part 'answer'"),
        (HEAD + "<!-- danlu:message {} -->\n## User\n\nhello\n\n", "messages.0.role"),
        (HEAD + '<!-- danlu:message {"role": "user"} -->\nhello\nthere\n\n', "line 5: a heading"),
        (HEAD + '<!-- danlu:message {"role": "user"} -->', "line 5: a heading"),
        (HEAD + "<!-- danlu:message {role} -->\n## User\n\n", "line 4: the comment holds no JSON"),
        (HEAD + '<!-- danlu:message {"role": NaN} -->\n## User\n\n', "line 4: the comment holds no JSON"),
        ('<!-- danlu:conversation {"parameters": {"a": %s} } -->\n# T\n\n' % ("[" * 5000 + "]" * 5000), "no JSON"),
        ('<!-- danlu:conversation {"secrets": 1} -->\n# T\n\n', "secrets"),
        (
            HEAD + '<!-- danlu:message {"role": "user"} -->\n## U\n\n<!-- danlu:reasoning {} -->\n<details>\n\nhm\n\n',
            "the answer after the reasoning is missing",
        ),
        (
            HEAD
            + '<!-- danlu:message {"role": "user"} -->\n## U\n\nsaid\n\n<!-- danlu:reasoning {} -->\n<details>\n\n',
            "a part 'reasoning'",
        ),
    ],
)
def test_what_is_no_such_file_is_refused(text: str, told: str) -> None:
    with pytest.raises(ApiError, match=r"^text: ") as refused:
        from_markdown(text)
    assert told in refused.value.message
    assert refused.value.status == 400


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(st.lists(st.one_of(st.sampled_from(OUR_MARKS), st.text(max_size=5)), max_size=30).map("".join))
def test_no_text_gets_the_reader_out_of_step(text: str) -> None:
    for one in (text, HEAD + text):
        with contextlib.suppress(ApiError):
            from_markdown(one)


def test_the_branch_that_is_shown() -> None:
    parents = {"q": None, "a": "q", "b": "q", "c": "b"}
    messages = [{"id": id, "parent": parent} for id, parent in parents.items()]

    def branch(leaves: list[str], leaf: str | None = None) -> str:
        return "".join(message["id"] for message in shown_branch({"leaves": leaves}, messages, leaf))

    assert (branch([]), branch(["a", "c"]), branch(["a"], "b")) == ("qbc", "qa", "qb")
    assert shown_branch({"leaves": []}, []) == []
