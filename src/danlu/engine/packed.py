"""Matrices laid out for the native kernels: tiles of 16 outputs, floats or the blocks of a GGUF file."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from danlu.formats.gguf_blocks import BLOCKS, PackedTensor, dequantize, quantize
from danlu.formats.mapped import MAP_NORESERVE, forget
from danlu.kernels import native

REPACKED = "Q8_0"
"""What block types without a kernel of their own are turned into, once, as the model is opened."""

Bytes = npt.NDArray[np.uint8]

_ALIGNMENT = 64
_FLOATS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Matrix:
    """``n`` outputs by ``k`` inputs in tiles (`kernels/pack.h`)."""

    kind: str
    n: int
    k: int
    data: Bytes

    @property
    def n_bytes(self) -> int:
        return self.data.nbytes

    def as_weight(self, bias: npt.NDArray[np.float32] | None = None) -> native.Weight:
        """What the kernels take; the arrays must outlive it."""
        kind = native.WEIGHT_KINDS.index(self.kind)
        return native.Weight(self.data.ctypes.data, None if bias is None else bias.ctypes.data, kind, self.n, self.k)


def pack(weight: Tensor | PackedTensor, arena: Arena, blocks: str | None = None, *, only_copy: bool = False) -> Matrix:
    """A matrix as it is stored: Q8_0, Q4_0, Q4_1 and floats keep every weight; other blocks become :data:`REPACKED`.

    Args:
        arena: where it is put.
        blocks: what float matrices are turned into, where their rows are whole blocks; default: kept.
        only_copy: nobody else looks at the weight: where it lies in a mapped file, its memory is given back. Never of a
            model that may have been trained: what was written to it would be lost.
    """
    library = native.library()
    assert library is not None
    if isinstance(weight, Tensor) and blocks is not None and weight.shape[1] % native.BLOCK == 0:
        weight = PackedTensor(blocks, tuple(weight.shape), quantize(weight.detach(), blocks))
    if isinstance(weight, PackedTensor) and weight.kind not in native.WEIGHT_KINDS:
        full = dequantize(weight.data, weight.kind, weight.shape)
        weight = PackedTensor(REPACKED, weight.shape, quantize(full, REPACKED))
    if isinstance(weight, PackedTensor):
        kind, rows = weight.kind, weight.data
    else:
        weight = weight.detach()
        kind, rows = (_FLOATS[weight.dtype], weight) if weight.dtype in _FLOATS else ("F32", weight.float())
    n, k = weight.shape
    elements, n_bytes = BLOCKS[kind]
    size = -(-n // native.TILE) * native.TILE * (k // elements * n_bytes)
    data = arena.take(size)
    own = rows.contiguous()
    library.danlu_pack(native.WEIGHT_KINDS.index(kind), own.data_ptr(), n, k, ctypes.c_void_p(data.ctypes.data))
    if only_copy:
        forget(rows)
    return Matrix(kind, n, k, data)


class Arena:
    """Room for many matrices in few large mappings."""

    CHUNK = 16 << 20

    def __init__(self) -> None:
        self._free = np.empty(0, np.uint8)

    def take(self, size: int) -> Bytes:
        """``size`` bytes at an address that is a multiple of 64."""
        whole = -(-size // _ALIGNMENT) * _ALIGNMENT
        if whole > len(self._free):
            self._free = huge_pages(max(whole, self.CHUNK))
        taken, self._free = self._free[:size], self._free[whole:]
        return taken


def huge_pages(size: int) -> Bytes:
    """Zeroed memory that costs nothing until it is written, in pages of 2 MiB where the system has them: a step touches
    all weights and caches once, and looking up small pages takes as long as reading them."""
    if size == 0:
        return np.empty(0, np.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    with contextlib.suppress(OSError):  # kernels without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
