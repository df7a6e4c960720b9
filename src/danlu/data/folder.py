"""The data folder: documents in sharded Parquet, one row a document, split by file name.

    DIR/train-00000.parquet  DIR/train-00001.parquet ...  DIR/heldout-00000.parquet ...  DIR/danlu.json

Columns: ``id, text, source, path, sha256, kind, meta``; ``meta`` is a JSON object of strings, which every Parquet
reader understands. Whatever makes such a folder writes it through :class:`ShardWriter`; whatever reads one goes through
:class:`DataFolder`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from danlu import files
from danlu.errors import DanluError
from danlu.formats.card import Card

Split = Literal["train", "heldout"]
DocumentKind = Literal["text", "chat"]

SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "text", "source", "path", "sha256", "kind", "meta")])
ROW_GROUP_BYTES = 8 << 20
"""Text held in memory by a writer, and by a reader, at a time."""


@dataclass
class Document:
    """One document, or one chunk of a long one.

    ``text`` of a chat is the JSON ``{"messages": [{"role": ..., "content": ...}, ...]}``. ``sha256`` is the hex digest
    of ``text``, computed when it is not given. ``source`` names the corpus, ``path`` the file inside it.
    """

    id: str
    text: str
    source: str = ""
    path: str = ""
    sha256: str = ""
    kind: DocumentKind = "text"
    meta: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.sha256:
            self.sha256 = hashlib.sha256(self.text.encode()).hexdigest()

    def messages(self) -> list[dict[str, str]]:
        """The turns of a chat."""
        assert self.kind == "chat", f"{self.id} is not a chat"
        found: list[dict[str, str]] = json.loads(self.text)["messages"]
        return found


class DataFolder:
    """A finished data folder, read in a stream.

    Raises:
        DanluError: the folder has no card, is of another kind, or lost one of its shards.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.card = Card.load(self.path)
        if self.card.kind != "data":
            raise DanluError(f"{path}: is a {self.card.kind} folder; expected a data folder made by `danlu data build`")
        if (changed := self.card.changed_file(self.path)) is not None:
            raise DanluError(
                f"{self.path / changed}: is missing or was changed since it was made; "
                "delete the folder and build it again"
            )

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def fingerprint(self) -> str:
        """Changes when, and only when, the documents may have changed."""
        return self.card.fingerprint

    def splits(self) -> list[Split]:
        """The splits that hold documents."""
        return [split for split in get_args(Split) if self.shards(split)]

    def shards(self, split: Split) -> list[Path]:
        """The Parquet files of a split, in order."""
        return sorted(
            self.path / name for name in self.card.files if name.startswith(f"{split}-") and name.endswith(".parquet")
        )

    def documents(self, split: Split) -> Iterator[Document]:
        """The documents of a split, in order; at most one row group is in memory.

        Raises:
            DanluError: there is no such split, or a shard is damaged.
        """
        shards = self.shards(split)
        if not shards:
            raise DanluError(
                f"{self.path}: has no split {split!r}; it holds {', '.join(self.splits()) or 'no documents'}"
            )
        for shard in shards:
            yield from read_shard(shard)


def read_shard(shard: Path) -> Iterator[Document]:
    """The documents of one shard, in order; at most one row group is in memory.

    Raises:
        DanluError: the shard is damaged.
    """
    try:
        with pq.ParquetFile(shard) as file:
            for group in range(file.num_row_groups):
                for row in file.read_row_group(group, columns=SCHEMA.names).to_pylist():
                    yield Document(**{**row, "meta": json.loads(row["meta"])})
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DanluError(f"{shard}: cannot be read as a data shard ({error}); build the data folder again") from error


class ShardWriter:
    """Writes the documents of one split into numbered Parquet shards, each of them whole or not there at all.

    A context manager: leaving it by an exception drops the shard that was being written. The same documents in the same
    order give the same bytes.

    Args:
        shard_bytes: text (UTF-8 bytes, before compression) after which a new shard is begun.
    """

    def __init__(self, folder: str | Path, split: Split, shard_bytes: int = 256 << 20) -> None:
        self.folder = Path(folder)
        self.split = split
        self.shard_bytes = shard_bytes
        self.n_documents = 0
        self.n_bytes = 0
        self._n_shards = 0
        self._bytes_in_shard = 0
        self._rows: list[dict[str, Any]] = []
        self._bytes_in_rows = 0
        self._writer: pq.ParquetWriter | None = None
        self._open = contextlib.ExitStack()

    def write(self, document: Document) -> None:
        """Add one document."""
        size = len(document.text.encode())
        meta = json.dumps(document.meta, ensure_ascii=False, sort_keys=True)
        self._rows.append({**vars(document), "meta": meta})
        self._bytes_in_rows += size
        self._bytes_in_shard += size
        self.n_documents += 1
        self.n_bytes += size
        if self._bytes_in_rows >= ROW_GROUP_BYTES:
            self._flush()
        if self._bytes_in_shard >= self.shard_bytes:
            self._close_shard()

    def _flush(self) -> None:
        if not self._rows:
            return
        try:
            if self._writer is None:
                name = f"{self.split}-{self._n_shards:05d}.parquet"
                temporary = self._open.enter_context(files.atomic_path(self.folder / name))
                self._writer = self._open.enter_context(pq.ParquetWriter(temporary, SCHEMA, compression="zstd"))
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=SCHEMA))
        except OSError as error:
            raise files.as_user_error(error, self.folder) from error
        self._rows, self._bytes_in_rows = [], 0

    def _close_shard(self) -> None:
        self._flush()
        if self._writer is not None:
            self._open.close()
            self._writer = None
            self._n_shards += 1
        self._bytes_in_shard = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if error is None:
            with self._open:
                self._close_shard()
            return None
        return self._open.__exit__(kind, error, trace)
