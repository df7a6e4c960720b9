"""A decoder-only language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from danlu.models.transformer import Transformer
from danlu.nn.config import ModelConfig
from danlu.nn.kv_cache import KVCache
from danlu.nn.linear import Head

if TYPE_CHECKING:
    from danlu.models.family import Task


class CausalLM(Transformer):
    """Next-token model: a stack that looks back only, and a head over the vocabulary."""

    task: ClassVar[Task] = "causal_lm"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.head = Head(config.dim, config.vocab_size, config.head_bias, config.head_scale, config.logit_softcap)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """As in :class:`Transformer`; a tied embedding is drawn small: it is also the head, and small logits start the
        loss at ln(vocab)."""
        super().init_weights(generator)
        if self.config.tie_embeddings:
            nn.init.normal_(self.embed.weight, std=0.02, generator=generator)
        else:
            nn.init.normal_(self.head.weight, std=0.001, generator=generator)

    def forward(
        self,
        ids_bt: Tensor,
        positions_bt: Tensor | None = None,
        segments_bt: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        real_bt: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token after each position, (batch, seq, vocab), fp32. Arguments as in
        :meth:`Transformer.hidden_states`."""
        return self.head(self.hidden_states(ids_bt, positions_bt, segments_bt, cache, real_bt=real_bt))  # type: ignore[no-any-return]

    def estimate_flops(self, seq_len: int) -> int:
        return super().estimate_flops(seq_len) + 6 * self.config.vocab_size * self.config.dim
