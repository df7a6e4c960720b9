"""NF4, four-bit NormalFloat (Dettmers et al. 2023, QLoRA, arXiv:2305.14314): a weight is one of 16 levels times the
largest magnitude of its block of 64.

The levels are quantiles of the normal distribution, which weights follow: each is met about equally often. One level is
exactly 0. Double quantization packs the magnitudes too, in 8 bits, and leaves 4.127 bits a weight of 4.5::

    weight = level[code] * absmax[block]                      absmax[block] = mean + step[group] * absmax_code[block]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.errors import DanluError

GROUP = 256
"""Blocks whose magnitudes share a step in double quantization."""

_CHUNK = 2**18
"""Weights worked on at a time on a CPU: temporaries of a megabyte each, whatever the tensor's size."""


def _levels() -> Tensor:
    """The 16 levels in ascending order, (16,) fp32: quantiles of either half of the normal distribution at equal
    distances, eight above 0 and seven below, scaled to [-1, 1].

    The outermost lies where half a level's share of the probability is left behind it: 1/32 of 16 levels or 1/30 of
    15, of which the paper takes the mean. Seven digits of it and fp32 give the published constants to the bit.
    """
    outermost = 0.9677083  # 1 - (1/32 + 1/30) / 2
    above = [NormalDist().inv_cdf(p) for p in torch.linspace(0.5, outermost, 9)[1:].tolist()]
    below = [-NormalDist().inv_cdf(p) for p in torch.linspace(outermost, 0.5, 8)[:-1].tolist()]
    levels = torch.tensor([*below, 0.0, *above])
    return levels / levels.max()


LEVELS = _levels()
_MIDPOINTS = (LEVELS[1:] + LEVELS[:-1]) / 2

_PAIRS = torch.cartesian_prod(LEVELS, LEVELS).view(torch.int64).flatten()
"""(256,): the two fp32 levels that a byte of codes stands for, in 8 bytes."""


@dataclass(frozen=True)
class NF4Tensor:
    """A tensor in NF4. Blocks run along the rows and on into the next one; the last is filled up with zeros.

    Attributes:
        codes: uint8 (blocks x block / 2,), two codes a byte, the first in the high half.
        absmax: (blocks,), fp32, or int8 where it is quantized itself.
        steps: fp32 (groups of 256 blocks,): of the quantized ``absmax``; None where it is not.
        mean: fp32 (): was taken off ``absmax`` before it was quantized; None where it is not.
        shape: of the weights.
        block: weights that share a magnitude.
    """

    codes: Tensor
    absmax: Tensor
    steps: Tensor | None
    mean: Tensor | None
    shape: tuple[int, ...]
    block: int

    @property
    def n_bytes(self) -> int:
        """Bytes of all that is stored."""
        stored = (self.codes, self.absmax, self.steps, self.mean)
        return sum(tensor.numel() * tensor.itemsize for tensor in stored if tensor is not None)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / math.prod(self.shape)


def quantize_nf4(weight: Tensor, *, block: int = 64, double: bool = True) -> NF4Tensor:
    """Pack a tensor: every weight gets the nearest level of its block.

    Args:
        weight: any shape and floating dtype, on any device; may be mapped from a file, which is read a piece at a time.
        block: weights that share a magnitude; even.
        double: quantize the magnitudes too (section 3 of the paper). Their 8 bits are linear: the squared error of
            those of SmolLM2-135M is then 1.2e-5 of their squares; with the 8-bit floats of bitsandbytes 1.6e-5, with
            E4M3 5.5e-5.

    Raises:
        DanluError: no weights, or some that are NaN or infinite.
    """
    if block < 2 or block % 2:
        raise ValueError(f"block must be an even number, not {block}")
    if not weight.is_floating_point():
        raise ValueError(f"only floating-point weights are quantized, not {weight.dtype}")
    if not weight.numel():
        raise DanluError(f"a weight of shape {tuple(weight.shape)} is empty and cannot be NF4")
    flat = weight.detach().reshape(-1)
    n_blocks = -(-flat.numel() // block)
    codes = torch.empty(n_blocks * block // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(n_blocks, device=flat.device)
    step = _blocks_at_once(flat, n_blocks, block)
    for start in range(0, n_blocks, step):
        end = min(start + step, n_blocks)
        part = flat[start * block : end * block].float()
        if not part.isfinite().all():
            raise DanluError("holds NaN or infinite values, which NF4 cannot; look at how the model was trained")
        values = F.pad(part, (0, (end - start) * block - len(part))).view(-1, block)
        largest = values.abs().amax(dim=1, keepdim=True)
        # A block of zeros would be 0 / 0.
        scaled = values / largest.where(largest > 0, 1)
        nearest = torch.bucketize(scaled, _MIDPOINTS.to(flat.device), out_int32=True).to(torch.uint8)
        codes[start * block // 2 : end * block // 2] = (nearest[:, ::2] << 4 | nearest[:, 1::2]).flatten()
        absmax[start:end] = largest[:, 0]
    shape = tuple(weight.shape)
    if not double:
        return NF4Tensor(codes, absmax, None, None, shape, block)
    return NF4Tensor(codes, *_quantize_absmax(absmax), shape, block)


def dequantize_nf4(packed: NF4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights, in their shape: computed in fp32 and rounded to ``dtype`` once."""
    absmax = _absmax(packed)
    n_blocks, half = len(absmax), packed.block // 2
    out = torch.empty(n_blocks, packed.block, dtype=dtype, device=absmax.device)
    pairs = _PAIRS.to(absmax.device)
    step = _blocks_at_once(out, n_blocks, packed.block)
    for start in range(0, n_blocks, step):
        end = min(start + step, n_blocks)
        # One look-up gives two weights as the 8 bytes they fill. Of the ways that torch has to look up, this is the
        # fastest on a CPU: 0.7 ns a weight; indexing and embedding take 3 times that, a look-up for each code 10 times.
        found = pairs.index_select(0, packed.codes[start * half : end * half].int()).view(torch.float32)
        out[start:end] = found.view(-1, packed.block).mul_(absmax[start:end, None])
    return out.view(-1)[: math.prod(packed.shape)].view(packed.shape)


def _quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The magnitudes in 8 bits: codes int8 (blocks,), steps fp32 (groups,), mean fp32 ()."""
    mean = absmax.double().mean().float()  # double: the sum of large magnitudes would overflow
    groups = F.pad(absmax - mean, (0, -len(absmax) % GROUP)).view(-1, GROUP)
    steps = groups.abs().amax(dim=1) / 127
    codes = (groups / steps.where(steps > 0, 1)[:, None]).round().to(torch.int8)
    return codes.view(-1)[: len(absmax)].clone(), steps, mean


def _absmax(packed: NF4Tensor) -> Tensor:
    """(blocks,) fp32."""
    if packed.steps is None or packed.mean is None:
        return packed.absmax
    steps = packed.steps.repeat_interleave(GROUP)[: len(packed.absmax)]
    # Rounding must not turn the sign of a block that lies close to 0.
    return (packed.absmax * steps + packed.mean).clamp(min=0)


def _blocks_at_once(tensor: Tensor, n_blocks: int, block: int) -> int:
    """A GPU has room for the temporaries, and a launch for each piece would take longer than the work; a compiler makes
    one loop of it all."""
    pieces = tensor.device.type == "cpu" and not torch.compiler.is_compiling()
    return max(1, _CHUNK // block) if pieces else n_blocks
