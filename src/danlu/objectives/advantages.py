"""How much better than expected: what a policy gradient multiplies log-probabilities with.

Numbers and no functions of the weights: nothing here carries a gradient. Masked slots are passed over and come out 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from danlu.objectives.logprobs import masked, masked_mean

Scale = Literal["group", "batch", "none"]


def gae(rewards_bt: Tensor, values_bt: Tensor, mask_bt: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438, eq. 16), backward in time::

        delta_t = r_t + gamma V_t+1 - V_t        A_t = delta_t + gamma lam A_t+1        returns_t = A_t + V_t

    behind the last token V = 0: an answer ends there. lam = 0 gives the TD error; gamma = lam = 1 the rewards still to
    come less the value, and with values of 0 what REINFORCE takes.

    Args:
        rewards_bt: (batch, seq), from :func:`~danlu.objectives.kl.score_at_end`.
        values_bt: (batch, seq), what the critic expects before each token is drawn.
        mask_bt: (batch, seq) bool: the tokens that the policy drew. One that it did not, between two that it did (the
            answer of a tool), is passed over: the later one follows the earlier.

    Returns:
        advantages and returns, (batch, seq) fp32; the returns, which the critic learns, from advantages not yet
        whitened.
    """
    mask = mask_bt.bool()
    rewards, values = masked(rewards_bt.detach(), mask), masked(values_bt.detach(), mask)
    advantages = torch.zeros_like(values)
    next_advantage_b = next_value_b = torch.zeros(len(values), device=values.device)
    for t in reversed(range(values.shape[1])):
        delta_b = rewards[:, t] + gamma * next_value_b - values[:, t]
        advantage_b = delta_b + gamma * lam * next_advantage_b
        advantages[:, t] = masked(advantage_b, mask[:, t])
        next_advantage_b = torch.where(mask[:, t], advantage_b, next_advantage_b)
        next_value_b = torch.where(mask[:, t], values[:, t], next_value_b)
    return advantages, advantages + values


def whiten(values_bt: Tensor, mask_bt: Tensor, shift_mean: bool = True) -> Tensor:
    """``(x - mean) / std`` over all unmasked slots, whose mean is then 0 and whose variance (n - 1 in the denominator)
    is 1; the same shape, fp32, 0 where masked. Of equal values, 0.

    Over the returns of a whole batch (:func:`gae` with values of 0) it is the advantage of REINFORCE++ (Hu 2025,
    arXiv:2501.03262). Over the *whole* batch: micro-batches whitened one by one are another estimate.

    Args:
        shift_mean: False keeps the mean where it was, as is usual for rewards.
    """
    values, mask = values_bt.detach(), mask_bt.bool()
    centred = _centred(values.reshape(1, -1), mask.reshape(1, -1)).view(values.shape)
    variance = centred.square().sum() / (mask.sum() - 1).clamp(min=1)
    whitened = centred * torch.rsqrt(variance + 1e-8)
    return whitened if shift_mean else masked(whitened + masked_mean(values, mask), mask)


def group_advantages(
    rewards_gn: Tensor,
    mask_gn: Tensor | None = None,
    *,
    scale: Scale = "group",
    leave_one_out: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """Each answer's reward less that of its group, the answers to one prompt; (groups, answers) fp32.

    - ``scale="group"``: ``(r - mean) / (std + eps)`` of the group (GRPO, Shao et al. 2024, arXiv:2402.03300): rewards
      0 and 1 give -0.707 and 0.707.
    - ``scale="none"``: ``r - mean``: easy and hard prompts weigh by how much their answers differ (Dr. GRPO, Liu et al.
      2025, arXiv:2503.20783); with ``leave_one_out``, ``r`` less the mean of the *other* answers, which is unbiased
      (RLOO, Ahmadian et al. 2024, arXiv:2402.14740).
    - ``scale="batch"``: ``(r - mean of the group) / (std of all rewards + eps)`` (Liu et al. 2025, arXiv:2508.08221).

    Equal rewards give exactly 0, and so does an answer alone in its group: there is nothing to learn.

    Args:
        mask_gn: (groups, answers) bool: there is a reward; None: everywhere. An answer that could not be judged counts
            in no mean and gets 0.
        eps: added to the standard deviation (n - 1 in the denominator); 1e-4 in TRL, 1e-6 in verl.
    """
    given = torch.ones_like(rewards_gn, dtype=torch.bool) if mask_gn is None else mask_gn.bool()
    rewards, n_g1 = rewards_gn.detach(), given.sum(-1, keepdim=True)
    centred = _centred(rewards, given)
    advantages = centred * (n_g1 / (n_g1 - 1).clamp(min=1)) if leave_one_out else centred
    if scale == "none":
        return advantages
    if scale == "group":
        return advantages / ((centred.square().sum(-1, keepdim=True) / (n_g1 - 1).clamp(min=1)).sqrt() + eps)
    deviations = _centred(rewards.reshape(1, -1), given.reshape(1, -1))
    return advantages / ((deviations.square().sum() / (given.sum() - 1).clamp(min=1)).sqrt() + eps)


def _centred(values_rn: Tensor, mask_rn: Tensor) -> Tensor:
    """The values less the mean of their row, both of the unmasked ones; (rows, n) fp32, 0 where masked.

    Differences to one value of the row are taken first: these are exactly 0 where all are equal, while those to a
    rounded mean are not, and would be scaled up to the size of real ones.
    """
    values = masked(values_rn, mask_rn)
    differences = masked(values - values.gather(1, mask_rn.long().argmax(-1, keepdim=True)), mask_rn)
    means_r1 = differences.sum(-1, keepdim=True) / mask_rn.sum(-1, keepdim=True).clamp(min=1)
    return masked(differences - means_r1, mask_rn)
