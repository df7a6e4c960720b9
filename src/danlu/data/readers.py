"""Readers: every kind of file as a stream of records. A record is one text or chat before cleaning.

Text files are one record each, cut at ``separator`` where one is given; source code, HTML and PDF are one record a
file; JSON Lines, JSON arrays, CSV and Parquet are one record a row. Nothing larger than a record, a row group or a
megabyte is in memory at a time.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from danlu.data.corpus import SourceFile
from danlu.data.decoding import WHOLE_FILE_LIMIT, decode_lines, decode_pieces, open_bytes, read_whole
from danlu.errors import DanluError, MissingExtra

TextType = Literal["prose", "code", "chat"]
OnError = Callable[[DanluError], None]
Row = tuple[Any, int, str]
"""A row of a table as it stands in its file, its number from 1 on, and where that is, for errors."""

TEXT_LIMIT = 64 << 20
"""Characters of a text file kept together. Longer files become several documents, cut at blank lines where there are
any.
"""


@dataclass
class Record:
    """One text as it was read. ``row`` counts from 1 inside its file; None where the file is one record."""

    text: str
    type: TextType
    row: int | None = None
    meta: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ReaderOptions:
    """What the readers take from the config (see there)."""

    encoding: str = "utf-8"
    text_field: str = ""
    separator: str = ""
    text_type: Literal["auto", "prose", "code"] = "auto"


Reader = Callable[[SourceFile, ReaderOptions, OnError], Iterator[Record]]
RowReader = Callable[[SourceFile, ReaderOptions, OnError], Iterator[Row]]


def read_rows(file: SourceFile, options: ReaderOptions, on_error: OnError) -> Iterator[Row]:
    """The rows of a table (JSON Lines, JSON, CSV, TSV, Parquet) as they stand, with all their columns. Errors as in
    :func:`read_records`.

    Raises:
        DanluError: the file is no table.
    """
    if file.format not in _ROWS:
        raise DanluError(f"{file.path}: is not a table; expected {', '.join(_ROWS)}")
    try:
        yield from _ROWS[file.format](file, options, on_error)
    except DanluError as error:
        on_error(error)


def read_records(file: SourceFile, options: ReaderOptions, on_error: OnError) -> Iterator[Record]:
    """The records of a file, in order. Errors about a row or the file go to ``on_error``, which raises them or lets
    them pass.
    """
    try:
        for record in _READERS[file.format](file, options, on_error):
            if record.type != "chat" and options.text_type != "auto":
                record.type = options.text_type
            yield record
    except DanluError as error:
        if isinstance(error, MissingExtra):  # a broken installation is not a broken file
            raise
        on_error(error)


def _read_text(file: SourceFile, options: ReaderOptions, on_error: OnError) -> Iterator[Record]:
    limit = TEXT_LIMIT
    with open_bytes(file.path, file.compression) as stream:
        buffer, rows = "", 0
        for piece in decode_pieces(file.path, stream, options.encoding):
            buffer += piece
            if options.separator:
                *texts, buffer = buffer.split(options.separator)
            else:
                texts = []
            while len(buffer) > limit:
                cut = buffer.rfind("\n\n", limit // 2, limit) + 2
                cut = cut if cut > 1 else limit
                texts.append(buffer[:cut])
                buffer = buffer[cut:]
            for text in texts:
                rows += 1
                if text.strip():
                    yield Record(text, "prose", rows)
    if rows == 0 or buffer.strip():
        yield Record(buffer, "prose", rows + 1 if rows else None)


def _read_code(file: SourceFile, options: ReaderOptions, on_error: OnError) -> Iterator[Record]:
    is_python = file.name.split(".")[-1 if file.compression is None else -2] in ("py", "pyi", "pyx")
    with open_bytes(file.path, file.compression) as stream:
        pieces, size = [], 0
        for piece in decode_pieces(file.path, stream, options.encoding, is_python):
            pieces.append(piece)
            size += len(piece)
            if size > TEXT_LIMIT:
                raise DanluError(
                    f"{file.path}: is longer than {TEXT_LIMIT:,} characters, no source a person wrote; --exclude it"
                )
    yield Record("".join(pieces), "code")


def _read_html(file: SourceFile, options: ReaderOptions, on_error: OnError) -> Iterator[Record]:
    try:
        import trafilatura
    except ImportError as error:
        raise MissingExtra("trafilatura", "data", f"{file.path}: reading HTML") from error
    content = read_whole(file.path, file.compression)
    if b"\0" in content[:1024] and not content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DanluError(f"{file.path}: is a binary file, not HTML; --exclude it")
    try:  # bytes, not text: the page declares its own encoding
        text = trafilatura.extract(content, include_comments=False, include_tables=True, deduplicate=False)
    except Exception as error:  # pages are hostile: whatever breaks in the parser is a fault of this page alone
        raise DanluError(
            f"{file.path}: no text can be extracted ({type(error).__name__}: {error}); --exclude it"
        ) from error
    yield Record(text or "", "prose")


def _read_pdf(file: SourceFile, options: ReaderOptions, on_error: OnError) -> Iterator[Record]:
    try:
        import pypdfium2
    except ImportError as error:
        raise MissingExtra("pypdfium2", "data", f"{file.path}: reading PDF") from error
    content = read_whole(file.path, file.compression)
    pages = []
    try:
        document = pypdfium2.PdfDocument(content)
        try:
            for index in range(len(document)):
                page = document[index]
                text_page = page.get_textpage()
                # PDFium marks a hyphen at a line end as U+0002 (once U+FFFE): the word goes on in the next line
                text = text_page.get_text_bounded().replace("\r\n", "\n")
                pages.append(
                    text.replace("\x02\n", "").replace("\ufffe\n", "").replace("\x02", "").replace("\ufffe", "")
                )
                text_page.close()
                page.close()
        finally:
            document.close()
    except pypdfium2.PdfiumError as error:
        if "password" in str(error).lower():
            raise DanluError(f"{file.path}: is encrypted; save it without a password, or --exclude it") from error
        raise DanluError(f"{file.path}: is not a PDF that can be read ({error}); mend it, or --exclude it") from error
    yield Record("\n\n".join(pages), "prose", meta={"pages": str(len(pages))})


def _jsonl_rows(file: SourceFile, options: ReaderOptions, on_error: OnError) -> Iterator[Row]:
    with open_bytes(file.path, file.compression) as stream:
        for number, line in enumerate(decode_lines(file.path, stream, options.encoding), start=1):
            if not line.strip():
                continue
            where = f"{file.path}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", "nested too deeply")
                at = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                on_error(DanluError(f"{where}: is not valid JSON ({reason}{at}); mend the line, or --on-error skip"))
                continue
            yield row, number, where


def _json_rows(file: SourceFile, options: ReaderOptions, on_error: OnError) -> Iterator[Row]:
    """An array of rows, parsed value by value, or a single row."""
    with open_bytes(file.path, file.compression) as stream:
        for number, (row, line) in enumerate(
            _json_values(file, decode_pieces(file.path, stream, options.encoding)), start=1
        ):
            yield row, number, f"{file.path}:{line}"


def _json_values(file: SourceFile, pieces: Iterator[str]) -> Iterator[tuple[Any, int]]:
    """The items of a top-level array (or the one top-level value) with their line numbers, from text that comes in
    pieces.
    """
    decoder = json.JSONDecoder()
    buffer, at, line, ended = next(pieces, ""), 0, 1, False

    def grow() -> bool:
        """Forget what is parsed and double what is left, so that a large value is not parsed over and over."""
        nonlocal buffer, at, line, ended
        line += buffer.count("\n", 0, at)
        buffer, at = buffer[at:], 0
        parts, size, wanted = [buffer], len(buffer), 2 * len(buffer) + 1
        while size < wanted and (piece := next(pieces, None)) is not None:
            parts.append(piece)
            size += len(piece)
        grown, buffer = size > len(buffer), "".join(parts)
        if size > WHOLE_FILE_LIMIT:
            raise DanluError(
                f"{file.path}:{line}: one value is larger than {WHOLE_FILE_LIMIT:,} characters; write JSON Lines"
            )
        ended = not grown
        return grown

    def peek() -> str:
        """The next character that is not white space; empty at the end."""
        nonlocal at
        while True:
            while at < len(buffer) and buffer[at] in " \t\r\n":
                at += 1
            if at < len(buffer) or not grow():
                return buffer[at : at + 1]

    def value() -> Any:
        nonlocal at
        peek()
        while True:
            try:
                found, end = decoder.raw_decode(buffer, at)
                cut = end == len(buffer) or buffer[end] in ".eE+-0123456789"  # a number may go on in the next piece
                if not cut or ended or not grow():
                    at = end
                    return found
            except json.JSONDecodeError as error:
                if ended or not grow():
                    raise broken(error.msg, error.pos) from error
            except RecursionError as error:
                raise broken("nested too deeply", at) from error

    def broken(reason: str, position: int) -> DanluError:
        return DanluError(
            f"{file.path}:{line + buffer.count(chr(10), 0, position)}: is not valid JSON ({reason}); mend the file"
        )

    def here() -> int:
        peek()
        return line + buffer.count("\n", 0, at)

    if peek() == "[":
        at += 1
        if peek() == "]":
            return
        while True:
            where = here()
            yield value(), where
            mark = peek()
            at += 1
            if mark == "]":
                break
            if mark != ",":
                raise broken("expected a comma or ] after a row", at)
    else:
        where = here()
        yield value(), where
    if peek():
        raise broken("something follows the end; JSON Lines must be named .jsonl", at)


def _table_rows(delimiter: str) -> RowReader:
    def read(file: SourceFile, options: ReaderOptions, on_error: OnError) -> Iterator[Row]:
        csv.field_size_limit(WHOLE_FILE_LIMIT)
        with open_bytes(file.path, file.compression) as stream:
            lines = (line + "\n" for line in decode_lines(file.path, stream, options.encoding))
            rows = csv.reader(lines, delimiter=delimiter, strict=True)
            try:
                header = next(rows, [])
                number = 0
                for values in rows:
                    number += 1
                    where = f"{file.path}:{rows.line_num}"
                    if not values:
                        continue
                    if len(values) != len(header):
                        on_error(
                            DanluError(
                                f"{where}: has {len(values)} fields, the header {len(header)}; quote fields that hold "
                                f"{delimiter!r}, or --on-error skip"
                            )
                        )
                        continue
                    yield dict(zip(header, values, strict=True)), number, where
            except csv.Error as error:
                raise DanluError(f"{file.path}:{rows.line_num}: is not valid CSV ({error}); mend its quotes") from error

    return read


def _parquet_rows(file: SourceFile, options: ReaderOptions, on_error: OnError) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.compression is not None:
        raise DanluError(
            f"{file.path}: Parquet inside {file.compression} cannot be streamed; unpack it, it is compressed itself"
        )
    number = 0
    try:
        with pq.ParquetFile(file.path) as table:
            for batch in table.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield row, number, f"{file.path}: row {number}"
    except (pa.ArrowException, OSError) as error:
        raise DanluError(
            f"{file.path}: is not a Parquet file that can be read ({error}); fetch or write it again"
        ) from error


_KEPT_COLUMNS = ("id", "url", "title", "author", "date", "license", "language")
"""Row columns kept as provenance in a document's ``meta`` where they hold text."""


def _row_record(row: Any, number: int, where: str, options: ReaderOptions, on_error: OnError) -> Iterator[Record]:
    """The record of one row of a table or JSON file (none when the row is broken and errors are skipped)."""
    from danlu.data.chat_rows import chat_messages

    try:
        if isinstance(row, str):
            yield Record(_valid_unicode(row, where), "prose", number)
            return
        if not isinstance(row, dict):
            raise DanluError(f"{where}: is a {type(row).__name__}, not an object with a text column; see --text-field")
        meta = {name: row[name] for name in _KEPT_COLUMNS if isinstance(row.get(name), str) and len(row[name]) <= 1000}
        if row.get("kind") == "chat" and isinstance(row.get("text"), str) and "sha256" in row:  # a row of a data folder
            row = json.loads(row["text"])
        messages = None if options.text_field else chat_messages(row, where)
        if messages is not None:
            text = json.dumps({"messages": messages}, ensure_ascii=False)
            yield Record(_valid_unicode(text, where), "chat", number, meta)
            return
        names = (options.text_field,) if options.text_field else ("text", "content")
        name = next((name for name in names if name in row), None)
        if name is None:
            raise DanluError(
                f"{where}: has no column {' or '.join(map(repr, names))} and is no chat; it has "
                f"{', '.join(map(str, row))}; choose one with --text-field"
            )
        text = row[name]
        if not isinstance(text, str):
            raise DanluError(
                f"{where}: column {name!r} holds {type(text).__name__}, not text; choose one with --text-field"
            )
        yield Record(_valid_unicode(text, where), "prose", number, meta)
    except DanluError as error:
        on_error(error)


def _valid_unicode(text: str, where: str) -> str:
    """JSON can spell half a surrogate pair, which no encoding can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DanluError(
            f"{where}: holds half a surrogate pair (character {error.start}); mend it, or --on-error skip"
        ) from error
    return text


def _records_of(rows: RowReader) -> Reader:
    def read(file: SourceFile, options: ReaderOptions, on_error: OnError) -> Iterator[Record]:
        for row, number, where in rows(file, options, on_error):
            yield from _row_record(row, number, where, options, on_error)

    return read


_ROWS: dict[str, RowReader] = {
    "jsonl": _jsonl_rows,
    "json": _json_rows,
    "csv": _table_rows(","),
    "tsv": _table_rows("\t"),
    "parquet": _parquet_rows,
}
_READERS: dict[str, Reader] = {
    "text": _read_text,
    "code": _read_code,
    "html": _read_html,
    "pdf": _read_pdf,
    **{name: _records_of(rows) for name, rows in _ROWS.items()},
}
