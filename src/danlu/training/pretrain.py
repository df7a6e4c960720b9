"""`danlu pretrain`: a causal language model from scratch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from danlu import console
from danlu.config import validate
from danlu.data.folder import DataFolder, Split
from danlu.data.packing import DocumentSequences, RowStream
from danlu.data.tokens import tokenize
from danlu.errors import DanluError, Problems
from danlu.formats.card import Stage
from danlu.models.causal_lm import CausalLM
from danlu.models.config import model_config_for
from danlu.models.load import save_model
from danlu.nn.config import ModelConfig
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.training.config import PretrainConfig, TrainingConfig
from danlu.training.loop import HeldOut, Trainer


def pretrain(config: PretrainConfig) -> Path:
    """Train a model from scratch and write its model folder.

    Args:
        config: see :class:`PretrainConfig`. Without steps, minutes or epochs the run takes 20 tokens per weight
            (Hoffmann et al. 2022, arXiv:2203.15556).

    Returns:
        The model folder.

    Raises:
        Problems: impossible options, all at once.
        DanluError: the data is empty or smaller than one batch, the output folder cannot be used, or the disk is full.
        KeyboardInterrupt: stopped by Ctrl-C; the run can be resumed by calling again.
    """
    config = validate(config)
    inputs = {"data": config.data, "tokenizer": config.tokenizer}
    data, tokenizer = DataFolder(config.data), Tokenizer.load(config.tokenizer)
    stage = Stage.open(
        config.out, kind="model", verb="pretrain", config=config, inputs=inputs, overwrite=config.overwrite
    )
    if stage.finished:
        console.note(f"{config.out}: already made, nothing to do")
        return config.out

    shape = model_config_for(
        config.size,
        tokenizer.vocab_size,
        config.context or config.seq_len,
        dim=config.dim,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        ffn_dim=config.ffn_dim,
        rope_base=config.rope_base,
        tie_embeddings=config.tie_embeddings,
    )
    batch_tokens = config.batch_tokens or default_batch_tokens(shape)
    with stage.preparing():
        if problems := shape.problems():
            raise Problems("the model cannot have this shape:", problems)
        rows = _rows(data, "train", tokenizer, config)
        n_tokens = int(rows.sequences.lengths.sum())
        if n_tokens < batch_tokens and config.steps != 0:
            raise DanluError(
                f"{config.data}: has {n_tokens:,} training tokens, fewer than one batch of {batch_tokens:,}; "
                "add data, or lower batch_tokens"
            )
        held_out = _held_out_rows(data, tokenizer, config)
    model = CausalLM(shape)
    model.init_weights(torch.Generator().manual_seed(config.seed))
    if config.steps is None and config.minutes is None and config.epochs is None:
        config = dataclasses.replace(config, steps=max(1, 20 * model.num_parameters() // batch_tokens))
    trainer = Trainer(
        config, model, rows,
        held_out=held_out,
        rates=default_rates(config, shape),
        batch_tokens=batch_tokens,
    )  # fmt: skip
    metrics = trainer.run()
    save_model(model, config.out, tokenizer)
    stage.finish(metrics, trainer.details())
    trainer.clean_up()
    return config.out


def default_batch_tokens(shape: ModelConfig) -> int:
    """Tokens per step: a small model on a short run learns more from many small steps than from few large ones."""
    sizes = {256: 4_096, 512: 8_192, 1024: 32_768}
    return next((tokens for width, tokens in sizes.items() if shape.dim <= width), 131_072)


def default_rates(config: TrainingConfig, shape: ModelConfig, scale: float = 1.0) -> dict[str, float]:
    """Peak learning rates, tuned at width 256 (docs/log.md).

    Muon's does not depend on the width; those of embedding and head fall with its square root. An embedding of its own
    starts at standard deviation 1 and takes large steps; one that is also the head starts at 0.02 and cannot.
    """
    width = (shape.dim / 256) ** -0.5
    return {
        "matrix_lr": config.matrix_lr or scale * (0.002 * width if config.optimizer == "adamw" else 0.02),
        "embed_lr": config.embed_lr or scale * (0.01 if shape.tie_embeddings else 0.3) * width,
        "head_lr": config.head_lr or scale * 0.006 * width,
        "norm_lr": config.norm_lr or scale * 0.005,
    }


def _held_out_rows(data: DataFolder, tokenizer: Tokenizer, config: TrainingConfig) -> HeldOut | None:
    """The held-out rows that are measured while training; None when the data has none."""
    if not config.heldout_tokens or "heldout" not in data.splits():
        return None
    return HeldOut.first_rows(_rows(data, "heldout", tokenizer, config), config, tokenizer)


def _rows(data: DataFolder, split: Split, tokenizer: Tokenizer, config: TrainingConfig) -> RowStream:
    tokens = tokenize(data, split, tokenizer)
    sequences = DocumentSequences(tokens.ids, tokens.offsets, tokenizer.bos_id)
    return RowStream(sequences, config.seq_len, seed=config.seed, pad_id=tokenizer.pad_id)
