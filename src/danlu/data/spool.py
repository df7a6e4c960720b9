"""A scratch file of cleaned documents: written once, then read in any order, so that a corpus larger than memory can
be deduplicated and shuffled after it was parsed and cleaned only once.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from array import array
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, cast

import pyarrow as pa

from danlu import files
from danlu.data.readers import Record


@dataclasses.dataclass
class Spooled:
    """A cleaned record and where it came from: ``source`` is an index, ``path`` is relative to that source."""

    source: int
    path: str
    record: Record


class Spool:
    """Append :class:`Spooled` documents, get them back by number. 16 bytes of memory a document.

    The file has no name in the folder: it is gone when the process is, however that ends.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._file = cast(BinaryIO, tempfile.TemporaryFile(dir=folder))  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise files.as_user_error(error, folder) from error
        self._codec = pa.Codec("zstd", compression_level=1)
        self._starts = array("q", [0])
        self._sizes = array("q")

    def append(self, item: Spooled) -> None:
        """Write one document at the end."""
        raw = json.dumps([item.source, item.path, vars(item.record)], ensure_ascii=False).encode()
        try:
            written = self._file.write(self._codec.compress(raw, asbytes=True))
        except OSError as error:
            raise files.as_user_error(error, self._folder) from error
        self._starts.append(self._starts[-1] + written)
        self._sizes.append(len(raw))

    def __getitem__(self, index: int) -> Spooled:
        self._file.seek(self._starts[index])
        packed = self._file.read(self._starts[index + 1] - self._starts[index])
        source, path, record = json.loads(self._codec.decompress(packed, self._sizes[index], asbytes=True))
        return Spooled(source, path, Record(**record))

    def __len__(self) -> int:
        return len(self._sizes)

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
