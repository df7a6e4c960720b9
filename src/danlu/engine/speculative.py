"""Speculative decoding without loss (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318).

Tokens that were guessed are run in one forward pass, and those that the model itself might have chosen are kept: what
comes out has the distribution of choosing one token at a time, and is the same tokens where the choice is greedy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from danlu.engine.logit_rules import SequenceSampler, rows_logprobs, sample_rows
from danlu.engine.logprobs import Sampled, logprobs_of


def verify(
    logits_kv: Tensor, draft_ids: Sequence[int], draft_probs_kv: Tensor | None, sampler: SequenceSampler
) -> list[Sampled]:
    """The tokens that come next: guesses that are right, and one more that is the model's own.

    Each position is judged by the rules of its own place (penalties, grammar, top-p, ...): ``sampler`` accepts every
    token that is returned before the next one is looked at. Nothing follows a stop token or the end of a grammar.

    A guess that is no draw is right if the model's own draw at this place is the same token; so an answer is, token for
    token, what the seed would have given without guesses. A guess drawn from q is right with probability
    min(1, p / q); where it is not, the token is drawn from max(0, p - q).

    Args:
        logits_kv: (guesses + 1, vocab) the first before the first guess, the last after the last.
        draft_probs_kv: (guesses, vocab) what each was drawn from, given those before it; None: they were no draws.
    """
    if sampler.greedy:
        draft_probs_kv = None  # nothing is drawn: a guess is right if it is the choice
    ahead: list[Sampled] = []
    if sampler.greedy and not sampler.rules:  # no choice depends on the one before it
        ahead = sample_rows(logits_kv, [sampler] * len(logits_kv))
    else:
        logits_kv = logits_kv.cpu()
    chosen: list[Sampled] = []
    for place in range(len(draft_ids) + 1):
        logits_1v = logits_kv[place : place + 1]
        if ahead:
            sampled = ahead[place]
        elif draft_probs_kv is not None and place < len(draft_ids):
            sampled = _judge(logits_1v, draft_ids[place], draft_probs_kv[place], sampler)
        else:
            (sampled,) = sample_rows(logits_1v, [sampler])
        chosen.append(sampled)
        sampler.accept(sampled.token_id)
        if place < len(draft_ids) and sampled.token_id != draft_ids[place]:
            break
        if sampler.finished or sampled.token_id in sampler.stop_ids:
            break
    return chosen


def _judge(logits_1v: Tensor, guess: int, draft_probs_v: Tensor, sampler: SequenceSampler) -> Sampled:
    """A guess that was drawn, or what takes its place."""
    probs_v = rows_logprobs(logits_1v, [sampler])[0].exp()
    rest_v = (probs_v - draft_probs_v).clamp_(min=0)
    token_id = guess
    draw = float(torch.rand((), generator=sampler.generator))
    # Two distributions that are equal but for rounding leave no rest.
    if draw * float(draft_probs_v[guess]) >= float(probs_v[guess]) and bool(rest_v.any()):
        token_id = int(torch.multinomial(rest_v, 1, generator=sampler.generator))
    n, told_at = sampler.params.logprobs, sampler.params.logprobs_temperature
    return Sampled(token_id, None if n is None else logprobs_of(logits_1v, [token_id], n, told_at)[0])
