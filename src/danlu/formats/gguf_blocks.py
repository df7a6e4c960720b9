"""GGUF's quantised types: how a block of weights is packed into bytes, and back.

Every type cuts a row into blocks of 32 or 256 weights. A block holds its scale d in fp16 and the codes q in a few bits:

    *_0    w = d (q - offset)          *_1    w = d q + m
    *_K    blocks of 256 in groups of 16 or 32, whose own scales and mins are small integers times the block's d, dmin

The byte layouts are those of ggml's `ggml-common.h`; each function below names the fields in their order. Computed in
fp32 with one rounding an operation, as in the reference, so results are the same to the bit. Shapes: (n, bytes per
block) uint8 to and from (n, weights per block) fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from danlu.errors import DanluError
from danlu.formats.gguf_types import TYPES

BLOCKS = {kind: (elements, n_bytes) for kind, (_, elements, n_bytes) in TYPES.items()}
"""Name -> (weights per block, bytes per block)."""

PLAIN_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""The types that torch has as dtypes."""

IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The 16 levels of IQ4_NL, denser around zero as weights are."""

_CHUNK = 2**18
"""Weights worked on at a time: temporaries of a megabyte each, whatever the tensor's size."""


@dataclass(frozen=True)
class PackedTensor:
    """A tensor in the bytes of a GGUF type. ``data`` is uint8 of shape (*shape[:-1], bytes per row)."""

    kind: str
    shape: tuple[int, ...]
    data: Tensor


def row_bytes(kind: str, n_columns: int) -> int:
    """Bytes that a row of ``n_columns`` weights takes.

    Raises:
        DanluError: the row is not a whole number of blocks.
    """
    elements, n_bytes = BLOCKS[kind]
    if n_columns % elements:
        raise DanluError(f"a row of {n_columns} weights cannot be {kind}, which packs {elements} at a time")
    return n_columns // elements * n_bytes


def dequantize(data: Tensor, kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Unpack a tensor.

    Args:
        data: uint8, the blocks of all rows one after the other, in any shape.

    Returns:
        The given shape, computed in fp32 and rounded to ``dtype`` once.

    Raises:
        DanluError: the type is not supported, or the bytes are too few or too many for the shape.
    """
    if kind not in _UNPACK and kind not in ("F32", "F16", "BF16"):
        raise DanluError(f"{kind} is not supported; supported are F32, F16, BF16, {', '.join(_UNPACK)}")
    expected = math.prod(shape[:-1]) * row_bytes(kind, shape[-1])
    if data.numel() != expected:
        raise DanluError(f"{kind} of shape {shape} takes {expected} bytes, not {data.numel()}")
    if kind in PLAIN_DTYPES:
        return data.reshape(-1).view(PLAIN_DTYPES[kind]).reshape(shape).to(dtype)
    elements, n_bytes = BLOCKS[kind]
    blocks = data.reshape(-1, n_bytes)
    out = torch.empty(len(blocks), elements, dtype=dtype, device=data.device)
    step = _CHUNK // elements
    for start in range(0, len(blocks), step):
        out[start : start + step] = _UNPACK[kind](blocks[start : start + step])
    return out.reshape(shape)


def quantize(tensor: Tensor, kind: str) -> Tensor:
    """Pack a tensor, as ggml's reference does (without an importance matrix).

    Args:
        tensor: any floating dtype, at least one dimension; computed in fp32.
        kind: F32, F16, BF16, Q8_0, Q4_0, Q4_1 or Q4_K.

    Returns:
        uint8 of shape (*tensor.shape[:-1], bytes per row).

    Raises:
        DanluError: the type cannot be written, rows are not whole blocks, or values are not finite or do not fit.
    """
    if kind not in _PACK and kind not in ("F32", "F16", "BF16"):
        raise DanluError(f"cannot write {kind}; choose F32, F16, BF16, {', '.join(_PACK)}")
    shape = (*tensor.shape[:-1], row_bytes(kind, tensor.shape[-1]))
    if kind in PLAIN_DTYPES:
        cast = tensor.to(PLAIN_DTYPES[kind])
        if (cast.isinf() & tensor.isfinite()).any():
            raise DanluError(f"holds {tensor.abs().max():.4g}, which is beyond {kind}; choose BF16 or F32")
        return cast.contiguous().reshape(-1).view(torch.uint8).reshape(shape)
    elements, n_bytes = BLOCKS[kind]
    blocks = tensor.reshape(-1, elements)
    out = torch.empty(len(blocks), n_bytes, dtype=torch.uint8, device=tensor.device)
    step = _CHUNK // elements
    for start in range(0, len(blocks), step):
        chunk = blocks[start : start + step].float()
        if not chunk.isfinite().all():
            raise DanluError(f"holds NaN or infinite values, which {kind} cannot; look at how the model was trained")
        out[start : start + step] = _PACK[kind](chunk)
    return out.reshape(shape)


def _fields(blocks: Tensor, *n_bytes: int) -> tuple[Tensor, ...]:
    """The fields of every block, by their sizes."""
    return tuple(blocks.split_with_sizes(n_bytes, dim=1))


def _half(raw: Tensor) -> Tensor:
    """(n, 2) bytes -> (n, 1) fp32."""
    return raw.contiguous().view(torch.float16).float()


def _to_half(values: Tensor) -> Tensor:
    """(n, 1) fp32 -> (n, 2) bytes."""
    half = values.to(torch.float16)
    if half.isinf().any():
        raise DanluError(f"its values need a scale of {values.abs().max():.4g}, beyond fp16; choose BF16 or F32")
    return half.view(torch.uint8)


def _planes(raw: Tensor, width: int, n_bits: int) -> Tensor:
    """Codes of ``n_bits`` that share bytes: of every ``width`` bytes first the lowest bits of all, then the next."""
    shifts = torch.arange(0, 8, n_bits, dtype=torch.uint8, device=raw.device)
    spread = raw.reshape(len(raw), -1, 1, width) >> shifts[:, None]
    codes: Tensor = spread & (2**n_bits - 1)
    return codes.reshape(len(raw), -1)


def _nibbles(codes: Tensor, width: int) -> Tensor:
    """4-bit codes to bytes, the inverse of ``_planes(..., width, 4)``."""
    pairs = codes.to(torch.uint8).reshape(len(codes), -1, 2, width)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(codes), -1)


def _inverse(d: Tensor) -> Tensor:
    """1 / d, and 0 where there is none in fp32."""
    inverse = 1 / d
    return torch.where(inverse.isfinite(), inverse, 0)


def _unpack_q4_0(blocks: Tensor) -> Tensor:
    d, qs = _fields(blocks, 2, 16)
    return _half(d) * (_planes(qs, 16, 4).float() - 8)


def _pack_q4_0(x: Tensor) -> Tensor:
    # The value of the largest magnitude becomes code 0, that is -8, whatever its sign.
    d = x.gather(1, x.abs().argmax(1, keepdim=True)) / -8
    codes = (x * _inverse(d) + 8.5).trunc().clamp(0, 15)
    return torch.cat((_to_half(d), _nibbles(codes, 16)), 1)


def _unpack_q4_1(blocks: Tensor) -> Tensor:
    d, m, qs = _fields(blocks, 2, 2, 16)
    return _half(d) * _planes(qs, 16, 4).float() + _half(m)


def _pack_q4_1(x: Tensor) -> Tensor:
    low, high = x.aminmax(dim=1, keepdim=True)
    d = (high - low) / 15
    codes = ((x - low) * _inverse(d) + 0.5).trunc().clamp(0, 15)
    return torch.cat((_to_half(d), _to_half(low), _nibbles(codes, 16)), 1)


def _unpack_q5_0(blocks: Tensor) -> Tensor:
    d, qh, qs = _fields(blocks, 2, 4, 16)
    return _half(d) * ((_planes(qs, 16, 4) | _planes(qh, 1, 1) << 4).float() - 16)


def _unpack_q5_1(blocks: Tensor) -> Tensor:
    d, m, qh, qs = _fields(blocks, 2, 2, 4, 16)
    return _half(d) * (_planes(qs, 16, 4) | _planes(qh, 1, 1) << 4).float() + _half(m)


def _unpack_q8_0(blocks: Tensor) -> Tensor:
    d, qs = _fields(blocks, 2, 32)
    return _half(d) * qs.view(torch.int8).float()


def _pack_q8_0(x: Tensor) -> Tensor:
    d = x.abs().amax(1, keepdim=True) / 127
    scaled = x * _inverse(d)
    whole = scaled.abs().floor()
    codes = scaled.sign() * (whole + (2 * (scaled.abs() - whole)).floor())  # C's roundf: halves away from zero
    return torch.cat((_to_half(d), codes.to(torch.int8).view(torch.uint8)), 1)


def _unpack_q2_k(blocks: Tensor) -> Tensor:
    scales, qs, d, dmin = _fields(blocks, 16, 64, 2, 2)
    scale = _half(d) * (scales & 15).float()
    low = _half(dmin) * (scales >> 4).float()
    return _grouped(_planes(qs, 32, 2).float(), scale, low)


def _unpack_q3_k(blocks: Tensor) -> Tensor:
    hmask, qs, scales_low, scales_high, d = _fields(blocks, 32, 64, 8, 4, 2)
    scales = (_planes(scales_low, 8, 4) | _planes(scales_high, 4, 2) << 4).float() - 32
    codes = _planes(qs, 32, 2).float() - 4 * (1 - _planes(hmask, 32, 1).float())  # a set bit means no offset
    return _grouped(codes, _half(d) * scales)


def _unpack_q4_k(blocks: Tensor) -> Tensor:
    d, dmin, scales, qs = _fields(blocks, 2, 2, 12, 128)
    sc, m = _unpack_scales(scales)
    return _grouped(_planes(qs, 32, 4).float(), _half(d) * sc, _half(dmin) * m)


def _unpack_q5_k(blocks: Tensor) -> Tensor:
    d, dmin, scales, qh, qs = _fields(blocks, 2, 2, 12, 32, 128)
    sc, m = _unpack_scales(scales)
    codes = _planes(qs, 32, 4) | _planes(qh, 32, 1) << 4
    return _grouped(codes.float(), _half(d) * sc, _half(dmin) * m)


def _unpack_q6_k(blocks: Tensor) -> Tensor:
    ql, qh, scales, d = _fields(blocks, 128, 64, 16, 2)
    codes = (_planes(ql, 64, 4) | _planes(qh, 32, 2) << 4).float() - 32
    return _grouped(codes, _half(d) * scales.view(torch.int8).float())


def _unpack_iq4_nl(blocks: Tensor) -> Tensor:
    d, qs = _fields(blocks, 2, 16)
    levels = torch.tensor(IQ4_NL_VALUES, dtype=torch.float32, device=blocks.device)
    return _half(d) * levels[_planes(qs, 16, 4).long()]


def _grouped(codes: Tensor, scale: Tensor, low: Tensor | None = None) -> Tensor:
    """(n, 256) codes times the (n, groups) scales of their groups, less their mins."""
    groups = codes.reshape(*scale.shape, -1) * scale[:, :, None]
    return (groups if low is None else groups - low[:, :, None]).reshape(codes.shape)


def _unpack_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 scales and 8 mins of Q4_K and Q5_K, 6 bits each in 12 bytes: the first four of either fill the low bits of
    bytes 0-3 and 4-7; of the others the low four bits share bytes 8-11 and the top two lie above the first ones."""
    sc, m, rest = _fields(packed, 4, 4, 4)
    scales = torch.cat((sc & 63, rest & 15 | (sc >> 6) << 4), 1)
    mins = torch.cat((m & 63, rest >> 4 | (m >> 6) << 4), 1)
    return scales.float(), mins.float()


def _pack_scales(scales: Tensor, mins: Tensor) -> Tensor:
    """The inverse of :func:`_unpack_scales`."""
    sc, m = scales.to(torch.uint8), mins.to(torch.uint8)
    first_sc, last_sc, first_m, last_m = sc[:, :4], sc[:, 4:], m[:, :4], m[:, 4:]
    rest = last_sc & 15 | (last_m & 15) << 4
    return torch.cat((first_sc | (last_sc >> 4) << 6, first_m | (last_m >> 4) << 6, rest), 1)


def _pack_q4_k(x: Tensor) -> Tensor:
    x = x.reshape(-1, 8, 32)
    weight = x.abs() + x.square().mean(2, keepdim=True).sqrt()  # large weights matter more
    scale, low = _fit_scale_and_min(x, weight)
    d = scale.amax(1, keepdim=True) / 63
    dmin = low.amax(1, keepdim=True) / 63
    sc = (scale * _inverse(d)).round().clamp(0, 63)
    m = (low * _inverse(dmin)).round().clamp(0, 63)
    d_raw, dmin_raw = _to_half(d), _to_half(dmin)
    scale = (_half(d_raw) * sc)[:, :, None]  # as they will be read back
    low = (_half(dmin_raw) * m)[:, :, None]
    codes = torch.where(scale > 0, ((x + low) / scale).round(), 0).clamp(0, 15)
    return torch.cat((d_raw, dmin_raw, _pack_scales(sc, m), _nibbles(codes.reshape(-1, 256), 32)), 1)


def _fit_scale_and_min(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """scale >= 0 and min >= 0 of x ~ scale * code - min with codes 0..15, per group of the last dimension.

    Codes are taken on 21 grids, from 14 to 16 steps from the best offset so far to the largest value; for the codes of
    each grid the weighted least squares fit is solved, and the one with the least weighted squared error wins (ggml's
    make_qkx2_quants).
    """
    offset, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True)
    scale = (high - offset) / 15
    sum_w, sum_x = weight.sum(-1, keepdim=True), (weight * x).sum(-1, keepdim=True)
    least = _weighted_error(x, weight, scale, offset, _grid_codes(x, 15, offset, high))
    for steps in (14 + step / 10 for step in range(21)):
        codes = _grid_codes(x, steps, offset, high)
        weighted = weight * codes
        sum_l, sum_l2, sum_xl = (terms.sum(-1, keepdim=True) for terms in (weighted, weighted * codes, weighted * x))
        determinant = sum_w * sum_l2 - sum_l * sum_l
        fit_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        fit_offset = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        fit_scale = torch.where(fit_offset > 0, sum_xl / sum_l2, fit_scale)  # mins are unsigned: the fit through zero
        fit_offset = fit_offset.clamp(max=0)
        error = _weighted_error(x, weight, fit_scale, fit_offset, codes)
        better = (determinant > 0) & (error < least)
        scale, offset = torch.where(better, fit_scale, scale), torch.where(better, fit_offset, offset)
        least = torch.where(better, error, least)
    return scale[..., 0], offset[..., 0].abs()


def _grid_codes(x: Tensor, steps: float, offset: Tensor, high: Tensor) -> Tensor:
    """Codes on a grid of ``steps`` from offset to high; all 0 for a group that is a single value."""
    return (steps * _inverse(high - offset) * (x - offset)).round().clamp(0, 15)


def _weighted_error(x: Tensor, weight: Tensor, scale: Tensor, offset: Tensor, codes: Tensor) -> Tensor:
    return (weight * (scale * codes + offset - x).square()).sum(-1, keepdim=True)


_UNPACK: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _unpack_q4_0,
    "Q4_1": _unpack_q4_1,
    "Q5_0": _unpack_q5_0,
    "Q5_1": _unpack_q5_1,
    "Q8_0": _unpack_q8_0,
    "Q2_K": _unpack_q2_k,
    "Q3_K": _unpack_q3_k,
    "Q4_K": _unpack_q4_k,
    "Q5_K": _unpack_q5_k,
    "Q6_K": _unpack_q6_k,
    "IQ4_NL": _unpack_iq4_nl,
}

_PACK: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": _pack_q8_0,
    "Q4_0": _pack_q4_0,
    "Q4_1": _pack_q4_1,
    "Q4_K": _pack_q4_k,
}
