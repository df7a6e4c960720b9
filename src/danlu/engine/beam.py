"""Beam search: the most likely answers, as far as a few of them that run side by side can see.

It is the search of transformers' `generate(num_beams=...)`, in its order and with its ways to end, for one request;
who runs the model asks for the next log probabilities of what is ``running`` and makes the moves that come back.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from danlu.engine.logit_rules import SequenceSampler
from danlu.engine.sampling import sanitize
from danlu.errors import DanluError

EarlyStopping = bool | Literal["never"]

BARRED = -1e9
"""Log probabilities under this mean "not allowed": some rules write -inf, some the smallest number."""

MAX_LENGTH_PENALTY = 20
"""The length of any answer to this power is still a number."""


@dataclass(frozen=True)
class Beams:
    """How beam search is done.

    Attributes:
        number: answers that run beside each other; 1: no search, greedy or sampled.
        length_penalty: finished answers are compared by the sum of their log probabilities, divided by their number of
            tokens (stop token included, prompt not) to this power. Above 0 favours long answers.
        early_stopping: when the search ends. False: when the best running answer would not be among the finished ones
            if it ended at once. True: with as many finished answers as there are beams. "never": when no running
            answer could win even at the length that suits it best.
    """

    number: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False

    def __post_init__(self) -> None:
        if self.number < 1:
            raise DanluError(f"beams: {self.number} are too few; 1 is greedy or sampled, 4 are usual")
        if not abs(self.length_penalty) <= MAX_LENGTH_PENALTY:
            raise DanluError(
                f"beams: a length_penalty of {self.length_penalty} is out of bounds; it lies between "
                f"-{MAX_LENGTH_PENALTY} and {MAX_LENGTH_PENALTY}, 1 is usual"
            )
        if self.early_stopping not in (False, True, "never"):
            raise DanluError(f"beams: early_stopping is {self.early_stopping!r}; it is true, false or never")


@dataclass(frozen=True)
class Hypothesis:
    """An answer, or the beginning of one: its tokens, and the sum of their log probabilities."""

    token_ids: list[int]
    logprob: float


class BeamSearch:
    """Beam search for one request.

    Args:
        limit: tokens that an answer may have; at least 1.
        stop_ids: tokens that end an answer; they are its last.

    Attributes:
        running: answers that go on, best first; the empty one alone at the start, at most as many as there are beams
            later.
        finished: the best answers that ended, best first, at most as many as there are beams.
    """

    def __init__(self, beams: Beams, limit: int, stop_ids: Collection[int]) -> None:
        self.beams, self.limit, self.stop_ids = beams, limit, frozenset(stop_ids)
        self.running = [Hypothesis([], 0.0)]
        self.finished: list[Hypothesis] = []

    def advance(self, logprobs_rv: Tensor) -> list[tuple[int, int]]:
        """Take one more token.

        Args:
            logprobs_rv: (running, vocab) fp32 log probabilities of the token after each of ``running``; what a rule
                forbids is -inf. They need not sum to 1: transformers does not normalise again after its rules.

        Returns:
            (parent, token) of each new ``running``: which of the former ones it continues, and with what.
        """
        scores_r = torch.tensor([hypothesis.logprob for hypothesis in self.running], device=logprobs_rv.device)
        totals_c = (logprobs_rv + scores_r[:, None]).flatten()
        # Enough that as many as there are beams go on: each beam can end in as many ways as there are stop tokens.
        best = totals_c.topk(min((1 + len(self.stop_ids)) * self.beams.number, len(totals_c)))
        running: list[Hypothesis] = []
        moves: list[tuple[int, int]] = []
        for rank, (total, candidate) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            parent, token_id = divmod(candidate, logprobs_rv.shape[1])
            hypothesis = Hypothesis([*self.running[parent].token_ids, token_id], total)
            if total <= BARRED:
                break
            if token_id in self.stop_ids or len(hypothesis.token_ids) == self.limit:
                if rank < self.beams.number:
                    self.finished.append(hypothesis)
            elif len(running) < self.beams.number:
                running.append(hypothesis)
                moves.append((parent, token_id))
        self.finished = sorted(self.finished, key=self.score, reverse=True)[: self.beams.number]
        self.running = running
        return moves

    def score(self, hypothesis: Hypothesis) -> float:
        """What finished answers are compared by."""
        return self._penalised(hypothesis.logprob, len(hypothesis.token_ids))

    @property
    def done(self) -> bool:
        """Whether the search has ended."""
        if not self.running:
            return True
        if len(self.finished) < self.beams.number:
            return False
        if self.beams.early_stopping is True:
            return True
        length = len(self.running[0].token_ids)
        if self.beams.early_stopping == "never" and self.beams.length_penalty > 0:
            length = self.limit
        return self._penalised(self.running[0].logprob, length) <= self.score(self.finished[-1])

    def _penalised(self, logprob: float, length: int) -> float:
        return logprob / math.pow(length, self.beams.length_penalty)


def beam_logprobs(logits_rv: Tensor, samplers: Sequence[SequenceSampler]) -> Tensor:
    """What :meth:`BeamSearch.advance` takes of a model's logits: its own log probabilities, (running, vocab), changed
    by each answer's rules and, as in transformers, not normalised after them.

    Args:
        samplers: of each of ``running``.

    Raises:
        DanluError: the rules leave no answer a token to go on with; if they leave some, the others just end.
    """
    logprobs_rv = sanitize(logits_rv).log_softmax(dim=-1)
    if not any(sampler.rules for sampler in samplers):
        return logprobs_rv
    logprobs_rv = logprobs_rv.cpu()
    stuck = []
    for row, sampler in zip(logprobs_rv.numpy(), samplers, strict=True):
        try:
            sampler.apply(row)
        except DanluError as error:
            row.fill(-torch.inf)
            stuck.append(error)
    if len(stuck) == len(samplers):
        raise stuck[0]
    return logprobs_rv
