"""How far a policy is from its reference, estimated from drawn tokens, and how that is held against it.

For x drawn from the policy, with ``d = log pi(x) - log ref(x)`` (Schulman 2020, "Approximating KL Divergence"):

    estimator   formula               value                   as a loss, its expected gradient is that of
    k1          d                     unbiased, varies most   nothing: 0
    k2          d^2 / 2               biased, a little        KL(pi || ref)
    k3          exp(-d) - 1 + d       unbiased, never < 0     KL(ref || pi)

So k1 (or k3) belongs in the reward, and k2 or k3 in the loss; in one of the two, never both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from danlu.objectives.logprobs import masked


def kl_k1(logps: Tensor, reference: Tensor) -> Tensor:
    """``d``; fp32, in nats, of the shape of the log-probs. Mask these first, not the result (`logprobs.masked`)."""
    return logps.float() - reference.float()


def kl_k2(logps: Tensor, reference: Tensor) -> Tensor:
    """``d^2 / 2``; as :func:`kl_k1`."""
    return kl_k1(logps, reference).square() / 2


def kl_k3(logps: Tensor, reference: Tensor) -> Tensor:
    """``exp(-d) - 1 + d``, which GRPO has in its loss (Shao et al. 2024, arXiv:2402.03300, eq. 4); as :func:`kl_k1`."""
    d = kl_k1(logps, reference)
    return torch.expm1(-d) + d


def score_at_end(scores_b: Tensor, kl_bt: Tensor, mask_bt: Tensor, beta: float) -> Tensor:
    """Rewards of single tokens, (batch, seq) fp32: ``-beta kl`` at each, and the answer's score at its last unmasked
    one, the EOS and not the padding behind it (Ziegler et al. 2019, arXiv:1909.08593, eq. 2). 0 elsewhere.

    Args:
        scores_b: (batch,).
        kl_bt: (batch, seq), mostly :func:`kl_k1`; it is a number here, without gradient.
        beta: cost of a nat; 0 where KL is in the loss.
    """
    mask = mask_bt.bool()
    is_last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    return masked(-beta * kl_bt.detach(), mask) + masked(scores_b[:, None].expand(mask.shape), is_last)


@dataclass
class AdaptiveKL:
    """The cost of KL in the reward, moved so that KL comes near a target (Ziegler et al. 2019, section 2.2)::

        coefficient *= 1 + clip(kl / target - 1, -0.2, 0.2) * n_samples / horizon

    Attributes:
        coefficient: beta, which moves; all that a checkpoint has to keep.
        target: nats a sequence.
        horizon: samples; the larger, the slower. ``n_samples / horizon`` is the paper's K of 0.1.
    """

    coefficient: float
    target: float
    horizon: int = 10_000

    def update(self, kl: float, n_samples: int) -> None:
        """After a step: its mean KL in nats a sequence. One that is not finite tells nothing and changes nothing."""
        if math.isfinite(kl):
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coefficient *= 1 + error * n_samples / self.horizon
