"""What a student is taught by the outputs, hidden states and attention of its teacher.

The divergences take logits or log-probs, (..., vocab), of student and teacher, and give each position's in nats, (...)
fp32; whoever accumulates divides the sum by the positions of the whole step. Both sides are softened by a temperature T
and the result is multiplied by T^2, which keeps the size of the gradients (Hinton et al. 2015, arXiv:1503.02531,
section 2). A token that neither can say (-inf) adds nothing. Give the teacher's without gradient.
"""

from __future__ import annotations

import math
from typing import Literal, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.objectives.logprobs import masked, vocab_logprobs

LOG_0 = torch.finfo(torch.float32).min
"""Stands for the log-prob of what cannot come, because ``0 * -inf`` is not 0."""

LEAST_REST = 1e-6
"""Probability that the tokens outside the top k have at least: about what rounding leaves of 1 - sum."""


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2 KL(teacher || student)``: the student covers all that the teacher says (Hinton et al. 2015)."""
    return temperature**2 * _kl(_finite_logprobs(teacher, temperature), _finite_logprobs(student, temperature))


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2 KL(student || teacher)``: the student says nothing that the teacher would not (Gu et al. 2023,
    arXiv:2306.08543)."""
    return temperature**2 * _kl(_finite_logprobs(student, temperature), _finite_logprobs(teacher, temperature))


def jsd(student: Tensor, teacher: Tensor, temperature: float = 1.0, beta: float = 0.5) -> Tensor:
    """``T^2 (beta KL(teacher || m) + (1 - beta) KL(student || m))`` with ``m = beta teacher + (1 - beta) student``, the
    generalised Jensen-Shannon divergence (Agarwal et al. 2023, arXiv:2306.13649, section 2). At 0.5 symmetric; at T = 1
    never above the entropy of (beta, 1 - beta), ln 2 at 0.5.

    Args:
        beta: between 0 and 1, both excluded; divided by beta it tends to :func:`forward_kl` at 0, and divided by
            1 - beta to :func:`reverse_kl` at 1.
    """
    assert 0 < beta < 1, "at 0 and 1 it is 0 everywhere"
    p, q = _finite_logprobs(teacher, temperature), _finite_logprobs(student, temperature)
    mixture = torch.logaddexp(p + math.log(beta), q + math.log(1 - beta))
    return temperature**2 * (beta * _kl(p, mixture) + (1 - beta) * _kl(q, mixture))


def top_k_logprobs(logits: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens, which are worth keeping of a teacher: log-probs at this temperature (..., k) fp32, from
    the largest, and ids (..., k)."""
    found = _finite_logprobs(logits, temperature).topk(k)
    return found.values, found.indices


def top_k_buckets(
    student: Tensor, teacher_logps_k: Tensor, teacher_ids_k: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probs of the teacher's top k and, last, of all other tokens together, of student and teacher; (..., k + 1)
    fp32. The divergences compare these like any others, a lower bound of what they say of the whole vocabulary::

        temperature**2 * forward_kl(*top_k_buckets(student, logps, ids, temperature))

    Args:
        student: logits, (..., vocab) with more than k tokens.
        teacher_logps_k, teacher_ids_k: from :func:`top_k_logprobs` at the same temperature.
    """
    student_logps = _finite_logprobs(student, temperature)
    student_rest = student_logps.scatter(-1, teacher_ids_k, LOG_0).logsumexp(-1, keepdim=True)
    teacher = teacher_logps_k.float()
    teacher_rest = (1 - teacher.exp().sum(-1, keepdim=True)).clamp(min=LEAST_REST).log()
    return (
        torch.cat([student_logps.gather(-1, teacher_ids_k), student_rest], -1),
        torch.cat([teacher, teacher_rest], -1),
    )


def hidden_loss(student: Tensor, teacher: Tensor, kind: Literal["mse", "cosine"] = "mse") -> Tensor:
    """How far the hidden states of the student, projected to the teacher's width where it is narrower, are from the
    teacher's; (..., dim) -> (...) fp32.

    - mse: the mean over dim of the squared difference (TinyBERT, Jiao et al. 2019, arXiv:1909.10351, eq. 8).
    - cosine: 1 less the cosine of the angle between them (DistilBERT, Sanh et al. 2019, arXiv:1910.01108).
    """
    student, teacher = student.float(), teacher.float()
    match kind:
        case "mse":
            return (student - teacher).square().mean(-1)
        case "cosine":
            return 1 - F.cosine_similarity(student, teacher, dim=-1)
        case _:
            assert_never(kind)


def attention_loss(student_bhts: Tensor, teacher_bhts: Tensor, visible_bts: Tensor) -> Tensor:
    """Mean squared difference of the attention scores *before* the softmax, over heads and the keys that a query sees;
    (batch, queries) fp32, 0 for a query that sees none (TinyBERT, Jiao et al. 2019, arXiv:1909.10351, eq. 7: scores
    teach better than probabilities).

    Args:
        student_bhts, teacher_bhts: (batch, heads, queries, keys), as many heads on both sides.
        visible_bts: bool, (batch, queries, keys) or what broadcasts to it; elsewhere scores may be anything.
    """
    visible = visible_bts.bool()[:, None].expand(student_bhts.shape)
    errors = (masked(student_bhts, visible) - masked(teacher_bhts, visible)).square()
    return errors.sum((1, 3)) / visible.sum((1, 3)).clamp(min=1)


def _finite_logprobs(logits: Tensor, temperature: float) -> Tensor:
    """With the least number for log 0, so that ``0 log 0`` is 0, and its gradient too."""
    return vocab_logprobs(logits, temperature).clamp(min=LOG_0)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """``sum of exp(p) (p - q)`` of log-probs."""
    return (p.exp() * (p - q)).sum(-1)
