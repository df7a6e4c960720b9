"""How likely a model finds the targets of packed examples: what every objective over sequences begins with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from danlu.data.packed_examples import PackedExamples
from danlu.data.packing import IGNORE
from danlu.models.causal_lm import CausalLM
from danlu.objectives.logprobs import entropy, token_logprobs

HEAD_ROWS = 1024
"""Targets whose logits are made at once: they are as wide as the vocabulary, and are made again going backward."""


def target_logprobs(
    model: CausalLM, packed: PackedExamples, *, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities in nats, (examples, width) fp32, 0 behind the end of an example (``packed.mask_bt``).

    Args:
        temperature: that the tokens were drawn at: log-probs are those of ``softmax(logits / temperature)``.
        with_entropy: also the entropy of each of these distributions, of the same shape, without gradient.
    """
    hidden_nd = packed.at_targets(model.hidden_states(packed.ids, packed.positions, packed.segments))
    targets_n = packed.targets.flatten().index_select(0, packed.slots_n)
    assert not bool((targets_n == IGNORE).any())

    def of_rows(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = model.head(hidden)
        spread = entropy(logits.detach(), temperature) if with_entropy else logits.new_zeros(len(targets))
        return token_logprobs(logits, targets, temperature), spread

    found: list[tuple[Tensor, Tensor]] = []
    pieces = zip(torch.split(hidden_nd, HEAD_ROWS), torch.split(targets_n, HEAD_ROWS), strict=True)
    for hidden, targets in pieces:
        if torch.is_grad_enabled() and len(targets_n) > HEAD_ROWS:
            found.append(checkpoint(of_rows, hidden, targets, use_reentrant=False))
        else:
            found.append(of_rows(hidden, targets))
    logps, entropies = (torch.cat(parts) for parts in zip(*found, strict=True))
    return packed.by_example(logps), packed.by_example(entropies) if with_entropy else None
