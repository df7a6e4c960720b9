"""A tiny random T5 in a folder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import T5Config, T5ForConditionalGeneration

from danlu.tokenizer.tokenizer import Tokenizer


def t5_folder(folder: Path, tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=tokenizer.vocab_size, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=tokenizer.pad_id,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save(folder)
