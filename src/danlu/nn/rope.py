"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and the ways to stretch it beyond the trained length."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from danlu.nn.config import Rope, RopeScaling

Rotation = tuple[Tensor, Tensor]
"""cos and sin, each (batch, 1, seq, rotated dims / 2)."""


class RotaryEmbedding(nn.Module):
    """``forward(positions_bt)`` gives cos and sin of every angle, in fp32.

    Args:
        rope: base, rotated dimensions and scaling.
        head_dim: width of a head.
        context: longest sequence of the model, scaling included; dynamic scaling and LongRoPE depend on it.
    """

    inv_freq: Tensor

    def __init__(self, rope: Rope, head_dim: int, context: int) -> None:
        super().__init__()
        self.rope, self.head_dim, self.context = rope, head_dim, context
        inv_freq, self.attention_factor = frequencies(rope, head_dim, context)
        # On the CPU even while a model is laid out on the meta device: it is not a weight and is not loaded.
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        scaling = rope.scaling
        # These two look at how long the sequence is; the others are fixed.
        self.limit = {"dynamic": context, "longrope": scaling.original_context}.get(scaling.kind) if scaling else None

    def forward(self, positions_bt: Tensor, length: int | Tensor | None = None) -> Rotation:
        """cos and sin of each position.

        Args:
            length: tokens the whole sequence will have, where that is known: keys in a cache stay turned as they were,
                so scalings that depend on the length must go by one length throughout. A tensor, (batch, seq): that of
                each token's sequence. Default: the furthest position.
        """
        inv_freq = self.inv_freq
        if self.limit is not None:
            if isinstance(length, Tensor):
                # Up to the limit all lengths are one; beyond it each is turned at its own pace.
                lengths, which_bt = torch.unique(length.clamp(min=self.limit), return_inverse=True)
                table = torch.stack([self._frequencies(n) for n in lengths.tolist()])
                inv_freq = table[which_bt].to(inv_freq.device)
            else:
                length = int(positions_bt.max()) + 1 if length is None else length
                if length > self.limit:
                    inv_freq = self._frequencies(length).to(inv_freq.device)
        angles = (positions_bt[..., None].float() * inv_freq).unsqueeze(1)
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor

    def _frequencies(self, length: int) -> Tensor:
        return frequencies(self.rope, self.head_dim, self.context, length)[0]


def frequencies(rope: Rope, head_dim: int, context: int, length: int = 0) -> tuple[Tensor, float]:
    """Angle per position of each pair of dimensions, (rotated dims / 2,) fp32 on the CPU, and the factor on cos and
    sin.

    Args:
        length: tokens in the sequence, for the scalings that depend on it.
    """
    dim = rope.dim or head_dim
    exponents = torch.arange(0, dim, 2, device="cpu").float() / dim
    inv_freq = 1.0 / rope.base**exponents
    scaling = rope.scaling
    if scaling is None:
        return inv_freq, 1.0
    if scaling.kind == "linear":  # Chen et al. 2023, arXiv:2306.15595
        return inv_freq / scaling.factor, 1.0
    if scaling.kind == "dynamic":  # "NTK-aware": the base grows with the sequence
        length = max(length, context)
        base = rope.base * ((scaling.factor * length / context) - (scaling.factor - 1)) ** (dim / (dim - 2))
        return 1.0 / base**exponents, 1.0
    if scaling.kind == "llama3":
        return _llama3(inv_freq, scaling), 1.0
    if scaling.kind == "yarn":
        return _yarn(inv_freq, rope.base, dim, scaling)
    long = length > scaling.original_context  # LongRoPE: Ding et al. 2024, arXiv:2402.13753
    stretch = torch.tensor(scaling.long_factors if long else scaling.short_factors, device="cpu")
    factor = scaling.attention_factor
    if factor is None:
        growth = scaling.factor
        factor = 1.0 if growth <= 1 else math.sqrt(1 + math.log(growth) / math.log(scaling.original_context))
    return 1.0 / (stretch * rope.base**exponents), factor


def _llama3(inv_freq: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: low frequencies are divided by the factor, high ones are kept, those between are blended."""
    wavelengths = 2 * math.pi / inv_freq
    low = scaling.original_context / scaling.low_freq_factor
    high = scaling.original_context / scaling.high_freq_factor
    blend = (scaling.original_context / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - blend) * inv_freq / scaling.factor + blend * inv_freq
    kept_or_blended = torch.where(wavelengths < high, inv_freq, blended)
    return torch.where(wavelengths > low, inv_freq / scaling.factor, kept_or_blended)


def _yarn(inv_freq: Tensor, base: float, dim: int, scaling: RopeScaling) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): dimensions that turn often keep their frequency, slow ones are
    interpolated, and attention is sharpened by a factor on cos and sin."""

    def turning(rotations: float) -> float:
        """The dimension that makes so many turns within the original context."""
        return dim * math.log(scaling.original_context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = turning(scaling.beta_fast), turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, device="cpu").float() - low) / max(high - low, 0.001)
    interpolated = ramp.clamp(0, 1)
    frequency = inv_freq / scaling.factor * interpolated + inv_freq * (1 - interpolated)

    def sharpening(mscale: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * mscale * math.log(scaling.factor) + 1.0

    factor = scaling.attention_factor
    if factor is None and scaling.mscale and scaling.mscale_all_dim:
        factor = sharpening(scaling.mscale) / sharpening(scaling.mscale_all_dim)
    return frequency, sharpening(1.0) if factor is None else factor


def apply_rope(x_bhtd: Tensor, rotation: Rotation, interleaved: bool = False) -> Tensor:
    """Turn each pair of the first dimensions by its angle; the rest passes. Computed in fp32, returned in the dtype of
    ``x``.

    Pairs are (x[i], x[i + n/2]), as in the checkpoints of Llama and most others, or, ``interleaved``, (x[2i], x[2i+1]),
    as in the paper and in GLM.
    """
    cos, sin = rotation
    n = 2 * cos.shape[-1]
    turned = x_bhtd[..., :n].float()
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    turned = turned.to(x_bhtd.dtype)
    return turned if n == x_bhtd.shape[-1] else torch.cat((turned, x_bhtd[..., n:]), dim=-1)
