"""Weights from a 4-bit file find its codes again; all others become NF4."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from danlu.errors import DanluError
from danlu.formats.gguf_blocks import PackedTensor, dequantize, quantize
from danlu.quantization.four_bits import from_file_blocks, pack, unpack
from danlu.quantization.nf4 import NF4Tensor, dequantize_nf4, quantize_nf4


def weights(n: int, k: int, seed: int = 0) -> Tensor:
    """Normal, of rows of different sizes, as those of a model are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator) * torch.rand(n, 1, generator=generator) * 0.05


def as_in_file(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The bytes of a file, and the weights that are unpacked from them."""
    data = quantize(weight, kind)
    return data, dequantize(data, kind, tuple(weight.shape))


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 70), blocks=st.integers(1, 5), seed=st.integers(0, 2**16), kind=st.sampled_from(("Q4_0", "Q4_1"))
)
def test_codes_of_the_file_are_found_again(n: int, blocks: int, seed: int, kind: str) -> None:
    _, weight = as_in_file(weights(n, 32 * blocks, seed), kind)
    packed = pack(weight)
    assert isinstance(packed, PackedTensor)
    assert packed.shape == weight.shape
    torch.testing.assert_close(unpack(packed), weight, rtol=0, atol=1e-3 * float(weight.abs().max()))


def test_the_very_bytes_of_q4_1_come_back() -> None:
    data, weight = as_in_file(weights(300, 1024), "Q4_1")  # more than one piece
    packed = pack(weight)
    assert isinstance(packed, PackedTensor)
    assert packed.kind == "Q4_1"
    assert torch.equal(packed.data, data)
    assert torch.equal(unpack(packed), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_also_after_the_weights_were_rounded(dtype: torch.dtype, kind: str) -> None:
    """The rounding of bf16 is 0.0016 of a weight; NF4's error is 0.09."""
    _, weight = as_in_file(weights(64, 128), kind)
    packed = pack(weight.to(dtype))
    assert isinstance(packed, PackedTensor)
    assert (unpack(packed) - weight).norm() < 3e-3 * weight.norm()


@pytest.mark.parametrize(
    "weight",
    [
        weights(64, 128),
        weights(64, 70),
        as_in_file(weights(64, 128), "Q8_0")[1],
        dequantize_nf4(quantize_nf4(weights(64, 128))),
        torch.cat((as_in_file(weights(64, 128), "Q4_1")[1], weights(8, 128))),
    ],
    ids=["floats", "rows of no blocks", "8 bits", "NF4", "a part of them"],
)
def test_others_become_nf4(weight: Tensor) -> None:
    assert from_file_blocks(weight) is None
    packed = pack(weight)
    assert isinstance(packed, NF4Tensor)
    assert torch.equal(unpack(packed, torch.bfloat16), dequantize_nf4(quantize_nf4(weight), torch.bfloat16))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    weight = as_in_file(weights(8, 64), "Q4_1")[1]
    weight[3, 5] = value
    with pytest.raises(DanluError, match="NaN or infinite"):
        pack(weight)


def test_zeros_stay_zeros() -> None:
    assert not unpack(pack(torch.zeros(4, 32))).any()
