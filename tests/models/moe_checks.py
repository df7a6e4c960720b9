"""What must hold for a decoder with experts, beyond parity."""

from __future__ import annotations

import torch
from parity import random_ids
from torch import Tensor

from danlu.models.causal_lm import CausalLM
from danlu.nn.moe import Routing


def check_flops(model: CausalLM, t: int = 16) -> None:
    """The estimate counts the experts that a token is sent to, not those that exist."""
    config = model.config
    heads = config.n_heads * config.head_dim
    per_layer = 2 * config.dim * heads + 2 * config.dim * config.n_kv_heads * config.head_dim
    weights = config.n_layers * per_layer + config.dim * config.vocab_size
    for layer in range(config.n_layers):
        if config.experts is not None and config.has_experts(layer):
            experts = config.experts
            weights += config.dim * experts.number + experts.top_k * 3 * config.dim * experts.ffn_dim
        else:
            weights += 3 * config.dim * config.ffn_dim
    assert model.estimate_flops(t) == 6 * weights + 12 * config.n_layers * heads * t


def check_gradient_checkpointing(model: CausalLM, t: int = 16) -> None:
    """Recomputing the blocks changes no gradient and makes no layer's routing count twice."""
    ids = random_ids(model.config.vocab_size, 2, t)
    model.train()

    def run(recompute: bool) -> tuple[dict[str, Tensor], list[Routing]]:
        model.gradient_checkpointing = recompute
        model.zero_grad()
        routings: list[Routing] = []
        hidden = model.hidden_states(ids, routings=routings)
        # The routers' own part of the loss, which a recomputed block must not lose.
        balance = torch.stack([routing.logits_ne.logsumexp(-1).square().mean() for routing in routings]).sum()
        (hidden.square().mean() + balance).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, routings

    plain, routings = run(recompute=False)
    recomputed, routings_again = run(recompute=True)
    layers = [layer for layer in range(model.config.n_layers) if model.config.has_experts(layer)]
    assert len(routings) == len(routings_again) == len(layers)
    assert plain.keys() == recomputed.keys()
    assert any("router" in name and gradient.abs().max() > 1e-4 for name, gradient in plain.items())
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=lambda text, name=name: f"{name}: {text}")
