"""What `danlu distil` takes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from danlu.config import REQUIRED, option
from danlu.training.config import FinetuneConfig, TrainingConfig
from danlu.training.heldout_config import HeldOutOptions
from danlu.training.labelled_config import LabelledOptions

CONTROL = "control"
"""Folder, inside that of the run, of the student that learns without the teacher; gone when the run is finished."""


@dataclass(frozen=True, kw_only=True)
class DistilConfig(TrainingConfig, HeldOutOptions, LabelledOptions):
    """Train a smaller model, the student, to do as a larger one does, its teacher."""

    teacher: Path = option(REQUIRED, "The teacher: a model folder, GGUF file or name (smollm2).", positional=True)
    data: Path = option(
        REQUIRED,
        "What both read: a data folder of text, or chats, instructions or texts in JSON Lines, JSON, CSV or Parquet "
        "files; classify: rows with text, label.",
    )
    task: Literal["causal", "classify"] = option(
        "causal", "What the teacher does: go on with a text, or classify texts."
    )
    method: Literal["logits", "sequence"] = option(
        "logits",
        "logits: the student follows the teacher's probabilities; sequence: the teacher writes an answer to each "
        "prompt, and the student is fine-tuned on them.",
    )

    student: Path | None = option(None, "Model folder to start the student from; its tokenizer must be the teacher's.")
    keep_layers: int | None = option(
        None, "Start from the teacher with so many of its layers, evenly spread.", unit="layers", ge=1
    )
    layers: tuple[str, ...] = option((), "Start from the teacher with these of its layers, numbered from 0: 0,2,4.")
    size: int | None = option(
        None, "Start from a new model of the teacher's family: number of layers; the width is 64 times it.",
        unit="layers", ge=1, le=128,
    )  # fmt: skip
    dim: int | None = option(None, "Width of a new student; default 64 x size, else the teacher's.", ge=8, le=16384)
    n_heads: int | None = option(None, "Query heads of a new student; default in the teacher's proportion.", ge=1)
    n_kv_heads: int | None = option(
        None, "Key and value heads of a new student; default in the teacher's proportion.", ge=1
    )
    head_dim: int | None = option(None, "Width of a head of a new student; default the teacher's.", ge=8, le=256)
    ffn_dim: int | None = option(
        None, "Width of the feed-forward layer of a new student; default in the teacher's proportion.", ge=8
    )
    init: Literal["teacher", "random"] = option(
        "teacher",
        "What a new student begins with: the teacher's weights, cut to its shape; or random ones, as to train from "
        "scratch.",
    )

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = option(
        "forward_kl",
        "How far the student's probabilities are from the teacher's: KL(teacher || student), which covers all the "
        "teacher would say; KL(student || teacher), which keeps to what it is surest of; or Jensen-Shannon's, between.",
    )
    jsd_beta: float = option(0.5, "jsd: the teacher's share in the mixture; near 0 as forward_kl.", gt=0, lt=1)
    temperature: float = option(
        1.0, "Divides the logits of both before they are compared: above 1, what is unlikely counts for more.",
        gt=0, le=100,
    )  # fmt: skip
    hard_share: float | None = option(
        None,
        "Share of the ordinary loss, on what the data says, in the sum of both losses; default 0, classify: 0.5.",
        ge=0,
        le=1,
    )
    hidden_weight: float = option(0.0, "Weight of the loss between hidden states of layers; 0: none.", ge=0)
    hidden_loss: Literal["mse", "cosine"] = option("mse", "How hidden states are compared: TinyBERT's or DistilBERT's.")
    attention_weight: float = option(0.0, "Weight of the loss between attention maps of layers; 0: none.", ge=0)
    layer_map: dict[int, int] = option(
        {},
        "Which layer of the teacher each layer of the student is compared with, both from 0, as '{0: 1, 1: 3}'; "
        "default: evenly spread.",
    )

    teacher_top_k: int = option(
        0,
        "Keep the teacher's k most likely tokens of each position on disk, in the cache, computed once and used again; "
        "0: ask the teacher at each step.",
        ge=0,
        le=65536,
    )
    on_policy: float = option(
        0.0, "Share of the steps whose answers the student writes, for the teacher to correct (GKD).", ge=0, le=1
    )
    answer_tokens: int = option(
        128, "Longest answer that teacher (sequence) or student (on_policy) write.", unit="tokens", ge=1, le=131072
    )
    answer_temperature: float | None = option(
        None, "Temperature that answers are written at; default 1 for the student, 0 for the teacher: its likeliest.",
        ge=0, le=100,
    )  # fmt: skip
    prompt_tokens: int = option(
        32, "Of a text that is no chat, so many tokens are the prompt.", unit="tokens", ge=1, le=131072
    )
    control: bool | None = option(
        None,
        "Also train the same student, from the same start, without the teacher, for as many steps, to tell what its "
        "lessons were good for; default: for classify.",
    )

    train_on: Literal["assistant", "all"] = option("assistant", "Which tokens of a chat carry loss.")
    unlabelled: Path | None = option(
        None,
        "classify: texts without labels; of these the student learns what the teacher says, and nothing else.",
    )
    lr_scale: float | None = option(
        None,
        "Multiplies the default learning rates: those of pre-training (default 1, for a student with the teacher's "
        "weights 0.3), or for labels those of fine-tuning (default 1, for random weights 10).",
        gt=0,
        le=10,
    )

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """``layers`` as numbers."""
        return tuple(int(number) for number in ",".join(self.layers).split(",") if self.layers)

    @property
    def shape(self) -> dict[str, int]:
        """The numbers of a new student that are given."""
        return {name: number for name in SHAPE if (number := getattr(self, name)) is not None}

    @property
    def as_finetuning(self) -> FinetuneConfig:
        """The options that `danlu finetune` has too, for what reads the data."""
        mine = {field.name for field in fields(self)}
        shared = {field.name: getattr(self, field.name) for field in fields(FinetuneConfig) if field.name in mine}
        return FinetuneConfig(model=self.teacher, **shared)

    @property
    def from_scratch(self) -> bool:
        """Whether the student begins with nothing."""
        return bool(self.shape) and self.init == "random"

    @property
    def compares_layers(self) -> bool:
        """Whether hidden states or attention maps are compared."""
        return bool(self.hidden_weight or self.attention_weight)

    def problems(self) -> list[str]:
        """What cannot be right between the options."""
        found = super().problems()
        origins = [name for name in ("student", "keep_layers", "layers") if getattr(self, name) not in (None, ())]
        if self.shape:
            origins.append(next(iter(self.shape)))
        if len(origins) != 1:
            given = " and ".join(origins) or "nothing"
            found.append(
                f"{given} says what the student is; give one: keep_layers or layers (the teacher's), size or dim (a "
                "new one), or student (a folder)"
            )
        numbers = ",".join(self.layers).split(",") if self.layers else []
        if not all(number.strip().isdecimal() for number in numbers):
            found.append(f"layers: {','.join(self.layers)!r} are no numbers of layers, as in 0,2,4")
        elif sorted({int(number) for number in numbers}) != [int(number) for number in numbers]:
            found.append(f"layers: {','.join(self.layers)} must be in rising order, each once")
        if _is_given(self, "init") and not self.shape:
            found.append("init is for a new student (size, dim); keep_layers, layers and student say it themselves")
        found += self._not_for_task()
        found += self._conflicts()
        return found

    def _not_for_task(self) -> list[str]:
        return [
            f"{name} is for task={task}, not {self.task}"
            for task, names in _ONLY.items()
            for name in names
            if self.task != task and _is_given(self, name)
        ]

    def _conflicts(self) -> list[str]:
        found = []
        if self.method == "sequence":
            found += [f"{name} is for method=logits, not sequence" for name in _FOR_LOGITS if _is_given(self, name)]
        if _is_given(self, "jsd_beta") and self.divergence != "jsd":
            found.append(f"jsd_beta is for divergence=jsd, not {self.divergence}")
        for name in ("hidden_loss", "layer_map"):
            if _is_given(self, name) and not (self.hidden_weight or (self.attention_weight and name == "layer_map")):
                found.append(f"{name} is given, and no layers are compared; give hidden_weight too")
        if self.method == "logits" and not self.on_policy:
            found += [f"{name} is given, and nobody writes answers" for name in _FOR_ANSWERS if _is_given(self, name)]
        if self.teacher_top_k and self.on_policy:
            found.append("teacher_top_k and on_policy exclude each other: nobody knows what the student will write")
        if self.compares_layers:
            if self.teacher_top_k:
                found.append("teacher_top_k keeps probabilities only; to compare layers the teacher is asked each time")
            if self.on_policy:
                found.append("hidden_weight and attention_weight are not for on_policy; give one or the other")
            if self.gradient_checkpointing:
                found.append("gradient_checkpointing keeps no hidden states to compare; leave it out")
            if self.compile == "always":
                found.append("compile=always leaves no hidden states to compare; leave it out")
        if self.compile == "always" and (self.on_policy or self.task == "classify"):
            found.append("compile=always is for rows of one length, not for on_policy or classify")
        if self.teacher_top_k and self.hard_share == 1:
            found.append("hard_share=1 leaves nothing to learn from the teacher")
        found += self.heldout_problems()
        return found


SHAPE = ("size", "dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim")

_ONLY = {
    "causal": (
        "train_on", "batch_tokens", "method", "teacher_top_k", "on_policy", "answer_tokens", "answer_temperature",
        "prompt_tokens", "divergence", "jsd_beta",
    ),
    "classify": (
        "heldout", "unlabelled", "batch_size", "text_column", "text2_column", "label_column", "label_kind",
        "label_names",
    ),
}  # fmt: skip
"""Options that mean something for one task only; given for another they are refused, not passed over."""

_FOR_LOGITS = (
    "divergence", "jsd_beta", "temperature", "hard_share", "hidden_weight", "attention_weight", "teacher_top_k",
    "on_policy",
)  # fmt: skip

_FOR_ANSWERS = ("answer_tokens", "answer_temperature", "prompt_tokens")


def _is_given(config: DistilConfig, name: str) -> bool:
    default: Any = type(config).__dataclass_fields__[name].default
    if name == "layer_map":
        default = {}
    return bool(getattr(config, name) != default)
