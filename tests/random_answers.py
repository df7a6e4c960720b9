"""What a model that knows nothing writes under a grammar."""

from __future__ import annotations

from collections.abc import Callable

import torch

from danlu.engine.config import SamplingParams
from danlu.engine.grammar import Grammar
from danlu.engine.logit_rules import SequenceSampler, sample_rows
from danlu.tokenizer.tokenizer import Tokenizer


def random_answer(
    tokenizer: Tokenizer, grammar: Grammar, seed: int, likes: Callable[[bytes], bool], max_tokens: int
) -> str | None:
    """With a liking for some tokens, which close what is open, and for the end; None: cut off."""
    sampler = SequenceSampler(SamplingParams(), [1], tokenizer.vocab_size, tokenizer.stop_ids, seed, grammar)
    generator = torch.Generator().manual_seed(seed)
    liked = [i for i in range(tokenizer.vocab_size) if likes(tokenizer.decode_bytes([i]))]
    ids: list[int] = []
    for _ in range(max_tokens):
        logits = torch.randn(1, tokenizer.vocab_size, generator=generator) * 2
        logits[:, [*tokenizer.stop_ids, *liked]] += 4
        (sampled,) = sample_rows(logits, [sampler])
        sampler.accept(sampled.token_id)
        if sampled.token_id in sampler.stop_ids:
            assert grammar.may_end
            break
        ids.append(sampled.token_id)
        if sampler.finished:
            break
    else:
        return None
    return tokenizer.decode_bytes(ids).decode()
