"""A decoder-only language model: embed, n pre-norm blocks, norm, head. Read it beside the Qwen3 report
(arXiv:2505.09388)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from danlu.models.config import ModelConfig
from danlu.nn.attention import Attention
from danlu.nn.kv_cache import KVCache
from danlu.nn.linear import Linear
from danlu.nn.mlp import SwiGLU
from danlu.nn.norm import RMSNorm
from danlu.nn.rope import RotaryEmbedding


class Block(nn.Module):
    """Pre-norm residual block: attention, then feed-forward."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(
            config.dim, config.n_heads, config.n_kv_heads, config.head_dim, layer, config.norm_eps
        )
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config.dim, config.ffn_dim)

    def forward(
        self, x_btd: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        x_btd = x_btd + self.attention(self.attention_norm(x_btd), rope, mask, cache)
        return x_btd + self.mlp(self.mlp_norm(x_btd))  # type: ignore[no-any-return]


class CausalLM(nn.Module):
    """Next-token model.

    ``compute_dtype`` is the dtype of activations and matrix products; weights stay in their own dtype (fp32 master
    weights while training) and are cast where they are used.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if problems := config.problems():
            raise ValueError("; ".join(problems))
        self.config = config
        self.compute_dtype: torch.dtype | None = None  # None: the dtype of the weights
        self.gradient_checkpointing = False
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.rope = RotaryEmbedding(config.head_dim, config.context, config.rope_base)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Uniform 1/sqrt(fan_in) input projections; output projections zero, so that every block starts as the
        identity.

        A tied embedding is drawn small: it is also the head, and small logits start the loss at ln(vocab).
        """
        for block in self.layers:
            assert isinstance(block, Block)
            for linear in (block.attention.q_proj, block.attention.k_proj, block.attention.v_proj,
                           block.mlp.gate_proj, block.mlp.up_proj):  # fmt: skip
                bound = (3 / linear.in_features) ** 0.5  # uniform with standard deviation 1/sqrt(fan_in)
                nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
            nn.init.zeros_(block.attention.o_proj.weight)
            nn.init.zeros_(block.mlp.down_proj.weight)
        for module in self.modules():
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        if self.config.tie_embeddings:
            nn.init.normal_(self.embed.weight, std=0.02, generator=generator)
        else:
            nn.init.normal_(self.embed.weight, std=1.0, generator=generator)
            nn.init.normal_(self.head.weight, std=0.001, generator=generator)

    def hidden_states(
        self,
        ids_bt: Tensor,
        positions_bt: Tensor | None = None,
        segments_bt: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Final normalised hidden states, (batch, seq, dim), in ``compute_dtype``.

        Args:
            positions_bt: position of each token in its document; default 0, 1, 2, ...
            segments_bt: document number of each token; tokens attend only within their document. Default: one document
                a row.
            cache: keys and values of earlier tokens; excludes the two above.
        """
        t = ids_bt.shape[1]
        mask: Tensor | None = None
        if cache is not None:
            positions_bt, mask = cache.positions(t), cache.mask(t)
        elif segments_bt is not None:
            # Additive and made once: SDPA would turn a boolean mask into this form again in every layer.
            mask = document_mask(segments_bt, self.compute_dtype or self.embed.weight.dtype)
        if positions_bt is None:
            positions_bt = torch.arange(t, device=ids_bt.device)[None]
        rope = self.rope(positions_bt)
        x = self.embed(ids_bt).to(self.compute_dtype or self.embed.weight.dtype)
        for block in self.layers:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, rope, mask, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache)
        if cache is not None:
            cache.length += t
        return self.norm(x)  # type: ignore[no-any-return]

    def forward(
        self,
        ids_bt: Tensor,
        positions_bt: Tensor | None = None,
        segments_bt: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits of the next token after each position, (batch, seq, vocab), fp32. Arguments as in
        :meth:`hidden_states`."""
        return self.head(self.hidden_states(ids_bt, positions_bt, segments_bt, cache)).float()  # type: ignore[no-any-return]

    def num_parameters(self) -> int:
        """Number of weights; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def estimate_flops(self, seq_len: int) -> int:
        """FLOPs of training on one token: 6 per matmul weight (2 forward, 4 backward) plus 12 x heads x head_dim x seq
        a layer for attention over the full square (Chowdhery et al. 2022, arXiv:2204.02311, appendix B). The embedding
        look-up is free."""
        matrices = sum(p.numel() for layer in self.layers for p in layer.parameters() if p.ndim == 2)
        head = self.config.vocab_size * self.config.dim
        attention = 12 * self.config.n_layers * self.config.n_heads * self.config.head_dim * seq_len
        return 6 * (matrices + head) + attention


def document_mask(segments_bt: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask, (batch, 1, seq, seq): 0 where a token may look (itself and earlier tokens of its own
    document), else -inf."""
    t = segments_bt.shape[1]
    same = segments_bt[:, None, :, None] == segments_bt[:, None, None, :]
    allowed = same & torch.ones(t, t, dtype=torch.bool, device=segments_bt.device).tril()
    return torch.zeros(allowed.shape, dtype=dtype, device=segments_bt.device).masked_fill_(~allowed, float("-inf"))
