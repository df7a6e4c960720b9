"""Losses that keep a mixture of experts in balance, and the measure of that balance.

All take what the routers of the layers said (`danlu.nn.moe.Routing`) in the order of the flattened tokens,
n = batch x seq, and an optional ``mask`` of n elements in any shape, zero or False for padding, which does not count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def load_balancing_loss(logits_ne: Sequence[Tensor], top_k: int, mask: Tensor | None = None) -> Tensor:
    """``E * sum over experts e of f_e * p_e``: f the fraction of tokens that are sent to e (:func:`expert_load`), p the
    mean probability that the router gives e (Fedus et al. 2021, arXiv:2101.03961, eq. 4-6); a scalar, fp32.

    ``top_k`` when the experts are in balance, up to E when a router sends every token to the same ones. Gradients flow
    through p alone. A mean over the unmasked tokens given here and not a sum, because a product of fractions does not
    add up: with micro-batches, average it over them, and know that each balances within itself.

    As in transformers, f and p are taken over the tokens of all layers together. For balance in every layer by itself
    call this with one layer at a time.

    Args:
        logits_ne: (n, E) of each layer.
        top_k: experts a token is sent to.
    """
    probs = torch.cat(list(logits_ne)).float().softmax(-1)
    n_experts = probs.shape[-1]
    counted = _counted(mask, probs, len(logits_ne))
    mean_prob_e = counted @ probs / counted.sum().clamp(min=1)
    return n_experts * (expert_load(probs.topk(top_k).indices, n_experts, counted) * mean_prob_e).sum()


def router_z_loss(logits_ne: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Sum of ``(log sum over e of exp(logit_e))^2`` over the unmasked tokens and the layers (Zoph et al. 2022,
    arXiv:2202.08906, eq. 5); a scalar, fp32. It keeps the logits small, where their softmax is exact.

    The sum and not the mean: whoever accumulates micro-batches divides once, by the unmasked tokens of the whole step,
    which gives the paper's loss added over the layers.

    Args:
        logits_ne: (n, E) of each layer.
    """
    logits = torch.cat(list(logits_ne)).float()
    return _counted(mask, logits, len(logits_ne)) @ logits.logsumexp(-1).square()


def expert_load(experts_nk: Tensor, n_experts: int, mask: Tensor | None = None) -> Tensor:
    """Fraction of the unmasked tokens that each expert gets, (E,) fp32. Sums to k; k / E everywhere is perfect balance.

    Args:
        experts_nk: (n, k) numbers of the experts that each token is sent to.
    """
    counted = _counted(mask, experts_nk, 1)
    pairs = counted[:, None].expand(experts_nk.shape).flatten()
    load_e = counted.new_zeros(n_experts).index_add_(0, experts_nk.flatten(), pairs)
    return load_e / counted.sum().clamp(min=1)


def _counted(mask: Tensor | None, rows: Tensor, n_layers: int) -> Tensor:
    """1 for each row that counts, 0 for padding, fp32; the same tokens pass through all layers."""
    if mask is None:
        return torch.ones(len(rows), device=rows.device)
    return mask.flatten().to(device=rows.device, dtype=torch.float32).repeat(n_layers)
