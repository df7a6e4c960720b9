"""Activations that are computed again for the gradient instead of kept (Chen et al. 2016, arXiv:1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from danlu import hardware


def recomputed(block: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """``block(*arguments)``, of which only the arguments are held until the gradient is asked for.

    On a CPU, what the C library holds of freed memory goes back to the system between blocks, on both ways: the graph's
    many small parts split the large blocks that lie free, so that each layer would take fresh ones (QLoRA of a model of
    135M weights: 400 MB of 800, docs/log.md).
    """
    y: Tensor = checkpoint(block, *arguments, use_reentrant=False)
    if y.device.type != "cpu" or torch.compiler.is_compiling():
        return y
    return _GivesBack.apply(y)  # type: ignore[no-any-return,no-untyped-call]


class _GivesBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        hardware.return_freed_memory()
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        hardware.return_freed_memory()
        return grad
