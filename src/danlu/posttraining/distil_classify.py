"""Classifiers as students: they learn the teacher's probabilities of labels beside the labels themselves (Hinton et al.
2015, arXiv:1503.02531), and its layers where that is asked for."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from danlu import console, files, hardware
from danlu.data.labelled import Columns, LabelKind, read_unlabelled
from danlu.data.padded import Example, PaddedBatch, PaddedStream, batches_by_length
from danlu.engine.classify import encode_text, predict
from danlu.errors import DanluError
from danlu.evaluation.baselines import Scores
from danlu.formats.card import Stage
from danlu.models.heads import SequenceClassifier
from danlu.models.load import load_model, save_model
from danlu.objectives.classification import squared_error_sum, yes_no_nll_sum
from danlu.objectives.distillation import forward_kl
from danlu.objectives.logprobs import sequence_means
from danlu.posttraining.distil_config import CONTROL, DistilConfig
from danlu.posttraining.layer_matching import LayerMatching, layer_matching, visible_pairs
from danlu.posttraining.students import copied, make_student
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.training.classify import LOSS, PROBLEM, Labelled, Side, read_labelled, report_on, scores_on
from danlu.training.loop import LossSum, Trainer
from danlu.training.metrics import Numbers
from danlu.training.task import (
    BATCH_SIZE,
    BETAS,
    LEAST_EPOCHS,
    LEAST_STEPS,
    MOST_EPOCHS,
    HeldOutRows,
    default_rates,
    first_examples,
    show,
)

HARD_SHARE = 0.5
"""Default share of the labels' loss; the rest is the teacher's."""

NEW_STUDENT_SCALE = 10.0
"""A model that has learned nothing takes larger steps than one that is fine-tuned."""

READ_ROWS = 32
"""Rows that the teacher reads at a time."""

SPEED_ROWS = 256
"""Held-out rows that are read to see how fast a model is."""


@dataclass
class LabelLesson:
    """Called with a batch whose targets are the numbers of its rows, it gives the sum of the losses of these rows::

        hard_share * loss of the labels + (1 - hard_share) * divergence + weights * layers

    Of a row without a label it is the divergence, whole, and the layers.

    Attributes:
        labels: what the first rows are labelled with, as `objectives/classification.py` takes it; others have no label.
        logits_nl: (rows, labels) what the teacher says of each row.
        matching: the loss between layers, if there is one; then the teacher reads each batch again.
    """

    kind: LabelKind
    student: SequenceClassifier
    teacher: SequenceClassifier
    labels: Tensor
    logits_nl: Tensor
    hard_share: float
    temperature: float
    matching: LayerMatching | None = None

    def __call__(self, batch: PaddedBatch) -> Tensor:
        if self.matching is None:
            return self._loss_sum(self._logits(self.student, batch), batch)
        with self.matching.watching(self.student, self.teacher) as seen:
            logits_bl = self._logits(self.student, batch)
            with torch.no_grad():
                self._logits(self.teacher, batch)
        segments = torch.zeros_like(batch.ids).masked_fill(~batch.real, -1)
        losses_bt = self.matching(*seen, visible_pairs(segments, causal=self.student.config.causal))
        return self._loss_sum(logits_bl, batch) + sequence_means(losses_bt, batch.real).sum()

    def hard_loss(self, batch: PaddedBatch) -> Tensor:
        """The ordinary loss, of the labels alone."""
        return self._hard(self._logits(self.student, batch), batch)

    def _loss_sum(self, logits_bl: Tensor, batch: PaddedBatch) -> Tensor:
        theirs_bl, has_label = self.logits_nl[batch.targets], batch.targets < len(self.labels)
        soft = self._divergence(logits_bl[has_label], theirs_bl[has_label])
        alone = self._divergence(logits_bl[~has_label], theirs_bl[~has_label])
        return self.hard_share * self._hard(logits_bl, batch) + (1 - self.hard_share) * soft + alone

    def _hard(self, logits_bl: Tensor, batch: PaddedBatch) -> Tensor:
        has_label = batch.targets < len(self.labels)
        return LOSS[self.kind](logits_bl[has_label], self.labels[batch.targets[has_label]])

    def _divergence(self, mine_bl: Tensor, theirs_bl: Tensor) -> Tensor:
        """Of labels of which one holds; of each label by itself; or of numbers."""
        t = self.temperature
        if self.kind == "single":
            return forward_kl(mine_bl, theirs_bl, t).sum()
        if self.kind == "multi":
            return t**2 * yes_no_nll_sum(mine_bl / t, (theirs_bl / t).sigmoid())
        return squared_error_sum(mine_bl, theirs_bl.squeeze(-1))

    def _logits(self, model: SequenceClassifier, batch: PaddedBatch) -> Tensor:
        return model(batch.ids, batch.real, batch.types)  # type: ignore[no-any-return]


@dataclass
class HeldOutLabels:
    """Held-out rows measured while training by the ordinary loss, whatever the student is taught by."""

    rows: HeldOutRows
    hard_loss: LossSum

    def measure(self, loss_sum: LossSum, micro_rows: int, device: torch.device) -> Numbers:
        """As in :class:`~danlu.training.loop.Measurement`."""
        return self.rows.measure(self.hard_loss, micro_rows, device)


def distil_classify(config: DistilConfig, stage: Stage) -> Path:
    """See :func:`danlu.posttraining.distil.distil`."""
    with stage.preparing():
        tokenizer, teacher = Tokenizer.load(config.teacher), load_model(config.teacher, SequenceClassifier)
        rows = read_labelled(config.as_finetuning)
        kind = rows.kind
        _require_same_labels(config, rows, teacher)
        student = make_student(
            config, teacher, tokenizer, new_head=True, labels=teacher.labels, problem_type=PROBLEM[kind]
        )
        student.problem_type = PROBLEM[kind]
        longest = min(config.seq_len, teacher.config.context, student.config.context)
        train, held_out = rows.encoded(config.as_finetuning, tokenizer, longest)
        others = _unlabelled(config, tokenizer, longest, held_out)
        matching = layer_matching(config, student, teacher)
    examples = [*train.examples, *held_out.examples]
    device = hardware.pick_device(config.device)
    teacher.requires_grad_(False).to(device)
    lesson = LabelLesson(
        kind=kind,
        student=student,
        teacher=teacher,
        labels=torch.tensor([e.target for e in examples], dtype=torch.long if kind == "single" else torch.float32),
        logits_nl=_logits(teacher, [*examples, *others], tokenizer.pad_id),
        hard_share=HARD_SHARE if config.hard_share is None else config.hard_share,
        temperature=config.temperature,
    )
    lesson.labels = lesson.labels.to(device)
    numbered = [dataclasses.replace(example, target=number) for number, example in enumerate([*examples, *others])]
    learned, kept = numbered[: len(train.examples)], numbered[len(train.examples) : len(examples)]

    alone: Scores | None = None
    if config.control is not False:
        other = dataclasses.replace(lesson, student=copied(student), hard_share=1.0)
        alone = _control(_as_long(config, len(learned), len(others)), other, learned, kept, tokenizer, held_out)
    if matching is not None:
        student.add_module("matching", matching)  # its projections are trained with the student, and then left behind
    lesson = dataclasses.replace(lesson, matching=matching)
    trainer = _trainer(config, lesson, [*learned, *numbered[len(examples) :]], kept, tokenizer.pad_id)
    metrics = trainer.run()
    if matching is not None:
        del student.matching
    student.eval()
    save_model(student, config.out, tokenizer)
    n_student, n_teacher = student.num_parameters(), teacher.num_parameters()
    metrics |= {
        "parameters": n_student, "teacher_parameters": n_teacher, "smaller_by": 1 - n_student / n_teacher,
        "examples": len(learned), "unlabelled_examples": len(others), "heldout_examples": len(kept),
    }  # fmt: skip
    details = trainer.details()
    if kept:
        report = report_on(student, tokenizer, kind, train, held_out)
        theirs = scores_on(teacher, tokenizer, kind, held_out)
        metrics |= {**report.metrics, "teacher": theirs, **_speeds(student, teacher, kept, tokenizer.pad_id)}
        mine = report.compared.pop("this model")
        compared = {"student": mine, "teacher": theirs, **({"without teacher": alone} if alone else {})}
        if alone is not None:
            metrics["control"] = alone
        if kind == "single":
            metrics["share_of_teacher"] = share_above_chance(mine, theirs, report.compared["majority"])
        details |= report.details
        report.compared = {**compared, **report.compared}
        show(report, len(kept))
    else:
        console.warn(f"{config.data}: no row is held out, so nobody knows how good the student is; see --heldout")
    stage.finish(metrics, details)
    trainer.clean_up()
    shutil.rmtree(config.out / CONTROL, ignore_errors=True)
    return config.out


def share_above_chance(student: Scores, teacher: Scores, majority: Scores) -> float | None:
    """How much of what the teacher gets right more often than the commonest answer does the student keeps; None where
    the teacher is no better than that."""
    gained = teacher["accuracy"] - majority["accuracy"]
    return (student["accuracy"] - majority["accuracy"]) / gained if gained > 0 else None


def _unlabelled(config: DistilConfig, tokenizer: Tokenizer, longest: int, held_out: Side) -> list[Example]:
    """Texts of which nothing is known but what the teacher says. What is held out stays unseen here too."""
    if config.unlabelled is None:
        return []
    columns = Columns(config.text_column, config.text2_column)
    unseen = {row.key for row in held_out.rows}
    rows = read_unlabelled(config.unlabelled, columns, on_error=config.on_error)
    encoded = (encode_text(tokenizer, row.text, row.pair, longest) for row in rows if row.key not in unseen)
    return [Example(ids, 0, types) for ids, types, _ in encoded]


def _require_same_labels(config: DistilConfig, rows: Labelled, teacher: SequenceClassifier) -> None:
    """The student's logits are compared with the teacher's, label by label."""
    if teacher.problem_type not in (None, PROBLEM[rows.kind]):
        raise DanluError(
            f"{config.teacher}: was made for {teacher.problem_type.replace('_', ' ')}, and the labels of {config.data} "
            f"are for {PROBLEM[rows.kind].replace('_', ' ')}; choose another teacher, or give label_kind"
        )
    if rows.kind == "number":
        if len(teacher.labels) != 1:
            raise DanluError(f"{config.teacher}: tells {len(teacher.labels)} labels apart and gives no number")
        if config.temperature != 1:
            raise DanluError("temperature is for labels; a number has no probabilities")
    elif rows.labels != teacher.labels:
        raise DanluError(
            f"{config.data}: has the labels {', '.join(rows.labels[:20])}, and the teacher {config.teacher} "
            f"{', '.join(teacher.labels[:20])}; teacher and student must tell the same apart (label_names gives names "
            "to labels that the data calls 0, 1, 2, ...)"
        )


@torch.inference_mode()
def _logits(teacher: SequenceClassifier, examples: Sequence[Example], pad_id: int) -> Tensor:
    """What the teacher says of each row, (rows, labels) fp32."""
    found = torch.empty(len(examples), len(teacher.labels), device=teacher.device)
    with console.progress("asking the teacher", total=len(examples), unit="rows") as advance:
        for places, batch in batches_by_length(examples, READ_ROWS, pad_id):
            here = batch.to(teacher.device)
            found[places] = teacher(here.ids, here.real, here.types).float()
            advance(len(places))
    return found.clone()


def _trainer(
    config: DistilConfig, lesson: LabelLesson, learned: Sequence[Example], kept: Sequence[Example], pad_id: int
) -> Trainer:
    batch = config.batch_size or BATCH_SIZE
    rows = PaddedStream(learned, batch, config.seed, pad_id)
    scale = config.lr_scale or (NEW_STUDENT_SCALE if config.from_scratch else 1.0)
    measured = first_examples(kept, config.heldout_tokens, len)
    return Trainer(
        dataclasses.replace(config, optimizer="adamw", compile="never") if config.optimizer == "auto" else config,
        lesson.student, rows,
        held_out=HeldOutLabels(HeldOutRows(measured, pad_id), lesson.hard_loss) if measured else None,
        rates=default_rates(dataclasses.replace(config.as_finetuning, lr_scale=scale), lesson.student),
        batch_tokens=batch * rows.row_len,
        default_epochs=_default_epochs(batch, len(learned)),
        loss_sum=lesson,
        betas=BETAS,
    )  # fmt: skip


def _default_epochs(batch: int, n_rows: int) -> float:
    return min(MOST_EPOCHS, max(LEAST_EPOCHS, LEAST_STEPS * batch / n_rows))


def _as_long(config: DistilConfig, n_labelled: int, n_others: int) -> DistilConfig:
    """For the rows with labels alone: as many steps as a run over all rows has."""
    if not n_others or config.steps is not None or config.minutes is not None:
        return config
    n_rows, batch = n_labelled + n_others, config.batch_size or BATCH_SIZE
    epochs = config.epochs or _default_epochs(batch, n_rows)
    return dataclasses.replace(config, epochs=None, steps=max(1, math.ceil(epochs * n_rows / batch)))


def _control(
    config: DistilConfig,
    lesson: LabelLesson,
    learned: Sequence[Example],
    kept: Sequence[Example],
    tokenizer: Tokenizer,
    held_out: Side,
) -> Scores | None:
    """What the same student comes to without the teacher, on the same rows for as long."""
    if not kept:
        return None
    out = config.out / CONTROL
    figures = out / "figures.json"
    if not figures.exists():
        out.mkdir(exist_ok=True)
        console.note("first the student without the teacher, to compare with")
        _trainer(dataclasses.replace(config, out=out, log_to=()), lesson, learned, kept, tokenizer.pad_id).run()
        files.write_json(figures, scores_on(lesson.student.eval(), tokenizer, lesson.kind, held_out))
    return dict(files.read_json(figures))


def _speeds(
    student: SequenceClassifier, teacher: SequenceClassifier, kept: Sequence[Example], pad_id: int
) -> dict[str, float]:
    """Rows a second, the best of three times."""
    rows = kept[:SPEED_ROWS]

    def speed(model: SequenceClassifier) -> float:
        seconds = []
        for _ in range(3):
            begun = time.perf_counter()
            predict(model, rows, pad_id)
            seconds.append(time.perf_counter() - begun)
        return len(rows) / min(seconds)

    mine, theirs = speed(student), speed(teacher)
    return {"rows_per_second": mine, "teacher_rows_per_second": theirs, "faster_by": mine / theirs}
