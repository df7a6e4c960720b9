"""A tiny language that is known, a teacher that has learned it, and little data for its students."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from danlu.models.causal_lm import CausalLM
from danlu.models.load import save_model
from danlu.nn.config import ModelConfig, Rope
from danlu.posttraining.distil_config import DistilConfig
from danlu.tokenizer.train import train_on
from danlu.training.config import FinetuneConfig
from danlu.training.finetune import finetune

WORDS = ("red", "blue", "stone", "water", "salt", "iron", "fire", "smoke", "ash", "gold")
SHAPE: dict[str, Any] = {
    "qk_norm": "head", "rope": Rope(), "n_layers": 4, "dim": 32, "n_heads": 2, "n_kv_heads": 1, "head_dim": 16,
    "ffn_dim": 64, "context": 128,
}  # fmt: skip
QUIET: dict[str, Any] = {
    "log_to": (), "compile": "never", "device": "cpu", "precision": "fp32", "heldout_every": 1000,
    "heldout_tokens": 2048,
}  # fmt: skip


def sentences(n: int, seed: int) -> list[dict[str, str]]:
    """Chats in a language in which three words can follow each word, one of them more often than the others."""
    draw = random.Random(seed)
    rows = []
    for _ in range(n):
        words = [draw.choice(WORDS)]
        while len(words) < 20:
            step = draw.choices((1, 3, 7), (6, 3, 1))[0]
            words.append(WORDS[(WORDS.index(words[-1]) + step) % len(WORDS)])
        rows.append({"prompt": " ".join(words[:3]), "completion": " ".join(words[3:])})
    return rows


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def untrained_folder(folder: Path, *, seed: int = 0, vocab_size: int = 320, **changes: Any) -> Path:
    texts = [f"user\n{row['prompt']} assistant\n{row['completion']}" for row in sentences(200, seed)]
    tokenizer = train_on(texts, vocab_size, 2)
    model = CausalLM(ModelConfig(vocab_size=tokenizer.vocab_size, **{**SHAPE, **changes}))
    model.init_weights(torch.Generator().manual_seed(seed))
    save_model(model, folder, tokenizer)
    return folder


def teacher_folder(folder: Path) -> Path:
    """A model that has read much of the language."""
    model = untrained_folder(folder / "untrained")
    data = write(folder / "much.jsonl", sentences(500, 1))
    return finetune(
        FinetuneConfig(
            model=model, data=data, out=folder / "teacher", steps=50, batch_tokens=1024, seq_len=64, lr_scale=1.0,
            heldout_share=0.0, **QUIET,
        )
    )  # fmt: skip


def config(teacher: Path, data: Path, out: Path, **changes: Any) -> DistilConfig:
    values: dict[str, Any] = {
        "teacher": teacher, "data": data, "out": out, "seq_len": 64, "batch_tokens": 256, "steps": 6,
        "heldout_share": 0.5, "keep_layers": 2, **QUIET,
    }  # fmt: skip
    return DistilConfig(**{**values, **changes})


def same_weights(a: Path, b: Path) -> bool:
    return (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
