"""Language models as students: they learn next-token probabilities, layers, answers that the teacher wrote, or how the
teacher judges their own."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from danlu import console, files, hardware
from danlu.data.folder import DataFolder
from danlu.data.packed_examples import Example
from danlu.data.packing import DocumentSequences, MaskedSequences, RowStream, Sequences
from danlu.data.tokens import tokenize
from danlu.errors import DanluError
from danlu.formats.card import CARD, Stage, fingerprint_of
from danlu.models.causal_lm import CausalLM
from danlu.models.load import load_model, save_model
from danlu.posttraining.answers import Writer, teacher_answers
from danlu.posttraining.distil_config import CONTROL, DistilConfig
from danlu.posttraining.layer_matching import layer_matching
from danlu.posttraining.lesson import Lesson, nll_sum
from danlu.posttraining.students import copied, make_student
from danlu.posttraining.taught_rows import OnPolicyRows, TaughtBatch, TaughtRows
from danlu.posttraining.teacher_cache import TeacherCache, cache_teacher
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.training.finetune import read_examples
from danlu.training.loop import HeldOut, LossSum, Rows, Trainer
from danlu.training.metrics import Numbers
from danlu.training.pretrain import default_batch_tokens, default_rates

READ_TOKENS = 4096
"""Tokens of a forward pass of the teacher over the whole data, or of a model that is measured."""

SPEED_ROUNDS = 3
"""How often held-out text is read to see how fast a model is; the best counts."""


@dataclass
class HeldOutText:
    """Held-out text measured while training, by the student's own loss, whatever it is taught by."""

    text: HeldOut
    model: CausalLM

    def measure(self, loss_sum: LossSum, micro_rows: int, device: torch.device) -> Numbers:
        """Bits per byte; as in :class:`~danlu.training.loop.Measurement`."""
        return self.text.measure(partial(nll_sum, self.model), micro_rows, device)


def distil_causal(config: DistilConfig, stage: Stage) -> Path:
    """See :func:`danlu.posttraining.distil.distil`."""
    with stage.preparing():
        tokenizer, teacher = Tokenizer.load(config.teacher), load_model(config.teacher)
        student = make_student(config, teacher, tokenizer)
        _require_room(config, teacher, student)
        sequences, text = _read(config, tokenizer)
        matching = layer_matching(config, student, teacher)
        teacher = _as_it_computes(config, config.teacher)

    def rows_of(sequences: Sequences) -> TaughtRows:
        return TaughtRows(sequences, config.seq_len, seed=config.seed, pad_id=tokenizer.pad_id)

    rows = rows_of(sequences)
    found: dict[str, Any] = {}
    if config.control:
        found["control"] = _control(config, copied(student), rows_of(sequences), text)
    begun = time.monotonic()
    cache = None
    if config.method == "sequence":
        examples = _teacher_answers(config, tokenizer, rows)
        rows = rows_of(MaskedSequences(examples))
        found |= {"answers": len(examples), "answer_tokens": sum(sum(learned) for _, learned in examples)}
    elif config.teacher_top_k:
        cache = _cached(config, teacher, rows)
    found["teacher_seconds"] = round(time.monotonic() - begun, 3)

    if matching is not None:
        student.add_module("matching", matching)  # its projections are trained with the student, and then left behind
    lesson = Lesson.of(config, student, teacher, cache, matching)
    learn: LossSum = lesson if config.method == "logits" else partial(_hard_loss, student)
    with _on_policy(config, tokenizer, student, rows) as taught:
        trainer = _trainer(config, student, taught, text, learn)
        metrics = trainer.run()
    if matching is not None:
        del student.matching
    save_model(student, config.out, tokenizer)
    stage.finish({**metrics, **found, **_compared(config, teacher, text)}, trainer.details())
    trainer.clean_up()
    shutil.rmtree(config.out / CONTROL, ignore_errors=True)
    return config.out


def _require_room(config: DistilConfig, teacher: CausalLM, student: CausalLM) -> None:
    for path, model in ((config.teacher, teacher), (config.student or "student", student)):
        if config.seq_len > model.config.context:
            raise DanluError(
                f"seq_len ({config.seq_len}) is longer than the context of {path} ({model.config.context}); lower it"
            )
    if config.teacher_top_k >= teacher.config.vocab_size:
        raise DanluError(
            f"teacher_top_k ({config.teacher_top_k}) is the whole vocabulary of {teacher.config.vocab_size}; lower it, "
            "or leave it out"
        )


def _read(config: DistilConfig, tokenizer: Tokenizer) -> tuple[Sequences, HeldOut | None]:
    """What is learned from, and the held-out text: documents of a data folder, cut where they are longer than a row,
    or examples as `danlu finetune` has them."""
    held_out: Sequences | None = None
    if (config.data / CARD).exists() and next(DataFolder(config.data).documents("train")).kind == "text":
        data = DataFolder(config.data)
        splits = {split: tokenize(data, split, tokenizer) for split in data.splits()}
        documents = {
            split: DocumentSequences(tokens.ids, tokens.offsets, tokenizer.bos_id) for split, tokens in splits.items()
        }
        train: Sequences = documents["train"]
        held_out = documents.get("heldout")
    else:
        examples, others = read_examples(config.as_finetuning, tokenizer)
        train = MaskedSequences(examples)
        held_out = MaskedSequences(others) if others else None
    if held_out is None or not config.heldout_tokens:
        return train, None
    rows = RowStream(held_out, config.seq_len, seed=config.seed, pad_id=tokenizer.pad_id)
    return train, HeldOut.first_rows(rows, config, tokenizer)


def _as_it_computes(config: DistilConfig, path: Path) -> CausalLM:
    """A model that is only asked, in the dtype that the run computes in."""
    device = hardware.pick_device(config.device)
    dtype = hardware.DTYPES[hardware.pick_precision(config.precision, device)]
    return load_model(path, device=device, dtype=dtype).requires_grad_(False)


def _hard_loss(model: CausalLM, taught: TaughtBatch) -> Tensor:
    return nll_sum(model, taught.batch)


def _trainer(config: DistilConfig, student: CausalLM, rows: Rows, text: HeldOut | None, learn: LossSum) -> Trainer:
    if config.compares_layers or config.on_policy:
        config = dataclasses.replace(config, compile="never")  # hooks, and rows that come in other numbers each time
    return Trainer(
        config, student, rows,
        held_out=None if text is None else HeldOutText(text, student),
        rates=default_rates(config, student.config, config.lr_scale or (1.0 if config.from_scratch else 0.3)),
        batch_tokens=config.batch_tokens or default_batch_tokens(student.config),
        default_epochs=2.0,
        loss_sum=learn,
    )  # fmt: skip


def _control(config: DistilConfig, student: CausalLM, rows: TaughtRows, text: HeldOut | None) -> dict[str, Any]:
    """What the same student comes to without the teacher, on the same rows for as long."""
    out = config.out / CONTROL
    figures = out / "figures.json"
    if not figures.exists():
        out.mkdir(exist_ok=True)
        console.note("first the student without the teacher, to compare with")
        config = dataclasses.replace(config, out=out, log_to=())
        metrics = _trainer(config, student, rows, text, partial(_hard_loss, student)).run()
        files.write_json(figures, {name: metrics.get(name) for name in ("steps", "tokens", "heldout_bits_per_byte")})
    return dict(files.read_json(figures))


def _teacher_answers(config: DistilConfig, tokenizer: Tokenizer, rows: TaughtRows) -> list[Example]:
    writer = _writer(config, config.teacher, tokenizer, config.answer_temperature or 0.0)
    prompts = rows.prompts(range(rows.rows_per_epoch), config.prompt_tokens)
    try:
        return teacher_answers(config.out, writer, prompts)
    finally:
        writer.close()


def _cached(config: DistilConfig, teacher: CausalLM, rows: TaughtRows) -> TeacherCache:
    return cache_teacher(
        teacher, fingerprint_of(config.teacher), rows, k=config.teacher_top_k, temperature=config.temperature,
        micro_rows=max(1, (config.micro_batch_tokens or READ_TOKENS) // config.seq_len),
    )  # fmt: skip


@contextmanager
def _on_policy(config: DistilConfig, tokenizer: Tokenizer, student: CausalLM, rows: TaughtRows) -> Iterator[Rows]:
    """The rows, some of them written by the student where that is asked for."""
    if not config.on_policy:
        yield rows
        return
    temperature = 1.0 if config.answer_temperature is None else config.answer_temperature
    writer = _writer(config, student, tokenizer, temperature)
    try:
        yield OnPolicyRows(
            rows, config.on_policy, writer.examples, prompt_tokens=config.prompt_tokens, pad_id=tokenizer.pad_id
        )
    finally:
        writer.close()


def _writer(config: DistilConfig, model: Path | CausalLM, tokenizer: Tokenizer, temperature: float) -> Writer:
    return Writer(
        model, tokenizer, row_len=config.seq_len, answer_tokens=config.answer_tokens, temperature=temperature,
        seed=config.seed, device=config.device,
    )  # fmt: skip


def _compared(config: DistilConfig, teacher: CausalLM, text: HeldOut | None) -> dict[str, Any]:
    """Sizes of both and, on the held-out text, bits per byte and speed."""
    student = _as_it_computes(config, config.out)
    n_student, n_teacher = student.num_parameters(), teacher.num_parameters()
    found: dict[str, Any] = {
        "parameters": n_student, "teacher_parameters": n_teacher, "smaller_by": 1 - n_student / n_teacher,
    }  # fmt: skip
    if text is None:
        return found
    bits, speed = _bits_and_speed(student, text)
    teacher_bits, teacher_speed = _bits_and_speed(teacher, text)
    return found | {
        "heldout_bits_per_byte": bits,
        "teacher_bits_per_byte": teacher_bits,
        "reading_tokens_per_second": speed,
        "teacher_reading_tokens_per_second": teacher_speed,
        "faster_by": speed / teacher_speed,
    }


@torch.inference_mode()
def _bits_and_speed(model: CausalLM, text: HeldOut) -> tuple[float, float]:
    """Bits per byte, and tokens a second that are read and predicted."""
    found: Numbers = {}
    seconds = []
    for _ in range(SPEED_ROUNDS):
        begun = time.perf_counter()
        found = text.measure(partial(nll_sum, model), max(1, READ_TOKENS // text.batch.ids.shape[1]), model.device)
        seconds.append(time.perf_counter() - begun)
    return found["heldout_bits_per_byte"] or 0.0, text.batch.n_tokens / min(seconds)
