"""`danlu align --method dpo`: learning from preferences between given answers, by any loss of
`objectives/preference.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from danlu.adapters.training import reads_tokens
from danlu.adapters.wrapper import disabled
from danlu.data.packed_examples import Example
from danlu.errors import DanluError
from danlu.evaluation.intervals import share_interval
from danlu.models.causal_lm import CausalLM
from danlu.models.load import load_model, read_config
from danlu.objectives.kl import kl_k3
from danlu.objectives.logprobs import masked_sum, sequence_means
from danlu.objectives.preference import (
    DPOKind,
    dpo_losses,
    implicit_rewards,
    kto_kl,
    kto_losses,
    orpo_losses,
    simpo_losses,
)
from danlu.posttraining.config import REFERENCE_FREE, AlignConfig
from danlu.posttraining.judged import (
    Figures,
    JudgedTask,
    Tally,
    learning_rates,
    open_model,
    train_on_judged,
)
from danlu.posttraining.preferences import Group, GroupBatch, Judged, read_groups
from danlu.posttraining.reference import Reference, StoredReference, compute_logps, store_logps, stored_logps
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.training.logprobs import target_logprobs
from danlu.training.loop import Trainer

RATE = 5e-6
"""Of all weights, at a width of 768."""

ADAPTER_RATE = 1e-4

STORED = "checkpoints/reference.safetensors"


@dataclass
class Side:
    """Groups to learn from, or held out.

    Attributes:
        reference: what the reference says of them; None for losses without one.
        others: kto: each group's prompt with an answer to another prompt, by which the distance is measured.
    """

    groups: list[Group]
    reference: Reference | None = None
    others: list[Group] = field(default_factory=list)
    others_reference: Reference | None = None


class PreferenceJudge:
    """The losses of pairs, or of single answers (kto), and what is told of them (a `judged.Judge`)."""

    def __init__(self, config: AlignConfig, model: CausalLM, judged: Judged) -> None:
        self.config, self.model = config, model
        self.train, self.held_out = Side(judged.train), Side(judged.held_out)
        if config.loss == "kto":
            self.train.others = other_answers(judged.train, config.seq_len)
            among = [*judged.held_out, *judged.train]  # those held out may all have one prompt
            self.held_out.others = other_answers(among, config.seq_len)[: len(judged.held_out)]
        self._kl: tuple[GroupBatch | None, Tensor] = (None, torch.zeros(()))

    @property
    def lists(self) -> dict[str, Sequence[Group]]:
        """All groups that the reference is asked about, by name."""
        found = {
            "train": self.train.groups, "heldout": self.held_out.groups,
            "train_others": self.train.others, "heldout_others": self.held_out.others,
        }  # fmt: skip
        return {name: groups for name, groups in found.items() if groups}

    def ask(self, reference_of: Callable[[str], Reference | None]) -> None:
        """Take the references, by the names of :attr:`lists`."""
        self.train.reference, self.held_out.reference = reference_of("train"), reference_of("heldout")
        self.train.others_reference = reference_of("train_others")
        self.held_out.others_reference = reference_of("heldout_others")

    def __call__(self, batch: GroupBatch, is_held_out: bool) -> tuple[Tensor, Figures]:
        side = self.held_out if is_held_out else self.train
        logps_bt, _ = target_logprobs(self.model, batch.packed)
        reference_bt = None if side.reference is None else side.reference(batch)
        if self.config.loss == "kto":
            assert reference_bt is not None
            return self._singles(batch, side, logps_bt, reference_bt)
        return self._pairs(batch, logps_bt, reference_bt)

    def _pairs(self, batch: GroupBatch, logps_bt: Tensor, reference_bt: Tensor | None) -> tuple[Tensor, Figures]:
        config, mask_bt, beta = self.config, batch.packed.mask_bt, self.config.strength
        reduce = sequence_means if config.averages else masked_sum
        policy_g2 = reduce(logps_bt, mask_bt).view(-1, 2)
        chosen, rejected = policy_g2.unbind(1)
        if reference_bt is None:
            rewards_g2 = beta * policy_g2.detach()
            if config.loss == "orpo":
                losses = orpo_losses(chosen, rejected, beta=beta)
            else:
                losses = simpo_losses(
                    chosen, rejected, beta=beta, margin=config.target_margin, label_smoothing=config.label_smoothing
                )
        else:
            reference_g2 = reduce(reference_bt, mask_bt).view(-1, 2)
            rewards_g2 = implicit_rewards(policy_g2, reference_g2, beta=beta)
            losses = dpo_losses(
                chosen, rejected, *reference_g2.unbind(1),
                beta=beta, kind=cast(DPOKind, config.loss), label_smoothing=config.label_smoothing,
            )  # fmt: skip
        if config.sft_weight:
            losses = losses - config.sft_weight * sequence_means(logps_bt, mask_bt).view(-1, 2)[:, 0]
        leads = rewards_g2[:, 0] - rewards_g2[:, 1]
        sums_g2 = masked_sum(logps_bt.detach(), mask_bt).view(-1, 2)
        return losses, {
            "accuracy": (leads > 0).float() + 0.5 * (leads == 0),
            "margin": leads,
            "reward_chosen": rewards_g2[:, 0],
            "reward_rejected": rewards_g2[:, 1],
            "logps_chosen": sums_g2[:, 0],
            "logps_rejected": sums_g2[:, 1],
            **_distance(logps_bt, reference_bt, mask_bt),
        }

    def _singles(self, batch: GroupBatch, side: Side, logps_bt: Tensor, reference_bt: Tensor) -> tuple[Tensor, Figures]:
        config, mask_bt = self.config, batch.packed.mask_bt
        policy, reference = masked_sum(logps_bt, mask_bt), masked_sum(reference_bt, mask_bt)
        good = torch.tensor([group.desirable for group in batch.groups], device=policy.device)
        kl = self._step_kl(batch, side)
        losses = kto_losses(
            policy, reference, good, kl, beta=config.strength,
            desirable_weight=config.desirable_weight, undesirable_weight=config.undesirable_weight,
        )  # fmt: skip
        rewards = implicit_rewards(policy, reference, beta=config.strength)
        leads = torch.where(good, 1.0, -1.0) * (rewards - config.strength * kl)
        return losses, {
            "accuracy": (leads > 0).float() + 0.5 * (leads == 0),
            "reward_good": rewards[good],
            "reward_bad": rewards[~good],
            "logps_good": policy.detach()[good],
            "logps_bad": policy.detach()[~good],
            **_distance(logps_bt, reference_bt, mask_bt),
        }

    @torch.no_grad()
    def _step_kl(self, batch: GroupBatch, side: Side) -> Tensor:
        """Over all groups of the step, computed with its first micro-batch."""
        step = batch.step or batch
        if self._kl[0] is not step:
            assert side.others_reference is not None
            others = dataclasses.replace(step, groups=[side.others[i] for i in step.numbers], step=None)
            found: list[tuple[Tensor, Tensor]] = []
            was_training = self.model.training
            self.model.eval()
            for micro in others.split(max(1, batch.n_tokens // batch.room)):
                logps_bt, _ = target_logprobs(self.model, micro.packed)
                mask_bt = micro.packed.mask_bt
                found.append((masked_sum(logps_bt, mask_bt), masked_sum(side.others_reference(micro), mask_bt)))
            self.model.train(was_training)
            policy, reference = (torch.cat(parts) for parts in zip(*found, strict=True))
            self._kl = (step, kto_kl(policy, reference))
        return self._kl[1]


def _distance(logps_bt: Tensor, reference_bt: Tensor | None, mask_bt: Tensor) -> Figures:
    """At each token the estimate k3 of KL(reference || policy), in nats: exact on average for answers of the
    reference's, and near to it for those that it could have given."""
    if reference_bt is None:
        return {}
    return {"kl": kl_k3(reference_bt, logps_bt.detach())[mask_bt]}


def other_answers(groups: Sequence[Group], seq_len: int) -> list[Group]:
    """Each prompt with the answer to the next other prompt of the list, cut where it does not fit into ``seq_len``.

    Raises:
        DanluError: there is one prompt only.
    """
    parts = [_prompt_and_answer(group.examples[0]) for group in groups]
    found: list[Group] = []
    following = 0
    for i, (prompt, _) in enumerate(parts):
        following = max(following, i + 1)
        while parts[following % len(parts)][0] == prompt:
            following += 1
            if following > i + len(parts):
                raise DanluError(
                    f"{groups[0].where}: all rows have one prompt; kto compares with answers to other prompts"
                )
        answer = parts[following % len(parts)][1][: max(1, seq_len + 1 - len(prompt))]
        example: Example = [*prompt, *answer], [False] * len(prompt) + [True] * len(answer)
        found.append(dataclasses.replace(groups[i], examples=(example,)))
    return found


def _prompt_and_answer(example: Example) -> tuple[list[int], list[int]]:
    ids, mask = example
    n = list(mask).index(True)
    return list(ids[:n]), [i for i, wanted in zip(ids[n:], mask[n:], strict=True) if wanted]


def learn_preferences(config: AlignConfig) -> Path:
    """Train a model on preferences, and write a model folder.

    The log-probabilities of the reference are computed once, before the first step, and kept beside the checkpoints.

    Returns:
        The new model folder.

    Raises:
        DanluError: a row that cannot be used (with file and line), no row that fits, a reference with another
            tokenizer, or an output folder that cannot be used.
        KeyboardInterrupt: stopped by Ctrl-C; the run can be resumed by calling again.
    """
    inputs = {} if config.reference is None else {"reference": config.reference}
    return train_on_judged(config, "align", inputs, partial(_prepare, config))


def _prepare(config: AlignConfig, tokenizer: Tokenizer) -> JudgedTask:
    if config.reference is not None:
        _check_reference(config, config.reference, tokenizer)
    model, tokenizer, details = open_model(config, CausalLM, tokenizer)
    reader = reads_tokens(tokenizer, config.new_tokens) if config.new_tokens else tokenizer
    judged = read_groups(config, reader, "singles" if config.loss == "kto" else "pairs")
    judge = PreferenceJudge(config, model, judged)
    return JudgedTask(
        model, tokenizer, judged, judge, learning_rates(config, model, RATE, adapter=ADAPTER_RATE),
        begin=partial(_ask_reference, config, judge, tokenizer), report=partial(_report, judged), details=details,
    )  # fmt: skip


def _check_reference(config: AlignConfig, reference: Path, tokenizer: Tokenizer) -> None:
    if Tokenizer.load(reference).fingerprint != tokenizer.fingerprint:
        raise DanluError(
            f"{reference}: has another tokenizer or chat template than {config.model}; what the two say of an answer "
            "cannot be compared"
        )
    if (context := read_config(reference).context) < config.seq_len:
        raise DanluError(f"{reference}: reads {context} tokens, less than seq_len ({config.seq_len}); lower it")


def _ask_reference(config: AlignConfig, judge: PreferenceJudge, tokenizer: Tokenizer, trainer: Trainer) -> None:
    if config.loss in REFERENCE_FREE:
        return
    model = judge.model
    if config.precompute == "never":

        @torch.no_grad()
        def without_adapter(batch: GroupBatch) -> Tensor:
            was_training = model.training
            with disabled(model):
                logps_bt, _ = target_logprobs(model.eval(), batch.packed)
            model.train(was_training)
            return logps_bt

        judge.ask(lambda name: without_adapter)
        return
    path, lists = config.out / STORED, judge.lists
    logps = stored_logps(path, lists)
    if logps is None:
        reference = model
        if config.reference is not None:
            reference = load_model(config.reference).to(trainer.device)
            reference.compute_dtype = trainer.dtype
        logps = {
            name: compute_logps(
                reference, groups, micro_tokens=trainer.micro_rows * trainer.rows.row_len, device=trainer.device,
                pad_id=tokenizer.pad_id,
            )
            for name, groups in lists.items()
        }  # fmt: skip
        store_logps(path, lists, logps)
    stored = {name: StoredReference.of(groups, logps[name]) for name, groups in lists.items()}
    judge.ask(stored.get)


def _report(judged: Judged, tally: Tally) -> tuple[dict[str, Any], dict[str, Any]]:
    n_rows = len({group.where for group in judged.held_out})  # the pairs of a ranking are no independent cases
    return {"heldout_accuracy_interval": share_interval(tally.values("accuracy").mean().item(), n_rows)}, {}
