"""How likely a model finds its targets: what every objective over tokens or sequences begins with.

Logits are as wide as the vocabulary: they are made for targets only, and for some rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from danlu.data.packed_examples import PackedExamples
from danlu.data.packing import IGNORE
from danlu.models.causal_lm import CausalLM
from danlu.models.transformer import Transformer
from danlu.nn.linear import Head
from danlu.objectives.causal_lm import next_token_nll_sum, projected_nll_sum
from danlu.objectives.logprobs import entropy, token_logprobs

T = TypeVar("T")

HEAD_ROWS = 1024
"""Targets whose logits are made at once where they have to be made again going backward."""

CPU_LOGITS, GPU_LOGITS = 1 << 23, 1 << 27
"""Logits held at once where they are not: 32 MiB in fp32 stay near the cache (of 49,152 tokens and width 576, one core,
a trained head took 0.86 of the time of 1,024 rows at once, a frozen one as long); a GPU wants more work at once."""


def nll_sum(head: nn.Module, hidden_btd: Tensor, targets_bt: Tensor) -> Tensor:
    """Sum of ``-log p(target)`` in nats over the targets that are not IGNORE, a scalar, fp32; positions without a
    target never reach the head.

    Args:
        head: hidden states to logits: a :class:`~danlu.nn.linear.Head`, or what an adapter put in its place.
    """
    slots_n = (targets_bt != IGNORE).flatten().nonzero().squeeze(1)
    hidden_nd = hidden_btd.flatten(0, -2).index_select(0, slots_n)
    targets_n = targets_bt.flatten().index_select(0, slots_n)
    if type(head) is Head:
        logits = CPU_LOGITS if hidden_nd.device.type == "cpu" else GPU_LOGITS
        return projected_nll_sum(
            hidden_nd, head.weight, targets_n, rows=max(1, logits // head.out_features), bias_v=head.bias,
            scale=head.scale, softcap=head.softcap,
        )  # fmt: skip

    def of_rows(hidden: Tensor, targets: Tensor) -> Tensor:
        return next_token_nll_sum(head(hidden), targets)

    pieces = zip(torch.split(hidden_nd, HEAD_ROWS), torch.split(targets_n, HEAD_ROWS), strict=True)
    return torch.stack([_in_rows(of_rows, len(targets_n), *piece) for piece in pieces]).sum()


def hidden_at_targets(model: Transformer, packed: PackedExamples) -> Tensor:
    """The final hidden states that predict the targets, (n, dim)."""
    hidden_btd = model.hidden_states(packed.ids, packed.positions, packed.segments, prefixes_bt=packed.prefixes)
    return packed.at_targets(hidden_btd)


def target_logprobs(
    model: CausalLM, packed: PackedExamples, *, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities in nats, (examples, width) fp32, 0 behind the end of an example (``packed.mask_bt``).

    Args:
        temperature: that the tokens were drawn at: log-probs are those of ``softmax(logits / temperature)``.
        with_entropy: also the entropy of each of these distributions, of the same shape, without gradient.
    """
    hidden_nd = hidden_at_targets(model, packed)
    targets_n = packed.targets.flatten().index_select(0, packed.slots_n)
    assert not bool((targets_n == IGNORE).any())

    def of_rows(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = model.head(hidden)
        spread = entropy(logits.detach(), temperature) if with_entropy else logits.new_zeros(len(targets))
        return token_logprobs(logits, targets, temperature), spread

    pieces = zip(torch.split(hidden_nd, HEAD_ROWS), torch.split(targets_n, HEAD_ROWS), strict=True)
    found = [_in_rows(of_rows, len(targets_n), *piece) for piece in pieces]
    logps, entropies = (torch.cat(parts) for parts in zip(*found, strict=True))
    return packed.by_example(logps), packed.by_example(entropies) if with_entropy else None


def _in_rows(of_rows: Callable[..., T], n_targets: int, hidden: Tensor, targets: Tensor) -> T:
    """What is computed of one piece; if there are others, its logits are made again going backward."""
    if torch.is_grad_enabled() and n_targets > HEAD_ROWS:
        return checkpoint(of_rows, hidden, targets, use_reentrant=False)  # type: ignore[no-any-return]
    return of_rows(hidden, targets)
