"""`danlu convert`: model folders and GGUF files into each other, tensor by tensor, so that about one tensor is in
memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from danlu import files
from danlu.config import validate
from danlu.console import note, progress, warn
from danlu.errors import DanluError
from danlu.formats.card import CARD, RUN, Stage, card_if_any
from danlu.formats.gguf_file import GGUFFile
from danlu.formats.gguf_write import GGUFTensor, write_gguf
from danlu.formats.safetensors_files import PendingTensor, save_safetensors
from danlu.formats.weights import INDEX_FILE, Weights, open_weights
from danlu.hub.pull import with_models
from danlu.models.convert_config import ConvertConfig
from danlu.models.gguf import from_gguf
from danlu.models.gguf_export import Export, requantized, to_gguf
from danlu.tokenizer.gguf_export import tokenizer_to_gguf
from danlu.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from danlu.formats.gguf_blocks import PackedTensor

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
WHOLE_NUMBERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL")

COPIED_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".md"}
"""What a folder holds beside its weights: configs, the tokenizer's files, the model's card and licence."""


def convert(config: ConvertConfig) -> Path:
    """Write a model in another format or type; returns the file or folder.

    Raises:
        DanluError: the source is no model, holds something that the target cannot express (named), the output exists
            and ``overwrite`` is not set, or the disk is too small. No half-written output is left.
    """
    config = with_models(validate(config), "source")
    if (card := card_if_any(config.source) if config.source.is_dir() else None) is not None and card.kind != "model":
        raise DanluError(f"{config.source}: is a {card.kind} folder; expected a model folder or a GGUF file")
    weights = open_weights(config.source)
    if config.to_gguf:
        _write_gguf(config, weights)
    else:
        _write_folder(config, weights)
    return config.out


# ---- to one GGUF file


def _write_gguf(config: ConvertConfig, weights: Weights) -> None:
    out = config.out
    if out.is_dir():
        raise DanluError(f"{out}: is a folder; give the name of a file that ends in .gguf")
    if out.exists() and out.samefile(weights.path):
        raise DanluError(f"{out}: is the source itself; give another name")
    if out.exists() and not config.overwrite:
        raise DanluError(f"{out}: exists already; choose another name, or replace it with --overwrite")
    kind = None if config.dtype == "keep" else config.dtype.upper()
    if isinstance(weights, GGUFFile):
        export = requantized(weights, kind)
        _warn_of_twice(weights, export)
    else:
        folder = weights.path.parent
        tokenizer = tokenizer_to_gguf(Tokenizer.load(folder))
        name = folder.resolve().name
        export = to_gguf(weights, _read_config(folder), str(folder / "config.json"), tokenizer, kind, name)
    _note_fallbacks(export)
    total = sum(tensor.n_bytes for tensor in export.tensors)
    with progress(f"Writing {out}", total=total, unit="bytes") as advance:
        write_gguf(out, export.metadata, [_counted(tensor, advance) for tensor in export.tensors])


def _counted(tensor: GGUFTensor, advance: Callable[..., None]) -> GGUFTensor:
    """The tensor, which tells when it was made."""

    def make() -> Tensor | PackedTensor:
        made = tensor.make()
        advance(tensor.n_bytes)
        return made

    return GGUFTensor(tensor.name, tensor.kind, tensor.shape, make)


def _warn_of_twice(source: GGUFFile, export: Export) -> None:
    """Rounding what was rounded already is worse than rounding once."""
    plain = ("F32", "F16", "BF16")
    kinds = {source.infos[t.name].dtype for t in export.tensors if t.kind != source.infos[t.name].dtype}
    rounded = sorted(kinds - set(plain))
    if rounded and any(t.kind not in plain for t in export.tensors if t.kind != source.infos[t.name].dtype):
        warn(f"{source.path}: holds {', '.join(rounded)}, and quantizing twice loses more; start from the original")


def _note_fallbacks(export: Export) -> None:
    for kind in sorted(set(export.fallbacks.values())):
        names = [name for name, chosen in export.fallbacks.items() if chosen == kind]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        note(f"{', '.join(names[:3])}{more}: rows are no whole blocks of the type asked for; written as {kind}")


# ---- to a folder


def _write_folder(config: ConvertConfig, weights: Weights) -> None:
    stage = Stage.open(
        config.out,
        kind="model",
        verb="convert",
        config=config,
        inputs={"model": config.source},
        overwrite=config.overwrite,
    )
    if stage.finished:
        note(f"{config.out}: already holds this; nothing to do")
        return
    dtype = DTYPES.get(config.dtype)
    with stage.preparing():
        if isinstance(weights, GGUFFile):
            view, content = from_gguf(weights)
            texts: list[Path] = []
            tokenizer = Tokenizer.load(weights.path) if "tokenizer.ggml.model" in weights.metadata else None
        else:
            folder = weights.path.parent
            view, content, texts, tokenizer = weights, _read_config(folder), _texts(folder), None
        tensors = {name: _pending(view, name, dtype) for name in view.infos}
        total = sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())
        files.require_space(config.out, total, "the model")
    for path in texts:
        with files.atomic_path(config.out / path.name) as temporary:
            shutil.copyfile(path, temporary)
    if tokenizer is not None:
        tokenizer.save(config.out)
        files.write_json(config.out / "generation_config.json", _generation(tokenizer))
    name = str(dtype or _widest(tensors)).removeprefix("torch.")
    files.write_json(config.out / "config.json", {**content, "dtype": name, "torch_dtype": name})
    with progress(f"Writing {config.out}", total=total, unit="bytes") as advance:
        counted = {name: _reporting(tensor, advance) for name, tensor in tensors.items()}
        save_safetensors(config.out, counted, max_shard_bytes=int(config.shard_size * 1e9))
    stage.finish(
        metrics={"tensors": len(tensors), "bytes": total, "parameters": sum(t.numel() for t in tensors.values())},
        details={"dtype": name, "from": "gguf" if isinstance(weights, GGUFFile) else "hf"},
    )


def _pending(weights: Weights, name: str, dtype: torch.dtype | None) -> PendingTensor:
    """A tensor in the wanted dtype; None: as stored, or fp32 where it is quantized. Whole numbers stay so."""
    info = weights.infos[name]
    if info.dtype in WHOLE_NUMBERS:
        return PendingTensor(weights.tensor(name).dtype, info.shape, partial(weights.tensor, name))
    chosen = dtype or STORED_DTYPES.get(info.dtype, torch.float32)
    return PendingTensor(chosen, info.shape, partial(_cast, weights, name, chosen))


def _cast(weights: Weights, name: str, dtype: torch.dtype) -> Tensor:
    tensor = weights.tensor(name)
    cast = tensor.to(dtype)
    if (cast.isinf() & tensor.isfinite()).any():
        raise DanluError(f"{name}: holds {tensor.abs().max():.4g}, which is beyond f16; choose bf16 or f32")
    return cast


def _reporting(tensor: PendingTensor, advance: Callable[..., None]) -> PendingTensor:
    def make() -> Tensor:
        made = tensor.make()
        advance(made.numel() * made.dtype.itemsize)
        return made

    return PendingTensor(tensor.dtype, tensor.shape, make)


def _widest(tensors: Mapping[str, PendingTensor]) -> torch.dtype:
    """The dtype of most weights."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise DanluError(f"{folder}: is not a model folder (no config.json)")
    return files.read_json_object(path)


def _texts(folder: Path) -> list[Path]:
    """The files beside the weights that belong to the model."""
    ours = {CARD, RUN, INDEX_FILE, "config.json"}
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in ours
        and (path.suffix in COPIED_SUFFIXES or path.name.startswith("LICENSE"))
    ]


def _generation(tokenizer: Tokenizer) -> dict[str, Any]:
    """`generation_config.json` of a model whose file tells its tokens only."""
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
    return {key: value for key, value in ids.items() if value not in (None, [])}
