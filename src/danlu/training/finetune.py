"""`danlu finetune`: supervised fine-tuning on chats, instructions or plain text; other tasks have files of their own
(`classify.py`, `tag.py`, `seq2seq.py`)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from danlu import console, hardware
from danlu.adapters import training as adapters
from danlu.config import validate
from danlu.data.chat_rows import ChatRow, read_chat_rows
from danlu.data.folder import DataFolder
from danlu.data.packing import MaskedSequences, RowStream
from danlu.errors import DanluError
from danlu.formats.card import CARD, Stage
from danlu.hub.pull import with_models
from danlu.models.causal_lm import CausalLM
from danlu.models.load import load_model
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.training.classify import prepare_classify
from danlu.training.config import FinetuneConfig
from danlu.training.loop import HeldOut, Trainer
from danlu.training.optim import BETAS
from danlu.training.pretrain import default_batch_tokens, default_rates
from danlu.training.seq2seq import prepare_seq2seq
from danlu.training.tag import prepare_tag
from danlu.training.task import train_task

PREPARE = {"classify": prepare_classify, "tag": prepare_tag, "seq2seq": prepare_seq2seq}

Example = tuple[list[int], list[bool]]
"""Token ids, and which of them are learned."""


def finetune(config: FinetuneConfig) -> Path:
    """Fine-tune a model folder and write a new model folder.

    Of chats, the loss falls on the assistant's turns only (or on all tokens: ``train_on=all``); examples are packed
    without seeing each other. Without steps, minutes or epochs the run makes 2 passes over the data. For labels and
    pairs see :func:`danlu.training.task.train_task`.

    Args:
        config: see :class:`FinetuneConfig`.

    Returns:
        The new model folder.

    Raises:
        Problems: impossible options, all at once.
        DanluError: a row that cannot be used (with file and line), no row that fits, or an output folder that cannot be
            used.
        KeyboardInterrupt: stopped by Ctrl-C; the run can be resumed by calling again.
    """
    config = with_models(validate(config), "model")
    if config.task != "causal":
        return train_task(config, PREPARE[config.task])
    compute_dtype = hardware.DTYPES[hardware.pick_precision(config.precision, hardware.pick_device(config.device))]
    model = load_model(config.model, dtype=adapters.base_dtype(config, compute_dtype))
    tokenizer = Tokenizer.load(config.model)
    if config.seq_len > model.config.context:
        raise DanluError(
            f"seq_len ({config.seq_len}) is longer than the context of {config.model} "
            f"({model.config.context}); lower it"
        )
    if (config.balance_loss or config.router_z_loss) and model.config.experts is None:
        raise DanluError(f"balance_loss and router_z_loss are for mixtures of experts, and {config.model} is none")
    stage = Stage.open(
        config.out, kind=adapters.kind_of_output(config), verb="finetune", config=config,
        inputs={"model": config.model, "data": config.data}, overwrite=config.overwrite,
    )  # fmt: skip
    if stage.finished:
        console.note(f"{config.out}: already made, nothing to do")
        return config.out

    details: dict[str, Any] = {}
    with stage.preparing():
        if config.adapter != "none":
            tokenizer, details["adapter"] = adapters.begin_adapter(
                config, model, tokenizer, seed=config.seed, start=config.adapter_start
            )
            if config.optimizer == "auto":
                config = dataclasses.replace(config, optimizer="adamw")
        reader = adapters.reads_tokens(tokenizer, config.new_tokens) if config.new_tokens else tokenizer
        train, held_out = read_examples(config, reader)
    rows = RowStream(MaskedSequences(train), config.seq_len, seed=config.seed, pad_id=tokenizer.pad_id)
    trainer = Trainer(
        config, model, rows,
        held_out=_held_out_rows(held_out, tokenizer, config),
        rates=_rates(config, model),
        batch_tokens=config.batch_tokens or default_batch_tokens(model.config),
        default_epochs=2.0,
        betas=BETAS if config.adapter == "none" else adapters.BETAS,
        balance_loss=config.balance_loss,
        router_z_loss=config.router_z_loss,
        neftune_alpha=config.neftune_alpha,
    )  # fmt: skip
    metrics = trainer.run()
    adapters.save_trained(model, config.out, config.model, tokenizer, with_tokenizer=bool(config.new_tokens))
    metrics |= {"examples": len(train), "heldout_examples": len(held_out)}
    stage.finish(metrics, {**trainer.details(), **details})
    trainer.clean_up()
    return config.out


def _rates(config: FinetuneConfig, model: CausalLM) -> dict[str, float]:
    if config.adapter != "none":
        return adapters.learning_rates(config, adapters.RATE * (config.lr_scale or 1.0))
    return default_rates(config, model.config, scale=config.lr_scale or 0.1)


def read_examples(config: FinetuneConfig, tokenizer: Tokenizer) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples; those longer than a row are left out and counted."""
    train: list[Example] = []
    held_out: list[Example] = []
    too_long = without_target = 0
    for row, is_held_out in _rows(config):
        ids, mask = _encode(row, config, tokenizer)
        if len(ids) - 1 > config.seq_len:
            too_long += 1
        elif not any(mask[1:]):
            without_target += 1
        else:
            (held_out if is_held_out else train).append((ids, mask))
    total = len(train) + len(held_out) + too_long + without_target
    if too_long:
        console.warn(
            f"{config.data}: {too_long:,} of {total:,} rows are longer than seq_len ({config.seq_len} tokens) "
            "and left out"
        )
    if without_target:
        console.warn(
            f"{config.data}: {without_target:,} of {total:,} rows have nothing to learn (no answer) and are left out"
        )
    if not train:
        raise DanluError(
            f"{config.data}: no row is left to train on; raise seq_len (now {config.seq_len}) or add rows with answers"
        )
    return train, held_out


def _rows(config: FinetuneConfig) -> Iterator[tuple[ChatRow, bool]]:
    """All rows, and whether each is held out: by the data folder's own split, else by a hash of the row."""
    if (config.data / CARD).exists():
        for split in DataFolder(config.data).splits():
            for row in read_chat_rows(config.data, config.on_error, split):
                yield row, split == "heldout"
        return
    heldout_share = 0.02 if config.heldout_share is None else config.heldout_share
    for row in read_chat_rows(config.data, config.on_error):
        content = json.dumps(row.messages or row.text, sort_keys=True, ensure_ascii=False)
        share = int.from_bytes(hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()[:4], "big") / 2**32
        yield row, share < heldout_share


def _encode(row: ChatRow, config: FinetuneConfig, tokenizer: Tokenizer) -> Example:
    try:
        if row.text is not None:
            ids = [tokenizer.bos_id, *tokenizer.encode(row.text), tokenizer.bos_id]
            return ids, [True] * len(ids)
        return tokenizer.encode_chat_with_mask(row.messages, train_on=config.train_on)
    except DanluError as error:
        raise DanluError(f"{row.where}: {error}") from error


def _held_out_rows(examples: list[Example], tokenizer: Tokenizer, config: FinetuneConfig) -> HeldOut | None:
    if not examples or not config.heldout_tokens:
        return None
    rows = RowStream(MaskedSequences(examples), config.seq_len, seed=config.seed, pad_id=tokenizer.pad_id)
    return HeldOut.first_rows(rows, config, tokenizer)
