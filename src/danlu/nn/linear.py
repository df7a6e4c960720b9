"""A linear layer that computes in the dtype of its input and keeps its own weights as they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """``y = x W^T + b`` in the dtype of ``x``.

    With fp32 weights and bf16 activations this is mixed precision with fp32 master weights, spelled out in one line: no
    autocast region decides from outside. The gradient comes back in the dtype of the weights.
    """

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


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
