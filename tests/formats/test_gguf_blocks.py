"""Blocks of GGUF: equal to the bit to the `gguf` package where it has the type, else held to what a quantiser owes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from danlu.errors import DanluError
from danlu.formats.gguf_blocks import BLOCKS, dequantize, quantize, row_bytes
from danlu.formats.gguf_types import TYPES

UNPACKED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"]


def bits(values: np.ndarray) -> np.ndarray:
    """fp32 as whole numbers, all NaN alike: their payload is nobody's promise."""
    return np.where(np.isnan(values), np.uint32(0x7FC00000), values.view(np.uint32))


def test_the_table_of_types_is_ggmls() -> None:
    assert {kind.name: (kind.value, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType} == TYPES


@pytest.mark.parametrize("kind", UNPACKED)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 5), blocks=st.integers(1, 4))
def test_dequantisation_is_the_references_to_the_bit(kind: str, seed: int, rows: int, blocks: int) -> None:
    elements, n_bytes = BLOCKS[kind]
    raw = np.random.default_rng(seed).integers(0, 256, (rows, blocks * n_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, GGMLQuantizationType[kind])
    found = dequantize(torch.from_numpy(raw), kind, (rows, blocks * elements))
    assert found.shape == expected.shape
    np.testing.assert_array_equal(bits(found.numpy()), bits(expected))


@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K"])
def test_large_tensors_are_unpacked_piece_by_piece_to_the_same(kind: str) -> None:
    elements, n_bytes = BLOCKS[kind]
    raw = np.random.default_rng(1).integers(0, 256, (3, 3 * 2**18 // elements // 2 * n_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, GGMLQuantizationType[kind])
    np.testing.assert_array_equal(bits(dequantize(torch.from_numpy(raw), kind, expected.shape).numpy()), bits(expected))


# No -0, since which zero is the least is open, and nothing so small that 1/d is infinite, where C's result is as well.
finite = st.floats(-60000, 60000, width=32).map(lambda value: 0.0 if abs(value) < 1e-30 else value)
weights = hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.just(64)), elements=finite, fill=finite)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "BF16", "F16"])
@settings(max_examples=40, deadline=None)
@given(values=weights, scale=st.sampled_from([1.0, 1e-2, 1e-4]))
def test_quantisation_is_the_references_to_the_bit(kind: str, values: np.ndarray, scale: float) -> None:
    values = values * np.float32(scale)
    expected = gguf.quants.quantize(values, GGMLQuantizationType[kind]).view(np.uint8)
    np.testing.assert_array_equal(quantize(torch.from_numpy(values), kind).numpy(), expected)


def test_a_large_gaussian_tensor_is_quantised_to_the_bit() -> None:
    values = torch.randn(700, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    for kind in ("Q8_0", "Q4_0", "Q4_1"):
        expected = gguf.quants.quantize(values.numpy(), GGMLQuantizationType[kind])
        np.testing.assert_array_equal(quantize(values, kind).numpy(), expected)


def rmse(values: torch.Tensor, kind: str) -> float:
    """Root mean squared error of a type, by the reference's reading of what was written."""
    back = gguf.quants.dequantize(quantize(values, kind).numpy(), GGMLQuantizationType[kind])
    return float((torch.from_numpy(back) - values).square().mean().sqrt())


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.random.default_rng(0).standard_normal((64, 1024), dtype=np.float32), 0.0709586),
        (np.random.default_rng(1).random((64, 1024), dtype=np.float32), 0.0168011),
        (np.random.default_rng(2).random((64, 1024), dtype=np.float32) + 5, 0.1004428),
        (np.random.default_rng(3).standard_t(3, (64, 1024)).astype(np.float32), 0.1603335),
    ],
    ids=["gaussian", "positive", "far from zero", "heavy tails"],
)
def test_q4_k_is_as_good_as_ggmls_own(values: np.ndarray, expected: float) -> None:
    """``expected`` is the error of ggml's quantize_row_q4_K_ref, compiled from C without fused multiply-add. Sums in
    another order choose another grid in a few blocks of a hundred, no better and no worse."""
    assert rmse(torch.from_numpy(values), "Q4_K") == pytest.approx(expected, rel=3e-4)


def test_q4_k_is_better_than_its_simple_kin() -> None:
    gaussian = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    assert rmse(gaussian, "Q4_K") < 0.85 * rmse(gaussian, "Q4_0")
    assert rmse(gaussian, "Q4_K") < 0.95 * rmse(gaussian, "Q4_1")


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 0.37, -12.5, 1e-3, 3e4])
def test_q4_k_keeps_a_constant_to_the_precision_of_its_scales(value: float) -> None:
    values = torch.full((2, 512), value)
    back = dequantize(quantize(values, "Q4_K"), "Q4_K", (2, 512))
    assert torch.allclose(back, values, rtol=2**-10, atol=15 * 63 * 2**-25)  # half a step of fp16 near zero


def test_q4_k_of_what_it_can_hold_exactly_is_exact() -> None:
    """Codes, scales and mins that the format has are found again, whatever the search passes by."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (4, 8, 32), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 15  # the range is used
    values = (codes * 0.5 - 4).float().reshape(4, 256)
    back = dequantize(quantize(values, "Q4_K"), "Q4_K", (4, 256))
    assert torch.allclose(back, values, atol=4 * 2**-10)


def test_q4_k_twice_is_q4_k_once_nearly() -> None:
    values = torch.randn(16, 1024, generator=torch.Generator().manual_seed(0))
    once = dequantize(quantize(values, "Q4_K"), "Q4_K", (16, 1024))
    twice = dequantize(quantize(once, "Q4_K"), "Q4_K", (16, 1024))
    error = (once - values).square().mean().sqrt()
    assert (twice - once).square().mean().sqrt() < 0.2 * error


@settings(max_examples=30, deadline=None)
@given(values=hnp.arrays(np.float32, (1, 256), elements=finite, fill=finite), scale=st.sampled_from([1.0, 1e-3, 1e-30]))
def test_q4_k_never_makes_a_value_that_is_not_near_the_block(values: np.ndarray, scale: float) -> None:
    x = torch.from_numpy(values) * scale
    back = dequantize(quantize(x, "Q4_K"), "Q4_K", (1, 256))
    assert back.isfinite().all()
    assert (back - x).abs().max() <= 1.1 * (x.abs().max() / 2 + 2**-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_quantised_as_fp32(dtype: torch.dtype) -> None:
    values = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    for kind in ("Q8_0", "Q4_0", "Q4_1", "Q4_K"):
        assert torch.equal(quantize(values, kind), quantize(values.float(), kind))
        assert torch.equal(quantize(values.t().contiguous().t(), kind), quantize(values, kind))


def test_what_cannot_be_done_is_told() -> None:
    with pytest.raises(DanluError, match="row of 48 weights cannot be Q4_0"):
        quantize(torch.zeros(2, 48), "Q4_0")
    with pytest.raises(DanluError, match="row of 128 weights cannot be Q4_K"):
        row_bytes("Q4_K", 128)
    with pytest.raises(DanluError, match="cannot write IQ2_XXS; choose"):
        quantize(torch.zeros(1, 256), "IQ2_XXS")
    with pytest.raises(DanluError, match="IQ2_XXS is not supported; supported are"):
        dequantize(torch.zeros(66, dtype=torch.uint8), "IQ2_XXS", (1, 256))
    with pytest.raises(DanluError, match="takes 18 bytes, not 17"):
        dequantize(torch.zeros(17, dtype=torch.uint8), "Q4_0", (1, 32))
    for bad in (torch.nan, torch.inf):
        for kind in ("Q8_0", "Q4_0", "Q4_1", "Q4_K"):
            with pytest.raises(DanluError, match="NaN or infinite"):
                quantize(torch.full((1, 256), bad), kind)
    for kind in ("Q8_0", "Q4_0", "Q4_1", "Q4_K"):
        with pytest.raises(DanluError, match="beyond fp16"):
            quantize(torch.linspace(-1e9, 1e9, 256)[None], kind)
    with pytest.raises(DanluError, match="beyond F16; choose BF16"):
        quantize(torch.full((1, 32), 1e5), "F16")
