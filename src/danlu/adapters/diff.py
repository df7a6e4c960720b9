"""`danlu adapters diff`: in what two adapters differ, from their folders alone."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from danlu import console
from danlu.adapters.open import makes_up_for_4_bits, trained_in
from danlu.adapters.peft_config import PeftConfig, read_peft_config
from danlu.adapters.peft_folder import LowRankTensors, read_low_rank
from danlu.adapters.verbs_config import AdaptersDiffConfig
from danlu.config import validate


@dataclass(frozen=True)
class Update:
    """``s B A`` of one module, which is never written out."""

    a: Tensor
    b: Tensor
    scale: float

    def dot(self, other: Update) -> float:
        """Sum of the products of all entries: ``tr((B A)^T B' A')``, which is the sum over ``B^T B' * A A'^T``."""
        inner = (self.b.T @ other.b) * (self.a @ other.a.T)
        return self.scale * other.scale * float(inner.sum())

    @property
    def norm(self) -> float:
        """Frobenius norm."""
        return math.sqrt(max(0.0, self.dot(self)))


def adapters_diff(config: AdaptersDiffConfig) -> dict[str, Any]:
    """Compare two adapter folders, print what differs, and return it.

    Returns:
        ``config``: field -> values of both, where they differ; ``only_first``, ``only_second``: modules; ``modules``:
        name -> ``norms`` (Frobenius norms of both updates ``s B A``), ``dot`` and ``cosine`` (None where one is zero or
        the shapes differ), ``ranks`` and, where the shapes differ, ``shapes``; ``cosine``: of all common updates
        together.

    Raises:
        DanluError: a folder is no adapter, or not supported.
    """
    config = validate(config)
    first, second = _read(config.first), _read(config.second)
    modules = {
        name: _compare(first[1][name], second[1][name], first[0], second[0], name)
        for name in first[1]
        if name in second[1]
    }
    found: dict[str, Any] = {
        "config": _differing((config.first, first[0]), (config.second, second[0])),
        "only_first": [name for name in first[1] if name not in second[1]],
        "only_second": [name for name in second[1] if name not in first[1]],
        "modules": modules,
        "cosine": _whole_cosine(modules),
    }
    if config.json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        _show(found, config)
    return found


Adapter = tuple[PeftConfig, dict[str, LowRankTensors]]


def _read(folder: Path) -> Adapter:
    config = read_peft_config(folder)
    return config, read_low_rank(folder)


def _differing(first: tuple[Path, PeftConfig], second: tuple[Path, PeftConfig]) -> dict[str, list[Any]]:
    def fields(folder: Path, config: PeftConfig) -> dict[str, Any]:
        shape = config.shape
        return {
            "base": config.base, "task": config.task_type, "kind": shape.kind, "rank": shape.rank, "alpha": shape.alpha,
            "rslora": shape.rslora, "dropout": shape.dropout, "targets": sorted(shape.targets),
            "ranks": dict(config.ranks), "alphas": dict(config.alphas),
            "tokens": {name: list(ids) for name, ids in config.token_ids.items()},
            "quantize": trained_in(folder), "adapter_start": "error" if makes_up_for_4_bits(folder) else "zero",
        }  # fmt: skip

    one, other = fields(*first), fields(*second)
    return {name: [one[name], other[name]] for name in one if one[name] != other[name]}


def _compare(
    first: LowRankTensors, second: LowRankTensors, config: PeftConfig, other: PeftConfig, name: str
) -> dict[str, Any]:
    one, two = _update(first, config, name), _update(second, other, name)
    shapes = [[len(u.b), u.a.shape[1]] for u in (one, two)]
    found: dict[str, Any] = {
        "ranks": [len(one.a), len(two.a)],
        "norms": [one.norm, two.norm],
        "dot": None,
        "cosine": None,
    }
    if shapes[0] != shapes[1]:
        return {**found, "shapes": shapes}
    found["dot"] = one.dot(two)
    if one.norm and two.norm:
        found["cosine"] = found["dot"] / (one.norm * two.norm)
    return found


def _update(tensors: LowRankTensors, config: PeftConfig, name: str) -> Update:
    alpha, rank = config.alpha_of(name), len(tensors.a)
    return Update(tensors.a.double(), tensors.b.double(), alpha / (rank**0.5 if config.shape.rslora else rank))


def _whole_cosine(modules: dict[str, dict[str, Any]]) -> float | None:
    common = [module for module in modules.values() if module["dot"] is not None]
    norms = [sum(module["norms"][i] ** 2 for module in common) ** 0.5 for i in (0, 1)]
    return sum(module["dot"] for module in common) / (norms[0] * norms[1]) if norms[0] and norms[1] else None


def _show(found: dict[str, Any], config: AdaptersDiffConfig) -> None:
    table = Table(box=None)
    for title in ("", config.first.name, config.second.name):
        table.add_column(title, overflow="fold")
    for name, (one, other) in found["config"].items():
        table.add_row(name, str(one), str(other))
    for where, folder in (("only_first", config.first), ("only_second", config.second)):
        for name in found[where]:
            console.out().print(f"only in {folder}: {name}", markup=False)
    if found["config"]:
        console.out().print(table)
    updates = Table(
        box=None, title="size of the updates (Frobenius norm), and cosine between them", title_justify="left"
    )
    for title in ("", config.first.name, config.second.name, "cosine"):
        updates.add_column(title, justify="left" if not title else "right")
    for name, module in found["modules"].items():
        cosine = "other shape" if "shapes" in module else "" if module["cosine"] is None else f"{module['cosine']:.4f}"
        updates.add_row(name, *(f"{norm:.4g}" for norm in module["norms"]), cosine)
    if found["cosine"] is not None:
        updates.add_row("all together", "", "", f"{found['cosine']:.4f}")
    console.out().print(updates)
