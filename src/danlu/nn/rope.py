"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the half-split layout of the Llama and Qwen
checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """cos and sin of every position up to ``max_positions``, kept in fp32: ``forward(positions_bt)`` looks rows up."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, max_positions: int, base: float = 10_000.0) -> None:
        super().__init__()
        frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float64), frequencies)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, positions_bt: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, seq) positions -> cos and sin, each (batch, 1, seq, head_dim / 2)."""
        return self.cos[positions_bt].unsqueeze(1), self.sin[positions_bt].unsqueeze(1)


def apply_rope(x_bhtd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + d/2]) by its angle. Computed in fp32, returned in the dtype of ``x``."""
    first, second = x_bhtd.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_bhtd.dtype)
