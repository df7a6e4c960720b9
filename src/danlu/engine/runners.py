"""From what a user names to what runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

import torch

from danlu.adapters.open import base_of, open_adapted
from danlu.adapters.peft_config import is_adapter_folder
from danlu.adapters.wrapper import wrappers
from danlu.engine.batch import Runner
from danlu.engine.drafts import DraftModel
from danlu.engine.engine_config import EngineConfig
from danlu.engine.native_runner import NativeRunner, why_not
from danlu.engine.torch_runner import TorchRunner, Writer
from danlu.errors import DanluError
from danlu.hardware import DTYPES, pick_device, pick_precision
from danlu.hub.pull import model_path
from danlu.models.causal_lm import CausalLM
from danlu.models.encoder_decoder import EncoderDecoder
from danlu.models.load import load_model, read_config, tasks_of
from danlu.tokenizer.tokenizer import Tokenizer

W = TypeVar("W", bound=Writer)


def open_runner(
    model: str | Path | Writer | Runner, config: EngineConfig, tokenizer: Tokenizer | None
) -> tuple[Runner, Tokenizer | None]:
    """What runs a model, and its tokenizer where there is one.

    Args:
        model: a model folder, an adapter folder (merged into its base), a GGUF file, a name that `danlu pull` knows, a
            model in memory, or a runner, which is taken as it is.

    Raises:
        DanluError: the model cannot be opened.
    """
    if isinstance(model, str | Path):
        path = model_path(model)
        if is_adapter_folder(path):
            merged, own = _load_adapted(path, config)
            return _native(merged, config) or _on_torch(merged, config), tokenizer or own
        runner = _native(path, config) or _on_torch(_load(path, _kind_of(path), config), config)
        return runner, tokenizer or Tokenizer.load(path)
    if isinstance(model, CausalLM | EncoderDecoder):
        return _native(model, config) or _on_torch(model, config), tokenizer
    return model, tokenizer


def _native(model: Path | Writer, config: EngineConfig) -> NativeRunner | None:
    """The native kernels, where they are wanted and cover the model.

    With ``precision=auto`` the weights of a file stay as they are stored, packed ones too.
    """
    if config.kernels == "torch":
        return None
    device = pick_device(config.device) if isinstance(model, Path) else model.device
    reason = _why_not_native(model, config, device)
    if reason is not None:
        if config.kernels == "native" or config.weights != "stored":
            wanted = "kernels=native" if config.kernels == "native" else f"weights={config.weights}"
            raise DanluError(f"{wanted}: the native kernels cannot run this: {reason}")
        return None
    assert config.kv_dtype != "fp16"
    weight_dtype = None if config.weights == "stored" else config.weights
    options = {"kv_dtype": config.kv_dtype, "weight_dtype": weight_dtype, "threads": config.threads}
    if isinstance(model, Path) and config.precision == "auto":
        return NativeRunner.open(model, **options)
    if isinstance(model, Path):
        model = _load(model, CausalLM, config)
    assert isinstance(model, CausalLM)
    return NativeRunner.of(model, **options)


def _why_not_native(model: Path | Writer, config: EngineConfig, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the model runs on {device}"
    if config.block_size != NativeRunner.block_size:
        return f"blocks are of {NativeRunner.block_size} tokens, not {config.block_size}"
    if config.kv_dtype == "fp16":
        return "there is no cache in fp16; choose bf16"
    if isinstance(model, EncoderDecoder) or (isinstance(model, Path) and _kind_of(model) is EncoderDecoder):
        return "it is an encoder-decoder"
    if isinstance(model, Path):
        return why_not(read_config(model))
    stored = model.embed.weight.dtype
    if model.compute_dtype not in (None, stored) and stored != torch.float32:
        return f"the model computes in {model.compute_dtype}"
    adapted = wrappers(model).values()
    if adapted and stored != torch.float32:
        return f"an adapter put into weights of {stored} would be rounded"
    if any(wrapper.is_tied and not wrapper.shares_weight for wrapper in adapted):
        return "the head has an adapter, and is tied to the embedding"
    return why_not(model.config)


def _on_torch(model: Writer, config: EngineConfig) -> TorchRunner:
    kv_dtype: torch.dtype | Literal["int8"] | None = None
    if config.kv_dtype != "auto":
        kv_dtype = "int8" if config.kv_dtype == "int8" else DTYPES[config.kv_dtype]
    return TorchRunner(model, block_size=config.block_size, kv_dtype=kv_dtype)


def _kind_of(path: Path) -> type[Writer]:
    return EncoderDecoder if "seq2seq" in tasks_of(path) else CausalLM


def _load(path: Path, kind: type[W], config: EngineConfig) -> W:
    device = pick_device(config.device)
    model: W = load_model(path, kind, device=device, dtype=DTYPES[pick_precision(config.precision, device)])
    return model


def _load_adapted(path: Path, config: EngineConfig) -> tuple[Writer, Tokenizer]:
    device = pick_device(config.device)
    dtype = DTYPES[pick_precision(config.precision, device)]
    return open_adapted(path, _kind_of(base_of(path)), device=device, dtype=dtype, merged=True)


def open_draft_model(config: EngineConfig, tokenizer: Tokenizer | None, vocab_size: int) -> DraftModel | None:
    """The small model that a config names, if any.

    Raises:
        DanluError: it cannot be opened, or its tokenizer is another.
    """
    if config.draft_model is None:
        return None
    if tokenizer is None:
        raise DanluError("draft_model: needs the tokenizer of the model that answers, to compare it with its own")
    model = _load(config.draft_model, CausalLM, config)
    return DraftModel(model, Tokenizer.load(config.draft_model), tokenizer, vocab_size)
