"""Fine-tuning to a task with labelled rows: what classifying, tagging and rewriting have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.table import Table

from danlu import console
from danlu.adapters import training as adapters
from danlu.data.padded import Example, PaddedStream, batches_by_length
from danlu.errors import MissingExtra
from danlu.evaluation.baselines import Scores
from danlu.formats.card import Stage
from danlu.models.load import Model
from danlu.nn.config import EncoderDecoderConfig
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.training.config import FinetuneConfig
from danlu.training.loop import LossSum, Trainer
from danlu.training.metrics import Numbers

E = TypeVar("E")

BATCH_SIZE = 16
BETAS = (0.9, 0.999)
LEAST_STEPS, LEAST_EPOCHS, MOST_EPOCHS = 400, 3.0, 20.0
"""Few rows are read more often: a fresh head needs some hundred steps, whatever the data."""


@dataclass
class Report:
    """How good a model is on held-out rows.

    Attributes:
        metrics: for the card.
        compared: the figures of the model and of the baselines, for the table.
        per_class: precision, recall, F1 and support of each label.
        details: for the card: confusions, mistakes.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    compared: dict[str, Scores] = field(default_factory=dict)
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Task:
    """A model and what it is to learn.

    Attributes:
        loss_sum: sum of the losses of a :class:`~danlu.data.padded.PaddedBatch`.
        report: the figures on the held-out rows, called with the trained model in place.
    """

    model: Model
    train: Sequence[Example]
    held_out: Sequence[Example]
    loss_sum: LossSum
    report: Callable[[], Report]


@dataclass
class HeldOutRows:
    """Held-out rows whose loss (nats a target) is measured while training."""

    examples: Sequence[Example]
    pad_id: int

    def measure(self, loss_sum: LossSum, micro_rows: int, device: torch.device) -> Numbers:
        """As in :class:`~danlu.training.loop.Measurement`."""
        total, n_targets = 0.0, 0
        for _, batch in batches_by_length(self.examples, micro_rows, self.pad_id):
            total += loss_sum(batch.to(device)).item()
            n_targets += batch.n_targets
        return {"heldout_loss": total / max(1, n_targets)}


def train_task(config: FinetuneConfig, prepare: Callable[[FinetuneConfig, Tokenizer], Task]) -> Path:
    """Fine-tune on labelled rows, write a model folder (or an adapter's), and tell how good it is on held-out rows.

    AdamW with warm-up and linear decay; batches of rows of like length; the loss of a step is the mean over all its
    targets. Without steps, minutes or epochs, the run makes 3 passes over the data, and on few rows up to 20, until it
    has 400 steps.

    Args:
        prepare: reads the data and opens the model.

    Returns:
        The new folder.
    """
    inputs = {"model": config.model, "data": config.data}
    if config.heldout is not None:
        inputs["heldout"] = config.heldout
    stage = Stage.open(
        config.out, kind=adapters.kind_of_output(config), verb="finetune", config=config, inputs=inputs,
        overwrite=config.overwrite,
    )  # fmt: skip
    if stage.finished:
        console.note(f"{config.out}: already made, nothing to do")
        return config.out
    with stage.preparing():
        torch.manual_seed(config.seed)  # a fresh head is drawn from it
        tokenizer = Tokenizer.load(config.model)
        task = prepare(config, tokenizer)
        details = {} if config.adapter == "none" else _begin_adapter(config, task.model, tokenizer)
    batch = config.batch_size or BATCH_SIZE
    rows = PaddedStream(task.train, batch, config.seed, tokenizer.pad_id)
    measured = first_examples(task.held_out, config.heldout_tokens, len)
    trainer = Trainer(
        dataclasses.replace(config, optimizer="adamw") if config.optimizer == "auto" else config,
        task.model, rows,
        held_out=HeldOutRows(measured, tokenizer.pad_id) if measured else None,
        rates=default_rates(config, task.model),
        batch_tokens=batch * rows.row_len,
        default_epochs=min(MOST_EPOCHS, max(LEAST_EPOCHS, LEAST_STEPS * batch / len(task.train))),
        loss_sum=task.loss_sum,
        betas=BETAS,
    )  # fmt: skip
    metrics = trainer.run()
    task.model.eval()
    found = task.report() if task.held_out else Report()
    adapters.save_trained(task.model, config.out, config.model, tokenizer)
    metrics |= {"examples": len(task.train), "heldout_examples": len(task.held_out), **found.metrics}
    stage.finish(metrics, {**trainer.details(), **found.details, **details})
    trainer.clean_up()
    if task.held_out:
        show(found, len(task.held_out))
    else:
        console.warn(f"{config.data}: no row is held out, so nobody knows how good the model is; see --heldout")
    return config.out


def _begin_adapter(config: FinetuneConfig, model: Model, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the card says of the adapter that the model is given."""
    _, details = adapters.begin_adapter(config, model, tokenizer, seed=config.seed, start=config.adapter_start)
    return {"adapter": details, **adapters.head_details(model)}


def default_rates(config: FinetuneConfig, model: Model) -> dict[str, float]:
    """Peak learning rates: 5e-5 at the width of BERT-base (768), as Devlin et al. 2018 (arXiv:1810.04805) tried them,
    falling with the square root of the width; a fresh head learns faster. Adapters have their own."""
    if config.adapter != "none":
        return adapters.learning_rates(config, adapters.RATE * (config.lr_scale or 1.0))
    shape = model.config.decoder if isinstance(model.config, EncoderDecoderConfig) else model.config
    rate = (config.lr_scale or 1.0) * 5e-5 * (shape.dim / 768) ** -0.5
    return {
        "matrix_lr": config.matrix_lr or rate,
        "embed_lr": config.embed_lr or rate,
        "norm_lr": config.norm_lr or rate,
        "head_lr": config.head_lr or 10 * rate,
    }


def first_examples(examples: Sequence[E], tokens: int, n_tokens: Callable[[E], int]) -> list[E]:
    """The first examples, up to about so many tokens."""
    found: list[E] = []
    for example in examples:
        if tokens <= 0:
            break
        found.append(example)
        tokens -= n_tokens(example)
    return found


def compare(common: Scores, linear: Callable[[], Scores] | None) -> dict[str, Scores]:
    """The figures to beat; without scikit-learn the linear model is left out, and the user told so."""
    found = {"majority": common}
    if linear is not None:
        try:
            found["tfidf"] = linear()
        except MissingExtra as error:
            console.note(f"{error} (it is left out)")
        except ValueError as error:  # texts without a word
            console.note(f"the TF-IDF baseline is left out: {error}")
    return found


def show(report: Report, n_rows: int) -> None:
    """The tables, on the terminal."""
    names = list(dict.fromkeys(name for scores in report.compared.values() for name in scores))
    table = Table(box=None, title=f"{n_rows:,} held-out rows", title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for who, scores in report.compared.items():
        table.add_row(who, *(_figure(scores.get(name)) for name in names))
    console.err().print(table)
    if report.per_class:
        console.err().print(_per_class(report.per_class))
    confusion, labels = report.details.get("confusion"), report.details.get("labels")
    if confusion and labels and len(labels) <= 12:
        console.err().print(_confusion(confusion, labels))


def _per_class(per_class: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(box=None)
    table.add_column("")
    for name in ("precision", "recall", "f1", "support"):
        table.add_column(name, justify="right")
    commonest = sorted(per_class, key=lambda label: -per_class[label]["support"])
    for label in commonest[:30]:
        scores = per_class[label]
        table.add_row(label, *(_figure(scores[n]) for n in ("precision", "recall", "f1")), f"{scores['support']:.0f}")
    if len(commonest) > 30:
        table.add_row(f"... {len(commonest) - 30} more in the card", "", "", "", "")
    return table


def _confusion(confusion: Sequence[Sequence[int]], labels: Sequence[str]) -> Table:
    table = Table(box=None, title="true (row) taken for (column)", title_justify="left")
    table.add_column("")
    for label in labels:
        table.add_column(label, justify="right")
    for label, row in zip(labels, confusion, strict=True):
        table.add_row(label, *(str(count) if count else "." for count in row))
    return table


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
