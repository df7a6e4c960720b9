"""Weights in 4 bits: in NF4, or in the blocks of the 4-bit file that they were unpacked from.

Weights that come from Q4_0 or Q4_1 of a GGUF file lie on 16 levels a block at equal distances, also after they were
stored in fp16 or bf16, whose rounding is far below a step. Rounding them once more, to the levels of NF4, loses as much
as the file had lost before (it raises the loss of SmolLM2-135M by 12.6 %); in their own blocks they lose nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from danlu.errors import DanluError
from danlu.formats.gguf_blocks import BLOCKS, PackedTensor, dequantize, quantize
from danlu.quantization.nf4 import NF4Tensor, dequantize_nf4, quantize_nf4

FourBits = NF4Tensor | PackedTensor

FILE_TYPES = ("Q4_0", "Q4_1")
"""Whose packing finds the codes of what it has packed again: it tells scales by the extremes of a block."""

MOST_ERROR = 0.01
"""Of the weights' norm, in blocks that count as their own. Weights that were rounded to bf16 come within 0.003, those
of another origin within 0.08."""

_CHUNK = 2**18
"""Weights worked on at a time."""


@torch.no_grad()
def pack(weight: Tensor, *, block: int = 64, double: bool = True) -> FourBits:
    """Weights (out, in) in 4 bits.

    Args:
        weight: of any floating dtype; may be mapped from a file, which is read a piece at a time.
        block, double: of NF4, as in :func:`quantize_nf4`.

    Raises:
        DanluError: no weights, or some that are NaN or infinite.
    """
    own = from_file_blocks(weight) if weight.numel() else None
    return quantize_nf4(weight, block=block, double=double) if own is None else own


def unpack(packed: FourBits, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights, in their shape."""
    if isinstance(packed, NF4Tensor):
        return dequantize_nf4(packed, dtype)
    return dequantize(packed.data, packed.kind, packed.shape, dtype)


@torch.no_grad()
def from_file_blocks(weight: Tensor) -> PackedTensor | None:
    """The blocks that weights (out, in) were unpacked from; None where they were not."""
    found = (_own_blocks(weight, kind) for kind in FILE_TYPES if weight.shape[-1] % BLOCKS[kind][0] == 0)
    return next((packed for packed in found if packed is not None), None)


def _own_blocks(weight: Tensor, kind: str) -> PackedTensor | None:
    pieces = []
    for rows in weight.split(max(1, _CHUNK // weight.shape[-1])):  # type: ignore[no-untyped-call]
        try:
            data = quantize(rows, kind)
        except DanluError:  # not finite, or beyond the scales of the type
            return None
        lost = dequantize(data, kind, tuple(rows.shape)) - rows
        if not lost.norm() <= MOST_ERROR * rows.float().norm():
            return None
        pieces.append(data)
    return PackedTensor(kind, tuple(weight.shape), torch.cat(pieces))
