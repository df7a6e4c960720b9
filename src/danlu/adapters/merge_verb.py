"""`danlu merge`: an adapter put into its base, as a model folder like any other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from danlu import console
from danlu.adapters.lora import merge
from danlu.adapters.open import open_adapted, trained_in
from danlu.adapters.peft_config import TASK_TYPES, read_peft_config
from danlu.adapters.verbs_config import MergeConfig
from danlu.adapters.wrapper import unwrap
from danlu.config import validate
from danlu.data.chat_rows import read_chat_rows
from danlu.data.folder import DataFolder, Split
from danlu.errors import DanluError
from danlu.evaluation.bits_per_byte import bits_per_byte
from danlu.formats.card import CARD, Stage
from danlu.formats.weights import open_weights
from danlu.hub.pull import with_models
from danlu.models.causal_lm import CausalLM
from danlu.models.encoder_decoder import EncoderDecoder
from danlu.models.heads import QuestionAnswering, SequenceClassifier, TokenClassifier
from danlu.models.load import Model, save_model
from danlu.quantization.packed_linear import dequantize_linears
from danlu.tokenizer.tokenizer import Tokenizer

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
KINDS: dict[str, type[Any]] = {
    TASK_TYPES[kind.task]: kind
    for kind in (CausalLM, SequenceClassifier, TokenClassifier, QuestionAnswering, EncoderDecoder)
}


def merge_adapter(config: MergeConfig) -> Path:
    """Write the model that an adapter makes of its base.

    Of an adapter that was trained on 4 bits, the base is put into these, unpacked, and the update added to that: what
    was trained, and not what it was trained from. A head tied to the embedding that has an update of its own is untied.

    Returns:
        The model folder. Its card has ``perplexity_before`` and ``perplexity_after`` (the base with the adapter beside
        it, and the merged weights as they are written) where ``data`` is given.

    Raises:
        Problems: impossible options.
        DanluError: the adapter is for another base, or not supported; or a folder that cannot be used.
    """
    config = with_models(validate(config), "base")
    inputs = {"model": config.base, "adapter": config.adapter} | ({"data": config.data} if config.data else {})
    kind = KINDS.get(read_peft_config(config.adapter).task_type or "CAUSAL_LM", CausalLM)
    if config.data is not None and kind is not CausalLM:
        raise DanluError("data: only a causal language model is compared by what it expects of a text")
    dtype = _stored_dtype(config.base) if config.dtype == "keep" else DTYPES[config.dtype]
    stage = Stage.open(config.out, kind="model", verb="merge", config=config, inputs=inputs, overwrite=config.overwrite)
    if stage.finished:
        console.note(f"{config.out}: already made, nothing to do")
        return config.out
    metrics: dict[str, Any] = {}
    with stage.preparing():
        model, tokenizer = open_adapted(
            config.adapter, kind, base=config.base, dtype=None, quantize=config.quantize
        )  # fmt: skip
        if config.data is not None:
            metrics["perplexity_before"] = _perplexity(model, tokenizer, config)
    merge(model)
    unwrap(model)
    dequantize_linears(model)
    if config.data is not None:
        metrics["perplexity_after"] = _perplexity(model.to(dtype), tokenizer, config)
        console.note(
            f"perplexity: {metrics['perplexity_before']:.4f} with the adapter beside the base, "
            f"{metrics['perplexity_after']:.4f} merged, as {str(dtype).removeprefix('torch.')}"
        )
    save_model(model, config.out, tokenizer, dtype=dtype)
    quantize = trained_in(config.adapter) if config.quantize == "auto" else config.quantize
    stage.finish(
        {**metrics, "parameters": model.num_parameters()},
        {"dtype": str(dtype).removeprefix("torch."), "base": quantize},
    )
    return config.out


def _stored_dtype(base: Path) -> torch.dtype:
    """That of most weights; fp32 for those in a packed type."""
    sizes: dict[torch.dtype, int] = {}
    for info in open_weights(base).infos.values():
        dtype = STORED.get(info.dtype, torch.float32)
        sizes[dtype] = sizes.get(dtype, 0) + math.prod(info.shape)
    return max(sizes, key=lambda dtype: sizes[dtype])


def _perplexity(model: Model, tokenizer: Tokenizer, config: MergeConfig) -> float:
    """Per token, computed in fp32."""
    assert isinstance(model, CausalLM)
    assert config.data is not None
    before, model.compute_dtype = model.compute_dtype, torch.float32
    score = bits_per_byte(model, tokenizer, _texts(config.data, tokenizer, config.text_tokens))
    model.compute_dtype = before
    return math.exp(score.nats / score.tokens)


def _texts(data: Path, tokenizer: Tokenizer, n_tokens: int) -> Iterator[str]:
    """The first texts, about so many tokens of them; of a data folder, the held-out ones if there are any."""
    is_folder = (data / CARD).exists()
    split: Split = "heldout" if is_folder and "heldout" in DataFolder(data).splits() else "train"
    for row in read_chat_rows(data, split=split):
        text = row.text if row.text is not None else "\n".join(str(m["content"]) for m in row.messages)
        text = text[: 16 * n_tokens]
        ids = tokenizer.encode(text)
        yield text if len(ids) <= n_tokens else tokenizer.decode(ids[:n_tokens])
        n_tokens -= len(ids)
        if n_tokens <= 0:
            return
