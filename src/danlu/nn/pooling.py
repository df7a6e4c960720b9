"""From a hidden state for each token to one for the sequence."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Pool = Literal["first", "last", "mean", "max"]


def pool(x_btd: Tensor, real_bt: Tensor | None, how: Pool) -> Tensor:
    """(batch, dim): the state of the first or last token, or the mean or maximum of all, padding left out.

    Args:
        real_bt: False for padding, on either side; every row has a real token. None: there is no padding.
    """
    if real_bt is None:
        real_bt = torch.ones(x_btd.shape[:2], dtype=torch.bool, device=x_btd.device)
    if how == "mean":
        weights = real_bt[..., None].float()
        return ((x_btd.float() * weights).sum(dim=1) / weights.sum(dim=1)).to(x_btd.dtype)
    if how == "max":
        return x_btd.masked_fill(~real_bt[..., None], float("-inf")).amax(dim=1)
    order = real_bt.int() if how == "first" else real_bt.int().flip(1)
    position = order.argmax(dim=1)  # the first of several maxima
    if how == "last":
        position = x_btd.shape[1] - 1 - position
    return x_btd[torch.arange(len(x_btd), device=x_btd.device), position]
