"""What `danlu pretrain` and `danlu finetune` take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from danlu.adapters.config import AdapterOptions, AdapterStart
from danlu.config import REQUIRED, option
from danlu.training.heldout_config import HeldOutOptions
from danlu.training.labelled_config import LabelledOptions


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Options every training run has. Exactly one of steps, minutes and epochs sets how long it is."""

    out: Path = option(REQUIRED, "Model folder to write.", affects_result=False)
    steps: int | None = option(
        None, "Length of the run in optimizer steps; 0 writes the model as it starts.", unit="steps", ge=0
    )
    minutes: float | None = option(
        None,
        "Length of the run in wall time, start-up and compilation included; turned into steps at the start.",
        unit="minutes",
        gt=0,
    )
    epochs: float | None = option(None, "Length of the run in passes over the data.", unit="epochs", gt=0)
    seq_len: int = option(
        512,
        "Length of a packed row; of a labelled row, what it is cut to if it is longer.",
        unit="tokens",
        ge=8,
        le=131072,
    )
    batch_tokens: int = option(0, "Tokens per optimizer step; 0 derives it from the size.", unit="tokens", ge=0)
    micro_batch_tokens: int = option(
        0, "Tokens per forward pass; 0 fits it to the machine. Changes memory, not the result.", unit="tokens", ge=0
    )
    optimizer: Literal["auto", "muon", "adamw"] = option(
        "auto",
        "Optimizer of the matrices; embeddings and norms always use AdamW. auto: Muon, but AdamW for labels and pairs.",
    )
    matrix_lr: float | None = option(
        None,
        "Learning rate of the matrices; default 0.02 for Muon, 0.002 for AdamW, 5e-5 for labels and pairs, 5e-4 for "
        "adapters; wider models get less, but for adapters.",
        gt=0,
        le=1,
    )
    embed_lr: float | None = option(None, "Learning rate of the embedding; default derived from the width.", gt=0, le=1)
    head_lr: float | None = option(
        None,
        "Learning rate of the head, unless it is tied to the embedding; default derived from the width.",
        gt=0,
        le=1,
    )
    norm_lr: float | None = option(None, "Learning rate of norm weights; default 0.005.", gt=0, le=1)
    weight_decay: float = option(0.0, "Weight decay of the matrices at the start; falls linearly to 0.", ge=0, lt=1)
    schedule: Literal["wsd", "cosine", "constant"] = option(
        "wsd", "Learning-rate schedule: warm-up, constant, linear decay; or cosine."
    )
    warmup_steps: int = option(40, "Steps of linear warm-up; at most a tenth of the run is used.", unit="steps", ge=0)
    decay_share: float = option(0.6, "Share of the run over which the rate falls to zero (wsd).", ge=0, le=1)
    clip_norm: float = option(0.0, "Largest gradient norm; 0 switches clipping off.", ge=0)
    skip_sigma: float = option(
        6.0,
        "Skip a step whose loss or gradient norm lies this many standard deviations above the recent mean; "
        "0 skips non-finite ones only.",
        unit="sigma",
        ge=0,
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto",
        "Dtype of activations and products; weights stay fp32. auto: bf16 where the hardware computes it, else fp32.",
    )
    compile: Literal["auto", "always", "never"] = option(
        "auto", "torch.compile; auto: where it pays and a C++ compiler is there."
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass: less memory, about a third slower."
    )
    heldout_every: int = option(
        0, "Steps between held-out measurements; 0: ten in a run.", unit="steps", ge=0, affects_result=False
    )
    heldout_tokens: int = option(
        8_192, "Held-out tokens measured during training.", unit="tokens", ge=0, affects_result=False
    )
    checkpoint_every: int = option(100, "Steps between checkpoints.", unit="steps", ge=1, affects_result=False)
    keep_checkpoints: int = option(
        2, "Checkpoints kept while training; all go when the run is finished.", ge=1, affects_result=False
    )
    log_every: int = option(1, "Steps between lines in metrics.jsonl.", unit="steps", ge=1, affects_result=False)
    log_to: tuple[str, ...] = option(
        ("tensorboard",),
        "Where metrics go besides metrics.jsonl: tensorboard, trackio, wandb.",
        affects_result=False,
    )
    seed: int = option(0, "Seed of the weights and of the order of the data.", ge=0, lt=2**63)
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    threads: int = option(
        0, "CPU threads; 0: one per core. Another number may change the last bits of the result.", unit="threads", ge=0
    )
    overwrite: bool = option(False, "Replace another run in the output folder.", affects_result=False)

    def problems(self) -> list[str]:
        """What cannot be right between the options."""
        found = []
        lengths = [name for name in ("steps", "minutes", "epochs") if getattr(self, name) is not None]
        if len(lengths) > 1:
            found.append(f"{' and '.join(lengths)} are given; give one of steps, minutes, epochs")
        if self.batch_tokens and self.batch_tokens < self.seq_len:
            found.append(f"batch_tokens ({self.batch_tokens}) is less than one row of seq_len ({self.seq_len}) tokens")
        if unknown := sorted(set(self.log_to) - {"tensorboard", "trackio", "wandb"}):
            found.append(f"log_to: unknown logger {unknown[0]!r}; known: tensorboard, trackio, wandb")
        if self.device not in ("auto", "cpu", "cuda") and not (
            self.device[:5] == "cuda:" and self.device[5:].isdecimal()
        ):
            found.append(f"device: {self.device!r} is not auto, cpu, cuda or cuda:N")
        return found


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    """Train a causal language model from scratch. One dial, ``size``, derives width, heads, batch and learning
    rates."""

    data: Path = option(REQUIRED, "Data folder made by `danlu data build`.")
    tokenizer: Path = option(REQUIRED, "Tokenizer folder made by `danlu tokenizer train`.")
    size: int = option(4, "The dial: number of layers; the width is 64 times it.", unit="layers", ge=1, le=128)
    dim: int | None = option(None, "Width; default 64 x size.", ge=32, le=16384)
    n_heads: int | None = option(None, "Query heads; default width / 64.", ge=1)
    n_kv_heads: int | None = option(None, "Key and value heads; default half the query heads.", ge=1)
    head_dim: int | None = option(None, "Width of a head; default 64.", ge=8, le=256)
    ffn_dim: int | None = option(None, "Width of the feed-forward layer; default 8/3 of the width.", ge=8)
    rope_base: float | None = option(None, "Base of the rotary frequencies; default 10,000.", gt=1)
    tie_embeddings: bool = option(False, "Share the weights of embedding and head: smaller, and learns slower.")
    context: int | None = option(
        None,
        "Longest context the model is made for; default seq_len, the length it is trained at.",
        unit="tokens",
        ge=8,
    )

    def problems(self) -> list[str]:
        """What cannot be right between the options."""
        found = super().problems()
        if self.context and self.context < self.seq_len:
            found.append(f"context ({self.context}) is shorter than seq_len ({self.seq_len})")
        if self.dim and self.dim % 32:
            found.append(f"dim ({self.dim}) must be a multiple of 32")
        if self.n_heads and self.n_kv_heads and self.n_heads % self.n_kv_heads:
            found.append(f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})")
        return found


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingConfig, HeldOutOptions, LabelledOptions, AdapterOptions):
    """Fine-tune a model: on chats, instructions or plain text, or to label, tag, translate, summarise."""

    model: Path = option(REQUIRED, "Model folder, GGUF file or name (smollm2) to start from.", positional=True)
    data: Path = option(
        REQUIRED,
        "JSON Lines, JSON, CSV, TSV or Parquet files, or a data folder. causal: chat, ShareGPT, Alpaca, "
        "prompt-completion or text rows; classify: text, label; tag: tokens, tags, or text, spans, or CoNLL files; "
        "seq2seq: source, target.",
    )
    task: Literal["causal", "classify", "tag", "seq2seq"] = option(
        "causal",
        "What is learned: to go on with a text, labels or numbers of texts, labels of words, or a text for a text "
        "(encoder-decoders).",
    )
    train_on: Literal["assistant", "all"] = option("assistant", "Which tokens of a chat carry loss.")
    lr_scale: float | None = option(
        None,
        "Multiplies the default learning rates: those of pre-training (default 0.1), for labels and pairs those of "
        "fine-tuning, for adapters 5e-4 (default 1).",
        gt=0,
        le=10,
    )
    balance_loss: float = option(
        0.0, "Weight of the loss that spreads tokens evenly over a mixture's experts; Mixtral used 0.02.", ge=0
    )
    router_z_loss: float = option(
        0.0, "Weight of the loss that keeps the logits of a mixture's routers small; 0.001 is usual.", ge=0
    )
    neftune_alpha: float = option(
        0.0,
        "NEFTune: noise on the embeddings while training, uniform within alpha / sqrt(tokens of the example x width); "
        "5 to 15 are usual, 0 is none.",
        ge=0,
        le=1000,
    )
    adapter_start: AdapterStart = option(
        "auto",
        "What an adapter begins as: zero, the model as it is; error: with what quantize=4bit has lost of the weights, "
        "as far as its rank reaches, which belongs to the 4-bit base alone; auto: error with 4bit (encoder-decoders: "
        "zero).",
    )
    target_len: int = option(
        128, "seq2seq: longest target; rows with a longer one are left out.", unit="tokens", ge=2, le=131072
    )
    heldout_answers: int = option(
        100, "seq2seq: held-out rows that the model answers in the end, to be compared with their targets.", ge=0
    )

    def problems(self) -> list[str]:
        """What cannot be right between the options."""
        found = super().problems()
        for name, tasks in _ONLY.items():
            default = type(self).__dataclass_fields__[name].default
            if self.task not in tasks and getattr(self, name) != default:
                found.append(f"{name} is for task={' or '.join(tasks)}, not {self.task}")
        found += self.adapter_problems()
        if self.adapter != "none" and self.optimizer == "muon":
            found.append("optimizer=muon is for whole matrices; an adapter's are learned with adamw")
        if self.adapter_start == "error" and not self.in_4_bits:
            found.append("adapter_start=error makes up for what quantize=4bit loses; add that, or leave it out")
        if self.adapter_start == "zero" and self.adapter == "none":
            found.append("adapter_start is for adapters; add adapter=lora")
        if self.new_tokens and self.task != "causal":
            found.append(f"new_tokens are for task=causal, not {self.task}")
        if self.task != "causal" and self.compile == "always":
            found.append("compile=always is for task=causal: the rows of other tasks are of all lengths")
        found += self.heldout_problems()
        if self.label_names and self.label_kind == "number":
            found.append("label_names are given, and label_kind=number has no labels")
        if len(set(self.label_names)) < len(self.label_names):
            found.append("label_names: a name comes twice")
        return found


_ONLY: dict[str, tuple[str, ...]] = {
    "train_on": ("causal",),
    "batch_tokens": ("causal",),
    "balance_loss": ("causal",),
    "router_z_loss": ("causal",),
    "neftune_alpha": ("causal",),
    "heldout": ("classify", "tag", "seq2seq"),
    "batch_size": ("classify", "tag", "seq2seq"),
    "text_column": ("classify", "tag", "seq2seq"),
    "label_column": ("classify", "tag", "seq2seq"),
    "text2_column": ("classify",),
    "label_kind": ("classify",),
    "label_names": ("classify", "tag"),
    "target_len": ("seq2seq",),
    "heldout_answers": ("seq2seq",),
}
"""Options that mean something for some tasks only; given for another they are refused, not passed over."""
