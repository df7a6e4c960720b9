"""A linear layer that computes in the dtype of its input and keeps its own weights as they are."""

from __future__ import annotations

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
