"""The objective of pre-training and of supervised fine-tuning: next-token negative log-likelihood."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from danlu import hardware
from danlu.data.packing import IGNORE


def next_token_nll_sum(logits_btv: Tensor, targets_bt: Tensor) -> Tensor:
    """Sum of ``-log p(target)`` in nats over all targets that are not IGNORE; a scalar, fp32.

    The sum and not the mean: whoever accumulates micro-batches divides once, by the number of targets in the whole
    step, so that one step over 8 rows and 8 steps over one row give the same gradient whatever the lengths.
    """
    return F.cross_entropy(
        logits_btv.float().flatten(0, -2), targets_bt.flatten(), ignore_index=IGNORE, reduction="sum"
    )


def projected_nll_sum(
    hidden_nd: Tensor,
    weight_vd: Tensor,
    targets_n: Tensor,
    *,
    rows: int,
    bias_v: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """:func:`next_token_nll_sum` of the logits ``softcap * tanh((scale * hidden @ weight^T + bias) / softcap)``, of
    which no more than ``rows`` rows exist at any time; a scalar, fp32.

    The gradient is computed along with the loss, piece by piece, and only scaled when it is asked for (as in Liger
    Kernel, Hsu et al. 2024, arXiv:2410.10989): nothing is computed twice. The graph can be walked once.

    Args:
        hidden_nd: in the dtype of the products, which the weight is cast to.
        targets_n: none is IGNORE.
        rows: logits made at once; changes memory, not the result.
    """
    return _ProjectedNLL.apply(  # type: ignore[no-any-return,no-untyped-call]
        hidden_nd, weight_vd, bias_v, targets_n, rows, scale, softcap, torch.is_grad_enabled()
    )


class _ProjectedNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_nd: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets_n: Tensor,
        rows: int,
        scale: float | None,
        softcap: float | None,
        with_gradient: bool,
    ) -> Tensor:
        wanted = [with_gradient and needed for needed in ctx.needs_input_grad[:3]]
        grad_hidden = torch.empty_like(hidden_nd) if wanted[0] else None
        grad_weight = torch.zeros_like(weight) if wanted[1] else None
        grad_bias = torch.zeros_like(bias) if wanted[2] and bias is not None else None
        dtype = hardware.product_dtype(hidden_nd.dtype, hidden_nd.device)
        w = weight.to(hidden_nd.dtype).to(dtype)
        b = None if bias is None else bias.to(hidden_nd.dtype).to(dtype)
        total = torch.zeros((), device=hidden_nd.device)
        for start in range(0, len(hidden_nd), rows):
            here = slice(start, start + rows)
            x, targets = hidden_nd[here], targets_n[here, None]
            if scale is not None:
                x = x * scale
            x = x.to(dtype)
            logits = F.linear(x, w, b).float()
            slope = None
            if softcap is not None:
                capped = torch.tanh(logits.div_(softcap))
                slope = 1 - capped.square() if any(wanted) else None
                logits = capped.mul_(softcap)
            log_z = logits.logsumexp(-1, keepdim=True)
            total += (log_z - logits.gather(1, targets)).sum()
            if not any(wanted):
                continue
            # The gradient of the logits: softmax less one at the target.
            grad = logits.sub_(log_z).exp_()
            grad.scatter_add_(1, targets, grad.new_full(targets.shape, -1))
            grad = (grad if slope is None else grad.mul_(slope)).to(dtype)
            if grad_hidden is not None:
                grad_hidden[here] = grad @ w
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            if grad_weight is not None and grad_weight.dtype == grad.dtype:
                grad_weight.addmm_(grad.T, x)
            elif grad_weight is not None:
                grad_weight += grad.T @ x
        if grad_hidden is not None and scale is not None:
            grad_hidden *= scale
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradient of projected_nll_sum was already taken")
        return *(None if g is None else g.mul_(grad_total.to(g.dtype)) for g in gradients), *[None] * 5
