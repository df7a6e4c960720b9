"""The gated feed-forward block, SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from danlu.nn.linear import Linear


class SwiGLU(nn.Module):
    """``W_down(silu(W_gate x) * W_up x)``."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = Linear(dim, hidden_dim, bias=False)
        self.up_proj = Linear(dim, hidden_dim, bias=False)
        self.down_proj = Linear(hidden_dim, dim, bias=False)

    def forward(self, x_btd: Tensor) -> Tensor:
        hidden = F.silu(self.gate_proj(x_btd)) * self.up_proj(x_btd)
        return self.down_proj(hidden)  # type: ignore[no-any-return]
