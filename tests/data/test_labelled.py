"""Labelled rows: the same from every format, columns found or named, held out by content, errors with file and line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.data.labelled import (
    Columns,
    TextRow,
    kind_of_labels,
    label_names,
    number_label,
    pair_rows,
    read_split,
    sorted_labels,
    text_rows,
)
from danlu.data.tagged import TagRow, entities, tag_rows, words_of
from danlu.errors import DanluError

USUAL = Columns()
ROWS = [{"text": "Nice, and cheap.", "label": "good"}, {"text": 'Said "no".\nTwice.', "label": "bad"}]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def texts(path: Path, columns: Columns = USUAL, **options: Any) -> list[TextRow]:
    return read_split(text_rows, path, None, columns, share=0, **options)[0]


def tags(path: Path, columns: Columns = USUAL, names: tuple[str, ...] = ()) -> list[TagRow]:
    return read_split(tag_rows(names), path, None, columns, share=0)[0]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        jsonl(path, ROWS)
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="," if kind == "csv" else "\t")
            writer.writerows([["text", "label"], *([row["text"], row["label"]] for row in ROWS)])
    assert [(row.text, row.label) for row in texts(path)] == [(row["text"], row["label"]) for row in ROWS]


def test_columns_by_usual_names_or_named(tmp_path: Path) -> None:
    pair = {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0, "title": "x", "note": "n"}
    path = jsonl(tmp_path / "a.jsonl", [pair])
    assert (texts(path)[0].text, texts(path)[0].pair) == ("It rains.", "It is wet.")
    (row,) = texts(path, Columns("title", "note", "note"))
    assert (row.text, row.pair, row.label) == ("x", "n", "n")
    with pytest.raises(DanluError, match=r"a\.jsonl:1: has no column 'wrong'; it has premise.*--label-column"):
        texts(path, Columns(label="wrong"))


def test_pairs_to_rewrite(tmp_path: Path) -> None:
    rows = [
        {"source": "a", "target": "b"},
        {"text": "a", "summary": "b"},
        {"article": "a", "highlights": "b"},
        {"translation": {"source": "a", "target": "b"}},
    ]
    found = read_split(pair_rows, jsonl(tmp_path / "a.jsonl", rows), None, Columns(), share=0)[0]
    assert {(row.source, row.target) for row in found} == {("a", "b")}
    path = jsonl(tmp_path / "b.jsonl", [{"translation": {"en": "hi", "de": "hallo"}}])
    (row,) = read_split(pair_rows, path, None, Columns("en", "", "de"), share=0)[0]
    assert (row.source, row.target) == ("hi", "hallo")


def test_broken_rows_stop_or_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": "x"}\n{"text": "b"}\nnonsense\n{"text": "c", "label": "y"}\n')
    with pytest.raises(DanluError, match=r"a\.jsonl:2: has no column 'label'"):
        texts(path)
    assert [row.text for row in texts(path, on_error="skip")] == ["a", "c"]
    assert "2 of 4 rows skipped" in capsys.readouterr().err
    path.write_text("nonsense\n")
    with pytest.raises(DanluError, match="no usable row"):
        texts(path, on_error="skip")


def test_held_out_rows_stay_held_out_when_others_come(tmp_path: Path) -> None:
    rows = [{"text": f"text {i % 150}", "label": i % 2} for i in range(300)]  # each text twice, with other labels too

    def split(rows: list[Any]) -> tuple[set[str], set[str]]:
        path = jsonl(tmp_path / "a.jsonl", rows)
        train, held_out = read_split(text_rows, path, None, Columns(), share=0.2)
        assert len(train) + len(held_out) == len(rows)
        return {row.text for row in train}, {row.text for row in held_out}

    train, held_out = split(rows)
    assert 15 <= len(held_out) <= 45
    assert not train & held_out
    more_train, more_held_out = split([{"text": "new", "label": 5}, *reversed(rows)])
    assert (more_train - {"new"}, more_held_out - {"new"}) == (train, held_out)


def test_of_few_rows_one_is_held_out_all_the_same(tmp_path: Path) -> None:
    for n in range(2, 6):
        path = jsonl(tmp_path / "a.jsonl", [{"text": f"text {i}", "label": "x"} for i in range(n)])
        train, held_out = read_split(text_rows, path, None, Columns(), share=0.001)
        assert (len(train), len(held_out)) == (n - 1, 1)


def test_files_named_test_are_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "test", "validation-00000"):
        jsonl(tmp_path / f"{name}.jsonl", [{"text": name, "label": "x"}])
    train, held_out = read_split(text_rows, tmp_path, None, Columns(), share=0.5)
    assert ([row.text for row in train], len(held_out)) == (["train"], 2)
    assert "held out are" in capsys.readouterr().err
    (alone,) = texts(tmp_path / "test.jsonl")
    assert alone.text == "test"


def row_of(label: Any, where: str = "f:1") -> TextRow:
    return TextRow("t", None, label, where)


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (["a", "b"], "single"),
        ([0, 1], "single"),
        (["1", "2"], "single"),
        ([True, False], "single"),
        ([1.0, 2.0], "single"),
        ([0.5, 1], "number"),
        (["0.5", "1"], "number"),
        (["0.5", "x"], "single"),
        ([["a"], []], "multi"),
    ],
)
def test_kinds_of_labels(labels: list[Any], kind: str) -> None:
    assert kind_of_labels([row_of(label) for label in labels]) == kind


def test_labels_have_one_spelling() -> None:
    assert [label_names(row_of(label), "single") for label in (3, 3.0, " x ", True)] == [
        ("3",), ("3",), ("x",), ("true",)
    ]  # fmt: skip
    assert label_names(row_of("a|b|a"), "multi") == ("a", "b")
    assert label_names(row_of('["a", 2]'), "multi") == ("a", "2")
    assert label_names(row_of(1), "single", ("neg", "pos")) == ("pos",)
    assert label_names(row_of("neg"), "single", ("neg", "pos")) == ("neg",)
    assert sorted_labels({"10", "9", "-1"}) == ["-1", "9", "10"]
    assert sorted_labels({"10", "9", "x"}) == ["10", "9", "x"]
    assert number_label(row_of("2.5")) == 2.5


@pytest.mark.parametrize(
    ("label", "kind", "names", "message"),
    [
        (2, "single", ("neg", "pos"), "unknown label '2'"),
        (["a"], "single", (), "multi"),
        (1.5, "single", (), "not a name"),
        ("[1", "multi", (), "JSON list"),
        ("  ", "single", (), "not a name"),
        (10**400, "single", ("neg",), "unknown label"),
    ],
)
def test_labels_that_are_none(label: Any, kind: Any, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(DanluError, match=message) as caught:
        label_names(row_of(label, "file:7"), kind, names)
    assert str(caught.value).startswith("file:7: ")


@pytest.mark.parametrize("value", ["nan", "inf", "x", True, None, [1], 10**400])
def test_numbers_that_are_none(value: Any) -> None:
    with pytest.raises(DanluError, match="not a finite number"):
        number_label(row_of(value))


def test_all_ways_to_tag_give_the_same_rows(tmp_path: Path) -> None:
    ways = {
        "lists.jsonl": json.dumps({"tokens": ["Ada", "Byron", "sleeps", "."], "tags": ["B-PER", "I-PER", "O", "O"]}),
        "numbers.jsonl": json.dumps({"tokens": ["Ada", "Byron", "sleeps", "."], "ner_tags": [1, 2, 0, 0]}),
        "spans.jsonl": json.dumps({"text": "Ada Byron sleeps.", "spans": [{"start": 0, "end": 9, "label": "PER"}]}),
        "doccano.jsonl": json.dumps({"text": "Ada Byron sleeps.", "label": [[0, 9, "PER"]]}),
        "words.csv": "tokens,tags\nAda Byron sleeps .,B-PER I-PER O O",
        "a.conll": "-DOCSTART- -X- O\n\nAda NNP B-PER\nByron NNP I-PER\nsleeps VB O\n. . O",
    }
    for name, content in ways.items():
        (tmp_path / name).write_text(content + "\n")
        (row,) = tags(tmp_path / name, names=("O", "B-PER", "I-PER") if name == "numbers.jsonl" else ())
        assert (row.words, row.tags) == (("Ada", "Byron", "sleeps", "."), ("B-PER", "I-PER", "O", "O")), name


def test_conll_sentences_and_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_text("# comment\nA O\n# B-X\n\n\nB\tB-Y\n")
    first, second = tags(path)
    assert (first.words, first.tags, second.words) == (("A", "#"), ("O", "B-X"), ("B",))
    assert second.where == f"{path}:6"
    path.write_text("A O\nB\n")
    with pytest.raises(DanluError, match=r"a\.conll:2: has one column"):
        tags(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2 words and 1 tags"),
        ({"tokens": [], "tags": []}, "no words"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, "word 2"),
        ({"tokens": ["a"]}, "no column 'tags'"),
        ({"tokens": ["a"], "tags": [None]}, "not a name"),
        ({"text": "Ada sleeps", "spans": [{"start": 1, "end": 3, "label": "X"}]}, "inside the word 'Ada'"),
        ({"text": "Ada", "spans": [{"start": 0, "end": 9, "label": "X"}]}, "does not lie"),
        ({"text": "Ada", "spans": [[0, 3, "X"], [0, 3, "Y"]]}, "overlaps"),
        ({"text": "a  b", "spans": [[1, 3, "X"]]}, "holds no word"),
        ({"text": "Ada", "spans": [{"begin": 0}]}, "not a span"),
        ({"text": "Ada", "spans": [[0, 3, None]]}, "not a name"),
    ],
)
def test_broken_tags_are_told_with_file_and_line(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"tokens": ["a"], "tags": ["O"]}, row])
    with pytest.raises(DanluError, match=r"a\.jsonl:2: .*" + message):
        tags(path)


@given(st.text(max_size=60))
def test_words_lie_where_they_say_and_only_white_space_is_left_out(text: str) -> None:
    at = 0
    for word, start, end in words_of(text):
        assert text[start:end] == word
        assert not text[at:start].strip()
        at = end
    assert not text[at:].strip()


def test_scripts_without_spaces_are_read_by_character() -> None:
    assert [word for word, _, _ in words_of("我爱北京, ok_1!")] == ["我", "爱", "北", "京", ",", "ok_1", "!"]


@given(st.lists(st.sampled_from(["O", "B-X", "I-X", "B-Y", "I-Y"]), max_size=12))
def test_entities_do_not_overlap_and_cover_all_marked_words(sentence: list[str]) -> None:
    covered = [i for _, first, last in entities(sentence) for i in range(first, last + 1)]
    assert covered == [i for i, tag in enumerate(sentence) if tag != "O"]
