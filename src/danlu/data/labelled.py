"""Rows to learn a task from: texts with labels, and pairs of texts; columns are found by their usual names or named.

    text (, text2), label     {"text": "Fine.", "label": "good"}    a label, a list of labels, or a number
    source, target            {"source": "Hallo", "target": "Hello"}   translations, summaries, answers

Words with tags are in `tagged.py`. Which rows are held out depends on what they say and on nothing else: a text that
comes twice falls on one side, and adding rows moves none of the others.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from danlu import console
from danlu.data.corpus import ErrorPolicy, SourceFile, find_sources
from danlu.data.readers import ReaderOptions, read_rows
from danlu.errors import DanluError

LabelKind = Literal["single", "multi", "number"]
"""One label of several, any of several, or a number."""

TEXT = ("text", "sentence", "content", "review", "sentence1", "premise", "question1", "question", "title")
TEXT2 = ("text2", "sentence2", "hypothesis", "question2", "text_pair")
LABEL = ("label", "labels", "category", "class", "sentiment", "topic", "intent", "stars", "score")
SOURCE = ("source", "src", "text", "article", "document", "dialogue", "input", "question")
TARGET = ("target", "tgt", "summary", "highlights", "translation", "output", "answer")

HELD_OUT = ("test", "valid", "validation", "dev", "eval", "heldout")
"""First words of the names of files that a folder of data keeps apart."""

MANY_LABELS = 20
"""Above this, labels that hardly ever come twice are taken for a mistake."""


@dataclass(frozen=True)
class Columns:
    """Columns that the user named; empty ones are looked for by their usual names."""

    text: str = ""
    text2: str = ""
    label: str = ""


class LabelledRow(Protocol):
    """A row: ``where`` it stands, for errors, and the ``key`` that decides whether it is held out."""

    @property
    def where(self) -> str: ...
    @property
    def key(self) -> str: ...


R = TypeVar("R", bound=LabelledRow)
RowReader = Callable[[SourceFile, Columns, ErrorPolicy], Iterator[R]]


@dataclass(frozen=True)
class TextRow:
    """A text, or two, with the label as it was read."""

    text: str
    pair: str | None
    label: Any
    where: str

    @property
    def key(self) -> str:
        return f"{self.text}\0{self.pair or ''}"


@dataclass(frozen=True)
class PairRow:
    """A text and what is to be written for it."""

    source: str
    target: str
    where: str

    @property
    def key(self) -> str:
        return self.source


def read_split(
    read: RowReader[R],
    data: Path,
    heldout: Path | None,
    columns: Columns,
    *,
    share: float,
    on_error: Literal["stop", "skip"] = "stop",
) -> tuple[list[R], list[R]]:
    """Rows to learn from and rows that are held out: those of ``heldout``; else those of files named test, dev,
    validation; else a ``share``, by a hash of the row.

    Args:
        read: the rows of one file: :func:`text_rows`, :func:`pair_rows` or that of `tagged.py`.
        data: a file, a folder or a glob.

    Raises:
        DanluError: a broken row, with file and line; no row to learn from.
    """
    policy = ErrorPolicy(on_error)
    train: list[R] = []
    held_out: list[R] = []
    files = _files(data, policy)
    apart = [file for file in files if _is_apart(file.name)]
    apart = apart if heldout is None and 0 < len(apart) < len(files) else []
    if apart:
        console.note(f"{data}: held out are {', '.join(file.name for file in apart)}")
    for file in files:
        for row in read(file, columns, policy):
            by_hash = heldout is None and not apart and _unit_hash(row.key) < share
            (held_out if by_hash or file in apart else train).append(row)
    if heldout is not None:
        held_out = [row for file in _files(heldout, policy) for row in read(file, columns, policy)]
        if not held_out:
            raise DanluError(f"{heldout}: holds no usable row")
    elif not apart and share > 0 and not held_out and len({row.key for row in train}) > 1:
        # So few rows that none fell under the share: the one that came nearest.
        nearest = min((row.key for row in train), key=_unit_hash)
        held_out = [row for row in train if row.key == nearest]
        train = [row for row in train if row.key != nearest]
    if policy.count:
        total = policy.count + len(train) + len(held_out)
        console.warn(f"{data}: {policy.count:,} of {total:,} rows skipped; the first: {policy.messages[0]}")
    if not train:
        raise DanluError(f"{data}: holds no usable row to learn from")
    return train, held_out


def _files(path: Path, policy: ErrorPolicy) -> list[SourceFile]:
    return [file for source in find_sources([str(path)], (), (), policy) for file in source.files]


def _is_apart(name: str) -> bool:
    words = re.findall("[a-z]+", name.rpartition("/")[2].lower())
    return bool(words) and words[0] in HELD_OUT


def _unit_hash(key: str) -> float:
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big") / 2**32


def text_rows(file: SourceFile, columns: Columns, on_error: ErrorPolicy) -> Iterator[TextRow]:
    """Texts with labels."""
    for row, where in objects(file, on_error):
        with_label = column(row, columns.label, LABEL, "--label-column", where, on_error)
        texts = text_and_pair(row, columns, where, on_error)
        if with_label is None or texts is None:
            continue
        label = row[with_label]
        if label is None or label == "":
            on_error(DanluError(f"{where}: column {with_label!r} is empty; give every row a label, or leave it out"))
            continue
        yield TextRow(*texts, label, where)


def read_unlabelled(data: Path, columns: Columns, *, on_error: Literal["stop", "skip"] = "stop") -> list[TextRow]:
    """Texts alone; if they have labels, nobody looks at them.

    Raises:
        DanluError: a broken row, with file and line; no row at all.
    """
    policy = ErrorPolicy(on_error)
    found = []
    for file in _files(data, policy):
        for row, where in objects(file, policy):
            if (texts := text_and_pair(row, columns, where, policy)) is not None:
                found.append(TextRow(*texts, None, where))
    if policy.count:
        total = policy.count + len(found)
        console.warn(f"{data}: {policy.count:,} of {total:,} rows skipped; the first: {policy.messages[0]}")
    if not found:
        raise DanluError(f"{data}: holds no usable row")
    return found


def text_and_pair(
    row: Mapping[str, Any], columns: Columns, where: str, on_error: ErrorPolicy
) -> tuple[str, str | None] | None:
    """The text of a row, and its second text if it has one; None where an error was let pass."""
    text = _text_of(row, columns.text, TEXT, "--text-column", where, on_error)
    if text is None:
        return None
    if not columns.text2 and not any(row.get(name) is not None for name in TEXT2):
        return text, None
    pair = _text_of(row, columns.text2, TEXT2, "--text2-column", where, on_error)
    return None if pair is None else (text, pair)


def pair_rows(file: SourceFile, columns: Columns, on_error: ErrorPolicy) -> Iterator[PairRow]:
    """Pairs of texts. Columns of an object ``translation`` ({"en": ..., "de": ...}) count as columns of the row."""
    for row, where in objects(file, on_error):
        if isinstance(inner := row.get("translation"), Mapping):
            row = {**{name: value for name, value in row.items() if name != "translation"}, **inner}
        source = _text_of(row, columns.text, SOURCE, "--text-column", where, on_error)
        target = _text_of(row, columns.label, TARGET, "--label-column", where, on_error)
        if source is not None and target is not None:
            yield PairRow(source, target, where)


def objects(file: SourceFile, on_error: ErrorPolicy) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The rows of a table, each with where it stands."""
    for row, _, where in read_rows(file, ReaderOptions(), on_error):
        if isinstance(row, Mapping):
            yield row, where
        else:
            on_error(DanluError(f"{where}: is a {type(row).__name__}, not an object with columns"))


def column(
    row: Mapping[str, Any], named: str, usual: Sequence[str], flag: str, where: str, on_error: ErrorPolicy
) -> str | None:
    """The column of a row, as ``named`` or else the first of the ``usual`` names; None where an error was let pass."""
    found = next((name for name in ((named,) if named else usual) if name in row), None)
    if found is None:
        wanted = repr(named) if named else f"{', '.join(map(repr, usual[:3]))} or the like"
        on_error(
            DanluError(f"{where}: has no column {wanted}; it has {', '.join(map(str, row))}; choose one with {flag}")
        )
    return found


def _text_of(
    row: Mapping[str, Any], named: str, usual: Sequence[str], flag: str, where: str, on_error: ErrorPolicy
) -> str | None:
    name = column(row, named, usual, flag, where, on_error)
    if name is None:
        return None
    text = row[name]
    if not isinstance(text, str):
        on_error(DanluError(f"{where}: column {name!r} holds {type(text).__name__}, not text; choose one with {flag}"))
        return None
    if not text.strip():
        on_error(DanluError(f"{where}: column {name!r} is empty; leave the row out, or --on-error skip"))
        return None
    return text


def kind_of_labels(rows: Sequence[TextRow]) -> LabelKind:
    """What the labels of these rows are: lists: several a row; numbers with a fraction: numbers; else one a row.

    Raises:
        DanluError: some are lists and some are not, or nearly every row has a label of its own.
    """
    lists = [isinstance(row.label, (list, tuple)) for row in rows]
    if any(lists):
        if not all(lists):
            odd = rows[lists.index(False)]
            raise DanluError(f"{odd.where}: label {odd.label!r} is no list, as those of other rows are")
        return "multi"
    numbers = [_number_of(row.label) for row in rows]
    are_numbers = all(number is not None for number in numbers)
    if are_numbers and any(number != int(number) for number in numbers if number is not None):
        return "number"
    distinct = len({str(row.label).strip() for row in rows})
    if distinct > max(MANY_LABELS, len(rows) // 2):
        hint = "numbers are learned with --label-kind number" if are_numbers else "is --label-column right?"
        raise DanluError(
            f"{rows[0].where}: the {len(rows):,} rows from here on have {distinct:,} different labels; {hint} "
            "(--label-kind single takes them as they are)"
        )
    return "single"


def _number_of(value: Any) -> float | None:
    """The finite number that a value is or spells."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < float("inf") else None


def number_label(row: TextRow) -> float:
    """The number that a row is labelled with.

    Raises:
        DanluError: it is none.
    """
    number = _number_of(row.label)
    if number is None:
        raise DanluError(f"{row.where}: label {row.label!r} is not a finite number")
    return number


def label_names(row: TextRow, kind: LabelKind, numbered: Sequence[str] = ()) -> tuple[str, ...]:
    """The names of a row's labels: one, or for ``multi`` any number; text is split at ``|`` then.

    Args:
        numbered: names of the labels that the data calls 0, 1, 2, ...

    Raises:
        DanluError: a label is no name, or there are several where one is expected.
    """
    if kind == "multi":
        return tuple(dict.fromkeys(label_name(value, row.where, numbered) for value in _listed(row)))
    if isinstance(row.label, (list, tuple, dict)):
        raise DanluError(f"{row.where}: label {row.label!r} is not one label; for several a row: --label-kind multi")
    return (label_name(row.label, row.where, numbered),)


def _listed(row: TextRow) -> Sequence[Any]:
    if isinstance(row.label, (list, tuple)):
        return row.label
    if not isinstance(row.label, str):
        return [row.label]
    if not row.label.lstrip().startswith("["):
        return row.label.split("|")
    return json_list(row.label, row.where)


def json_list(text: str, where: str) -> list[Any]:
    """A list that a CSV field spells as JSON."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise DanluError(f'{where}: {text[:80]!r} is not a JSON list, as in ["a", "b"]')
    return found


def label_name(value: Any, where: str, numbered: Sequence[str] = ()) -> str:
    """A label's name: text without white space round it; 3 and 3.0 are "3", true is "true"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise DanluError(f"{where}: label {value!r} is not a name; expected text or a whole number")
    name = value.strip()
    if not numbered:
        return name
    if name in numbered:
        return name
    if name.isdecimal() and len(name) < 7 and int(name) < len(numbered):
        return numbered[int(name)]
    raise DanluError(f"{where}: unknown label {name!r}; --label-names has {', '.join(numbered)}")


def sorted_labels(names: set[str]) -> list[str]:
    """Labels in a fixed order: by number where all are whole numbers, else by name."""
    if all(re.fullmatch(r"-?\d{1,18}", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)
