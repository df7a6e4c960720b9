"""A linear layer that computes in the dtype of its input and keeps its own weights as they are."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from danlu import hardware

WIDEN_ROWS = 32
"""Rows from which products are widened: below, widening the weight costs more than it saves."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` in the dtype of ``x``, to which the weight is rounded; see :func:`danlu.hardware.product_dtype`."""
    if hardware.product_dtype(x.dtype, x.device) != x.dtype and _rows(x) >= WIDEN_ROWS:
        return _WideProduct.apply(x, weight, bias)  # type: ignore[no-any-return,no-untyped-call]
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class _WideProduct(torch.autograd.Function):
    """Written out because autograd would keep the widened operands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        b = None if bias is None else bias.to(x.dtype).float()
        return F.linear(x.float(), weight.to(x.dtype).float(), b).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wide = grad_y.float()
        grad_x = (wide @ weight.to(x.dtype).float()).to(x.dtype) if ctx.needs_input_grad[0] else None
        rows = wide.flatten(0, -2)
        grad_weight = (rows.T @ x.flatten(0, -2).float()).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = rows.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1] if x.numel() else 0


class Linear(nn.Linear):
    """``y = x W^T + b`` in the dtype of ``x``.

    With fp32 weights and bf16 activations this is mixed precision with fp32 master weights, spelled out in one line: no
    autocast region decides from outside. The gradient comes back in the dtype of the weights.
    """

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


class Head(Linear):
    """The projection to logits, which come out in fp32.

    Args:
        scale: on the hidden states, before the projection (T5 divides by the square root of the width).
        softcap: bounds the logits by ``c * tanh(logits / c)`` (Gemma 2).
    """

    def __init__(
        self, dim: int, n_out: int, bias: bool = False, scale: float | None = None, softcap: float | None = None
    ) -> None:
        super().__init__(dim, n_out, bias=bias)
        self.scale, self.softcap = scale, softcap

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x if self.scale is None else x * self.scale).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
