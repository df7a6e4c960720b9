"""Objectives of classifiers and taggers. Sums and not means, as everywhere: whoever accumulates micro-batches divides
once, by the number of targets in the whole step."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from danlu.data.packing import IGNORE


def label_nll_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of ``-log p(target)`` in nats over all targets that are not IGNORE; a scalar, fp32.

    Args:
        logits: (..., labels).
        targets: (...) int64: of each row, or of each token.
    """
    flat = logits.float().flatten(0, -2)
    return F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORE, reduction="sum")


def yes_no_nll_sum(logits_bl: Tensor, targets_bl: Tensor) -> Tensor:
    """Each label by itself, there (1) or not (0): the sum of the nats of these decisions; a scalar, fp32. Both (batch,
    labels)."""
    return F.binary_cross_entropy_with_logits(logits_bl.float(), targets_bl, reduction="sum")


def squared_error_sum(predicted_b1: Tensor, targets_b: Tensor) -> Tensor:
    """Sum of ``(predicted - target)^2``; a scalar, fp32. ``predicted_b1`` (batch, 1)."""
    return F.mse_loss(predicted_b1.float().squeeze(-1), targets_b, reduction="sum")
