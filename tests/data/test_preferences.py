"""Preference rows in all their formats come out alike; what is broken is told by file and line."""

from __future__ import annotations

import contextlib
import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.data.preferences import PreferenceRow, preference_of, read_preferences
from danlu.errors import DanluError

USER = {"role": "user", "content": "Which is larger?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


PAIRS: dict[str, dict[str, Any]] = {
    "strings": {"prompt": "Which is larger?", "chosen": "The sun.", "rejected": "The moon."},
    "question": {"question": "Which is larger?", "chosen": "The sun.", "rejected": "The moon."},
    "messages": {"prompt": [USER], "chosen": said("The sun."), "rejected": said("The moon.")},
    "messages and text": {"prompt": [USER], "chosen": "The sun.", "rejected": "The moon."},
    "implicit": {"chosen": [USER, *said("The sun.")], "rejected": [USER, *said("The moon.")]},
    "UltraFeedback": {
        "prompt": "Which is larger?",
        "chosen": [USER, *said("The sun.")],
        "rejected": [USER, *said("The moon.")],
        "messages": [USER, *said("The sun.")],
        "score_chosen": 8.0,
        "score_rejected": 5.5,
    },
    "OpenAI": {
        "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
        "preferred_output": said("The sun."),
        "non_preferred_output": said("The moon."),
    },
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "Which is larger?"}],
        "chosen": {"from": "gpt", "value": "The sun."},
        "rejected": {"from": "gpt", "value": "The moon."},
    },
    "HH-RLHF": {
        "chosen": "\n\nHuman: Which is larger?\n\nAssistant: The sun.",
        "rejected": "\n\nHuman: Which is larger?\n\nAssistant: The moon.",
    },
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_come_out_alike(name: str) -> None:
    row = preference_of(PAIRS[name], "here")
    assert (row.kind, row.prompt, row.answers, row.ranks) == (
        "pair",
        [USER],
        (said("The sun."), said("The moon.")),
        (0, 1),
    )
    assert row.margin == (2.5 if name == "UltraFeedback" else None)


def test_a_system_message_belongs_to_the_prompt() -> None:
    row = preference_of({"system": "Be brief.", **PAIRS["question"]}, "here")
    assert row.prompt == [SYSTEM, USER]
    row = preference_of({"chosen": [SYSTEM, USER, *said("a")], "rejected": [SYSTEM, USER, *said("b")]}, "here")
    assert row.prompt == [SYSTEM, USER]


def test_answers_of_several_turns_part_at_the_assistants() -> None:
    chosen = [USER, *said("The sun."), {"role": "user", "content": "Why?"}, *said("It is.")]
    row = preference_of({"chosen": chosen, "rejected": [USER, *said("The moon.")]}, "here")
    assert row.prompt == [USER]
    assert [len(answer) for answer in row.answers] == [3, 1]


def test_texts_without_a_prompt_are_cut_before_a_word() -> None:
    row = preference_of({"chosen": "It was a sunny day", "rejected": "It was a summer night"}, "here")
    assert (row.prompt, row.answers) == ("It was a", (" sunny day", " summer night"))


RANKINGS: dict[str, dict[str, Any]] = {
    "ranks": {"answers": ["b", "c", "a", "d"], "ranks": [2, 3, 1, 3]},
    "scores": {"responses": ["b", "c", "a", "d"], "scores": [0.5, -1, 7, -1.0]},
    "own scores": {"completions": [{"content": t, "score": s} for t, s in (("b", 5), ("c", 1), ("a", 9), ("d", 1))]},
    "own ranks": {"answers": [{"text": t, "rank": r} for t, r in (("b", 5), ("c", 6), ("a", 0), ("d", 6))]},
}


@pytest.mark.parametrize("name", RANKINGS)
def test_rankings_come_best_first(name: str) -> None:
    row = preference_of({"prompt": [USER], **RANKINGS[name]}, "here")
    assert row.kind == "ranking"
    assert [answer[0]["content"] for answer in row.answers] == ["a", "b", "c", "d"]  # type: ignore[index]
    assert row.ranks == (0, 1, 2, 2)


@pytest.mark.parametrize(
    ("label", "good"), [(True, True), (False, False), (1, True), (0.0, False), ("true", True), ("False", False)]
)
def test_unpaired_answers(label: Any, good: bool) -> None:
    for fields in ({"prompt": "Which is larger?", "completion": "The sun."}, {"messages": [USER, *said("The sun.")]}):
        row = preference_of({**fields, "label": label}, "here")
        assert (row.kind, row.prompt, row.answers) == ("unpaired", [USER], (said("The sun."),))
        assert row.desirable is good


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "same": ({"prompt": "p", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
    "empty": ({"prompt": "p", "chosen": " ", "rejected": "a"}, "chosen is empty"),
    "no messages": ({"prompt": "p", "chosen": [], "rejected": said("a")}, "chosen is neither text nor messages"),
    "empty prompt": ({"prompt": " ", "chosen": "b", "rejected": "a"}, "'prompt' is no text, or empty"),
    "no prompt": ({"chosen": said("b"), "rejected": said("a")}, "has no prompt"),
    "nothing shared": ({"chosen": "b", "rejected": "a"}, "do not begin with one"),
    "half": ({"prompt": "p", "chosen": "b"}, "expected prompt, chosen, rejected"),
    "mixed": ({"prompt": "p", "chosen": "b", "rejected": said("a")}, "some answers are text and some are messages"),
    "half whole": ({"chosen": [USER, *said("a")], "rejected": said("b")}, "some answers are whole conversations"),
    "other prompts": (
        {"chosen": [USER, *said("a")], "rejected": [{"role": "user", "content": "?"}, *said("b")]},
        "the prompts differ",
    ),
    "other prompt": (
        {"prompt": "Something else", "chosen": [USER, *said("a")], "rejected": [USER, *said("b")]},
        "not what the conversations begin with",
    ),
    "cut off": (
        {"chosen": [USER, *said("a")], "rejected": [USER, *said("a"), {"role": "user", "content": "?"}, *said("b")]},
        "conversation 1 ends where another goes on",
    ),
    "prompt answered": ({"prompt": [USER, *said("a")], "chosen": "b", "rejected": "c"}, "ends with the assistant"),
    "role": ({"prompt": [USER], "chosen": [{"role": "x", "content": "a"}], "rejected": said("b")}, "unknown role 'x'"),
    "margin": ({**PAIRS["strings"], "margin": "much"}, "'margin': 'much' is not a finite number"),
    "infinite": ({"prompt": "p", "answers": ["a", "b"], "scores": [1, float("inf")]}, "not a finite number"),
    "bool": ({"prompt": "p", "answers": ["a", "b"], "scores": [1, True]}, "True is not a finite number"),
    "few ranks": ({"prompt": "p", "answers": ["a", "b"], "ranks": [1]}, "a list of 2 numbers"),
    "one answer": ({"prompt": "p", "answers": ["a"], "ranks": [1]}, "at least two answers"),
    "one rank": ({"prompt": "p", "answers": ["a", "b"], "ranks": [1, 1]}, "all answers have one rank"),
    "no rank": ({"prompt": "p", "answers": [{"text": "a", "rank": 1}, "b"]}, "answers 2 has no rank or score"),
    "rank and score": (
        {"prompt": "p", "answers": [{"text": "a", "rank": 1}, {"text": "b", "score": 1}]},
        "some answers have a rank and some a score",
    ),
    "label": ({"prompt": "p", "completion": "a", "label": "perhaps"}, "says neither good nor bad"),
    "unanswered": (
        {"messages": [USER, *said("a"), {"role": "user", "content": "b"}], "label": True},
        "the last message is not the assistant's",
    ),
    "tools": ({**PAIRS["strings"], "tools": "none"}, "'tools' must be a list"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rows_are_told(name: str) -> None:
    row, message = BROKEN[name]
    with pytest.raises(DanluError, match=r"^rows\.jsonl:7: ") as caught:
        preference_of(row, "rows.jsonl:7")
    assert message in str(caught.value)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


@given(prompt=texts, chosen=texts, rejected=texts)
def test_texts_come_through_unchanged(prompt: str, chosen: str, rejected: str) -> None:
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if chosen == rejected or not all(text.strip() for text in row.values()):
        with pytest.raises(DanluError):
            preference_of(row, "here")
        return
    found = preference_of(row, "here")
    assert found.prompt == [{"role": "user", "content": prompt}]
    assert found.answers == (said(chosen), said(rejected))


turn = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "tool", "system", "x", 3]),
        "content": st.sampled_from(["a", "b", "", None, 3]),
    }
)
values = st.sampled_from([None, True, 3, float("nan"), 10**400, "", "a", "b", {}, [], [3], ["a", "b"], [1, 2], [{}]])
value = values | turn | st.lists(turn, max_size=3) | st.lists(st.fixed_dictionaries({"text": values, "score": values}))
fields = st.sampled_from(["prompt", "chosen", "rejected", "answers", "ranks", "scores", "label", "completion", "input",
                          "messages", "preferred_output", "non_preferred_output", "margin", "tools"])  # fmt: skip
filled = [("chosen", "rejected"), ("answers",), ("answers", "scores"), ("completion", "label"), ("messages", "label"),
          ("input", "preferred_output", "non_preferred_output")]  # fmt: skip
rows = st.sampled_from(filled).flatmap(
    lambda names: st.builds(
        dict.__or__, st.dictionaries(fields, value), st.fixed_dictionaries(dict.fromkeys(names, value))
    )
)


@given(rows)
def test_whatever_a_row_holds_is_read_or_refused(row: dict[str, Any]) -> None:
    with contextlib.suppress(DanluError):
        assert isinstance(preference_of(row, "here"), PreferenceRow)


@given(shared=texts, first=texts, second=texts)
def test_what_texts_share_and_what_follows_are_the_texts(shared: str, first: str, second: str) -> None:
    try:
        found = preference_of({"chosen": shared + first, "rejected": shared + second}, "here")
    except DanluError:
        return
    if isinstance(found.prompt, str):
        assert [found.prompt + str(answer) for answer in found.answers] == [shared + first, shared + second]


def test_all_kinds_of_files(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    with open(tmp_path / "d.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    found = [read_preferences(tmp_path / name, share=0.3) for name in ("a.jsonl", "b.json", "c.parquet", "d.csv")]
    plain = [[[(row.prompt, row.answers) for row in part] for part in parts] for parts in found]
    assert plain[0] == plain[1] == plain[2] == plain[3]
    assert len(plain[0][0]) + len(plain[0][1]) == 20
    assert found[0][0][0].where.startswith(str(tmp_path / "a.jsonl:"))


def test_all_rows_of_a_prompt_fall_on_one_side(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i % 9}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(90)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, held_out = ({row.key for row in part} for part in read_preferences(tmp_path / "rows.jsonl", share=0.4))
    assert train
    assert held_out
    assert not train & held_out


def test_broken_rows_stop_or_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(8)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [*good, {"prompt": "p", "chosen": "a", "rejected": "a"}, {"x": 1}])))
    with pytest.raises(DanluError, match=r"rows\.jsonl:9: chosen and rejected are the same"):
        read_preferences(path)
    train, held_out = read_preferences(path, on_error="skip")
    assert len(train) + len(held_out) == 8
    assert "2 of 10 rows skipped" in capsys.readouterr().err.replace("\n", " ")
