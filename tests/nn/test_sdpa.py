"""Attention in bf16 where the CPU has no such products is that of fp32, rounded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from danlu import hardware
from danlu.nn.linear import WIDEN_ROWS
from danlu.nn.sdpa import attend

T = WIDEN_ROWS + 5


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("kind", ["causal", "boolean", "bias"])
def test_bf16_attention(kind: str, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_CPU_COMPUTES_BF16", False)
    torch.manual_seed(0)
    operands = [torch.randn(2, h, T, 16).bfloat16().requires_grad_() for h in (4, 2, 2)]
    options: dict[str, Any] = {"scale": 0.25, "softcap": softcap, "causal": kind == "causal"}
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    masks: dict[str, tuple[Tensor | None, Tensor | None]] = {
        "causal": (None, None),
        "boolean": (seen, seen),
        "bias": ((bias := torch.zeros(T, T).masked_fill(~seen, -1e4).bfloat16()), bias.double()),
    }
    exact = [t.detach().double().requires_grad_() for t in operands]
    wanted = attend(*exact, masks[kind][1], **options)
    found = attend(*operands, masks[kind][0], **options)
    assert found.dtype == torch.bfloat16
    # Half a unit in the last place of bf16, and no more: nothing between was rounded.
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=2**-8)
    grad = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, operands, grad), torch.autograd.grad(wanted, exact, grad.double()), strict=True
    ):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.double(), other, atol=1e-4, rtol=2**-8)
