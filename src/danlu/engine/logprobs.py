"""Log-probabilities of tokens, as the model itself has them.

They are natural logarithms of the raw distribution, before penalties, temperature, filters and grammar, as those of
OpenAI and vLLM are: what they say of a model does not depend on how it was sampled. (Who trains on samples wants them
at the temperature of sampling: ``logprobs_temperature``.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from danlu.engine.sampling import Row, log_total, sanitize, shortlist


@dataclass(frozen=True)
class TokenLogprobs:
    """A token's log-probability, and the most likely tokens in its place with theirs, most likely first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Sampled:
    """The token that was chosen, with its log-probabilities where they were asked for."""

    token_id: int
    logprobs: TokenLogprobs | None = None


def token_logprobs(row: Row, token_id: int, n: int, temperature: float = 1.0) -> TokenLogprobs:
    """Log-probabilities of one token and of the ``n`` most likely.

    Args:
        row: (vocab,) raw logits, sanitized.
        temperature: divides them.
    """
    if temperature != 1.0:
        row = row / np.float32(temperature)
    total = log_total(row)
    likeliest = shortlist(row).first(n) if n else None
    # In double precision, so that a token has the same number wherever it is told.
    top = () if likeliest is None else zip(likeliest.ids.tolist(), likeliest.logits.tolist(), strict=True)
    return TokenLogprobs(token_id, float(row[token_id]) - total, tuple((i, logit - total) for i, logit in top))


def logprobs_of(logits_rv: Tensor, token_ids: Sequence[int], n: int, temperature: float = 1.0) -> list[TokenLogprobs]:
    """Log-probabilities of the token that stands at each row, such as those of a prompt.

    Raises:
        DanluError: a row has no number in it.
    """
    rows = sanitize(logits_rv.detach()).cpu().numpy()
    return [token_logprobs(row, token_id, n, temperature) for row, token_id in zip(rows, token_ids, strict=True)]
