"""The feed-forward network of a block, plain (Vaswani et al. 2017, arXiv:1706.03762) or gated (Shazeer 2020,
arXiv:2002.05202)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from danlu.nn.config import Activation
from danlu.nn.linear import Linear

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class MLP(nn.Module):
    """``W_down(act(W_up x))``."""

    def __init__(self, dim: int, hidden_dim: int, activation: Activation, bias: bool = False) -> None:
        super().__init__()
        self.up_proj = Linear(dim, hidden_dim, bias=bias)
        self.down_proj = Linear(hidden_dim, dim, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x_btd: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x_btd)))  # type: ignore[no-any-return]


class GatedMLP(nn.Module):
    """``W_down(act(W_gate x) * W_up x)``: SwiGLU with silu, GeGLU with gelu."""

    def __init__(self, dim: int, hidden_dim: int, activation: Activation = "silu", bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(dim, hidden_dim, bias=bias)
        self.up_proj = Linear(dim, hidden_dim, bias=bias)
        self.down_proj = Linear(hidden_dim, dim, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x_btd: Tensor) -> Tensor:
        hidden = self.activation(self.gate_proj(x_btd)) * self.up_proj(x_btd)
        return self.down_proj(hidden)  # type: ignore[no-any-return]
