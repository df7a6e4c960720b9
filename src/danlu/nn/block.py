"""A residual block: attention, then feed-forward, with norms where the family puts them."""

from __future__ import annotations

from collections.abc import MutableSequence

from torch import Tensor, nn

from danlu.nn.attention import Attention
from danlu.nn.config import ModelConfig
from danlu.nn.documents import Documents
from danlu.nn.kv_cache import KVCache
from danlu.nn.mlp import MLP, GatedMLP
from danlu.nn.moe import MoE, Routing
from danlu.nn.norm import make_norm
from danlu.nn.paged import PagedStep
from danlu.nn.paged_memory import LayerMemory
from danlu.nn.rope import Rotation


class Block(nn.Module):
    """One layer. ``arrangement`` decides which of its norms exist:

    - ``pre``: x + f(norm(x)). Llama, GPT-2, T5.
    - ``post``: norm(x + f(x)). The original Transformer, BERT, BART.
    - ``sandwich``: x + norm(f(norm(x))). Gemma 2, GLM-4.
    - ``branch``: x + norm(f(x)). OLMo 2.
    - ``parallel``: x + attention(norm(x)) + mlp(norm(x)) with one norm. Falcon 7B, Phi-2.
    - ``parallel_two_norms``: the same with a norm for each. GPT-NeoX, Falcon 40B.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.arrangement = arrangement = config.arrangement
        self.attention = Attention(config, layer)
        if config.cross_attention:
            self.cross_attention = Attention(config, layer, cross=True)
        self.mlp: MoE | GatedMLP | MLP
        if config.experts is not None and config.has_experts(layer):
            experts = config.experts
            self.mlp = MoE(
                config.dim, experts.ffn_dim, experts.number, experts.top_k,
                activation=config.activation, normalize_top_k=experts.normalize_top_k,
            )  # fmt: skip
        else:
            network = GatedMLP if config.gated else MLP
            self.mlp = network(config.dim, config.ffn_dim, config.activation, config.ffn_bias)

        # The norm in front of a branch is named after the branch; the one behind it carries "post".
        if arrangement not in ("post", "branch"):
            self.attention_norm = make_norm(config)
            if arrangement != "parallel":
                self.mlp_norm = make_norm(config)
            if config.cross_attention:
                self.cross_norm = make_norm(config)
        if arrangement in ("post", "branch", "sandwich"):
            self.post_attention_norm = make_norm(config)
            self.post_mlp_norm = make_norm(config)
            if config.cross_attention:
                self.post_cross_norm = make_norm(config)

    def forward(
        self,
        x_btd: Tensor,
        rotation: Rotation | None = None,
        mask: Tensor | Documents | None = None,
        cache: KVCache | PagedStep | None = None,
        memory: tuple[Tensor, Tensor] | LayerMemory | None = None,
        memory_mask: Tensor | None = None,
        routings: MutableSequence[Routing] | None = None,
    ) -> Tensor:
        """Arguments as in :class:`Attention`; ``memory`` is what the cross-attention looks at, ``routings`` collects
        the decisions of a mixture of experts, for its losses."""
        if self.arrangement in ("parallel", "parallel_two_norms"):
            normed = self.attention_norm(x_btd)
            for_mlp = normed if self.arrangement == "parallel" else self.mlp_norm(x_btd)
            return x_btd + self.attention(normed, rotation, mask, cache) + self._mlp(for_mlp, routings)  # type: ignore[no-any-return]
        y = self.attention(self._before("attention", x_btd), rotation, mask, cache)
        x_btd = self._after("attention", x_btd, y)
        if memory is not None:
            y = self.cross_attention(self._before("cross", x_btd), mask=memory_mask, memory=memory)
            x_btd = self._after("cross", x_btd, y)
        return self._after("mlp", x_btd, self._mlp(self._before("mlp", x_btd), routings))

    def _before(self, branch: str, x_btd: Tensor) -> Tensor:
        if self.arrangement in ("post", "branch"):
            return x_btd
        return getattr(self, f"{branch}_norm")(x_btd)  # type: ignore[no-any-return]

    def _after(self, branch: str, x_btd: Tensor, y_btd: Tensor) -> Tensor:
        if self.arrangement == "pre":
            return x_btd + y_btd
        norm = getattr(self, f"post_{branch}_norm")
        return norm(x_btd + y_btd) if self.arrangement == "post" else x_btd + norm(y_btd)  # type: ignore[no-any-return]

    def _mlp(self, x_btd: Tensor, routings: MutableSequence[Routing] | None) -> Tensor:
        return self.mlp(x_btd, routings) if isinstance(self.mlp, MoE) else self.mlp(x_btd)  # type: ignore[no-any-return]
