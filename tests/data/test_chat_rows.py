"""Chat rows: the formats, what is refused and how it is told, files and data folders."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.data.chat_rows import ROLES, ChatRow, chat_messages, read_chat_rows
from danlu.data.folder import Document, ShardWriter
from danlu.errors import DanluError
from danlu.formats.card import Stage
from danlu.tokenizer.config import TokenizerConfig

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
S = {"role": "system", "content": "s"}
QA = [U, A]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": QA}, QA),
        ({"messages": [S, U, A, U, A]}, [S, U, A, U, A]),
        ({"messages": [{**S, "content": " "}, U, A]}, QA),
        ({"messages": [{"role": "developer", "content": "s"}, U, A]}, [S, *QA]),
        ({"messages": [U, A, U]}, [U, A, U]),
        ({"messages": [U, {**A, "tool_calls": None, "name": "x"}], "prompt": "other", "completion": "other"}, QA),
        ({"messages": [{**U, "content": [{"type": "text", "text": "q"}]}, A]}, QA),
        ({"messages": [U, {**A, "reasoning_content": "r"}]}, [U, {**A, "reasoning_content": "r"}]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, QA),
        ({"system": "s", "conversations": [{"from": "user", "value": "q"}, {"from": "bot", "value": "a"}]}, [S, *QA]),
        (
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                    {"from": "observation", "value": "3"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            [
                U,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
                },
                {"role": "tool", "content": "3"},
                A,
            ],
        ),
        ({"instruction": "q", "input": "", "output": "a"}, QA),
        ({"instruction": "q", "output": "a", "text": "the whole of it"}, QA),
        ({"instruction": "do", "input": "this", "output": "a"}, [{"role": "user", "content": "do\n\nthis"}, A]),
        ({"prompt": "q", "completion": "a"}, QA),
        ({"prompt": "q", "response": "a"}, QA),
        ({"prompt": [S, U], "completion": [A]}, [S, *QA]),
        ({"text": "plain"}, None),
        ({"prompt": "q"}, None),
        ({"messages": None, "text": "plain"}, None),
        ({}, None),
    ],
)
def test_formats(row: dict[str, Any], expected: Any) -> None:
    assert chat_messages(row, "here") == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "must be a list of turns, and not empty"),
        ({"messages": "hi"}, "must be a list"),
        ({"messages": ["hi"]}, "message 1 is not an object"),
        ({"messages": [{"content": "q"}]}, "message 1 has no role"),
        (
            {"messages": [U, {"role": "narrator", "content": "x"}]},
            "message 2 has the unknown role 'narrator'; known are system",
        ),
        ({"messages": [{"role": 3, "content": "x"}]}, "unknown role 3"),
        ({"messages": [U, {**A, "content": "  "}]}, r"message 2 \(assistant\) is empty"),
        ({"messages": [{**U, "content": None}, A]}, r"message 1 \(user\) is empty"),
        ({"messages": [{**U, "content": 5}, A]}, "content of message 1 is not text"),
        ({"messages": [A, U]}, "message 1 is the assistant's, before"),
        ({"messages": [S, A]}, "message 2 is the assistant's, before"),
        ({"messages": [U, U, A]}, "messages 1 and 2 are both the user's"),
        ({"messages": [U, A, A]}, "messages 2 and 3 are both the assistant's"),
        ({"messages": [U, A, S]}, "message 3 is a system message; only the first"),
        ({"messages": [U, {"role": "tool", "content": "x"}]}, "message 2 is a tool's answer"),
        ({"messages": [U, A, {"role": "tool", "content": "x"}, U]}, "has not used the tool's answer"),
        ({"messages": [U]}, "no message is the assistant's"),
        ({"messages": [{**S, "content": ""}]}, "no message is the assistant's"),
        ({"conversations": [{"value": "q"}]}, "unknown role None"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f()"}]},
            "without JSON",
        ),
        ({"instruction": "q", "output": ""}, r"message 2 \(assistant\) is empty"),
        ({"instruction": "", "output": "a"}, r"message 1 \(user\) is empty"),
        ({"prompt": "q", "completion": ["a"]}, "field 'completion' is not text"),
    ],
)
def test_broken_rows_are_told_with_their_place(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DanluError, match=message) as told:
        chat_messages(row, "train.jsonl:17")
    assert str(told.value).startswith("train.jsonl:17: ")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from([*ROLES, "function_call"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "text", "type"]), inner, max_size=4)
    ),
    max_leaves=12,
)
keys = st.sampled_from(
    ["messages", "conversations", "instruction", "input", "output", "prompt", "completion", "response", "system"]
)


@given(row=st.dictionaries(keys, json_values, max_size=4))
def test_any_row_is_read_or_refused_in_words(row: dict[str, Any]) -> None:
    try:
        messages = chat_messages(row, "x")
    except DanluError as error:
        told, messages = str(error), None
    else:
        told = "x: "
    assert told.startswith("x: ")
    if messages is not None:
        assert any(message["role"] == "assistant" for message in messages)
        assert all(isinstance(message["content"], str) for message in messages)


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    )
    return path


def test_files_of_every_kind(tmp_path: Path) -> None:
    rows = [{"messages": QA}, {"messages": [S, U, A]}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "e.csv").write_text('instruction,input,output\nq,"",a\n')
    for name in ("a.jsonl", "b.json", "c.parquet", "d.jsonl.gz"):
        assert [row.messages for row in read_chat_rows(tmp_path / name)] == [QA, [S, U, A]], name
    assert [row.messages for row in read_chat_rows(tmp_path / "e.csv")] == [QA]
    assert len(list(read_chat_rows(tmp_path))) == 9, "a folder is all its files"
    assert [row.where for row in read_chat_rows(tmp_path / "a.jsonl")] == [
        f"{tmp_path}/a.jsonl:1",
        f"{tmp_path}/a.jsonl:2",
    ]
    assert [row.where for row in read_chat_rows(tmp_path / "c.parquet")][1] == f"{tmp_path}/c.parquet: row 2"


def test_plain_text_rows(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "plain"}, {"messages": QA}])
    assert list(read_chat_rows(path)) == [ChatRow([], f"{path}:1", "plain"), ChatRow(QA, f"{path}:2")]


def test_stop_and_skip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [{"messages": [A]}, "{broken", "[1]", {"unrelated": 1}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": QA}, *bad, {"messages": QA}])
    rows = read_chat_rows(path)
    assert next(rows).messages == QA
    with pytest.raises(DanluError, match=r"a\.jsonl:2: message 1 is the assistant's"):
        next(rows)
    assert [row.where for row in read_chat_rows(path, on_error="skip")] == [f"{path}:1", f"{path}:6"]
    told = capsys.readouterr().err
    assert "4 of 6 rows skipped" in told
    assert f"{path}:2: message 1" in told
    for number, row in enumerate(bad):
        with pytest.raises(DanluError, match=r"x\.jsonl:1: "):
            list(read_chat_rows(write_jsonl(tmp_path / "x.jsonl", [row])))
        assert number < 4


def test_nothing_usable(tmp_path: Path) -> None:
    with pytest.raises(DanluError, match="holds no usable row"):
        list(read_chat_rows(write_jsonl(tmp_path / "a.jsonl", [{"messages": [A]}]), on_error="skip"))
    with pytest.raises(DanluError, match="does not exist"):
        list(read_chat_rows(tmp_path / "nothing.jsonl"))


def test_a_data_folder(tmp_path: Path) -> None:
    stage = Stage.open(tmp_path / "d", kind="data", verb="data build", config=TokenizerConfig(tmp_path, tmp_path))
    for split in ("train", "heldout"):
        with ShardWriter(tmp_path / "d", split) as writer:
            writer.write(Document("1", json.dumps({"messages": QA}), kind="chat", path=f"{split}.py"))
            writer.write(Document("2", "plain"))
    stage.finish()
    assert [row.messages for row in read_chat_rows(tmp_path / "d")] == [QA, []]
    assert [row.text for row in read_chat_rows(tmp_path / "d")] == [None, "plain"]
    assert [row.where for row in read_chat_rows(tmp_path / "d", split="heldout")] == [
        f"{tmp_path}/d: heldout.py",
        f"{tmp_path}/d: 2",
    ]
