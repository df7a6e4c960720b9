"""Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762), with the cap on the scores that no fused kernel
knows (Gemma 2, arXiv:2408.00118)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu import hardware
from danlu.nn.linear import WIDEN_ROWS


def attend(
    q_bhtd: Tensor,
    k_bhsd: Tensor,
    v_bhsd: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """``softmax(scale * q k^T + mask) v``; fewer key heads than query heads are shared among them.

    Args:
        softcap: bounds the scores by ``c * tanh(scores / c)`` before the mask.
    """
    wide = hardware.product_dtype(q_bhtd.dtype, q_bhtd.device)
    if wide != q_bhtd.dtype and q_bhtd.shape[2] >= WIDEN_ROWS:
        if mask is not None and mask.dtype == q_bhtd.dtype:
            mask = mask.to(wide)
        operands = (q_bhtd.to(wide), k_bhsd.to(wide), v_bhsd.to(wide))
        return attend(*operands, mask, causal=causal, scale=scale, softcap=softcap).to(q_bhtd.dtype)
    if softcap is None:
        return F.scaled_dot_product_attention(
            q_bhtd, k_bhsd, v_bhsd, attn_mask=mask, is_causal=causal, scale=scale,
            enable_gqa=q_bhtd.shape[1] != k_bhsd.shape[1],
        )  # fmt: skip
    # No fused kernel caps scores, so they are written out here.
    b, h, t, d = q_bhtd.shape
    groups, s = k_bhsd.shape[1], k_bhsd.shape[2]
    q = (q_bhtd * scale).reshape(b, groups, h // groups * t, d)
    scores = (q @ k_bhsd.transpose(-2, -1)).float().view(b, h, t, s)
    scores = softcap * torch.tanh(scores / softcap)
    if causal:
        mask = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(dim=-1).to(v_bhsd.dtype)
    return (weights.view(b, groups, h // groups * t, s) @ v_bhsd).view(b, h, t, d)
