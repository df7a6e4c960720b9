"""NF4 against its published constants, the nearest level by brute force, and the bytes that it takes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from danlu.errors import DanluError
from danlu.quantization import nf4
from danlu.quantization.nf4 import LEVELS, NF4Tensor, dequantize_nf4, quantize_nf4

PUBLISHED = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""QLoRA, arXiv:2305.14314, appendix E."""


def normal(*shape: int, seed: int = 0, scale: float = 0.02) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def blocks_of(flat: Tensor, block: int) -> Tensor:
    return torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)


def nearest_levels(weight: Tensor, block: int) -> Tensor:
    """What every weight is rounded to, found by trying all levels."""
    blocks = blocks_of(weight.double().flatten(), block)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    candidates = absmax[..., None] * torch.tensor(PUBLISHED, dtype=torch.float64)
    choice = (candidates - blocks[..., None]).abs().argmin(dim=-1, keepdim=True)
    found = candidates.expand(*blocks.shape, 16).gather(-1, choice).flatten()
    return found[: weight.numel()].view(weight.shape)


def test_levels_are_the_published_constants() -> None:
    assert torch.allclose(LEVELS, torch.tensor(PUBLISHED), rtol=0, atol=1e-7)
    assert LEVELS[7] == 0
    assert LEVELS[0] == -1
    assert LEVELS[15] == 1


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(1, 23), min_size=1, max_size=3),
    block=st.sampled_from((2, 6, 16, 64)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    scale=st.sampled_from((1e-3, 1.0, 1e3)),
    seed=st.integers(0, 2**16),
)
def test_each_weight_gets_the_nearest_level(
    shape: list[int], block: int, dtype: torch.dtype, scale: float, seed: int
) -> None:
    weight = normal(*shape, seed=seed, scale=scale).to(dtype)
    found = dequantize_nf4(quantize_nf4(weight, block=block, double=False))
    assert found.shape == weight.shape
    assert found.dtype == torch.float32
    best = (nearest_levels(weight, block) - weight.double()).abs()
    error = (found.double() - weight.double()).abs()
    assert bool((error <= best + 1e-6 * weight.double().abs().max()).all())


@pytest.mark.parametrize("double", [False, True])
def test_levels_times_a_magnitude_come_back(double: bool) -> None:
    """With one magnitude for all blocks, double quantization has nothing to round."""
    weight = LEVELS[torch.arange(4096) % 16] * 0.25
    assert torch.equal(dequantize_nf4(quantize_nf4(weight, double=double)), weight)


def test_the_first_of_two_codes_is_in_the_high_half() -> None:
    packed = quantize_nf4(torch.tensor([1.0, -1.0, 0.0, 0.3379]), block=4, double=False)
    assert packed.codes.tolist() == [0xF0, 0x7B]


def test_bits_per_weight() -> None:
    weight = normal(1024, 1024)
    plain, double = quantize_nf4(weight, double=False), quantize_nf4(weight)
    assert plain.n_bytes == 2**20 // 2 + 2**20 // 64 * 4 == stored_bytes(plain)
    assert plain.bits_per_weight == 4.5
    assert double.n_bytes == 2**20 // 2 + 2**20 // 64 + 2**20 // (64 * 256) * 4 + 4 == stored_bytes(double)
    assert round(double.bits_per_weight, 3) == 4.127


def stored_bytes(packed: NF4Tensor) -> int:
    parts = (packed.codes, packed.absmax, packed.steps, packed.mean)
    return sum(part.untyped_storage().nbytes() for part in parts if part is not None)


def test_error_on_normal_weights_is_below_that_of_16_even_levels() -> None:
    """The reason for the type. For 4 bits of even levels take all 16 that a two's complement has."""
    weight = normal(512, 512)
    blocks = blocks_of(weight.flatten(), 64)
    step = blocks.abs().amax(dim=1, keepdim=True) / 7.5
    even = ((blocks / step - 0.5).round().clamp(-8, 7) + 0.5) * step
    errors = [(found.reshape(weight.shape) - weight).norm() / weight.norm() for found in (even, double_of(weight))]
    assert errors[1] < 0.093 < 0.1 < errors[0]


def double_of(weight: Tensor) -> Tensor:
    return dequantize_nf4(quantize_nf4(weight))


def test_double_quantization_moves_a_magnitude_by_half_a_step() -> None:
    """300 blocks: two groups, the second not full."""
    weight = normal(300, 64) * torch.linspace(0.1, 3, 300)[:, None]
    packed = quantize_nf4(weight)
    assert packed.absmax.dtype == torch.int8
    assert packed.steps is not None
    assert packed.mean is not None
    assert packed.steps.shape == (2,)
    assert packed.absmax.int().abs().max() == 127
    absmax = weight.abs().amax(dim=1)
    assert torch.allclose(packed.mean, absmax.mean())
    found = double_of(weight).abs().amax(dim=1)
    half_a_step = packed.steps.repeat_interleave(256)[:300] / 2
    assert bool(((found - absmax).abs() <= half_a_step * 1.001).all())
    assert (found - absmax).abs().max() > packed.steps.min() / 4  # it is quantized at all


@pytest.mark.parametrize("seed", range(8))
def test_double_quantization_never_turns_a_sign(seed: int) -> None:
    """Small blocks among large ones: their magnitudes are rounded to one side of 0 or the other."""
    weight = normal(256, 64, seed=seed, scale=1.0)
    weight[0] *= 10  # makes the step large
    weight[1::7] *= 1e-6
    assert bool((double_of(weight) * weight >= 0).all())


@pytest.mark.parametrize("double", [False, True])
def test_zeros_stay_zeros(double: bool) -> None:
    weight = normal(4 * 256, 64)
    weight[::256] *= torch.arange(5, 9)[:, None]  # steps so large that the magnitude 0 is between two codes
    weight[3::256], weight[5, 7] = 0, 0
    found = dequantize_nf4(quantize_nf4(weight, double=double))
    assert not found[3::256].any()
    assert found[5, 7] == 0
    nothing = torch.zeros(5, 13)
    assert torch.equal(dequantize_nf4(quantize_nf4(nothing, double=double)), nothing)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 3e37])
def test_magnitudes_at_the_ends_of_fp32(scale: float, double: bool) -> None:
    weight = normal(600, 64, scale=1.0).clamp(-5, 5) * scale
    found = dequantize_nf4(quantize_nf4(weight, double=double))
    assert bool(found.isfinite().all())
    assert ((found.double() - weight.double()).norm() / weight.double().norm()) < (0.3 if scale < 1e-38 else 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_lower_dtype_is_rounded_once(dtype: torch.dtype) -> None:
    packed = quantize_nf4(normal(33, 77))
    assert torch.equal(dequantize_nf4(packed, dtype), dequantize_nf4(packed).to(dtype))


def test_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(37, 45).T  # 1,665 weights, not contiguous
    whole = quantize_nf4(weight)
    values = dequantize_nf4(whole)
    monkeypatch.setattr(nf4, "_CHUNK", 200)
    pieces = quantize_nf4(weight)
    for name in ("codes", "absmax", "steps", "mean"):
        assert torch.equal(getattr(whole, name), getattr(pieces, name))
    assert torch.equal(dequantize_nf4(pieces), values)
    assert math.prod(values.shape) == 1665


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = normal(10, 70)
    weight[9, 69] = bad
    with pytest.raises(DanluError, match="NaN or infinite"):
        quantize_nf4(weight)


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(DanluError, match="empty"):
        quantize_nf4(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="even number"):
        quantize_nf4(torch.zeros(4), block=7)
    with pytest.raises(ValueError, match="floating-point"):
        quantize_nf4(torch.zeros(4, dtype=torch.int64))
