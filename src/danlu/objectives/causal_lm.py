"""The objective of pre-training and of supervised fine-tuning: next-token negative log-likelihood."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from danlu.data.packing import IGNORE


def next_token_nll_sum(logits_btv: Tensor, targets_bt: Tensor) -> Tensor:
    """Sum of ``-log p(target)`` in nats over all targets that are not IGNORE; a scalar, fp32.

    The sum and not the mean: whoever accumulates micro-batches divides once, by the number of targets in the whole
    step, so that one step over 8 rows and 8 steps over one row give the same gradient whatever the lengths.
    """
    return F.cross_entropy(
        logits_btv.float().flatten(0, -2), targets_bt.flatten(), ignore_index=IGNORE, reduction="sum"
    )
