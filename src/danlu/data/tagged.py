"""Words with tags, for named entities and parts of speech.

tokens + tags     {"tokens": ["Ada", "sleeps"], "tags": ["B-PER", "O"]}
text + spans      {"text": "Ada sleeps", "spans": [{"start": 0, "end": 3, "label": "PER"}]}   in characters
CoNLL             a word a line, its tag in the last column; an empty line ends a sentence
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from danlu.data.corpus import ErrorPolicy, SourceFile
from danlu.data.decoding import decode_lines, open_bytes
from danlu.data.labelled import Columns, column, json_list, label_name, objects
from danlu.errors import DanluError

WORDS = ("tokens", "words", "text", "sentence", "content")
TAGS = ("tags", "ner_tags", "labels", "ner", "pos_tags", "pos", "spans", "entities", "label")
TABLES = ("jsonl", "json", "csv", "tsv", "parquet")

# Letters of scripts without spaces stand alone: a run of them is a sentence, not a word.
_ALONE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Japanese, Chinese
)
_WORD = re.compile(rf"[{_ALONE}]|(?:(?![{_ALONE}])\w)+|[^\w\s]")


Entity = tuple[str, int, int]
"""(type, first word, last word)"""


@dataclass(frozen=True)
class TagRow:
    """Words, each with its tag."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    where: str

    @property
    def key(self) -> str:
        return "\0".join(self.words)


def words_of(text: str) -> list[tuple[str, int, int]]:
    """(word, start, end) of a text: runs of letters and digits, single punctuation marks, single characters of scripts
    that are written without spaces."""
    return [(found.group(), found.start(), found.end()) for found in _WORD.finditer(text)]


def is_scheme(tags: Collection[str]) -> bool:
    """Whether tags mark entities word by word: ``O``, and names behind ``B-``, ``I-``, ``E-``, ``S-`` (or ``L-``,
    ``U-``)."""
    return any(tag[:2] == "B-" or tag[:2] == "I-" for tag in tags) and all(
        tag == "O" or (tag[:1] in "BIESLU" and tag[1:2] == "-" and len(tag) > 2) for tag in tags
    )


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of one sentence, in order.

    Read as conlleval and seqeval do: an entity ends before ``O``, ``B-``, ``S-`` and another type, and behind ``E-``
    and ``S-``; one that begins with ``I-`` or ``E-`` counts all the same. ``L-`` and ``U-`` (BILOU) are ``E-`` and
    ``S-``.
    """
    found: list[Entity] = []
    begun: tuple[str, int] | None = None
    before = "O"
    for i, tag in enumerate([*tags, "O"]):
        mark, _, kind = tag.partition("-")
        mark = {"L": "E", "U": "S"}.get(mark, mark)
        ended = before in ("E", "S", "O") or mark in ("B", "S", "O") or begun is None or begun[0] != kind
        if begun is not None and ended:
            found.append((begun[0], begun[1], i - 1))
            begun = None
        if mark != "O" and begun is None:
            begun = (kind, i)
        before = mark
    return found


def tag_rows(numbered: Sequence[str]) -> Any:
    """A reader for :func:`read_split`.

    Args:
        numbered: names of the tags that the data calls 0, 1, 2, ...
    """

    def read(file: SourceFile, columns: Columns, on_error: ErrorPolicy) -> Iterator[TagRow]:
        if file.format not in TABLES:
            yield from _conll_rows(file, numbered, on_error)
            return
        for row, where in objects(file, on_error):
            try:
                found = _row(row, columns, where, numbered)
            except DanluError as error:
                on_error(error)
                continue
            yield found

    return read


def _row(row: Mapping[str, Any], columns: Columns, where: str, numbered: Sequence[str]) -> TagRow:
    stop = ErrorPolicy("stop")
    text_column = column(row, columns.text, WORDS, "--text-column", where, stop)
    tags_column = column(row, columns.label, TAGS, "--label-column", where, stop)
    assert text_column is not None
    assert tags_column is not None
    tags = _list(row, tags_column, where)
    if isinstance(row[text_column], str) and all(isinstance(tag, (Mapping, list, tuple)) for tag in tags):
        return _from_spans(row[text_column], tags, where, numbered)
    words = _list(row, text_column, where)
    if not words:
        raise DanluError(f"{where}: has no words; leave the row out, or --on-error skip")
    if len(words) != len(tags):
        raise DanluError(f"{where}: has {len(words)} words and {len(tags)} tags; each word needs one tag")
    for number, word in enumerate(words, 1):
        if not isinstance(word, str) or not word.strip():
            raise DanluError(f"{where}: word {number} is {word!r}; expected text")
    return TagRow(tuple(words), tuple(label_name(tag, where, numbered) for tag in tags), where)


def untagged_words(row: Mapping[str, Any], columns: Columns, where: str) -> tuple[str, tuple[str, ...] | None]:
    """The text of a row, or its words where it gives words.

    Raises:
        DanluError: it has neither.
    """
    name = column(row, columns.text, WORDS, "--text-column", where, ErrorPolicy("stop"))
    assert name is not None
    value = row[name]
    if isinstance(value, str):
        return value, None
    words = _list(row, name, where)
    if not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise DanluError(f"{where}: column {name!r} must hold a text or a list of words, none of them empty")
    return "", tuple(words)


def _list(row: Mapping[str, Any], name: str, where: str) -> list[Any]:
    """A list; CSV spells it as JSON, or separated by spaces."""
    value = row[name]
    if isinstance(value, str):
        return json_list(value, where) if value.lstrip().startswith("[") else value.split()
    if not isinstance(value, (list, tuple)):
        raise DanluError(f"{where}: column {name!r} holds {type(value).__name__}, not a list")
    return list(value)


def _from_spans(text: str, spans: Sequence[Any], where: str, numbered: Sequence[str]) -> TagRow:
    """BIO tags of character spans, given as objects or as ``[start, end, label]``."""
    words = words_of(text)
    if not words:
        raise DanluError(f"{where}: has no words; leave the row out, or --on-error skip")
    tags = ["O"] * len(words)
    for span in spans:
        start, end, label = _span(span, where)
        if not 0 <= start < end <= len(text):
            raise DanluError(f"{where}: span {start}-{end} does not lie in a text of {len(text)} characters")
        inside = [i for i, (_, first, last) in enumerate(words) if first < end and last > start]
        for i in inside:
            word, first, last = words[i]
            if first < start or last > end:
                raise DanluError(f"{where}: span {start}-{end} begins or ends inside the word {word!r}; mend its ends")
            if tags[i] != "O":
                raise DanluError(f"{where}: span {start}-{end} overlaps another one; keep one of them")
        if not inside:
            raise DanluError(f"{where}: span {start}-{end} holds no word")
        name = label_name(label, where, numbered)
        for place, i in enumerate(inside):
            tags[i] = f"{'I' if place else 'B'}-{name}"
    return TagRow(tuple(word for word, _, _ in words), tuple(tags), where)


def _span(span: Any, where: str) -> tuple[int, int, Any]:
    if isinstance(span, Mapping):
        label = next((span[name] for name in ("label", "type", "tag", "entity") if name in span), None)
        parts: list[Any] = [span.get("start"), span.get("end"), label]
    else:
        parts = list(span)
    if len(parts) != 3 or not all(isinstance(part, int) and not isinstance(part, bool) for part in parts[:2]):
        raise DanluError(f'{where}: {span!r} is not a span; expected {{"start": 0, "end": 3, "label": "PER"}}')
    return parts[0], parts[1], parts[2]


def _conll_rows(file: SourceFile, numbered: Sequence[str], on_error: ErrorPolicy) -> Iterator[TagRow]:
    """Columns are separated by tabs or spaces; lines of ``-DOCSTART-`` and comments (``# ...``) are passed over."""
    words: list[str] = []
    tags: list[str] = []
    first = 1
    with open_bytes(file.path, file.compression) as stream:
        number = 0
        for number, line in enumerate(decode_lines(file.path, stream, "utf-8"), 1):
            parts = line.split()
            if not parts or parts[0] == "-DOCSTART-":
                if words:
                    yield TagRow(tuple(words), tuple(tags), f"{file.path}:{first}")
                words, tags = [], []
            elif len(parts) == 1 or (parts[0] == "#" and not words):
                if parts[0][0] != "#":
                    on_error(DanluError(f"{file.path}:{number}: has one column; expected a word and its tag"))
            else:
                if not words:
                    first = number
                try:
                    tags.append(label_name(parts[-1], f"{file.path}:{number}", numbered))
                    words.append(parts[0])
                except DanluError as error:
                    on_error(error)
    if words:
        yield TagRow(tuple(words), tuple(tags), f"{file.path}:{first}")
