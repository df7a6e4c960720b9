"""Policy gradients: the clipped surrogate of PPO with the changes since, the critic's loss, and how the losses of
tokens become one number.

A whole method is a sentence of these. GRPO::

    advantages = group_advantages(rewards_gn).flatten()[:, None]                 # advantages.py
    losses_bt = policy_losses(logps_bt, old_bt, advantages, clip_low=0.2, clip_high=0.2, mask_bt=mask_bt)
    losses_bt += beta * kl_k3(logps_bt, reference_bt)                            # kl.py
    loss_sum, count = aggregate(losses_bt, mask_bt, "sequence")

DAPO: ``clip_high=0.28``, no KL, ``"token"``, and :func:`overlong_penalty` in the rewards. Dr. GRPO: advantages without
scale, ``"constant"``. GSPO (Zheng et al. 2025, arXiv:2507.18071): in place of ``logps_bt`` and ``old_bt`` their
`logprobs.sequence_means`, as (batch, 1), and ``mask_bt.any(-1, keepdim=True)``: one ratio and one loss an answer.
REINFORCE: ``old_bt = logps_bt.detach()``, where the ratio is 1 and its gradient that of the log-probs.
"""

from __future__ import annotations

from typing import Literal, assert_never

import torch
from torch import Tensor

from danlu.objectives.logprobs import masked, masked_mean, masked_sum, sequence_means

Aggregation = Literal["token", "sequence", "constant"]

LARGEST_LOG_RATIO = 20.0
"""Ratios are computed up to e^20 and taken as constant beyond: where ``exp`` overflows even a clipped ratio's gradient
would be NaN."""


def policy_losses(
    logps_bt: Tensor,
    old_bt: Tensor,
    advantages_bt: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    mask_bt: Tensor | None = None,
) -> Tensor:
    """``max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high))`` with ``ratio = exp(logps - old)``, (batch, seq)
    fp32 (Schulman et al. 2017, arXiv:1707.06347, eq. 7).

    Args:
        logps_bt: of the drawn tokens under the policy now, at the temperature that they were drawn at.
        old_bt: under the policy that drew them, without gradient.
        advantages_bt: (batch, seq), or (batch, 1) for one an answer.
        clip_low, clip_high: 0.2 in the paper; a higher one above keeps rare tokens alive (0.28; DAPO, Yu et al. 2025,
            arXiv:2503.14476, section 3.1).
        dual_clip: the loss of a negative advantage is at most this times its size, above 1, 3 in the paper; None: any
            (Ye et al. 2019, arXiv:1912.09729).
        mask_bt: where a slot may hold anything, NaN included; it comes out 0.
    """
    if mask_bt is not None:
        logps_bt, old_bt = masked(logps_bt, mask_bt), masked(old_bt, mask_bt)
        advantages_bt = masked(advantages_bt.expand(mask_bt.shape), mask_bt)
    ratios, advantages = _ratios(logps_bt, old_bt), advantages_bt.float()
    losses = torch.maximum(-advantages * ratios, -advantages * ratios.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is None:
        return losses
    return torch.where(advantages < 0, torch.minimum(losses, -advantages * dual_clip), losses)


def clipped_share(
    logps_bt: Tensor, old_bt: Tensor, advantages_bt: Tensor, mask_bt: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """Share of the unmasked tokens that :func:`policy_losses` clips, which learn nothing: a good one already likelier
    by more than ``clip_high``, a bad one less likely by more than ``clip_low``. A scalar without gradient."""
    ratios = _ratios(logps_bt.detach(), old_bt)
    clipped = ((ratios > 1 + clip_high) & (advantages_bt > 0)) | ((ratios < 1 - clip_low) & (advantages_bt < 0))
    return masked_mean(clipped, mask_bt)


def importance_weights(old_bt: Tensor, rollout_bt: Tensor, *, cap: float) -> Tensor:
    """``min(exp(old - rollout), cap)``, to multiply losses with when the engine that drew the tokens computes other
    log-probs than the trainer: truncated importance sampling (Ionides 2008; Espeholt et al. 2018, arXiv:1802.01561);
    (batch, seq) fp32, without gradient."""
    return _ratios(old_bt.detach(), rollout_bt.detach()).clamp(max=cap)


def value_losses(
    values_bt: Tensor, old_bt: Tensor, returns_bt: Tensor, clip: float | None, mask_bt: Tensor | None = None
) -> Tensor:
    """``max((V - R)^2, (V_clipped - R)^2) / 2``, (batch, seq) fp32, where V_clipped is V held within ``clip`` of what
    it was when the answers were drawn (PPO's first implementation; Huang et al. 2022, "The 37 Implementation Details of
    PPO", detail 9).

    Args:
        values_bt, old_bt: what the critic says now and said then.
        returns_bt: from :func:`~danlu.objectives.advantages.gae`.
        clip: in units of reward; None: the plain squared error.
        mask_bt: as in :func:`policy_losses`.
    """
    if mask_bt is not None:
        values_bt, old_bt, returns_bt = (masked(one, mask_bt) for one in (values_bt, old_bt, returns_bt))
    values, old, returns = values_bt.float(), old_bt.float(), returns_bt.float()
    errors = (values - returns).square()
    if clip is not None:
        errors = torch.maximum(errors, (old + (values - old).clamp(-clip, clip) - returns).square())
    return errors / 2


def aggregate(
    losses_bt: Tensor, mask_bt: Tensor, how: Aggregation, constant: float | None = None
) -> tuple[Tensor, int]:
    """What the losses of tokens add up to, a scalar, fp32, and the count that it is to be divided by, both summed over
    the micro-batches of a step first: the quotient is then that of the whole step, however it was cut.

    - token: every token weighs the same (DAPO, arXiv:2503.14476, section 3.3); the count is of tokens.
    - sequence: every answer does, its tokens are averaged first (GRPO, arXiv:2402.03300, eq. 3); of answers.
    - constant: tokens are summed and divided by ``constant``, mostly the longest answer allowed, so that length does
      not move a token's weight (Dr. GRPO, arXiv:2503.20783); of answers.

    An answer without an unmasked token is none.
    """
    n_sequences = int(mask_bt.any(-1).sum())
    match how:
        case "token":
            return masked_sum(losses_bt, mask_bt).sum(), int(mask_bt.sum())
        case "sequence":
            return sequence_means(losses_bt, mask_bt).sum(), n_sequences
        case "constant":
            assert constant is not None, "aggregation by a constant needs one"
            return masked_sum(losses_bt, mask_bt).sum() / constant, n_sequences
        case _:
            assert_never(how)


def overlong_penalty(lengths_b: Tensor, limit: int, margin: int) -> Tensor:
    """0 for answers that leave ``margin`` tokens below the limit free, falling to -1 at the limit; (batch,) fp32, to be
    added to the rewards (DAPO, arXiv:2503.14476, eq. 13). ``margin`` is above 0."""
    return ((limit - margin - lengths_b.float()) / margin).clamp(-1, 0)


def missing_eos_penalty(scores_b: Tensor, ended_b: Tensor, penalty: float) -> Tensor:
    """The scores, less a penalty where an answer did not end with an EOS; (batch,) fp32. ``ended_b`` (batch,) bool."""
    return scores_b.float() - penalty * (~ended_b.bool()).float()


def _ratios(logps: Tensor, old: Tensor) -> Tensor:
    return (logps.float() - old.float()).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
