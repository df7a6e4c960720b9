"""Documents as token ids: made once per data and tokenizer, kept in the cache, read through a memory map.

    CACHE/tokens/<key>/ids.npy       uint16 (vocabularies up to 65,536) or uint32: all documents, one behind the other
                       offsets.npy   int64 (n_documents + 1): where each document begins
                       n_bytes.npy   int64 (n_documents): UTF-8 bytes of each document's text
                       index.json    written last: SHA-256 of the three

The key is a hash of the shards' contents and of the tokenizer. While it is being made the folder holds one file a
shard, so that a process killed at any moment loses the work on one shard at most. A file that is damaged or cut short
is made again.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from danlu import files
from danlu.console import progress, warn
from danlu.data.folder import DataFolder, Document, Split, read_shard
from danlu.errors import DanluError
from danlu.tokenizer.tokenizer import Tokenizer

FORMAT = 1  # part of the key: raise it when the meaning of the files changes
INDEX = "index.json"
ARRAYS = ("ids", "offsets", "n_bytes")

Array = npt.NDArray[Any]
T = TypeVar("T")


@dataclass(frozen=True)
class TokenFile:
    """The token ids of one split.

    Attributes:
        ids: (n_tokens,) memory map, uint16 or uint32. Every document is the tokenizer's ``bos_id`` and then its tokens.
        offsets: (n_documents + 1,) int64; document ``i`` is ``ids[offsets[i] : offsets[i + 1]]``.
        n_bytes: (n_documents,) int64, UTF-8 bytes of each document's text (of a chat: as the template renders it).
        path: the folder in the cache.
    """

    ids: Array
    offsets: npt.NDArray[np.int64]
    n_bytes: npt.NDArray[np.int64]
    path: Path

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.n_bytes)

    @property
    def n_tokens(self) -> int:
        """Number of tokens, separators included."""
        return len(self.ids)

    def document(self, i: int) -> Array:
        """Ids of document ``i``, the separator in front included; a view of the map."""
        return self.ids[self.offsets[i] : self.offsets[i + 1]]


def tokenize(data: DataFolder, split: Split, tokenizer: Tokenizer) -> TokenFile:
    """Token ids of a split, from the cache where they are already there.

    Memory stays within the tokens of one shard, however large the split.

    Raises:
        DanluError: the split is missing or holds no documents, a chat cannot be rendered, or the cache cannot be
            written.
    """
    shards = data.shards(split)
    if not shards:
        raise DanluError(f"{data.path}: has no split {split!r}; it holds {', '.join(data.splits()) or 'no documents'}")
    contents = [data.card.files[shard.name]["sha256"] for shard in shards]
    key = hashlib.sha256(json.dumps([FORMAT, tokenizer.fingerprint, contents]).encode()).hexdigest()[:32]
    folder = files.require_writable(files.cache_home() / "tokens" / key)
    found = _open(folder)
    if found is None:
        _make(folder, shards, tokenizer, what=f"tokenising {split}")
        found = _open(folder)
    if found is None:
        raise DanluError(f"{folder}: was changed while it was being made; run the same command again")
    if len(found) == 0:
        raise DanluError(f"{data.path}: the split {split!r} holds no documents; build the data folder from more text")
    return found


def _open(folder: Path) -> TokenFile | None:
    """What the cache holds, if it is there and whole."""
    index = folder / INDEX
    if not index.exists():
        return None
    try:
        digests = files.read_json(index)
        paths = {name: folder / f"{name}.npy" for name in ARRAYS}
        for name, path in paths.items():
            if files.sha256_file(path) != digests[name]:
                raise DanluError(f"{path.name} is not what was written")
        ids = np.load(paths["ids"], mmap_mode="r", allow_pickle=False)
        offsets, n_bytes = (np.load(paths[name], allow_pickle=False) for name in ("offsets", "n_bytes"))
    except (DanluError, OSError, ValueError, KeyError, TypeError) as error:
        warn(f"{folder}: is damaged ({error}); its tokens are made again")
        index.unlink(missing_ok=True)
        return None
    return TokenFile(ids, offsets, n_bytes, folder)


def _make(folder: Path, shards: list[Path], tokenizer: Tokenizer, what: str) -> None:
    """Tokenise every shard that is not yet, then join them."""
    lengths: list[Array] = []  # (n_documents of the shard,) tokens of each document
    n_bytes: list[Array] = []
    with progress(what, total=sum(shard.stat().st_size for shard in shards), unit="bytes of shards") as advance:
        for number, shard in enumerate(shards):
            part = _part(folder, number, shard, tokenizer)
            lengths.append(part["lengths"])
            n_bytes.append(part["n_bytes"])
            advance(shard.stat().st_size)
    offsets = np.concatenate([[0], *lengths]).cumsum(dtype=np.int64)
    # Written in sequence rather than through a map: a full disk is an error here, and a crash (SIGBUS) there.
    with files.atomic_path(folder / "ids.npy") as temporary, open(temporary, "wb") as file:
        header = {"descr": _dtype(tokenizer).str, "fortran_order": False, "shape": (int(offsets[-1]),)}
        np.lib.format.write_array_header_1_0(file, header)
        for number, shard in enumerate(shards):
            file.write(_part(folder, number, shard, tokenizer)["ids"].data)
    for name, array in (("offsets", offsets), ("n_bytes", np.concatenate(n_bytes))):
        with files.atomic_path(folder / f"{name}.npy") as temporary:
            np.save(temporary, array, allow_pickle=False)
    files.write_json(folder / INDEX, {name: files.sha256_file(folder / f"{name}.npy") for name in ARRAYS})
    for part_file in folder.glob("part-*.npz"):
        part_file.unlink(missing_ok=True)


def _part(folder: Path, number: int, shard: Path, tokenizer: Tokenizer) -> dict[str, Array]:
    """``ids``, ``lengths`` and ``n_bytes`` of one shard: kept where whole (zip has a CRC), else made."""
    path = folder / f"part-{number:05d}.npz"
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as kept:
                return {name: kept[name] for name in ("ids", "lengths", "n_bytes")}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            warn(f"{path}: is damaged ({error}); it is made again")
    dtype = _dtype(tokenizer)
    ids: list[Array] = []
    n_bytes: list[int] = []
    for batch in batches(read_shard(shard), lambda document: len(document.text)):
        for document_ids, size in _encode(batch, tokenizer):
            ids.append(np.array([tokenizer.bos_id, *document_ids], dtype=dtype))
            n_bytes.append(size)
    made: dict[str, Array] = {
        "ids": np.concatenate([np.empty(0, dtype), *ids]),
        "lengths": np.array([len(i) for i in ids], dtype=np.int64),
        "n_bytes": np.array(n_bytes, dtype=np.int64),
    }
    with files.atomic_path(path) as temporary:
        np.savez(temporary, ids=made["ids"], lengths=made["lengths"], n_bytes=made["n_bytes"])
    return made


def _encode(documents: list[Document], tokenizer: Tokenizer) -> Iterator[tuple[list[int], int]]:
    """Ids and text bytes of each document, texts on all cores."""
    texts = iter(tokenizer.encode_batch([document.text for document in documents if document.kind == "text"]))
    for document in documents:
        if document.kind == "text":
            yield next(texts), len(document.text.encode())
            continue
        try:
            messages = document.messages()
            yield tokenizer.encode_chat(messages), len(tokenizer.render_chat(messages).encode())
        except DanluError as error:
            raise DanluError(f"{document.source} {document.path} ({document.id}): {error}") from error


def _dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def batches(items: Iterable[T], length: Callable[[T], int], limit: int = 4 << 20) -> Iterator[list[T]]:
    """Items in runs of about ``limit`` characters of text: enough to keep the tokenizer's threads busy."""
    batch: list[T] = []
    size = 0
    for item in items:
        batch.append(item)
        size += length(item)
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
