"""Learning from preferences without a reward model: DPO and its relatives, KTO, ORPO and SimPO.

All take the log-probabilities of whole answers, (batch,) in nats, and give the loss of each pair or answer, (batch,)
fp32; whoever accumulates divides the sum by the pairs of the whole step. Those of an answer's tokens are summed
(`logprobs.masked_sum`) unless a function wants them averaged over its length (`logprobs.sequence_means`). Losses are
finite for margins of any size.
"""

from __future__ import annotations

from typing import Literal, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

DPOKind = Literal["sigmoid", "ipo", "hinge", "robust"]


def dpo_losses(
    chosen_b: Tensor,
    rejected_b: Tensor,
    reference_chosen_b: Tensor,
    reference_rejected_b: Tensor,
    *,
    beta: float,
    kind: DPOKind = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct preference optimisation. With ``h = (log pi/ref)(chosen) - (log pi/ref)(rejected)``:

    - sigmoid: ``-log sigmoid(beta h)`` (Rafailov et al. 2023, arXiv:2305.18290, eq. 7); with label smoothing e,
      ``-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)``: a share e of the labels is taken to be wrong
      (conservative DPO).
    - robust: ``(-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2 e)``, whose expectation over labels
      flipped with probability e is the loss of clean ones (Chowdhury et al. 2024, arXiv:2403.00409).
    - ipo: ``(h - 1 / (2 beta))^2`` (Azar et al. 2023, arXiv:2310.12036, eq. 17). The paper has summed log-probs; many
      give averaged ones, so that long answers do not drive the margin: then all four arguments are.
    - hinge: ``max(0, 1 - beta h)`` (Zhao et al. 2023, arXiv:2305.10425; Liu et al. 2023, arXiv:2309.06657).

    Where policy and reference agree they are ln 2, ln 2, ``1 / (2 beta)^2`` and 1.

    Args:
        chosen_b, rejected_b: of the policy, (batch,).
        reference_chosen_b, reference_rejected_b: of the model it shall stay near, (batch,), without gradient.
        beta: how near, above 0.
        label_smoothing: from 0 to below 0.5; for sigmoid and robust alone.
    """
    margins = (chosen_b.float() - rejected_b.float()) - (reference_chosen_b.float() - reference_rejected_b.float())
    assert label_smoothing == 0.0 or kind in ("sigmoid", "robust"), f"{kind} has no label smoothing"
    match kind:
        case "sigmoid":
            return _smoothed(beta * margins, label_smoothing)
        case "robust":
            right, wrong = F.logsigmoid(beta * margins), F.logsigmoid(-beta * margins)
            return (label_smoothing * wrong - (1 - label_smoothing) * right) / (1 - 2 * label_smoothing)
        case "ipo":
            return (margins - 1 / (2 * beta)).square()
        case "hinge":
            return F.relu(1 - beta * margins)
        case _:
            assert_never(kind)


def implicit_rewards(policy_b: Tensor, reference_b: Tensor, *, beta: float) -> Tensor:
    """``beta (log pi - log ref)``: the reward that the policy is optimal for, up to a number that depends on the prompt
    alone (Rafailov et al. 2023, eq. 5); (batch,) fp32, without gradient. Pairs whose chosen answer has the higher one
    are ranked rightly."""
    return beta * (policy_b.detach().float() - reference_b.detach().float())


def kto_losses(
    policy_b: Tensor,
    reference_b: Tensor,
    desirable_b: Tensor,
    kl: Tensor | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimisation, for answers that are good or bad by themselves (Ethayarajh et al. 2024,
    arXiv:2402.01306, section 4). With ``r = log pi - log ref``: ``w (1 - sigmoid(beta (r - kl)))`` for a good one and
    ``w (1 - sigmoid(beta (kl - r)))`` for a bad one.

    Args:
        desirable_b: (batch,) bool: the answer is good.
        kl: the point of comparison, from :func:`kto_kl`.
        desirable_weight, undesirable_weight: the paper advises that weight times number be about equal for both, up to
            4/3 on one side.
    """
    desirable = desirable_b.bool()
    gains = torch.where(desirable, 1.0, -1.0) * (policy_b.float() - reference_b.float() - kl)
    weights = torch.where(desirable, desirable_weight, undesirable_weight)
    return weights * torch.sigmoid(-beta * gains)


def kto_kl(policy_b: Tensor, reference_b: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) for :func:`kto_losses`: ``max(0, mean of log pi - log ref)`` over prompts
    with answers *of other prompts* (the same section); a scalar without gradient. Over the whole step: averages of
    micro-batches, clamped one by one, are too high."""
    return (policy_b.detach().float() - reference_b.detach().float()).mean().clamp(min=0)


def orpo_losses(chosen_b: Tensor, rejected_b: Tensor, *, beta: float) -> Tensor:
    """Odds-ratio preference optimisation, supervised learning and preference in one, without a reference (Hong et al.
    2024, arXiv:2403.07691, eq. 6-7)::

        -log P(chosen) - beta log sigmoid(log odds(chosen) - log odds(rejected))    odds(y) = P(y) / (1 - P(y))

    Args:
        chosen_b, rejected_b: (batch,) averaged over the length: P is the geometric mean of the tokens' probabilities.
        beta: weight of the preference, the paper's lambda.
    """
    chosen, rejected = chosen_b.float(), rejected_b.float()
    return -chosen - beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def simpo_losses(
    chosen_b: Tensor, rejected_b: Tensor, *, beta: float, margin: float, label_smoothing: float = 0.0
) -> Tensor:
    """Simple preference optimisation: ``-log sigmoid(beta (chosen - rejected) - margin)``, without a reference (Meng et
    al. 2024, arXiv:2405.14734, eq. 6).

    Args:
        chosen_b, rejected_b: (batch,) averaged over the length.
        beta: 2 to 10 in the paper; log-probs averaged over the length are small.
        margin: gamma, the lead that the chosen answer shall have, in units of ``beta`` times nats; the paper's tables
            give it as a share of beta.
    """
    return _smoothed(beta * (chosen_b.float() - rejected_b.float()) - margin, label_smoothing)


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of "the chosen one is better", true with probability 1 - label_smoothing."""
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def _log_odds(logps: Tensor) -> Tensor:
    """``log(p / (1 - p))``, finite at p = 1."""
    below_0 = logps.clamp(max=-torch.finfo(torch.float32).eps)
    return below_0 - torch.log(-torch.expm1(below_0))
