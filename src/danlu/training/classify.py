"""`danlu finetune --task classify`: labels or numbers of texts, with an encoder or a decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from danlu import console
from danlu.data.labelled import (
    Columns,
    LabelKind,
    TextRow,
    kind_of_labels,
    label_names,
    number_label,
    read_split,
    sorted_labels,
    text_rows,
)
from danlu.data.padded import Example, PaddedBatch
from danlu.engine.classify import encode_text, predict
from danlu.errors import DanluError
from danlu.evaluation.baselines import (
    Scores,
    majority,
    majority_multi,
    mean_number,
    named,
    tfidf,
    tfidf_multi,
    tfidf_number,
)
from danlu.evaluation.classification import (
    binary_log_loss,
    classification_report,
    log_loss,
    multi_label_report,
    regression_report,
)
from danlu.models.heads import ProblemType, SequenceClassifier
from danlu.models.load import load_model
from danlu.objectives.classification import label_nll_sum, squared_error_sum, yes_no_nll_sum
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.training.config import FinetuneConfig
from danlu.training.labels import known_labels, order_of
from danlu.training.task import Report, Task, compare

PROBLEM: dict[LabelKind, ProblemType] = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "number": "regression",
}
LOSS: dict[LabelKind, Callable[[Tensor, Tensor], Tensor]] = {
    "single": label_nll_sum,
    "multi": yes_no_nll_sum,
    "number": squared_error_sum,
}
Probabilities = npt.NDArray[np.float32]
LARGE_NUMBER = 20.0
"""A head that begins near 0 walks a long way to a number above this, in steps of its learning rate."""


@dataclass
class Side:
    """Rows for training, or held out, with what they are encoded to."""

    rows: list[TextRow]
    examples: list[Example]

    @property
    def texts(self) -> list[str]:
        """As the baselines read them."""
        return [row.text if row.pair is None else f"{row.text}\n{row.pair}" for row in self.rows]

    @property
    def targets(self) -> list[Any]:
        return [example.target for example in self.examples]


@dataclass
class Labelled:
    """Rows to learn labels or numbers from, and those that are held out. ``labels`` are in the order of the head's
    logits."""

    kind: LabelKind
    labels: tuple[str, ...]
    train: list[TextRow]
    held_out: list[TextRow]

    def encoded(self, config: FinetuneConfig, tokenizer: Tokenizer, max_length: int) -> tuple[Side, Side]:
        """Both with their tokens, at most ``max_length`` of a text.

        Raises:
            DanluError: a row that cannot be used, or an unknown label.
        """
        encode = _Encoder(tokenizer, self.kind, self.labels, config, max_length)
        train, held_out = (Side(rows, [encode(row) for row in rows]) for rows in (self.train, self.held_out))
        if encode.n_cut:
            n_rows = len(self.train) + len(self.held_out)
            console.warn(
                f"{config.data}: {encode.n_cut:,} of {n_rows:,} texts are cut to {max_length} tokens (seq_len)"
            )
        return train, held_out


def read_labelled(config: FinetuneConfig) -> Labelled:
    """Read the rows, and find out what their labels are.

    Raises:
        DanluError: a row that cannot be used, or labels with nothing to tell apart.
    """
    columns = Columns(config.text_column, config.text2_column, config.label_column)
    share = 0.1 if config.heldout_share is None else config.heldout_share
    train, held_out = read_split(text_rows, config.data, config.heldout, columns, share=share, on_error=config.on_error)
    kind = kind_of_labels([*train, *held_out]) if config.label_kind == "auto" else config.label_kind
    labels = ("value",) if kind == "number" else _labels(config, kind, train, held_out)
    return Labelled(kind, labels, train, held_out)


def prepare_classify(config: FinetuneConfig, tokenizer: Tokenizer) -> Task:
    """Read the rows, find out what their labels are, and open the model with a head for them.

    Raises:
        DanluError: a row that cannot be used, an unknown label, or labels with nothing to tell apart.
    """
    rows = read_labelled(config)
    kind = rows.kind
    model = load_model(
        config.model, SequenceClassifier, new_head=True, labels=rows.labels, problem_type=PROBLEM[kind]
    )  # fmt: skip
    train, held_out = rows.encoded(config, tokenizer, min(config.seq_len, model.config.context))
    if kind == "number":
        _start_at_mean(model, train.targets, config)

    def loss_sum(batch: PaddedBatch) -> Tensor:
        return LOSS[kind](model(batch.ids, batch.real, batch.types), batch.targets)

    def report() -> Report:
        return report_on(model, tokenizer, kind, train, held_out)

    return Task(model, train.examples, held_out.examples, loss_sum, report)


def _labels(
    config: FinetuneConfig, kind: LabelKind, train: Sequence[TextRow], held_out: Sequence[TextRow]
) -> tuple[str, ...]:
    """The labels, in the order of the head's logits."""
    found = {name for row in train for name in label_names(row, kind, config.label_names)}
    if config.heldout is None:
        found |= {name for row in held_out for name in label_names(row, kind, config.label_names)}
    if not found or (kind == "single" and len(found | set(config.label_names)) < 2):
        raise DanluError(f"{config.data}: all rows have the label {', '.join(found)!r}; there is nothing to tell apart")
    return order_of(sorted_labels(found), config.label_names, known_labels(config.model, "sequence_classification"))


@dataclass
class _Encoder:
    """Rows to examples; counts the texts that were cut."""

    tokenizer: Tokenizer
    kind: LabelKind
    labels: tuple[str, ...]
    config: FinetuneConfig
    max_length: int
    n_cut: int = 0

    def __call__(self, row: TextRow) -> Example:
        target = self._target(row)
        try:
            ids, types, is_cut = encode_text(self.tokenizer, row.text, row.pair, self.max_length)
        except DanluError as error:
            raise DanluError(f"{row.where}: {error}") from error
        self.n_cut += is_cut
        return Example(ids, target, types)

    def _target(self, row: TextRow) -> int | float | list[float]:
        if self.kind == "number":
            return number_label(row)
        names = label_names(row, self.kind, self.config.label_names)
        for name in names:
            if name not in self.labels:
                raise DanluError(
                    f"{row.where}: unknown label {name!r}; the rows to learn from have {', '.join(self.labels[:20])}"
                )
        if self.kind == "single":
            return self.labels.index(names[0])
        return [float(label in names) for label in self.labels]


def _start_at_mean(model: SequenceClassifier, numbers: Sequence[float], config: FinetuneConfig) -> None:
    """The best answer before anything is learned, where the head has a bias."""
    mean, largest = float(np.mean(numbers)), float(np.abs(numbers).max())
    if largest > LARGE_NUMBER:
        console.warn(
            f"{config.data}: numbers up to {largest:g} are learned slowly; scale them to about -1 to 1, or raise "
            "--head-lr"
        )
    if model.head.bias is not None:
        with torch.no_grad():
            model.head.bias.fill_(mean)


Figures = tuple[dict[str, Any], list[Any]]
"""The report on the model, and its answers."""


def scores_on(model: SequenceClassifier, tokenizer: Tokenizer, kind: LabelKind, held_out: Side) -> Scores:
    """The figures of a model on held-out rows."""
    found = predict(model, held_out.examples, tokenizer.pad_id)
    return _scores(FIGURES[kind](found, held_out, model.labels)[0])


def report_on(model: SequenceClassifier, tokenizer: Tokenizer, kind: LabelKind, train: Side, held_out: Side) -> Report:
    """How good a model is on held-out rows, beside what it has to beat."""
    found = predict(model, held_out.examples, tokenizer.pad_id)
    figures, answers = FIGURES[kind](found, held_out, model.labels)
    beaten = BASELINES[kind](train, held_out, model.labels)
    scores = _scores(figures)
    per_class: dict[str, dict[str, float]] = figures.get("per_class", {})
    details: dict[str, Any] = {"label_kind": kind, "labels": list(model.labels)}
    if "confusion" in figures:
        details["confusion"] = figures["confusion"]
    details["mistakes"] = _mistakes(kind, model.labels, held_out, answers)
    metrics: dict[str, Any] = {f"heldout_{name}": value for name, value in scores.items()}
    metrics |= {"baselines": beaten, "per_class": per_class}
    return Report(metrics, {"this model": scores, **beaten}, per_class, details)


def _scores(figures: dict[str, Any]) -> Scores:
    return {name: value for name, value in figures.items() if isinstance(value, float)}


def _single(found: Probabilities, held_out: Side, labels: Sequence[str]) -> Figures:
    true, answers = held_out.targets, [labels[i] for i in found.argmax(axis=1)]
    return classification_report([labels[i] for i in true], answers, labels) | {"loss": log_loss(found, true)}, answers


def _multi(found: Probabilities, held_out: Side, labels: Sequence[str]) -> Figures:
    true, answers = np.array(held_out.targets), named(found, labels)
    return multi_label_report(named(true, labels), answers, labels) | {"loss": binary_log_loss(found, true)}, answers


def _number(found: Probabilities, held_out: Side, labels: Sequence[str]) -> Figures:
    answers = found[:, 0].tolist()
    return dict(regression_report(held_out.targets, answers)), answers


FIGURES: dict[LabelKind, Callable[[Probabilities, Side, Sequence[str]], Figures]] = {
    "single": _single,
    "multi": _multi,
    "number": _number,
}


def _beaten_single(train: Side, held_out: Side, labels: Sequence[str]) -> dict[str, Scores]:
    known, true = train.targets, held_out.targets
    common = majority(known, true, labels)
    return compare(common, lambda: tfidf(train.texts, known, held_out.texts, true, labels))


def _beaten_multi(train: Side, held_out: Side, labels: Sequence[str]) -> dict[str, Scores]:
    known, true = np.array(train.targets), np.array(held_out.targets)
    common = majority_multi(known, true, labels)
    return compare(common, lambda: tfidf_multi(train.texts, known, held_out.texts, true, labels))


def _beaten_number(train: Side, held_out: Side, labels: Sequence[str]) -> dict[str, Scores]:
    known, true = train.targets, held_out.targets
    return compare(mean_number(known, true), lambda: tfidf_number(train.texts, known, held_out.texts, true))


BASELINES: dict[LabelKind, Callable[[Side, Side, Sequence[str]], dict[str, Scores]]] = {
    "single": _beaten_single,
    "multi": _beaten_multi,
    "number": _beaten_number,
}


def _mistakes(kind: LabelKind, labels: Sequence[str], held_out: Side, answers: Sequence[Any]) -> list[dict[str, Any]]:
    """The first rows that were answered wrongly, to look at; of numbers the worst."""
    rows = list(zip(held_out.rows, held_out.targets, answers, strict=True))
    if kind == "number":
        rows.sort(key=lambda item: -abs(item[1] - item[2]))
    found = []
    for row, target, answer in rows:
        true = (
            target if kind == "number"
            else labels[target] if kind == "single"
            else [label for label, there in zip(labels, target, strict=True) if there]
        )  # fmt: skip
        if true != answer:
            found.append({"where": row.where, "text": row.text[:300], "true": true, "predicted": answer})
    return found[:20]
