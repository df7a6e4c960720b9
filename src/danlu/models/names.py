"""The map between a checkpoint's tensors and ours, as data: one line for each kind of tensor.

A family's table gives for each of our names where it comes from::

    "layers.{i}.attention.o_proj.weight": "model.layers.{i}.self_attn.o_proj.weight",   # the same tensor
    QKV_WEIGHT: Fused("model.layers.{i}.self_attn.qkv_proj.weight"),                    # three of ours in one of theirs
    "layers.{i}.mlp.down_proj": Experts(("...experts.{e}.w2.weight",)),                 # one of ours from many

``{i}`` is the layer. Lines whose tensors a model does not have (biases, say) are passed over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from danlu.nn.config import Arrangement, ModelConfig

QKV_WEIGHT = tuple(f"layers.{{i}}.attention.{p}_proj.weight" for p in "qkv")
QKV_BIAS = tuple(f"layers.{{i}}.attention.{p}_proj.bias" for p in "qkv")
GATE_UP_WEIGHT = ("layers.{i}.mlp.gate_proj.weight", "layers.{i}.mlp.up_proj.weight")


@dataclass(frozen=True)
class Transposed:
    """A matrix stored as (in, out), as GPT-2's Conv1D does."""

    theirs: str


@dataclass(frozen=True)
class Fused:
    """Several of our tensors along the rows of one of theirs.

    ``rows``: one after the other. ``heads``: queries, keys and values of a head lie together, head after head
    (GPT-NeoX, BLOOM). ``groups``: the queries that share a key head, then that key and value head (Falcon).
    """

    theirs: str
    layout: Literal["rows", "heads", "groups"] = "rows"
    transposed: bool = False


@dataclass(frozen=True)
class Experts:
    """One of our tensors, (experts, rows, cols), from one or more of theirs for each expert ``{e}``, whose rows follow
    each other."""

    theirs: tuple[str, ...]


@dataclass(frozen=True)
class ByArrangement:
    """A tensor whose name depends on where the norms stand: a name for each arrangement that occurs (Falcon)."""

    theirs: Mapping[Arrangement, str]


@dataclass(frozen=True)
class ByGating:
    """A tensor whose name depends on whether the feed-forward network is gated (T5)."""

    gated: str
    plain: str


@dataclass(frozen=True)
class Row:
    """A vector that is stored as a matrix of one row."""

    theirs: str


@dataclass(frozen=True)
class ByTying:
    """A tensor that is stored twice, where the one that counts depends on whether the head is tied (BERT's bias)."""

    tied: str
    untied: str


Source = str | Transposed | Row | Fused | Experts | ByArrangement | ByGating | ByTying
Names = Mapping[str | tuple[str, ...], Source]


@dataclass(frozen=True)
class Rule:
    """One line of a table, for one layer: ``theirs`` -> ``ours`` and back. ``transposed``: theirs is (in, out)."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_ours: Callable[[list[Tensor]], list[Tensor]]
    to_theirs: Callable[[list[Tensor]], list[Tensor]]
    transposed: bool = False


def rules(names: Names, config: ModelConfig, shapes: Mapping[str, Sequence[int]], prefix: str = "") -> Iterator[Rule]:
    """The lines of a table that a model has tensors for.

    Args:
        shapes: our tensors, by name.
        prefix: goes in front of their names.
    """
    n_layers = 1 + max((int(found[1]) for name in shapes if (found := re.search(r"layers\.(\d+)\.", name))), default=-1)
    for key, source in names.items():
        keys = (key,) if isinstance(key, str) else key
        for i in range(n_layers) if "{i}" in keys[0] else (0,):
            ours = tuple(name.replace("{i}", str(i)) for name in keys)
            if ours[0] in shapes:
                yield _rule(ours, source, i, config, [shapes[name][0] for name in ours], prefix)


def _rule(
    ours: tuple[str, ...], source: Source, layer: int, config: ModelConfig, sizes: list[int], prefix: str
) -> Rule:
    def their(name: str) -> str:
        return prefix + name.replace("{i}", str(layer))

    if isinstance(source, ByArrangement):
        source = source.theirs[config.arrangement]
    if isinstance(source, ByTying):
        source = source.tied if config.tie_embeddings else source.untied
    if isinstance(source, ByGating):
        source = source.gated if config.gated else source.plain
    if isinstance(source, str):
        return Rule(ours, (their(source),), _same, _same)
    if isinstance(source, Row):
        return Rule(ours, (their(source.theirs),), _flatten, _as_row)
    if isinstance(source, Transposed):
        return Rule(ours, (their(source.theirs),), _transpose, _transpose, transposed=True)
    if isinstance(source, Fused):
        split, join = _fused(source, sizes, config)
        return Rule(ours, (their(source.theirs),), split, join, source.transposed)
    assert config.experts is not None
    number, parts = config.experts.number, len(source.theirs)
    theirs = tuple(their(name).replace("{e}", str(e)) for e in range(number) for name in source.theirs)

    def stack(tensors: list[Tensor]) -> list[Tensor]:
        each = [torch.cat(tensors[e * parts : (e + 1) * parts]) for e in range(number)]
        return [torch.stack(each)]

    def unstack(tensors: list[Tensor]) -> list[Tensor]:
        return [part for expert in tensors[0] for part in expert.chunk(parts)]

    return Rule(ours, theirs, stack, unstack)


def _same(tensors: list[Tensor]) -> list[Tensor]:
    return tensors


def _flatten(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.flatten() for tensor in tensors]


def _as_row(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor[None] for tensor in tensors]


def _transpose(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.T.contiguous() for tensor in tensors]


def _fused(
    source: Fused, sizes: list[int], config: ModelConfig
) -> tuple[Callable[[list[Tensor]], list[Tensor]], Callable[[list[Tensor]], list[Tensor]]]:
    """How to split one tensor into ours, and how to join them again."""
    groups = {"rows": 1, "heads": config.n_heads, "groups": config.n_kv_heads}[source.layout]
    rows = [size // groups for size in sizes]

    def split(tensors: list[Tensor]) -> list[Tensor]:
        tensor = tensors[0].T if source.transposed else tensors[0]
        grouped = tensor.unflatten(0, (groups, sum(rows)))  # type: ignore[no-untyped-call]
        return [part.flatten(0, 1).contiguous() for part in grouped.split(rows, dim=1)]

    def join(tensors: list[Tensor]) -> list[Tensor]:
        grouped = [tensor.unflatten(0, (groups, n)) for tensor, n in zip(tensors, rows, strict=True)]  # type: ignore[no-untyped-call]
        joined = torch.cat(grouped, dim=1).flatten(0, 1)
        return [joined.T.contiguous() if source.transposed else joined]

    return split, join
