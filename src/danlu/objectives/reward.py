"""Learning a reward from comparisons of answers: Bradley-Terry, Plackett-Luce, and keeping the rewards near 0.

Each gives the loss of every pair or ranking, (batch,) fp32; whoever accumulates divides the sum by their number.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.objectives.logprobs import masked


def bradley_terry_losses(chosen_b: Tensor, rejected_b: Tensor, margin_b: Tensor | None = None) -> Tensor:
    """``-log sigmoid(chosen - rejected - margin)``: of the model in which an answer beats another with probability
    ``sigmoid`` of the difference of their rewards (Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155,
    eq. 1). ln 2 at equal rewards, finite at any.

    Args:
        chosen_b, rejected_b: rewards, (batch,).
        margin_b: by how much the chosen answer is better, (batch,); None: 0 (Touvron et al. 2023, arXiv:2307.09288,
            eq. 2).
    """
    leads = chosen_b.float() - rejected_b.float()
    return -F.logsigmoid(leads if margin_b is None else leads - margin_b)


def ranking_losses(scores_bk: Tensor, mask_bk: Tensor, ranks_bk: Tensor | None = None) -> Tensor:
    """``sum over answers i of log(sum over j of exp(score_j)) - score_i``, j running over i and the answers ranked
    below it: of the model in which the best is drawn by softmax, then the next best among those left (Plackett 1975,
    Luce 1959). Of two answers it is the loss of Bradley and Terry.

    Args:
        scores_bk: rewards, (batch, answers).
        mask_bk: (batch, answers) bool: there is an answer.
        ranks_bk: (batch, answers), the lowest for the best; None: the best answer stands first, then the next best.
            Answers of one rank are not compared with each other.
    """
    scores, real = masked(scores_bk, mask_bk), mask_bk.bool()
    ranks = torch.arange(scores.shape[1], device=scores.device)[None] if ranks_bk is None else ranks_bk
    below_bij = (ranks[:, None, :] > ranks[:, :, None]) & real[:, None, :]
    itself = torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    rivals = scores[:, None, :].masked_fill(~(below_bij | itself), float("-inf"))
    return masked(rivals.logsumexp(-1) - scores, real).sum(-1)


def centring_losses(chosen_b: Tensor, rejected_b: Tensor) -> Tensor:
    """``(chosen + rejected)^2``, to be added with a small weight, 0.01 for one: comparisons leave the zero of the
    rewards open, and this puts it in their middle (Eisenstein et al. 2023, arXiv:2312.09244)."""
    return (chosen_b.float() + rejected_b.float()).square()
