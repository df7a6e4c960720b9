"""From bytes on disk to text: decompression, encodings, and saying exactly where a file is not what it claims to be."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import tokenize
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from danlu.errors import DanluError
from danlu.files import human_bytes

BLOCK = 1 << 20
WHOLE_FILE_LIMIT = 256 << 20
"""Formats that cannot be read in a stream (HTML, PDF, source code) are refused above this, so that memory stays
bounded.
"""

_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_MAGIC = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"PK\x03\x04": "a ZIP archive (or an Office document)",
    b"\x1f\x8b": "gzip data; name it .gz",
    b"\x28\xb5\x2f\xfd": "Zstandard data; name it .zst",
    b"\x7fELF": "a program",
    b"%PDF": "a PDF; name it .pdf",
    b"PAR1": "a Parquet file; name it .parquet",
    b"SQLite format 3": "a database",
    b"BZh": "bzip2 data; unpack it first",
    b"\xfd7zXZ": "xz data; unpack it first",
}


@contextlib.contextmanager
def open_bytes(path: Path, compression: str | None) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a file as a stream.

    Raises:
        DanluError: the file cannot be read, or is not whole in the compression that its suffix claims.
    """
    try:
        if compression == "zstd":
            import pyarrow as pa

            with pa.OSFile(str(path)) as raw, pa.CompressedInputStream(raw, "zstd") as stream:
                yield cast(IO[bytes], io.BufferedReader(_Raw(stream), BLOCK))
        elif compression == "gzip":
            with gzip.open(path) as unpacked:
                yield cast(IO[bytes], unpacked)
        else:
            with open(path, "rb") as plain:
                yield plain
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DanluError(f"{path}: is not a whole gzip file ({error}); fetch or pack it again") from error
    except OSError as error:
        if compression == "zstd" and error.errno is None:
            raise DanluError(f"{path}: is not a whole Zstandard file ({error}); fetch or pack it again") from error
        raise DanluError(f"{path}: cannot be read ({error.strerror or error}); mend it, or --exclude it") from error


class _Raw(io.RawIOBase):
    """An Arrow stream as Python's raw stream (Arrow's own lacks what ``BufferedReader`` asks for)."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        piece = self._stream.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)


def read_whole(path: Path, compression: str | None) -> bytes:
    """All decompressed bytes of a file of at most ``WHOLE_FILE_LIMIT``."""
    with open_bytes(path, compression) as stream:
        content = stream.read(WHOLE_FILE_LIMIT + 1)
    if len(content) > WHOLE_FILE_LIMIT:
        raise DanluError(
            f"{path}: is larger than {human_bytes(WHOLE_FILE_LIMIT)}, too large for one document; --exclude it"
        )
    return content


def encoding_of(path: Path, head: bytes, default: str, is_python: bool = False) -> str:
    """The encoding of a text file that begins with ``head``: by its byte order mark, its PEP 263 cookie, or
    ``default``.

    Raises:
        DanluError: the head is that of a binary file.
    """
    for mark, encoding in _BOMS:
        if head.startswith(mark):
            return encoding
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            raise DanluError(f"{path}: is not text but {what}; --exclude it otherwise")
    if b"\0" in head and not default.lower().replace("_", "-").startswith(("utf-16", "utf-32")):
        at = head.index(b"\0")
        line = head.count(b"\n", 0, at) + 1
        raise DanluError(f"{path}:{line}: is a binary file (zero byte at {at}); --exclude it, or name its --encoding")
    if is_python:
        try:
            cookie, _ = tokenize.detect_encoding(io.BytesIO(head).readline)
            return default if cookie == "utf-8" else cookie
        except SyntaxError as error:
            if "invalid or missing" in str(error):  # no cookie and not UTF-8: told with its place when it is decoded
                return default
            raise DanluError(f"{path}:1: {error.msg or error}; mend the coding line, or --exclude it") from error
    return default


def decode_pieces(path: Path, stream: IO[bytes], default: str, is_python: bool = False) -> Iterator[str]:
    """The text of a stream in pieces of about a megabyte, without byte order mark; line ends are left as they are.

    Raises:
        DanluError: naming line and byte where the encoding is broken, or telling that the file is binary.
    """
    piece = stream.read(BLOCK)
    encoding = encoding_of(path, piece[: 64 << 10], default, is_python)
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    offset, line = 0, 1
    while True:
        pending = decoder.getstate()[0]
        try:
            text = decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            at = offset - len(pending) + error.start
            line += (pending + piece).count(b"\n", 0, error.start)
            byte = error.object[error.start] if error.start < len(error.object) else 0
            raise DanluError(
                f"{path}:{line}: is not {encoding} text (byte {at} is 0x{byte:02x}); "
                "name its encoding, for example --encoding latin-1 or gb18030, save it as UTF-8, or --exclude it"
            ) from error
        if text:
            yield text
        if not piece:
            return
        offset += len(piece)
        line += piece.count(b"\n")
        piece = stream.read(BLOCK)


def decode_lines(path: Path, stream: IO[bytes], default: str) -> Iterator[str]:
    """Lines of a stream, ended by LF only (other line ends may stand inside JSON strings), without the LF."""
    rest = ""
    for text in decode_pieces(path, stream, default):
        *lines, rest = (rest + text).split("\n")
        yield from lines
        if len(rest) > WHOLE_FILE_LIMIT:
            raise DanluError(
                f"{path}: has a line longer than {human_bytes(WHOLE_FILE_LIMIT)}; is it really lines of text?"
            )
    if rest:
        yield rest
