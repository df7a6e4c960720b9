"""Sparse mixture of experts: a router sends each token to its top-k feed-forward experts (Shazeer et al. 2017,
arXiv:1701.06538; Mixtral, arXiv:2401.04088; Qwen3-MoE, arXiv:2505.09388).

No expert has a capacity and no token is dropped: the (token, expert) pairs are sorted by expert, and each expert
multiplies one contiguous slice of them, so that the cost follows the active experts and not all of them.
"""

from __future__ import annotations

from collections.abc import MutableSequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from danlu.nn.config import Activation
from danlu.nn.linear import Linear
from danlu.nn.mlp import ACTIVATIONS


class Routing(NamedTuple):
    """Where the n = batch x seq tokens of a layer go, in the order of the flattened tokens.

    ``weights_nk`` (fp32): weight of each chosen expert, largest first; ``experts_nk`` (int64): its number;
    ``logits_ne`` (fp32): what the router said about all experts, the input of :mod:`danlu.objectives.routing`.
    """

    weights_nk: Tensor
    experts_nk: Tensor
    logits_ne: Tensor


class MoE(nn.Module):
    """``y = sum over the chosen e of weight_e W_down,e(act(W_gate,e x) * W_up,e x)``; takes the place of a gated MLP.

    The router's logits and softmax are fp32 whatever the dtype of ``x`` (Fedus et al. 2021, arXiv:2101.03961, 2.4); the
    experts compute in the dtype of ``x``, as :class:`danlu.nn.linear.Linear` does.

    Args:
        dim: width of the model, D.
        hidden_dim: width of one expert, F.
        n_experts: number of experts, E.
        top_k: experts a token is sent to, 1 to E.
        normalize_top_k: the weights of the chosen experts are scaled to sum to 1 (Mixtral; ``norm_topk_prob`` of
            Qwen3-MoE).
        softmax_first: True: softmax over all experts, then top-k. False: top-k, then softmax over the chosen, which
            sums to 1 by itself and so equals softmax first with ``normalize_top_k``.

    Parameters: ``router.weight`` (E, D), ``gate_up_proj`` (E, 2F, D), the gate's rows first, ``down_proj`` (E, D, F).
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        n_experts: int,
        top_k: int,
        *,
        activation: Activation = "silu",
        normalize_top_k: bool,
        softmax_first: bool = True,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= n_experts:
            raise ValueError(f"top_k ({top_k}) must be from 1 to the number of experts ({n_experts})")
        if not softmax_first and not normalize_top_k:
            raise ValueError(
                "softmax over the chosen experts sums to 1: normalize_top_k=False needs softmax_first=True"
            )
        self.top_k = top_k
        self.activation = ACTIVATIONS[activation]
        self.normalize_top_k = normalize_top_k
        self.softmax_first = softmax_first
        self.router = Linear(dim, n_experts, bias=False)
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, 2 * hidden_dim, dim))
        self.down_proj = nn.Parameter(torch.empty(n_experts, dim, hidden_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within 1/sqrt(fan_in) for each expert, as ``torch.nn.Linear`` starts."""
        for weight in (self.router.weight, self.gate_up_proj, self.down_proj):
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)

    def route(self, x_btd: Tensor) -> Routing:
        """Choose the experts of every token of (..., D)."""
        logits_ne = self.router(x_btd.flatten(0, -2).float())
        if self.softmax_first:
            weights_nk, experts_nk = logits_ne.softmax(-1).topk(self.top_k)
            if self.normalize_top_k:
                weights_nk = weights_nk / weights_nk.sum(-1, keepdim=True)
        else:
            chosen_nk, experts_nk = logits_ne.topk(self.top_k)
            weights_nk = chosen_nk.softmax(-1)
        return Routing(weights_nk, experts_nk, logits_ne)

    def forward(self, x_btd: Tensor, routings: MutableSequence[Routing] | None = None) -> Tensor:
        """The weighted sum of each token's experts, in the shape and dtype of ``x_btd``, (..., D).

        Args:
            routings: a list of the caller's, to which this layer's routing is appended, for a loss or a log; the layer
                itself keeps nothing. To be read before the backward pass: activation checkpointing runs the layer again
                there, and so appends again.
        """
        routing = self.route(x_btd)
        if routings is not None:
            routings.append(routing)
        weights_nk, experts_nk, _ = routing
        # A pair p = (token, choice) is one row of work. `order_p` lists the pairs by expert; `rank_nk` is its inverse:
        # the row where the pair (token n, choice k) went.
        order_p = experts_nk.flatten().argsort(stable=True)
        rank_nk = torch.empty_like(order_p).index_copy_(0, order_p, torch.arange(len(order_p), device=order_p.device))
        rank_nk = rank_nk.view_as(experts_nk)
        x_pd = x_btd.flatten(0, -2).index_select(0, order_p // self.top_k)
        y_pd = self._experts(x_pd, experts_nk)
        # The weighted sum of k gathered rows is what embedding_bag computes, in one pass without the (n, k, D)
        # intermediate: forward and backward 20 ms, against 110 to 160 ms for scale and index_add, or gather, scale and
        # sum (4,096 tokens, k=2, D=1024, fp32, one core).
        y_nd = F.embedding_bag(rank_nk, y_pd, per_sample_weights=weights_nk.to(y_pd.dtype), mode="sum")
        return y_nd.view_as(x_btd)

    def _experts(self, x_pd: Tensor, experts_nk: Tensor) -> Tensor:
        """Each expert on its own slice of the rows, which are sorted by expert."""
        counts = experts_nk.flatten().bincount(minlength=len(self.down_proj)).tolist()
        gate_pf, up_pf = grouped_linear(x_pd, self.gate_up_proj, counts).chunk(2, -1)
        return grouped_linear(self.activation(gate_pf) * up_pf, self.down_proj, counts)


def keep_out_of_graphs(model: nn.Module) -> None:
    """Before a model is compiled: the bounds of the experts' slices are data, so a graph would be made anew for each
    routing. No decorator: that would import the compiler, 1.5 s, wherever this module is imported."""
    for module in model.modules():
        if isinstance(module, MoE):
            module._experts = torch.compiler.disable(module._experts)  # type: ignore[method-assign,no-untyped-call]


def grouped_linear(x_pi: Tensor, weight_eoi: Tensor, counts: list[int]) -> Tensor:
    """``x W_e^T`` where the first ``counts[0]`` rows of ``x`` belong to ``W_0``, the next ``counts[1]`` to ``W_1``, ...

    Weights are cast to the dtype of ``x`` where they are used, and their gradient comes back in their own dtype; an
    expert without rows gets a zero gradient. Experts without rows cost nothing in the forward pass.
    """
    return _GroupedLinear.apply(x_pi, weight_eoi, counts)  # type: ignore[no-any-return,no-untyped-call]


class _GroupedLinear(torch.autograd.Function):
    """Written out because autograd, going back through a loop over ``weight[e]``, would make and add one gradient of
    the size of all experts for each expert."""

    @staticmethod
    def forward(ctx: Any, x_pi: Tensor, weight_eoi: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x_pi, weight_eoi)
        ctx.counts = counts
        y_po = x_pi.new_empty(len(x_pi), weight_eoi.shape[1])
        for e, rows in enumerate(_slices(counts)):
            if rows.start < rows.stop:
                torch.mm(x_pi[rows], weight_eoi[e].to(x_pi.dtype).T, out=y_po[rows])
        return y_po

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_po: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_pi, weight_eoi = ctx.saved_tensors
        grad_x = torch.empty_like(x_pi) if ctx.needs_input_grad[0] else None
        grad_weight = x_pi.new_empty(weight_eoi.shape) if ctx.needs_input_grad[1] else None
        for e, rows in enumerate(_slices(ctx.counts)):
            if grad_x is not None and rows.start < rows.stop:
                torch.mm(grad_po[rows], weight_eoi[e].to(x_pi.dtype), out=grad_x[rows])
            if grad_weight is not None:
                torch.mm(grad_po[rows].T, x_pi[rows], out=grad_weight[e])  # zeros where there are no rows
        return grad_x, None if grad_weight is None else grad_weight.to(weight_eoi.dtype), None


def _slices(counts: list[int]) -> list[slice]:
    """The rows of each expert."""
    return [slice(end - n, end) for n, end in zip(counts, accumulate(counts), strict=True)]
