"""A tiny random language model of our own."""

from __future__ import annotations

from typing import Any

import torch

from danlu.models.causal_lm import CausalLM
from danlu.nn.config import ModelConfig, Rope


def random_lm(vocab_size: int, *, context: int, std: float = 0.3, **shape: Any) -> CausalLM:
    """With weights so large, by default, that its logits are far apart and rounding does not change the choice.

    Args:
        std: of the weights.
        shape: what of its shape shall differ.
    """
    small = {"n_layers": 2, "dim": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "ffn_dim": 64, **shape}
    model = CausalLM(ModelConfig(vocab_size=vocab_size, context=context, qk_norm="head", rope=Rope(), **small))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=std, generator=generator)
    return model.eval()
