"""Attention as every family here has it: grouped queries (Ainslie et al. 2023, arXiv:2305.13245), with what families
add: biases, normalised queries and keys (arXiv:2302.05442), a cap on the scores."""

from __future__ import annotations

from torch import Tensor, nn

from danlu.nn.config import ModelConfig
from danlu.nn.documents import Documents, attend_documents
from danlu.nn.kv_cache import KVCache
from danlu.nn.linear import Linear
from danlu.nn.norm import make_norm
from danlu.nn.paged import PagedStep
from danlu.nn.paged_memory import LayerMemory
from danlu.nn.rope import Rotation, apply_rope
from danlu.nn.sdpa import attend


class Attention(nn.Module):
    """``n_heads`` query heads share ``n_kv_heads`` key and value heads.

    QK-norm, per head or over the full width, keeps the scores bounded whatever the learning rate does, which is what
    lets Muon run at large steps.

    Args:
        layer: its place in a KV cache.
        cross: keys and values come from another sequence, by way of :meth:`keys_values`; no rotary positions.
    """

    def __init__(self, config: ModelConfig, layer: int = 0, cross: bool = False) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.layer = layer
        self.causal = config.causal and not cross
        self.scale = config.attention_scale or config.head_dim**-0.5
        if config.attention_scale_by_layer:
            self.scale /= layer + 1
        self.softcap = config.attention_softcap
        rope = None if cross else config.rope_of(layer)
        self.interleaved = rope is not None and rope.interleaved
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = Linear(config.dim, q_dim, bias=config.qkv_bias)
        self.k_proj = Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.v_proj = Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.o_proj = Linear(q_dim, config.dim, bias=config.attention_out_bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            full = config.qk_norm == "full"
            self.q_norm = make_norm(config, q_dim if full else config.head_dim)
            self.k_norm = make_norm(config, kv_dim if full else config.head_dim)

    def forward(
        self,
        x_btd: Tensor,
        rotation: Rotation | None = None,
        mask: Tensor | Documents | None = None,
        cache: KVCache | PagedStep | None = None,
        memory: tuple[Tensor, Tensor] | LayerMemory | None = None,
    ) -> Tensor:
        """Attend from every position of ``x``.

        Args:
            rotation: cos and sin of the positions, for layers that have any.
            mask: boolean (True where a query may look) or additive, broadcastable to (batch, heads, seq, keys); or the
                documents of packed rows. None: causal attention if the model is causal and there are as many keys as
                queries, else all may be seen.
            cache: earlier keys and values. A paged one knows by itself what each token may see, and takes no mask.
            memory: keys and values of another sequence, (batch, n_kv_heads, keys, head_dim) each, or those of many, to
                go with a paged cache.
        """
        q = self.queries(x_btd)
        if isinstance(memory, LayerMemory):
            return self._output(memory.attend(q, scale=self.scale, softcap=self.softcap))
        if memory is None:
            k, v = self.keys_values(x_btd)
            if rotation is not None:
                q, k = apply_rope(q, rotation, self.interleaved), apply_rope(k, rotation, self.interleaved)
            if isinstance(cache, PagedStep):
                return self._output(cache.attend(self.layer, q, k, v, scale=self.scale, softcap=self.softcap))
            if cache is not None:
                k, v = cache.update(self.layer, k, v)
        else:
            k, v = memory
        if isinstance(mask, Documents):
            return self._output(attend_documents(q, k, v, mask, scale=self.scale))
        causal = self.causal and mask is None and q.shape[2] == k.shape[2] > 1
        return self._output(attend(q, k, v, mask, causal=causal, scale=self.scale, softcap=self.softcap))

    def queries(self, x_btd: Tensor) -> Tensor:
        """Queries, (batch, n_heads, seq, head_dim), before any rotation."""
        return self._heads(self.q_proj(x_btd), self.n_heads, "q")

    def keys_values(self, x_btd: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, (batch, n_kv_heads, seq, head_dim) each, before any rotation."""
        v = self.v_proj(x_btd).view(*x_btd.shape[:2], self.n_kv_heads, self.head_dim).transpose(1, 2)
        return self._heads(self.k_proj(x_btd), self.n_kv_heads, "k"), v

    def _heads(self, x_btd: Tensor, n_heads: int, which: str) -> Tensor:
        """Cut into heads, (batch, heads, seq, head_dim), normalised where the family does so."""
        b, t, _ = x_btd.shape
        if self.qk_norm == "full":
            x_btd = getattr(self, f"{which}_norm")(x_btd)
        x_bthd = x_btd.view(b, t, n_heads, self.head_dim)
        if self.qk_norm == "head":
            x_bthd = getattr(self, f"{which}_norm")(x_bthd)
        return x_bthd.transpose(1, 2)

    def _output(self, y_bhtd: Tensor) -> Tensor:
        """The heads side by side again, and projected."""
        return self.o_proj(y_bhtd.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
