"""What a verb does that trains an adapter instead of all weights: begin on a frozen base, and write the folder."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from danlu import console
from danlu.adapters.config import AdapterOptions, AdapterStart
from danlu.adapters.lora import attach
from danlu.adapters.peft_folder import save_adapter
from danlu.adapters.quantization_error import Start, begin_with, lost_in_4_bits
from danlu.adapters.sites import Site, choose, n_weights
from danlu.adapters.token_rows import enlarge
from danlu.adapters.wrapper import active_adapter
from danlu.errors import DanluError
from danlu.formats.card import Kind
from danlu.models.causal_lm import CausalLM
from danlu.models.heads import SequenceClassifier, TokenClassifier
from danlu.models.load import Model, save_model
from danlu.models.transformer import Transformer
from danlu.tokenizer.tokenizer import Tokenizer

RATE = 5e-4
"""Peak learning rate of AdamW on an adapter, whatever its rank and the model's width: the update is scaled by alpha."""

BETAS = (0.9, 0.999)


def base_dtype(options: AdapterOptions, compute_dtype: torch.dtype) -> torch.dtype | None:
    """The dtype to open a model in: fp32 where all weights are trained, that of the products where they are frozen, and
    as they are stored (mapped, and read as they are needed) where they are packed."""
    if options.adapter == "none":
        return torch.float32
    return None if options.in_4_bits else compute_dtype


def with_new_tokens(tokenizer: Tokenizer, tokens: Sequence[str]) -> tuple[Tokenizer, tuple[int, ...]]:
    """A tokenizer that has a token for each of these texts, and their ids: those that they have, or new ones at the
    end. What users write cannot forge them, as it cannot forge others; :func:`reads_tokens` makes one that reads them.

    Raises:
        DanluError: two of the texts are one token.
    """
    definition = copy.deepcopy(dict(tokenizer.definition))
    added: list[dict[str, Any]] = definition.setdefault("added_tokens", [])
    known = {token["content"]: token for token in added}
    ids, end = [], tokenizer.vocab_size
    for text in tokens:
        if text not in known:
            own = _id_of(tokenizer, text)
            known[text] = {
                "id": end if own is None else own, "content": text, "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False, "special": False,
            }  # fmt: skip
            added.append(known[text])
            end += own is None
        ids.append(int(known[text]["id"]))
    if len(set(ids)) < len(ids):
        raise DanluError("new_tokens: two of them are the same token")
    added.sort(key=lambda token: int(token["id"]))
    return Tokenizer(definition, tokenizer.config, tokenizer.where), tuple(ids)


def reads_tokens(tokenizer: Tokenizer, tokens: Sequence[str]) -> Tokenizer:
    """The tokenizer to read rows of training with, in whose texts these are tokens and not their letters."""
    definition = copy.deepcopy(dict(tokenizer.definition))
    for token in definition["added_tokens"]:
        token["special"] = token["special"] and token["content"] not in tokens
    return Tokenizer(definition, tokenizer.config, tokenizer.where, words=tokens)


def _id_of(tokenizer: Tokenizer, text: str) -> int | None:
    try:
        return tokenizer.id_of(text)
    except DanluError:
        return None


def begin_adapter(
    options: AdapterOptions, model: Model, tokenizer: Tokenizer, *, seed: int, start: AdapterStart = "zero"
) -> tuple[Tokenizer, dict[str, Any]]:
    """Freeze a model, quantize it where that is asked for, and give it a fresh adapter.

    Args:
        start: zero: the model begins as it is without the adapter; error: with what its quantization has lost, as far
            as the rank reaches (`quantization_error.py`); auto: that where it is quantized, and no encoder-decoder.

    Returns:
        The tokenizer, with the new tokens; and what the card shall say. A base whose 4 bits lost nothing counts as not
        quantized: it is what the adapter belongs to.

    Raises:
        DanluError: targets, budget or tokens that do not fit the model, or one that cannot be quantized.
    """
    ids: tuple[int, ...] = ()
    if options.new_tokens:
        if not isinstance(model, CausalLM):
            raise DanluError("new_tokens are for causal language models")
        tokenizer, ids = with_new_tokens(tokenizer, options.new_tokens)
        enlarge(model, tokenizer.vocab_size)
    shape = options.adapter_shape(ids)
    chosen: list[Site] = []
    starts: dict[str, Start] = {}
    packed: Counter[str] = Counter()
    if start == "auto":
        start = "error" if options.in_4_bits and isinstance(model, Transformer) else "zero"
    if options.in_4_bits:
        from danlu.quantization.packed_linear import PackedLinear, quantize_linears

        if start == "error":
            if not isinstance(model, Transformer):
                raise DanluError("adapter_start=error is for models of one stack; leave it out")
            exact_shape, chosen = choose(model, shape)
            assert exact_shape.rank is not None
            starts = lost_in_4_bits(model, chosen, exact_shape.rank, seed=seed)
        quantize_linears(model)
        packed = Counter(module.kind for module in model.modules() if isinstance(module, PackedLinear))
        console.note("frozen in 4 bits: " + ", ".join(f"{n} matrices in {kind}" for kind, n in packed.items()))
    total = n_weights(model)
    shape = attach(model, shape, seed=seed)
    begin_with(model, chosen, starts)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return tokenizer, {
        **dataclasses.asdict(shape), "quantize": "4bit" if "NF4" in packed else "none",
        "start": "error" if starts else "zero", "trained_share": trained / total,
    }  # fmt: skip


class Rates(Protocol):
    """Learning rates as a config gives them."""

    @property
    def matrix_lr(self) -> float | None: ...
    @property
    def embed_lr(self) -> float | None: ...
    @property
    def head_lr(self) -> float | None: ...
    @property
    def norm_lr(self) -> float | None: ...


def learning_rates(given: Rates, rate: float = RATE) -> dict[str, float]:
    """One rate for all parts of an adapter, but for those that are given: of matrices, rows of tokens, a head that is
    trained whole, and DoRA's lengths."""
    return {
        "matrix_lr": given.matrix_lr or rate,
        "embed_lr": given.embed_lr or rate,
        "head_lr": given.head_lr or rate,
        "norm_lr": given.norm_lr or rate,
    }


def kind_of_output(options: AdapterOptions) -> Kind:
    """What the card calls the folder that comes out."""
    return "model" if options.adapter == "none" else "adapter"


def save_trained(model: Model, out: Path, base: Path, tokenizer: Tokenizer, *, with_tokenizer: bool = False) -> None:
    """Write what was trained: the adapter, or, where there is none, the model.

    Args:
        base: the model that the adapter is for; its absolute path is written down.
        with_tokenizer: an adapter's folder gets the tokenizer, too, which has new tokens.
    """
    if active_adapter(model) is None:
        save_model(model, out, tokenizer)
    else:
        save_adapter(model, out, base.resolve(), tokenizer if with_tokenizer else None)


def head_details(model: Model) -> dict[str, Any]:
    """What a card must say so that a head can be built again: PEFT's files do not."""
    if isinstance(model, SequenceClassifier):
        return {"head": {"labels": list(model.labels), "problem_type": model.problem_type}}
    return {"head": {"labels": list(model.labels)}} if isinstance(model, TokenClassifier) else {}
