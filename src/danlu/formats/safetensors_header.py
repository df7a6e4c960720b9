"""The header of a safetensors file: what lies where, checked before anything is believed.

8 bytes of length N (little endian), N bytes of JSON ``{name: {dtype, shape, data_offsets: [begin, end]}}`` with an
optional ``__metadata__`` of texts, then the data, gapless. Read without torch.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danlu.errors import DanluError

MAX_HEADER_BYTES = 100_000_000
"""Longest header that the format allows."""

METADATA = "__metadata__"

BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Bits per element of every dtype that the format knows."""

TORCH_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
"""Names in torch of the dtypes that it has."""


@dataclass(frozen=True)
class Entry:
    """A tensor's place: ``begin`` and ``end`` count bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """The tensors in the order of their data, and the file's own remarks."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: str | Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        DanluError: it is no safetensors file, is cut short, or its header contradicts itself or the file's size.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its other end
            raise DanluError(f"{path}: is not a file")
        size = status.st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise DanluError(
                    f"{path}: is no safetensors file or is cut short ({size} bytes); fetch or save it again"
                )
            raw = file.read(length)
    except OSError as error:
        raise DanluError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        content = json.loads(raw, object_pairs_hook=_without_duplicates)
        if not isinstance(content, dict):
            raise ValueError("it is not an object")
        metadata = content.pop(METADATA, None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError(f"{METADATA} must map names to texts")
        entries = {name: _entry(name, value, 8 + length) for name, value in content.items()}
        entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
        _check_gapless(entries, 8 + length, size)
    except (ValueError, RecursionError) as error:
        raise DanluError(f"{path}: its safetensors header is broken ({error}); fetch or save it again") from error
    return Header(entries, metadata)


def _entry(name: str, value: Any, data_start: int) -> Entry:
    name.encode()  # JSON can spell halves of characters, which are no text
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{name!r} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**63 for n in shape) or len(shape) > 64:
        raise ValueError(f"{name!r} has an impossible shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise ValueError(f"{name!r} has impossible data_offsets")
    begin, end = offsets
    bits = BITS[dtype] * math.prod(shape)
    if bits % 8 or end - begin != bits // 8:
        raise ValueError(f"{name!r} does not fill its {end - begin} bytes")
    return Entry(dtype, tuple(shape), data_start + begin, data_start + end)


def _check_gapless(entries: dict[str, Entry], start: int, size: int) -> None:
    for name, entry in entries.items():
        if entry.begin != start:
            raise ValueError(f"{name!r} {'overlaps another tensor' if entry.begin < start else 'leaves a gap'}")
        start = entry.end
    if start != size:
        raise ValueError(f"it promises {start} bytes and the file has {size}")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found
