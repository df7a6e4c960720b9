"""`danlu inspect`: what a model folder, .safetensors or .gguf file holds, read from headers alone, without torch."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from danlu import files
from danlu.config import validate
from danlu.console import out as stdout
from danlu.errors import DanluError
from danlu.formats import model_facts
from danlu.formats.config import InspectConfig
from danlu.formats.model_facts import ModelFacts, TokenizerFacts
from danlu.formats.weights import TensorInfo, weights_file
from danlu.hub.pull import with_models

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table


def inspect(config: InspectConfig) -> dict[str, Any]:
    """Print what a model is and what it takes to hold it, and return it.

    Returns:
        ``path``, ``format`` ("safetensors" or "gguf"), ``architecture``, ``parameters``, ``bytes`` (of the tensors),
        ``dtypes``: dtype -> {tensors, parameters, bytes}, ``model`` (hyper-parameters that are told), ``tokenizer``
        ({kind, vocab_size, chat_template} or None), ``memory``: {weights, context, kv_cache} in bytes and tokens, and
        ``tensors``: the first ``config.tensors`` as {name, dtype, shape, bytes}.

    Raises:
        DanluError: no weights there, damaged ones, or a context is asked for and the cache's size cannot be told.
    """
    config = with_models(validate(config), "path")
    found = describe(config.path, config.context, config.tensors if isinstance(config.tensors, int) else None)
    if config.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    return found


def describe(path: Path, context: int | None = None, n_tensors: int | None = None) -> dict[str, Any]:
    """What :func:`inspect` prints; ``n_tensors`` None is all of them."""
    source = weights_file(path)
    infos, facts, tokenizer = _read(source, is_folder=path.is_dir())
    told = context or facts.context
    kv_cache = facts.kv_cache_bytes(told) if told is not None else None
    if context is not None and kv_cache is None:
        raise DanluError(
            f"{path}: the KV cache for context={context} cannot be told: it does not say layers, heads and head size, "
            "keeps no keys and values, or is an encoder; leave --context out"
        )
    dtypes: dict[str, dict[str, int]] = {}
    for info in infos.values():
        entry = dtypes.setdefault(info.dtype, {"tensors": 0, "parameters": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["parameters"] += math.prod(info.shape)
        entry["bytes"] += info.n_bytes
    n_bytes = sum(info.n_bytes for info in infos.values())
    model = {key: value for key, value in dataclasses.asdict(facts).items() if value is not None}
    model.pop("windows", None)
    return {
        "path": str(path),
        "format": "gguf" if source.suffix == ".gguf" else "safetensors",
        "architecture": model.pop("architecture", None),
        "parameters": sum(entry["parameters"] for entry in dtypes.values()),
        "bytes": n_bytes,
        "dtypes": dict(sorted(dtypes.items(), key=lambda item: -item[1]["bytes"])),
        "model": model,
        "tokenizer": dataclasses.asdict(tokenizer) if tokenizer is not None else None,
        "memory": {"weights": n_bytes, "context": told, "kv_cache": kv_cache},
        "n_tensors": len(infos),
        "tensors": [
            {"name": info.name, "dtype": info.dtype, "shape": list(info.shape), "bytes": info.n_bytes}
            for info in list(infos.values())[:n_tensors]
        ],
    }


def _read(source: Path, *, is_folder: bool) -> tuple[dict[str, TensorInfo], ModelFacts, TokenizerFacts | None]:
    if source.suffix == ".gguf":
        from danlu.formats.gguf_file import GGUFFile

        gguf = GGUFFile(source)
        return gguf.infos, model_facts.facts_from_gguf(gguf.metadata), model_facts.tokenizer_in_gguf(gguf.metadata)
    from danlu.formats.safetensors_files import SafetensorsWeights

    infos = SafetensorsWeights(source).infos
    if not is_folder and source.suffix != ".json":
        return infos, ModelFacts(), None
    folder = source.parent
    facts = ModelFacts()
    if (folder / "config.json").is_file():
        facts = model_facts.facts_from_hf(model_facts.read_config(folder))
    return infos, facts, model_facts.tokenizer_in_folder(folder)


def _print(found: dict[str, Any]) -> None:
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    console = stdout()
    console.print(Text(_plain(f"{found['architecture'] or 'weights'}  {found['path']}"), style="bold"))
    parameters, n_bytes = found["parameters"], found["bytes"]
    bits = f", {8 * n_bytes / parameters:.2f} bits each" if parameters else ""
    console.print(Text(f"{parameters:,} parameters in {files.human_bytes(n_bytes)}{bits}, {found['format']}"))
    memory, tokenizer = found["memory"], found["tokenizer"]
    sections: list[tuple[str, Table]] = []
    if found["model"]:
        sections.append(("model", _pairs({key: _spell(value) for key, value in found["model"].items()})))
    if tokenizer:
        size = f"{tokenizer['vocab_size']:,} tokens" if tokenizer["vocab_size"] else "size not told"
        chat = "yes" if tokenizer["chat_template"] else "no"
        sections.append(("tokenizer", _pairs({"kind": tokenizer["kind"], "vocabulary": size, "chat template": chat})))
    rows = {"weights": files.human_bytes(memory["weights"])}
    if memory["kv_cache"] is not None:
        rows[f"KV cache, {memory['context']:,} tokens"] = (
            f"{files.human_bytes(memory['kv_cache'])} a sequence in 16 bits"
        )
        rows["both"] = files.human_bytes(memory["weights"] + memory["kv_cache"])
    sections.append(("memory", _pairs(rows)))
    kinds = [
        (dtype, f"{entry['tensors']:,}", f"{entry['parameters']:,}", files.human_bytes(entry["bytes"]))
        for dtype, entry in found["dtypes"].items()
    ]
    sections.append(("dtypes", _columns(("dtype", "tensors", "parameters", "size"), kinds)))
    if found["tensors"]:
        tensors = [
            (entry["name"], entry["dtype"], _shape(entry["shape"]), files.human_bytes(entry["bytes"]))
            for entry in found["tensors"]
        ]
        sections.append((f"tensors, {found['n_tensors']:,}", _columns(("name", "dtype", "shape", "size"), tensors)))
    for title, body in sections:
        console.print(Group(Text(f"\n{title}", style="bold cyan"), Padding(body, (0, 0, 0, 2))), soft_wrap=False)
    if 0 < len(found["tensors"]) < found["n_tensors"]:
        rest = found["n_tensors"] - len(found["tensors"])
        console.print(Text(f"  ... and {rest:,} more; list them with --tensors all", style="dim"))


def _pairs(values: Mapping[str, str]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for key, value in values.items():
        table.add_row(Text(_plain(key)), Text(_plain(value)))
    return table


def _columns(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table whose first two columns are texts and the others numbers, aligned to the right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for head in heads:
        table.add_column(head, justify="right" if head in ("tensors", "parameters", "size", "shape") else "left")
    for row in rows:
        table.add_row(*(Text(_plain(cell), overflow="fold") for cell in row))
    return table


def _shape(shape: list[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _spell(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{min(value):,} to {max(value):,}, by layer"
    return f"{value:,.0f}" if isinstance(value, float) else f"{value:,}"


def _plain(text: str) -> str:
    """Names come from files of anywhere; they must not steer the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)
