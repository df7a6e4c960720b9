"""Writing GGUF (version 3, little endian): the header first, then tensor after tensor, one in memory at a time."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from danlu import files
from danlu.errors import DanluError
from danlu.formats.gguf_blocks import PackedTensor, quantize, row_bytes
from danlu.formats.gguf_file import DEFAULT_ALIGNMENT, MAGIC, MAX_ALIGNMENT, MAX_DIMS
from danlu.formats.gguf_types import TYPES, VALUE_TYPES

_NUMBER_OF_VALUE = {name: number for number, (name, _) in VALUE_TYPES.items()}


@dataclass(frozen=True)
class Typed:
    """A metadata value of a named type ("UINT64", "FLOAT64", ...); a list becomes an array of that type, also an empty
    one."""

    kind: str
    value: Any


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor to be written.

    Attributes:
        kind: type in the file: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, or any type if ``make`` gives it packed.
        shape: outermost dimension first; rows must be whole blocks of the type.
        make: called when its turn comes; gives the tensor, which is then packed, or a PackedTensor of this kind.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor | PackedTensor]

    @property
    def n_bytes(self) -> int:
        """Size in the file, without padding."""
        return math.prod(self.shape[:-1]) * row_bytes(self.kind, self.shape[-1])


def write_gguf(path: str | Path, metadata: Mapping[str, Any], tensors: Sequence[GGUFTensor]) -> None:
    """Write a GGUF file atomically.

    Args:
        metadata: key -> value. A bool is written as BOOL, a whole number as UINT32 (INT32 if negative), a fraction as
            FLOAT32, text as STRING, a list as an array of what its elements are; anything else has to be
            :class:`Typed`. ``general.alignment`` is obeyed.
        tensors: in the order of the file.

    Raises:
        DanluError: a value, name or shape that the format cannot hold, or the disk is full; no file is left.
    """
    target = Path(path)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise DanluError(f"{path}: general.alignment must be a power of two from 8 to {MAX_ALIGNMENT}")
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise DanluError(f"{path}: two tensors have the same name")
    header = bytearray(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        try:
            header += _text(key) + _value(value)
        except (struct.error, OverflowError, TypeError, UnicodeEncodeError) as error:
            raise DanluError(f"{path}: the metadata {key} cannot be written ({error})") from error
    offset = 0
    for tensor in tensors:
        try:
            header += _tensor_info(tensor, offset)
        except DanluError as error:
            raise DanluError(f"{path}: {tensor.name}: {error}") from error
        offset += _padded(tensor.n_bytes, alignment)
    files.require_space(target.parent, len(header) + offset, "the model")
    with files.atomic_path(target) as temporary, open(temporary, "wb") as file:
        file.write(header.ljust(_padded(len(header), alignment), b"\0"))
        for tensor in tensors:
            try:
                _write_tensor(file, tensor)
            except DanluError as error:
                raise DanluError(f"{path}: {tensor.name}: {error}") from error
            file.write(bytes(_padded(tensor.n_bytes, alignment) - tensor.n_bytes))


def _value(value: Any) -> bytes:
    """The type number and the value."""
    if isinstance(value, Typed):
        kind, plain = value.kind, value.value
    else:
        plain = value
        kind = _kind_of(value) if not isinstance(value, (list, tuple)) else _kind_of_all(value)
    if kind not in _NUMBER_OF_VALUE or kind == "ARRAY":
        raise DanluError(f"{kind!r} is no type of GGUF metadata; choose one of {', '.join(_NUMBER_OF_VALUE)}")
    number = _NUMBER_OF_VALUE[kind]
    if not isinstance(plain, (list, tuple)):
        return struct.pack("<I", number) + _scalar(kind, plain)
    start = struct.pack("<IIQ", _NUMBER_OF_VALUE["ARRAY"], number, len(plain))
    return start + b"".join([_scalar(kind, item) for item in plain])


def _scalar(kind: str, value: Any) -> bytes:
    if kind == "STRING":
        return _text(value)
    if (kind == "BOOL") != isinstance(value, bool):
        raise TypeError(f"{value!r} is not {kind}")
    return struct.pack(VALUE_TYPES[_NUMBER_OF_VALUE[kind]][1], value)


def _kind_of(value: Any) -> str:
    if isinstance(value, bool):
        return "BOOL"
    if isinstance(value, int):
        return "UINT32" if value >= 0 else "INT32"
    if isinstance(value, float):
        return "FLOAT32"
    if isinstance(value, str):
        return "STRING"
    raise TypeError(f"{value!r} is neither a truth value, a number, a text nor a list of them")


def _kind_of_all(values: Sequence[Any]) -> str:
    """The one type of a list's elements; whole numbers are INT32, as llama.cpp's own lists of them are."""
    kinds = {"INT32" if kind == "UINT32" else kind for kind in map(_kind_of, values)}
    if len(kinds) != 1:
        raise TypeError("a list must have elements of one type; name the type of an empty one with Typed")
    return kinds.pop()


def _text(text: str) -> bytes:
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is not text")
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _tensor_info(tensor: GGUFTensor, offset: int) -> bytes:
    if not 1 <= len(tensor.shape) <= MAX_DIMS or 0 in tensor.shape:
        raise DanluError(f"shape {tensor.shape} cannot be written; GGUF has 1 to {MAX_DIMS} dimensions, none of them 0")
    if tensor.kind not in TYPES:
        raise DanluError(f"{tensor.kind} is no type of GGUF")
    row_bytes(tensor.kind, tensor.shape[-1])
    dims = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
    return _text(tensor.name) + dims + struct.pack("<IQ", TYPES[tensor.kind][0], offset)


def _write_tensor(file: BinaryIO, tensor: GGUFTensor) -> None:
    made = tensor.make()
    kind = made.kind if isinstance(made, PackedTensor) else tensor.kind
    if tuple(made.shape) != tensor.shape or kind != tensor.kind:
        raise DanluError(f"is {kind} of shape {tuple(made.shape)}; {tensor.kind} of {tensor.shape} was announced")
    data = made.data if isinstance(made, PackedTensor) else quantize(made.detach().cpu(), kind)
    file.write(data.cpu().contiguous().reshape(-1).numpy().data)


def _padded(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment
