"""Log-probabilities of tokens and what is summed of them: the numbers that every objective over sequences begins with.

Everything is computed in fp32, whatever comes in. A masked slot is as good as absent: what stands in it, NaN included,
reaches neither a value nor a gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.data.packing import IGNORE

ENTROPY_ROWS = 64
"""Distributions whose entropy is computed at once. What lies between is as wide as the vocabulary: so few stay near the
cache, which took a fifth of the time of 1024 at once (49152 tokens, 1 core), and next to no memory."""


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """``log softmax(logits / temperature)[target]`` in nats, (...) fp32; exactly 0 where the target is IGNORE.

    Args:
        logits: (..., vocab), each at the position that predicts its target.
        targets: (...) int64.
        temperature: what the tokens were drawn at, above 0.
    """
    kept = targets != IGNORE
    if bool(kept.all()):
        return _logprobs(logits, targets, temperature)
    logprobs = torch.zeros(targets.shape, device=logits.device)
    return logprobs.masked_scatter(kept, _logprobs(logits[kept], targets[kept], temperature))


def vocab_logprobs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``log softmax(logits / temperature)``, (..., vocab) fp32, in nats."""
    return F.log_softmax(logits.float() if temperature == 1.0 else logits.float() / temperature, -1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``-sum over tokens of p log p`` of ``p = softmax(logits / temperature)``, (...) fp32, in nats; of (..., vocab).

    A logit of -inf is a token that cannot come, and adds nothing.
    """
    rows = torch.split(logits.reshape(-1, logits.shape[-1]), ENTROPY_ROWS)
    return torch.cat([_entropy(some, temperature) for some in rows]).view(logits.shape[:-1])


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """The values in fp32, 0 where the mask is not set; no gradient goes there.

    For what is computed *from* log-probs, mask these and not only the result: the gradient of ``exp`` or of a square at
    NaN is NaN even when it is multiplied by 0.
    """
    return torch.where(mask.bool(), values.float(), 0.0)


def masked_sum(values_bt: Tensor, mask_bt: Tensor) -> Tensor:
    """Sum over each row's unmasked slots, (batch,) fp32: of log-probs, how likely the model finds the sequence."""
    return masked(values_bt, mask_bt).sum(-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over all unmasked slots, a scalar, fp32; 0 where there is none. To look at: a loss is summed, and divided by
    the count of the whole step."""
    return masked(values, mask).sum() / mask.sum().clamp(min=1)


def sequence_means(values_bt: Tensor, mask_bt: Tensor) -> Tensor:
    """Mean over each row's unmasked slots, (batch,) fp32, 0 for an empty row: of log-probs, those averaged over the
    length, which IPO, SimPO, ORPO and GSPO speak of."""
    return masked_sum(values_bt, mask_bt) / mask_bt.sum(-1).clamp(min=1)


def _entropy(logits_nv: Tensor, temperature: float) -> Tensor:
    logps = vocab_logprobs(logits_nv, temperature)
    return -(logps.exp() * logps.clamp(min=torch.finfo(torch.float32).min)).sum(-1)


def _logprobs(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    logps = vocab_logprobs(logits, temperature).reshape(-1, logits.shape[-1])
    return -F.nll_loss(logps, targets.flatten(), reduction="none").view(targets.shape)
