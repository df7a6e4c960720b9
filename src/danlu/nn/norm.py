"""Normalisation over the last dimension: LayerNorm (Ba et al. 2016, arXiv:1607.06450) and RMSNorm (Zhang & Sennrich
2019, arXiv:1910.07467)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.nn.config import ModelConfig


class RMSNorm(nn.Module):
    """``x / rms(x) * weight``, computed in fp32 and returned in the dtype of ``x``.

    Args:
        offset: the weight is stored as its difference from one, as Gemma does, so that weight decay pulls it to one.
    """

    def __init__(self, dim: int, eps: float = 1e-6, offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim) if offset else torch.ones(dim))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float() + 1 if self.offset else self.weight.float()
        return F.rms_norm(x.float(), (x.shape[-1],), weight, self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """``(x - mean) / std * weight + bias``, computed in fp32 and returned in the dtype of ``x``."""

    def __init__(self, dim: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), (x.shape[-1],), self.weight.float(), bias, self.eps).to(x.dtype)


def make_norm(config: ModelConfig, dim: int | None = None) -> RMSNorm | LayerNorm:
    """The norm of a family, over ``dim`` features (default: the width)."""
    if config.norm == "rms":
        return RMSNorm(dim or config.dim, config.norm_eps, config.norm_offset)
    return LayerNorm(dim or config.dim, config.norm_eps, config.norm_bias)
