"""Training on judged answers: what reward models and learning from preferences have in common."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from danlu import console, hardware
from danlu.adapters import training as adapters
from danlu.errors import DanluError
from danlu.formats.card import Stage
from danlu.models.load import load_model, read_config
from danlu.models.transformer import Transformer
from danlu.posttraining.config import JudgedConfig
from danlu.posttraining.preferences import BATCH_SIZE, Group, GroupBatch, GroupStream, Judged, batch_of
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.training.loop import LossSum, Trainer
from danlu.training.metrics import Numbers
from danlu.training.task import first_examples

T = TypeVar("T", bound=Transformer)

Figures = dict[str, Tensor]
"""What is told of a batch, by name: a number for each group, answer or token, of which the mean is logged."""

Judge = Callable[[GroupBatch, bool], tuple[Tensor, Figures]]
"""A batch, and whether it is held out -> the loss of each group, (groups,), and figures."""


class Tally:
    """Figures of several batches."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, figures: Figures) -> None:
        """Those of one more batch."""
        for name, values in figures.items():
            self._parts[name].append(values.detach().float().cpu())

    def values(self, name: str) -> Tensor:
        """All numbers of a figure, in the order of the batches."""
        return torch.cat(self._parts[name])

    def means(self, prefix: str = "") -> Numbers:
        """The mean of each figure; None where there was nothing."""
        found = {name: self.values(name) for name in self._parts}
        return {prefix + name: values.mean().item() if len(values) else None for name, values in found.items()}


@dataclass
class JudgedTask:
    """A model and what it is to learn.

    Attributes:
        judge: losses and figures.
        rates: peak learning rates.
        begin: what is to be done before the first step, with the trainer at hand.
        report: metrics and details for the card, of all held-out groups.
        details: more of them.
    """

    model: Transformer
    tokenizer: Tokenizer
    judged: Judged
    judge: Judge
    rates: dict[str, float]
    begin: Callable[[Trainer], None] = lambda trainer: None
    report: Callable[[Tally], tuple[dict[str, Any], dict[str, Any]]] = lambda tally: ({}, {})
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class StepLoss:
    """The loss of a micro-batch, which also keeps the figures of the step it belongs to."""

    judge: Judge
    tally: Tally = field(default_factory=Tally)
    step: GroupBatch | None = None

    def __call__(self, micro: GroupBatch) -> Tensor:
        """The sum of the losses of its groups."""
        if micro.step is not self.step:
            self.step, self.tally = micro.step, Tally()
        losses, figures = self.judge(micro, False)
        self.tally.add(figures)
        return losses.sum()

    def numbers(self) -> Numbers:
        """The figures of the last step."""
        return self.tally.means()


@dataclass
class HeldOutGroups:
    """Held-out groups that are measured while training."""

    model: Transformer
    judge: Judge
    groups: Sequence[Group]
    pad_id: int

    def measure(self, loss_sum: LossSum, micro_rows: int, device: torch.device) -> Numbers:
        """As in :class:`~danlu.training.loop.Measurement`."""
        return self.tally(micro_rows, device).means("heldout_")

    @torch.no_grad()
    def tally(self, micro_rows: int, device: torch.device) -> Tally:
        """All figures, ``loss`` among them; dropout is off."""
        was_training, found = self.model.training, Tally()
        self.model.eval()
        for micro in batch_of(self.groups, self.pad_id).to(device).split(micro_rows):
            losses, figures = self.judge(micro, True)
            found.add({"loss": losses, **figures})
        self.model.train(was_training)
        return found


def train_on_judged(
    config: JudgedConfig,
    verb: str,
    inputs: dict[str, Path],
    prepare: Callable[[Tokenizer], JudgedTask],
) -> Path:
    """Train on judged answers, write a model folder (or an adapter's), and tell how good it is on held-out ones.

    AdamW; the loss of a step is the mean over its groups, however it is cut. Without steps, minutes or epochs the run
    makes one pass over the data.

    Args:
        inputs: besides model and data.
        prepare: reads the data and opens the model.
    """
    inputs = {"model": config.model, "data": config.data, **inputs}
    if config.heldout is not None:
        inputs["heldout"] = config.heldout
    stage = Stage.open(
        config.out, kind=adapters.kind_of_output(config), verb=verb, config=config, inputs=inputs,
        overwrite=config.overwrite,
    )  # fmt: skip
    if stage.finished:
        console.note(f"{config.out}: already made, nothing to do")
        return config.out
    with stage.preparing():
        if config.seq_len > (context := read_config(config.model).context):
            raise DanluError(
                f"seq_len ({config.seq_len}) is longer than the context of {config.model} ({context}); lower it"
            )
        torch.manual_seed(config.seed)  # a fresh head is drawn from it
        task = prepare(Tokenizer.load(config.model))
    model, tokenizer, held_out = task.model, task.tokenizer, task.judged.held_out
    rows = GroupStream(task.judged.train, seed=config.seed, pad_id=tokenizer.pad_id)
    loss = StepLoss(task.judge)
    measured = first_examples(held_out, config.heldout_tokens, lambda group: group.n_tokens)
    optimizer = "adamw" if config.optimizer == "auto" else config.optimizer
    trainer = Trainer(
        dataclasses.replace(config, compile="never", optimizer=optimizer),  # rows are of all lengths
        model, rows,
        held_out=HeldOutGroups(model, task.judge, measured, tokenizer.pad_id) if measured else None,
        rates=task.rates,
        batch_tokens=(config.batch_size or BATCH_SIZE) * rows.row_len,
        loss_sum=loss,
        betas=(0.9, 0.999),
        step_numbers=loss.numbers,
    )  # fmt: skip
    task.begin(trainer)
    metrics = trainer.run()
    details = {**trainer.details(), **task.details}
    if held_out:
        tally = HeldOutGroups(model, task.judge, held_out, tokenizer.pad_id).tally(trainer.micro_rows, trainer.device)
        found, told = task.report(tally)
        metrics |= tally.means("heldout_") | found
        details |= told
    adapters.save_trained(model, config.out, config.model, tokenizer, with_tokenizer=bool(config.new_tokens))
    metrics |= {"rows": len(task.judged.train), "heldout_rows": len(held_out)}
    stage.finish(metrics, details)
    trainer.clean_up()
    if not held_out:
        console.warn(f"{config.data}: no row is held out, so nobody knows how good the model is; see --heldout")
    return config.out


def open_model(
    config: JudgedConfig, kind: type[T], tokenizer: Tokenizer, **options: Any
) -> tuple[T, Tokenizer, dict[str, Any]]:
    """The model, with an adapter where one is to be trained; the tokenizer, with new tokens; details for the card.

    Args:
        options: of :func:`~danlu.models.load.load_model`.

    Raises:
        DanluError: as :func:`~danlu.models.load.load_model`, and as :func:`~danlu.adapters.training.begin_adapter`.
    """
    compute_dtype = hardware.DTYPES[hardware.pick_precision(config.precision, hardware.pick_device(config.device))]
    model = load_model(config.model, kind, dtype=adapters.base_dtype(config, compute_dtype), **options)
    if config.adapter == "none":
        return model, tokenizer, {}
    tokenizer, details = adapters.begin_adapter(config, model, tokenizer, seed=config.seed)
    for p in model.head_parameters():  # trained whole, whatever the frozen weights are kept in
        p.data = p.data.float()
    return model, tokenizer, {"adapter": details, **adapters.head_details(model)}


def learning_rates(
    config: JudgedConfig, model: Transformer, rate: float, *, head: float = 1.0, adapter: float
) -> dict[str, float]:
    """Peak learning rates, where none are given.

    Args:
        rate: at a width of 768; it falls with the square root of the width.
        head: how much faster the head learns.
        adapter: the rate of adapters, whatever the width.
    """
    if config.adapter != "none":
        return adapters.learning_rates(config, adapter * (config.lr_scale or 1.0))
    rate *= (config.lr_scale or 1.0) * (model.config.dim / 768) ** -0.5
    return {
        "matrix_lr": config.matrix_lr or rate,
        "embed_lr": config.embed_lr or rate,
        "norm_lr": config.norm_lr or rate,
        "head_lr": config.head_lr or head * rate,
    }
