"""Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with RoPE and normalised queries and keys
(arXiv:2302.05442)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from danlu.nn.kv_cache import KVCache
from danlu.nn.linear import Linear
from danlu.nn.norm import RMSNorm
from danlu.nn.rope import apply_rope


class Attention(nn.Module):
    """Causal self-attention: ``n_heads`` query heads share ``n_kv_heads`` key and value heads.

    QK-norm keeps the attention logits bounded whatever the learning rate does, which is what lets Muon run at large
    steps.
    """

    def __init__(
        self, dim: int, n_heads: int, n_kv_heads: int, head_dim: int, layer: int = 0, norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self.layer = layer  # its place in a KV cache
        self.q_proj = Linear(dim, n_heads * head_dim, bias=False)
        self.k_proj = Linear(dim, n_kv_heads * head_dim, bias=False)
        self.v_proj = Linear(dim, n_kv_heads * head_dim, bias=False)
        self.o_proj = Linear(n_heads * head_dim, dim, bias=False)
        self.q_norm = RMSNorm(head_dim, norm_eps)
        self.k_norm = RMSNorm(head_dim, norm_eps)

    def forward(
        self,
        x_btd: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """``mask`` is boolean (True where a query may look) or additive, broadcastable to (batch, heads, seq, keys).
        None means plain causal attention or, with a cache, that every cached key may be seen."""
        b, t, _ = x_btd.shape
        q = self.q_proj(x_btd).view(b, t, self.n_heads, self.head_dim)
        k = self.k_proj(x_btd).view(b, t, self.n_kv_heads, self.head_dim)
        v = self.v_proj(x_btd).view(b, t, self.n_kv_heads, self.head_dim).transpose(1, 2)
        q = apply_rope(self.q_norm(q).transpose(1, 2), *rope)
        k = apply_rope(self.k_norm(k).transpose(1, 2), *rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        causal = mask is None and cache is None
        enable_gqa = self.n_heads != self.n_kv_heads
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=enable_gqa)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))  # type: ignore[no-any-return]
