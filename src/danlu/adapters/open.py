"""An adapter folder opened as the model that it makes of its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from danlu.adapters.lora import merge
from danlu.adapters.peft_config import TASK_TYPES, is_adapter_folder, read_peft_config
from danlu.adapters.peft_folder import WEIGHTS, load_adapter
from danlu.adapters.wrapper import unwrap
from danlu.errors import DanluError
from danlu.formats.card import CARD, Card, card_if_any
from danlu.formats.safetensors_files import SafetensorsWeights
from danlu.models.causal_lm import CausalLM
from danlu.models.heads import SequenceClassifier, TokenClassifier, default_labels
from danlu.models.load import Model, load_model
from danlu.tokenizer.definition import TOKENIZER
from danlu.tokenizer.tokenizer import Tokenizer

M = TypeVar("M", bound=Model)
Quantize = Literal["auto", "none", "4bit"]


def base_of(folder: str | Path) -> Path:
    """The base model of an adapter folder: the path that it names, from here or from beside the folder.

    Raises:
        DanluError: it names none, or none that is here.
    """
    named = read_peft_config(folder).base
    if named is None:
        raise DanluError(
            f"{folder}: does not say what it is an adapter of; merge it: danlu merge BASE {folder} --out OUT"
        )
    for candidate in (Path(named), Path(folder).parent / named):
        if candidate.exists():
            return candidate
    raise DanluError(
        f"{folder}: its base model {named} is not here; fetch it (danlu pull) and merge: "
        f"danlu merge BASE {folder} --out OUT"
    )


def makes_up_for_4_bits(folder: str | Path) -> bool:
    """Whether an adapter of ours began with what 4 bits had lost of its base, and so belongs to that base alone."""
    return _adapter_details(folder).get("start") == "error"


def trained_in(folder: str | Path) -> Literal["none", "4bit"]:
    """How the base was kept while an adapter of ours was trained."""
    return "4bit" if _adapter_details(folder).get("quantize") == "4bit" else "none"


def _adapter_details(folder: str | Path) -> dict[str, Any]:
    card = card_if_any(folder)
    details = card.details.get("adapter") if card is not None else None
    return details if isinstance(details, dict) else {}


def open_adapted(
    folder: str | Path,
    kind: type[M] = CausalLM,  # type: ignore[assignment]
    *,
    base: Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    quantize: Quantize = "auto",
    merged: bool = False,
) -> tuple[M, Tokenizer]:
    """The model that an adapter folder makes of its base, and its tokenizer.

    Args:
        kind: what to open the base as.
        base: the base model; default: the one that the folder names.
        dtype: of the base; None: as it is stored.
        quantize: whether the base is put into 4 bits; auto: where the adapter was trained on it so, and they had lost
            something. The adapter is the update of *those* weights.
        merged: the adapter is put into the weights, and a quantized base dequantized: a plain model, that can be saved.

    Raises:
        DanluError: the base is not here or another one, or the adapter holds something that is not supported.
    """
    place = base_of(folder) if base is None else base
    _compare(folder, place)
    if quantize == "none" and makes_up_for_4_bits(folder):
        raise DanluError(
            f"{folder}: makes up for what 4 bits have lost of its base, and cannot be added to the whole weights; "
            "leave out quantize=none, or train it with adapter_start=zero"
        )
    model: M = load_model(place, kind, dtype=dtype, new_head=True, **_head_options(folder, kind))
    if quantize == "4bit" or (quantize == "auto" and trained_in(folder) == "4bit"):
        from danlu.quantization.packed_linear import quantize_linears

        quantize_linears(model)
    load_adapter(model, folder)
    if merged:
        merge(model)
        unwrap(model)
        _dequantize(model, dtype or torch.float32)
    tokenizer = Tokenizer.load(folder if (Path(folder) / TOKENIZER).is_file() else place)
    model.to(device).eval()
    return model, tokenizer


def _dequantize(model: Model, dtype: torch.dtype) -> None:
    """Layers in 4 bits that had no adapter."""
    from danlu.quantization.packed_linear import dequantize_linears

    dequantize_linears(model, dtype)


def _head_options(folder: str | Path, kind: type[Any]) -> dict[str, Any]:
    """The labels of a classifier's head: as the card has them, else as many as the head has rows."""
    if not issubclass(kind, SequenceClassifier | TokenClassifier):
        return {}
    card = card_if_any(folder)
    head = card.details.get("head") if card is not None else None
    if isinstance(head, dict):
        return {key: head[key] for key in ("labels", "problem_type") if key in head}
    infos = SafetensorsWeights(Path(folder) / WEIGHTS).infos
    rows = [info.shape[0] for name, info in infos.items() if ".lora_" not in name and len(info.shape) == 2]
    return {"labels": default_labels(min(rows))} if rows else {}


def labeller_kind(folder: str | Path) -> type[SequenceClassifier] | type[TokenClassifier] | None:
    """What an adapter folder opens as, if it labels."""
    task = read_peft_config(folder).task_type
    return {
        TASK_TYPES["sequence_classification"]: SequenceClassifier,
        TASK_TYPES["token_classification"]: TokenClassifier,
    }.get(task or "")


def _compare(folder: str | Path, base: Path) -> None:
    """Whether this is the very model that the adapter was trained on, where both have cards."""
    if is_adapter_folder(base):
        raise DanluError(f"{base}: is an adapter itself; merge it into its base first")
    made, here = card_if_any(folder), card_if_any(base) if base.is_dir() else None
    if made is None or here is None:
        return
    then = _model_input(made)
    if then is not None and then != here.fingerprint:
        raise DanluError(
            f"{folder}: was trained on another model than the one at {base}; name that one, or train it again. "
            f"(Where you know better: without {folder}/{CARD} nobody can tell.)"
        )


def _model_input(card: Card) -> str | None:
    return next((item.fingerprint for item in card.inputs if item.role == "model"), None)
