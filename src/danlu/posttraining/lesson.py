"""The loss of a language model's student: how far its probabilities, and its layers, are from the teacher's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from danlu.data.packing import IGNORE, Batch
from danlu.models.causal_lm import CausalLM
from danlu.objectives.causal_lm import next_token_nll_sum
from danlu.objectives.distillation import forward_kl, jsd, reverse_kl, top_k_buckets
from danlu.objectives.logprobs import masked_sum
from danlu.posttraining.distil_config import DistilConfig
from danlu.posttraining.layer_matching import LayerMatching, visible_pairs
from danlu.posttraining.taught_rows import TaughtBatch
from danlu.posttraining.teacher_cache import TeacherCache

LOGITS = 1 << 25
"""Logits of one side that are held at once, 128 MB in fp32; more are made again going backward."""

Divergence = Callable[[Tensor, Tensor, float], Tensor]
"""Logits or log-probs of student and teacher, and a temperature -> nats of each position."""

Targets = Callable[..., Tensor]
"""What was computed for some targets, (n, ...) each -> the sum of their losses."""


@dataclass
class Lesson:
    """Called with a batch it gives the sum of the losses of its targets::

        hard_share * NLL + (1 - hard_share) * divergence + weights * layers

    Attributes:
        hard_share: of the ordinary loss; none of it where the student wrote the batch itself.
        cache: what the teacher says, where it was asked before.
        matching: the loss between layers, if there is one.
    """

    student: CausalLM
    teacher: CausalLM
    divergence: Divergence
    temperature: float
    hard_share: float
    cache: TeacherCache | None = None
    matching: LayerMatching | None = None

    @classmethod
    def of(
        cls,
        config: DistilConfig,
        student: CausalLM,
        teacher: CausalLM,
        cache: TeacherCache | None,
        matching: LayerMatching | None,
    ) -> Lesson:
        """As a config has it."""
        return cls(
            student, teacher, divergence_of(config), config.temperature, config.hard_share or 0.0, cache, matching
        )

    def __call__(self, taught: TaughtBatch) -> Tensor:
        batch, student = taught.batch, self.student
        slots_n = (batch.targets != IGNORE).flatten().nonzero().squeeze(1)
        targets_n = batch.targets.flatten()[slots_n]
        watched = nullcontext() if self.matching is None else self.matching.watching(student, self.teacher)
        hard_share = 0.0 if taught.own else self.hard_share
        with watched as seen:
            hidden_nd = _hidden(student, batch).flatten(0, 1)[slots_n]
            needed = hard_share < 1 or self.matching is not None  # else the teacher need not be asked
            theirs = self._theirs(taught, slots_n) if needed else ()
        loss_sum = partial(self._loss_sum, hard_share)
        total = _in_parts(loss_sum, student.config.vocab_size, hidden_nd, targets_n, *theirs)
        if self.matching is not None and seen is not None:
            visible = visible_pairs(batch.segments, causal=True)
            total = total + masked_sum(self.matching(*seen, visible), batch.targets != IGNORE).sum()
        return total

    @torch.no_grad()
    def _theirs(self, taught: TaughtBatch, slots_n: Tensor) -> tuple[Tensor, ...]:
        """What the teacher says at the targets: final hidden states, or log-probs and ids of its top k."""
        if self.cache is not None:
            return tuple(part.flatten(0, 1).to(slots_n.device)[slots_n] for part in self.cache.of(taught.numbers_b))
        return (_hidden(self.teacher, taught.batch).flatten(0, 1)[slots_n],)

    def _loss_sum(self, hard_share: float, hidden_nd: Tensor, targets_n: Tensor, *theirs: Tensor) -> Tensor:
        logits_nv = self.student.head(hidden_nd)
        if hard_share == 1:
            return next_token_nll_sum(logits_nv, targets_n)
        if self.cache is None:
            with torch.no_grad():
                teacher_nv = self.teacher.head(*theirs)
            soft = self.divergence(logits_nv, teacher_nv, self.temperature)
        else:
            logps_nk, ids_nk = theirs
            mine, others = top_k_buckets(logits_nv, logps_nk, ids_nk, self.temperature)
            soft = self.temperature**2 * self.divergence(mine, others, 1.0)
        total = (1 - hard_share) * soft.sum()
        return total + hard_share * next_token_nll_sum(logits_nv, targets_n) if hard_share else total


def divergence_of(config: DistilConfig) -> Divergence:
    """The divergence that a config names."""
    if config.divergence == "jsd":
        return partial(jsd, beta=config.jsd_beta)
    return forward_kl if config.divergence == "forward_kl" else reverse_kl


def nll_sum(model: CausalLM, batch: Batch) -> Tensor:
    """The ordinary loss: the sum over all targets of what a model has not expected, in nats."""
    slots_n = (batch.targets != IGNORE).flatten().nonzero().squeeze(1)
    hidden_nd = _hidden(model, batch).flatten(0, 1)[slots_n]

    def of_targets(hidden: Tensor, targets: Tensor) -> Tensor:
        return next_token_nll_sum(model.head(hidden), targets)

    return _in_parts(of_targets, model.config.vocab_size, hidden_nd, batch.targets.flatten()[slots_n])


def _hidden(model: CausalLM, batch: Batch) -> Tensor:
    return model.hidden_states(batch.ids, batch.positions, batch.segments)


def _in_parts(loss_sum: Targets, vocab_size: int, *of_targets: Tensor) -> Tensor:
    """The sum over all targets, so many at a time that their logits can be held."""
    rows = max(1, LOGITS // vocab_size)
    if len(of_targets[0]) <= rows:
        return loss_sum(*of_targets)
    parts = zip(*(torch.split(tensor, rows) for tensor in of_targets), strict=True)
    if not torch.is_grad_enabled():
        return torch.stack([loss_sum(*part) for part in parts]).sum()
    return torch.stack([checkpoint(loss_sum, *part, use_reentrant=False) for part in parts]).sum()
