"""How the next token is chosen: pure functions on the logits of one row, in the order in which they are applied.

    penalties -> temperature -> top-k -> top-p -> min-p -> typical-p -> draw

This is the order of transformers' `generate`, and each step keeps what the transformers processor of that name keeps.
It is done on the CPU, a row at a time, so that a row's token does not depend on its neighbours in the batch; only rows
without filters are drawn together, each as it would be alone (:func:`draw_rows`). A vocabulary is never sorted: the
filters look at the likeliest few hundred tokens (:class:`Candidates`), weighed by the exact sum over all, and only
where those are not enough (:class:`Beyond`) at the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from danlu.engine.config import SamplingParams
from danlu.errors import DanluError

__all__ = [
    "GREEDY_BELOW", "Beyond", "Candidates", "Ids", "Row", "SamplingParams", "draw", "draw_rows", "everything",
    "log_total", "min_p", "penalise_counts", "penalise_repetition", "sample", "sanitize", "shortlist", "top_k", "top_p",
    "truncate", "typical_p",
]  # fmt: skip

Row = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing by them would overflow."""

LARGEST = 1e30
"""No logit is this large; penalties and the lowest temperature keep it finite in fp32."""

SHORTLIST = 256

BLOCK = 64
"""Tokens whose probabilities are summed before they are cumulated."""

NEAR = 1 << 20
"""Logits that are drawn from at once: 4 MiB in fp32 stay near the cache."""


def sanitize(logits: Tensor) -> Tensor:
    """Logits, (..., vocab), as fp32 with NaN as -inf (never drawn) and +inf as a very large number.

    Raises:
        DanluError: a row has no number at all: the model is damaged.
    """
    logits = logits.float().nan_to_num(nan=-torch.inf, posinf=LARGEST, neginf=-torch.inf)
    logits = torch.where(logits == -torch.inf, logits, logits.clamp(-LARGEST, LARGEST))
    if bool((logits == -torch.inf).all(dim=-1).any()):
        raise DanluError(
            "the model's output is not a number (NaN); its weights are damaged or its training diverged; take another"
        )
    return logits


def penalise_repetition(row: Row, ids: Ids, penalty: float) -> None:
    """Divide positive logits of ``ids`` by the penalty and multiply negative ones, in place (CTRL, Keskar et al. 2019,
    arXiv:1909.05858)."""
    logits = row[ids]
    row[ids] = np.where(logits > 0, logits / penalty, logits * penalty)


def penalise_counts(
    row: Row, ids: Ids, counts: Ids, *, frequency: float = 0.0, presence: float = 0.0, count: float = 0.0
) -> None:
    """Make tokens that were used less likely, in place.

    Args:
        ids: the tokens that the answer has used, each once.
        counts: how often, at least once.
        frequency: OpenAI: ``logit -= frequency * counts``.
        presence: OpenAI: ``logit -= presence``.
        count: ``P = P0 / (1 + count * counts)`` before the probabilities are scaled to sum to 1 again; in logits:
            ``logit -= log(1 + count * counts)``.
    """
    row[ids] -= (frequency * counts + presence + np.log1p(count * counts)).astype(np.float32)


class Beyond(Exception):
    """A filter cannot tell by the candidates alone; it needs all tokens."""


@dataclass(frozen=True)
class Candidates:
    """Tokens of a row, the likeliest first.

    Attributes:
        ids: (candidates,) token ids.
        logits: (candidates,) descending, none -inf.
        row: (vocab,) all logits, as long as other tokens may be drawn too; None: the candidates are all there is.
    """

    ids: Ids
    logits: Row
    row: Row | None = None

    def probabilities(self) -> npt.NDArray[np.float64]:
        """(candidates,) among all tokens that may be drawn."""
        total = log_total(self.logits if self.row is None else self.row)
        probabilities: npt.NDArray[np.float64] = np.exp(self.logits - total, dtype=np.float64)
        return probabilities

    def first(self, n: int) -> Candidates:
        """The first ``n``, and nothing else."""
        return Candidates(self.ids[:n], self.logits[:n])


def everything(row: Row) -> Candidates:
    """All tokens that are not -inf, sorted."""
    ids = np.flatnonzero(row > -np.inf)
    order = np.argsort(-row[ids])
    return Candidates(ids[order], row[ids[order]])


def shortlist(row: Row, count: int = SHORTLIST) -> Candidates:
    """At least the ``count`` likeliest tokens, with all that are as likely as the last of them."""
    columns = 3 * count
    height = len(row) // columns
    if height < 2:
        return everything(row)
    # The row in columns: that many maxima lie at or above the count-th largest of them, so the tokens sought do too.
    maxima = row[: height * columns].reshape(height, columns).max(axis=0)
    least = np.partition(maxima, columns - count)[columns - count]
    if least == -np.inf:
        return everything(row)
    ids = np.flatnonzero(row >= least)
    order = np.argsort(-row[ids])
    return Candidates(ids[order], row[ids[order]], row)


def _widening(row: Row) -> Iterator[Candidates]:
    """Ever more tokens, to the last."""
    yield shortlist(row)
    yield shortlist(row, 16 * SHORTLIST)
    yield everything(row)


def log_total(logits: Row) -> float:
    """Log of the sum of exp; the greatest logit is finite."""
    # Summed in fp64: softmax and logsumexp of torch are off by up to 4e-6 for 20,000 tokens, this by 1e-8.
    greatest = logits.max()
    return float(greatest) + float(np.log(np.exp(logits - greatest).sum(dtype=np.float64)))


def top_k(candidates: Candidates, k: int) -> Candidates:
    """Keep the ``k`` largest logits and those equal to the k-th (Fan et al. 2018, arXiv:1805.04833)."""
    if k >= len(candidates.ids):
        return _all_of(candidates)
    return candidates.first(int(np.sum(candidates.logits >= candidates.logits[k - 1])))


def top_p(candidates: Candidates, p: float) -> Candidates:
    """Nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751): keep the fewest most likely tokens whose probabilities
    sum to at least ``p``, and at least one."""
    mass = candidates.probabilities().cumsum()
    if mass[-1] < p:
        return _all_of(candidates)
    return candidates.first(int(np.searchsorted(mass, p)) + 1)


def min_p(candidates: Candidates, p: float) -> Candidates:
    """Drop tokens less likely than ``p`` times the likeliest (Nguyen et al. 2024, arXiv:2407.01082)."""
    kept = int(np.sum(candidates.logits - candidates.logits[0] >= np.float32(np.log(p))))
    return _all_of(candidates) if kept == len(candidates.ids) else candidates.first(kept)


def typical_p(candidates: Candidates, p: float) -> Candidates:
    """Locally typical sampling (Meister et al. 2022, arXiv:2202.00666): keep the tokens whose surprise, -log P, is
    nearest to its mean, the entropy, the fewest whose probabilities sum to at least ``p``. The likeliest token may be
    dropped."""
    logits = candidates.logits if candidates.row is None else candidates.row
    logprobs = logits - np.float32(log_total(logits))
    probs = np.exp(logprobs, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        entropy = -np.nansum(probs * logprobs)  # 0 log 0 is 0
    closeness = (-np.abs(logprobs + entropy)).astype(np.float32)
    nearest = next(c for c in _widening(closeness) if c.row is None or probs[c.ids].sum() >= p)
    last = int(np.searchsorted(probs[nearest.ids].cumsum(), p))
    places = nearest.ids[nearest.logits >= nearest.logits[min(last, len(nearest.ids) - 1)]]
    places = places[np.argsort(-logits[places])]
    return Candidates(places if candidates.row is not None else candidates.ids[places], logits[places])


def _all_of(candidates: Candidates) -> Candidates:
    if candidates.row is not None:
        raise Beyond
    return candidates


def truncate(row: Row, params: SamplingParams) -> Candidates:
    """What the filters of ``params`` keep of a row of tempered logits.

    Args:
        row: (vocab,) NaN nowhere, the greatest finite.
    """
    for candidates in _widening(row):
        try:
            return _filtered(candidates, params)
        except Beyond:
            pass
    raise AssertionError("all tokens are never too few")


def _filtered(candidates: Candidates, params: SamplingParams) -> Candidates:
    if params.top_k > 0:
        candidates = top_k(candidates, params.top_k)
    if params.top_p < 1:
        candidates = top_p(candidates, params.top_p)
    if params.min_p > 0:
        candidates = min_p(candidates, params.min_p)
    if params.typical_p < 1:
        candidates = typical_p(candidates, params.typical_p)
    return candidates


def draw(candidates: Candidates, generator: torch.Generator) -> int:
    """Draw one token id of those that the filters have kept. It takes one uniform number: the place in the cumulative
    distribution, the likeliest token first."""
    assert candidates.row is None
    mass = np.exp(candidates.logits - candidates.logits[0], dtype=np.float64).cumsum()
    place = float(torch.rand((), dtype=torch.float64, generator=generator))
    return int(candidates.ids[_at(mass, place * mass[-1])])


def _at(cumulative: npt.NDArray[np.float64], place: float) -> int:
    """The first that reaches beyond the place; where rounding left the place behind all: the last that is possible."""
    return int(min(np.searchsorted(cumulative, place, side="right"), np.searchsorted(cumulative, cumulative[-1])))


def draw_rows(
    rows_rv: Row, temperatures: Sequence[float], generators: Sequence[torch.Generator]
) -> list[tuple[int, float]]:
    """Draw one token id a row among all of them, and its log-probability: one uniform number each, the place in the
    cumulative distribution in the order of the ids.

    Args:
        rows_rv: (rows, vocab) logits, NaN nowhere, the greatest of each finite.
    """
    found: list[tuple[int, float]] = []
    n_each = max(1, NEAR // rows_rv.shape[1])
    for start in range(0, len(rows_rv), n_each):
        some = slice(start, start + n_each)
        logits = rows_rv[some] / np.array(temperatures[some], dtype=np.float32)[:, None]
        logits -= logits.max(axis=1, keepdims=True)
        shares = np.exp(logits)
        # Cumulated in fp64, which is slow: first over blocks, then within the one that was hit.
        blocks = np.add.reduceat(shares, np.arange(0, shares.shape[1], BLOCK), axis=1, dtype=np.float64).cumsum(axis=1)
        for row, ends, generator in zip(range(len(logits)), blocks, generators[some], strict=True):
            place = float(torch.rand((), dtype=torch.float64, generator=generator)) * ends[-1]
            block = _at(ends, place)
            first = block * BLOCK
            within = shares[row, first : first + BLOCK].cumsum(dtype=np.float64)
            token_id = first + _at(within, place - (ends[block - 1] if block else 0.0))
            found.append((token_id, float(logits[row, token_id] - np.log(ends[-1]))))
    return found


def sample(logits_bv: Tensor, temperature: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw one token id a row, (batch,); the most likely one where the temperature is 0. One uniform number a row."""
    if temperature < GREEDY_BELOW:
        return logits_bv.argmax(dim=-1)
    drawn = draw_rows(logits_bv.float().cpu().numpy(), [temperature] * len(logits_bv), generators)
    return torch.tensor([token_id for token_id, _ in drawn], device=logits_bv.device)
