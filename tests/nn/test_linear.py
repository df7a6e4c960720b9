"""Products of bf16 where the CPU has none are those of bf16, summed in fp32 and rounded once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from danlu import hardware
from danlu.nn.linear import WIDEN_ROWS, Linear


@pytest.mark.parametrize("n", [1, WIDEN_ROWS, 70])
@pytest.mark.parametrize("frozen", [False, True])
def test_bf16_product(n: int, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_CPU_COMPUTES_BF16", False)
    torch.manual_seed(0)
    layer = Linear(48, 24).requires_grad_(not frozen)
    x = torch.randn(n, 48).bfloat16().requires_grad_()
    exact = [t.detach().bfloat16().double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    grad = torch.randn(n, 24).bfloat16()
    wanted_y = F.linear(*exact)
    wanted = torch.autograd.grad(wanted_y, exact, grad.double())
    y = layer(x)
    assert y.dtype == torch.bfloat16
    # Half a unit in the last place of bf16, relative to what is summed.
    torch.testing.assert_close(y.double(), wanted_y, atol=0.01, rtol=2**-8)
    learned = [x] if frozen else [x, layer.weight, layer.bias]
    found = torch.autograd.grad(y, learned, grad)
    for one, other, belongs_to in zip(found, wanted, learned, strict=False):
        assert one.dtype == belongs_to.dtype
        torch.testing.assert_close(one.double(), other, atol=0.03, rtol=2**-7)


def test_only_emulated_products_are_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for computes in (False, True):
        monkeypatch.setattr(hardware, "_CPU_COMPUTES_BF16", computes)
        for dtype in (torch.float32, torch.float16, torch.float64):
            assert hardware.product_dtype(dtype, cpu) == dtype
        assert hardware.product_dtype(torch.bfloat16, cpu) == (torch.bfloat16 if computes else torch.float32)
        assert hardware.product_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16


def test_no_widened_operand_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_CPU_COMPUTES_BF16", False)
    layer, kept = Linear(48, 24, bias=False), []
    x = torch.randn(64, 48).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), layer.weight.data_ptr()}
