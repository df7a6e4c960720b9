"""GGUF files, read without believing them: llama.cpp's format of typed metadata and block-quantised tensors.

Layout, little endian (ggml's docs/gguf.md)::

    "GGUF"  version u32  n_tensors u64  n_metadata u64
    n_metadata x (key string, type u32, value)        string: length u64, UTF-8;  array: type u32, count u64, values
    n_tensors  x (name string, n_dims u32, dims u64 (innermost first), type u32, offset u64)
    padding to general.alignment, then the data of the tensors, each at its offset

Every count and length is held against what is left of the file before anything is allocated for it.
"""

from __future__ import annotations

import functools
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danlu.errors import DanluError
from danlu.formats.gguf_types import KIND_OF, TYPES, VALUE_TYPES
from danlu.formats.mapped import map_file, view
from danlu.formats.weights import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from danlu.formats.gguf_blocks import PackedTensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 2**16
MAX_DIMS = 4

MAX_HEADER_BYTES = 256 * 2**20
"""Longest metadata and list of tensors; the largest vocabularies with their merges take about 10 MB."""

MAX_ARRAY_ELEMENTS = 2**22
"""Most elements of all the arrays of a file; tokens, scores, types and merges of 256k tokens are 1.3 million."""

_MIN_METADATA_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes are, from the start of the file."""

    info: TensorInfo
    begin: int


@functools.lru_cache(maxsize=1)
def _header(path: Path, state: tuple[int, ...]) -> tuple[int, dict[str, Any], dict[str, _Place]]:
    """Version, metadata and tensors. Model, config and tokenizer are read from one file one after the other, and a
    vocabulary takes a tenth of a second to read: the last header is kept while the file stays as it is."""
    mapped = map_file(path)
    reader = _Reader(mapped)
    version, n_tensors, n_metadata = reader.preamble()
    metadata = reader.metadata(n_metadata)
    return version, metadata, reader.tensors(n_tensors, _alignment(metadata), len(mapped))


class GGUFFile:
    """A GGUF file of version 2 or 3, little endian.

    Attributes:
        version: of the format.
        metadata: key -> int, float, bool, text or a list of them, in the order of the file.
        infos: tensor name -> what is known of it, in the order of the file.

    Raises:
        DanluError: it is no GGUF file, a version or byte order that is not read, one part of several, or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._mapped = map_file(self.path)
        try:
            state = self.path.stat()
            self.version, self.metadata, self._places = _header(
                self.path.absolute(), (state.st_ino, state.st_size, state.st_mtime_ns)
            )
        except _DamagedError as error:
            raise DanluError(f"{self.path}: {error}") from error
        if self.metadata.get("split.count", 0) not in (0, 1):
            raise DanluError(
                f"{self.path}: is one of {self.metadata['split.count']} parts; join them first "
                "(llama.cpp: llama-gguf-split --merge)"
            )
        self.infos = {name: place.info for name, place in self._places.items()}

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped file for the types torch has; the quantised ones dequantised to fp32.

        Raises:
            DanluError: there is no such tensor, or its type is not supported.
        """
        from danlu.formats.gguf_blocks import PLAIN_DTYPES, dequantize

        place = self._place(name)
        if place.info.dtype in PLAIN_DTYPES:
            return view(self._mapped, place.begin, PLAIN_DTYPES[place.info.dtype], place.info.shape)
        packed = self.packed(name)
        try:
            return dequantize(packed.data, packed.kind, packed.shape)
        except DanluError as error:
            raise DanluError(f"{self.path}: {name}: {error}") from error

    def packed(self, name: str) -> PackedTensor:
        """A tensor as its bytes lie in the file: a view, for kernels that compute on blocks.

        Raises:
            DanluError: there is no such tensor.
        """
        import torch

        from danlu.formats.gguf_blocks import PackedTensor, row_bytes

        place = self._place(name)
        kind, shape = place.info.dtype, place.info.shape
        data = view(self._mapped, place.begin, torch.uint8, (*shape[:-1], row_bytes(kind, shape[-1])))
        return PackedTensor(kind, shape, data)

    def _place(self, name: str) -> _Place:
        if name not in self._places:
            raise DanluError(f"{self.path}: has no tensor {name!r}")
        return self._places[name]


class _DamagedError(Exception):
    """What is wrong with the file, without its name."""


class _Reader:
    """Walks through the header; ``at`` is the next byte, ``end`` the first that no header reaches."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self.buffer = buffer
        self.at = 0
        self.end = min(len(buffer), MAX_HEADER_BYTES)
        self.elements_left = MAX_ARRAY_ELEMENTS

    def preamble(self) -> tuple[int, int, int]:
        """Version, number of tensors, number of metadata entries."""
        if self.buffer[:4] != MAGIC:
            raise _DamagedError("is no GGUF file; fetch it again, or give its right name")
        self.at = 4
        version = self.number("<I", "version")
        if version not in VERSIONS:
            if version.to_bytes(4, "little")[:2] == b"\0\0" and version:
                raise _DamagedError("is a big-endian GGUF file, which danlu does not read; convert it to little-endian")
            hint = "; convert the model anew with a current llama.cpp" if version == 1 else ""
            raise _DamagedError(f"is GGUF version {version}; danlu reads {VERSIONS[0]} and {VERSIONS[1]}{hint}")
        return version, self.number("<Q", "number of tensors"), self.number("<Q", "number of metadata entries")

    def metadata(self, count: int) -> dict[str, Any]:
        """The metadata entries."""
        self.require(count * _MIN_METADATA_BYTES, f"{count} metadata entries")
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self.text("a metadata key")
            if key in found:
                raise _DamagedError(f"has the metadata {key!r} twice; fetch or make it again")
            found[key] = self.value(self.number("<I", key), key)
        return found

    def value(self, type_number: int, key: str) -> Any:
        """A value of a given type, which is at hand."""
        kind, form = VALUE_TYPES.get(type_number, ("", ""))
        if kind == "STRING":
            return self.text(key)
        if kind == "ARRAY":
            return self.array(key)
        if not kind:
            raise _DamagedError(f"{key} has the value type {type_number}, which GGUF does not have")
        value = self.number(form, key)
        return self.truth([value], key)[0] if kind == "BOOL" else value

    def array(self, key: str) -> list[Any]:
        """An array, its type and count included."""
        type_number, count = self.number("<I", key), self.number("<Q", key)
        kind, form = VALUE_TYPES.get(type_number, ("", ""))
        if kind == "ARRAY":
            raise _DamagedError(f"{key} is an array of arrays, which danlu does not read")
        if not kind:
            raise _DamagedError(f"{key} has the value type {type_number}, which GGUF does not have")
        self.require(count * (8 if kind == "STRING" else struct.calcsize(form)), f"{count} elements of {key}")
        self.elements_left -= count
        if self.elements_left < 0:
            raise _DamagedError(
                f"{key} brings its arrays to more than {MAX_ARRAY_ELEMENTS} elements; no model has so many"
            )
        if kind == "STRING":
            return self.texts(count, key)
        values = list(struct.unpack_from(f"<{count}{form[1]}", self.buffer, self.at))
        self.at += count * struct.calcsize(form)
        return self.truth(values, key) if kind == "BOOL" else values

    def texts(self, count: int, key: str) -> list[str]:
        """Many strings at once: a vocabulary has hundreds of thousands, so this loop calls as little as it can."""
        buffer, at, end = self.buffer, self.at, self.end
        length_at = struct.Struct("<Q").unpack_from
        found = []
        try:
            for _ in range(count):
                start = at + 8
                at = start + length_at(buffer, at)[0]
                if at > end:
                    raise _DamagedError(f"ends within {key}; it is cut short or damaged, fetch it again")
                found.append(buffer[start:at].decode())
        except struct.error:
            raise _DamagedError(f"ends within {key}; it is cut short or damaged, fetch it again") from None
        except UnicodeDecodeError:
            raise _DamagedError(f"{key} holds text that is not UTF-8; fetch or make it again") from None
        self.at = at
        return found

    def tensors(self, count: int, alignment: int, size: int) -> dict[str, _Place]:
        """The list of tensors, each held against the file's ``size`` and its neighbours."""
        self.require(count * _MIN_TENSOR_BYTES, f"{count} tensors")
        found: dict[str, tuple[TensorInfo, int]] = {}
        for _ in range(count):
            info, offset = self.tensor()
            if info.name in found:
                raise _DamagedError(f"has the tensor {info.name!r} twice; fetch or make it again")
            if offset % alignment:
                raise _DamagedError(f"{info.name} lies at {offset}, which is no multiple of the alignment {alignment}")
            found[info.name] = (info, offset)
        start = -(-self.at // alignment) * alignment
        end = self.at  # a file without tensors, as those with a vocabulary alone, need not be padded
        for name, (info, offset) in sorted(found.items(), key=lambda item: item[1][1]):
            if start + offset < end:
                raise _DamagedError(f"{name} overlaps another tensor; it is damaged, fetch it again")
            end = start + offset + info.n_bytes
        if end > size:
            raise _DamagedError(f"promises {end} bytes and has {size}; it is cut short or damaged, fetch it again")
        return {name: _Place(info, start + offset) for name, (info, offset) in found.items()}

    def tensor(self) -> tuple[TensorInfo, int]:
        """One entry of the list, and its offset from the start of the data."""
        name = self.text("a tensor's name")
        n_dims = self.number("<I", name)
        if not 1 <= n_dims <= MAX_DIMS:
            raise _DamagedError(f"{name} has {n_dims} dimensions; GGUF has 1 to {MAX_DIMS}")
        dims = [self.number("<Q", name) for _ in range(n_dims)]
        type_number, offset = self.number("<I", name), self.number("<Q", name)
        if type_number not in KIND_OF:
            raise _DamagedError(f"{name} is of type {type_number}, which GGUF does not have (or no longer)")
        kind = KIND_OF[type_number]
        _, elements, block_bytes = TYPES[kind]
        if 0 in dims:
            raise _DamagedError(f"{name} has a dimension of 0; it is damaged, fetch it again")
        if dims[0] % elements:
            raise _DamagedError(
                f"{name} has rows of {dims[0]}, which {kind} cannot pack; it packs {elements} at a time"
            )
        n_bytes = math.prod(dims) // elements * block_bytes
        return TensorInfo(name, kind, tuple(reversed(dims)), n_bytes), offset

    def number(self, form: str, what: str) -> Any:
        """A number in a `struct` form."""
        size = struct.calcsize(form)
        self.require(size, what)
        self.at += size
        return struct.unpack_from(form, self.buffer, self.at - size)[0]

    def text(self, what: str) -> str:
        """A string."""
        return self.texts(1, what)[0]

    def truth(self, values: list[int], key: str) -> list[bool]:
        """Bytes as truth values."""
        if not set(values) <= {0, 1}:
            raise _DamagedError(f"{key} holds a truth value that is neither 0 nor 1; fetch or make it again")
        return [value == 1 for value in values]

    def require(self, n_bytes: int, what: str) -> None:
        """Whether so much of the header is left."""
        if n_bytes > self.end - self.at:
            raise _DamagedError(f"ends within {what}; it is cut short or damaged, fetch it again")


def _alignment(metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise _DamagedError(f"general.alignment is {alignment!r}; it must be a power of two from 8 to {MAX_ALIGNMENT}")
    return alignment
