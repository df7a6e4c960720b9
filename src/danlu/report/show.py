"""`danlu show`: what a folder is, what it was made from, how big it is; read from cards and headers, without torch."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danlu import files
from danlu.config import validate
from danlu.console import out as stdout
from danlu.errors import DanluError
from danlu.formats.card import CARD, RUN, Card, card_if_any
from danlu.formats.safetensors_header import read_header
from danlu.hub.pull import with_models
from danlu.report.config import ShowConfig
from danlu.report.numbers import chosen_options

if TYPE_CHECKING:
    from rich.table import Table
    from rich.tree import Tree

ADAPTER_CONFIG = "adapter_config.json"

_TELLING = (
    "parameters", "heldout_bits_per_byte", "bits_per_byte", "heldout_reward", "heldout_accuracy", "vocab_size",
    "documents_kept", "train_documents",
)  # fmt: skip
"""Metrics worth a place in the lineage tree."""


def show(config: ShowConfig) -> dict[str, Any]:
    """Print a folder's card, sizes and lineage, and return them.

    Raises:
        DanluError: no such folder, nothing in it that danlu knows, or a broken card or weights file.
    """
    config = with_models(validate(config), "folder")
    found = describe(config.folder)
    if config.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _print(found)
    return found


def describe(folder: str | Path) -> dict[str, Any]:
    """What is known of a folder.

    Returns:
        ``folder``, ``kind``, ``card`` (or None), ``unfinished`` (the verb of a run that was not finished, or None),
        ``model`` (the main numbers of config.json, or None), ``adapter`` (those of adapter_config.json, or None),
        ``weights`` (:func:`count_weights`, or None), ``files`` (name -> bytes; a sub-folder counts as one), ``bytes``,
        and ``changed`` (files whose size is not the card's).
    """
    path = Path(folder)
    if not path.is_dir():
        what = "is a file; give the folder it lies in" if path.exists() else "does not exist"
        raise DanluError(f"{path}: {what}")
    card = card_if_any(path)
    run = files.read_json(path / RUN) if card is None and (path / RUN).exists() else None
    unfinished = str(run.get("verb")) if isinstance(run, dict) else None
    tensors = sorted(path.glob("*.safetensors"))
    is_adapter = (path / ADAPTER_CONFIG).exists()
    is_model = (path / "config.json").exists() or tensors or list(path.glob("*.gguf"))
    if card is not None:
        kind: str = card.kind
    elif unfinished is not None:
        kind = "unfinished"
    elif is_adapter or is_model:
        kind = "adapter" if is_adapter else "model"
    elif (path / "tokenizer.json").exists():
        kind = "tokenizer"
    else:
        raise DanluError(f"{path}: holds no {CARD} and no model; give a folder made by danlu, or a model folder")
    sizes = {member.name: _size(member) for member in sorted(path.iterdir()) if not member.name.startswith(".")}
    noted = card.files if card is not None else {}
    return {
        "folder": str(path),
        "kind": kind,
        "card": dataclasses.asdict(card) if card is not None else None,
        "unfinished": unfinished,
        "model": _model_numbers(path / "config.json") if is_model and (path / "config.json").exists() else None,
        "adapter": _adapter_numbers(path / ADAPTER_CONFIG, card) if is_adapter else None,
        "weights": count_weights(tensors) if tensors else None,
        "files": sizes,
        "bytes": sum(sizes.values()),
        "changed": [name for name, entry in noted.items() if sizes.get(name) != entry.get("bytes")],
    }


def count_weights(paths: list[Path]) -> dict[str, Any]:
    """Parameters and bytes by dtype, from the headers of safetensors files.

    Returns:
        ``parameters``, ``tensors`` (counts) and ``by_dtype``: dtype -> {parameters, bytes}.

    Raises:
        DanluError: a file is cut short or its header is broken.
    """
    by_dtype: dict[str, dict[str, int]] = {}
    tensors = 0
    for path in paths:
        for tensor in read_header(path).entries.values():
            entry = by_dtype.setdefault(tensor.dtype, {"parameters": 0, "bytes": 0})
            entry["parameters"] += math.prod(tensor.shape)
            entry["bytes"] += tensor.end - tensor.begin
            tensors += 1
    total = sum(entry["parameters"] for entry in by_dtype.values())
    return {"parameters": total, "tensors": tensors, "by_dtype": by_dtype}


def _model_numbers(path: Path) -> dict[str, Any]:
    """The plain values of config.json (of its text part, where a model has several)."""
    content = files.read_json_object(path)
    content = {**content, **content["text_config"]} if isinstance(content.get("text_config"), dict) else content
    keys = "architectures model_type hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    keys += "intermediate_size vocab_size max_position_embeddings tie_word_embeddings dtype torch_dtype"
    return {key: content[key] for key in keys.split() if key in content}


def _adapter_numbers(path: Path, card: Card | None) -> dict[str, Any]:
    """What PEFT's file says, and what share of the weights it is, where its card tells."""
    content = files.read_json_object(path)
    keys = "base_model_name_or_path peft_type task_type r lora_alpha use_rslora use_dora target_modules modules_to_save"
    found = {key: content[key] for key in keys.split() if content.get(key) not in (None, False)}
    told = card.details.get("adapter") if card is not None else None
    return found | (
        {key: told[key] for key in ("quantize", "trained_share") if key in told} if isinstance(told, dict) else {}
    )


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(member.stat().st_size for member in path.rglob("*") if member.is_file())
    return path.stat().st_size if path.exists() else 0  # a link that leads nowhere


def _print(found: dict[str, Any]) -> None:
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    console = stdout()
    card = Card.from_dict(found["card"], found["folder"]) if found["card"] is not None else None
    console.print(Text(_plain(f"{found['kind']}  {found['folder']}"), style="bold"))
    if card is not None:
        made = (
            f"made by danlu {card.verb} on {card.created} in {card.seconds:,.1f} s, fingerprint {card.fingerprint[:12]}"
        )
        console.print(Text(_plain(made)))
    elif found["unfinished"]:
        console.print(
            Text(_plain(f"an unfinished run of danlu {found['unfinished']}; the same command goes on with it"))
        )
    else:
        console.print("not made by danlu: it has no card")
    sections: list[tuple[str, Table | Tree]] = []
    if found["adapter"]:
        sections.append(("adapter", _table(found["adapter"])))
    if found["model"]:
        sections.append(("model", _table(found["model"])))
    if found["weights"]:
        weights = found["weights"]
        rows = {"parameters": weights["parameters"], "tensors": weights["tensors"]}
        for dtype, entry in weights["by_dtype"].items():
            rows[dtype] = f"{entry['parameters']:,} parameters, {files.human_bytes(entry['bytes'])}"
        sections.append(("weights", _table(rows)))
    if card is not None:
        sections.append(("metrics", _table(card.metrics)))
        sections.append(("config", _table(chosen_options(card))))
        sections.append(("lineage", _tree(card, found["folder"])))
    changed = found["changed"]
    sizes = {
        name: files.human_bytes(size) + (" (changed)" * (name in changed)) for name, size in found["files"].items()
    }
    sizes |= {name: "gone" for name in changed if name not in sizes}
    sections.append((f"files, {files.human_bytes(found['bytes'])}", _table(sizes)))
    for title, body in sections:
        console.print(Group(Text(f"\n{title}", style="bold cyan"), Padding(body, (0, 0, 0, 2))), soft_wrap=False)


def _table(values: Mapping[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for key, value in values.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{inner}: {_spell(inner, content)}" for inner, content in value.items())
        table.add_row(Text(_plain(key)), Text(_plain(_spell(key, value))))
    return table


def _tree(card: Card, path: str) -> Tree:
    """What an artifact was made from, and that from what, as far as cards tell."""
    from rich.text import Text
    from rich.tree import Tree

    facts = [f"{key} {_spell(key, card.metrics[key])}" for key in _TELLING if card.metrics.get(key) is not None]
    branch = Tree(Text(_plain("  ".join([path, f"danlu {card.verb}", *facts])), overflow="fold"))
    for item in card.inputs:
        if item.card is None:
            leaf = f"{item.role}: {item.path}  (no card, fingerprint {item.fingerprint[:12]})"
            branch.add(Text(_plain(leaf), overflow="fold"))
        else:
            branch.add(_tree(Card.from_dict(item.card), f"{item.role}: {item.path}"))
    return branch


def _spell(key: str, value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return files.human_bytes(value) if "bytes" in key else f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_spell(key, item) for item in value)
    return str(value)


def _plain(text: object) -> str:
    """Cards come from anywhere; their texts must not steer the terminal."""
    return "".join(c if c.isprintable() else " " for c in str(text))
