"""A tiny untrained chat model whose answers end by themselves, after some dozen tokens."""

from __future__ import annotations

from pathlib import Path

import torch

from danlu.models.load import save_model
from danlu.tokenizer.train import train_on
from random_lm import random_lm


def stopping_teacher(folder: Path) -> Path:
    """Its stop token is worth as much, at any place, as the likeliest of other tokens."""
    tokenizer = train_on([f"Word {i} goes on and on, as words do.\n" for i in range(200)], 300, 2)
    model = random_lm(300, context=1024, std=0.05, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=32)
    with torch.no_grad():
        model.embed.weight[list(tokenizer.stop_ids)] *= 6
    save_model(model, folder, tokenizer)
    return folder
