"""A new student begins with its teacher's weights, cut to its own shape.

The residual stream is projected on the directions in which the teacher's embedding differs most (SliceGPT, Ashkboos et
al. 2024, arXiv:2401.15024, takes them from activations), whole heads and hidden units are kept or dropped by the norms
of their weights (Minitron, Muralidharan et al. 2024, arXiv:2407.14679, by activations), and layers are left out. It
needs no data. It is a beginning and no more: a norm does not commute with a projection.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from danlu.models.transformer import Transformer

Axis = Literal["residual", "query", "key", "hidden", "whole"]

AXES: dict[str, tuple[Axis, ...]] = {
    "q_proj": ("query", "residual"),
    "k_proj": ("key", "residual"),
    "v_proj": ("key", "residual"),
    "o_proj": ("residual", "query"),
    "gate_proj": ("hidden", "residual"),
    "up_proj": ("hidden", "residual"),
    "down_proj": ("residual", "hidden"),
    "pooler": ("residual", "residual"),
    "transform": ("residual", "residual"),
    "embed": ("whole", "residual"),
    "embed_positions": ("whole", "residual"),
    "embed_types": ("whole", "residual"),
    "head": ("whole", "residual"),
    "q_norm": ("whole",),
    "k_norm": ("whole",),
}
"""What the axes of a module's weight run over; its bias runs over the first. All other norms run over the residual
stream."""


@dataclass
class Cut:
    """What is kept of a teacher.

    Attributes:
        directions_dk: (teacher's width, student's width), orthonormal columns.
        share: of the squares of the residual stream that they keep.
        offset: 1 where gains are stored as their difference from one, else 0.
        kept: for each layer of the student, which rows of "query", "key" and "hidden" of its teacher's.
    """

    directions_dk: Tensor
    share: float
    offset: float
    kept: list[dict[Axis, Tensor]]

    def of(self, name: str, weight: Tensor) -> Tensor | None:
        """A weight of the teacher, under its student's name, in the student's shape; None where it has no rule."""
        module, kind = name.split(".")[-2:]
        layer = re.match(r"layers\.(\d+)\.", name)
        kept: Mapping[Axis, Tensor] = self.kept[int(layer[1])] if layer else {}
        if module.endswith("norm") and module not in AXES:
            return self._of_norm(kind, weight)
        if module not in AXES:
            return None
        for axis, runs_over in enumerate(AXES[module][: weight.dim()]):
            if runs_over == "residual":
                weight = torch.tensordot(weight, self.directions_dk, dims=([axis], [0])).movedim(-1, axis)
            elif runs_over in kept:
                weight = weight.index_select(axis, kept[runs_over])
        return weight

    def _of_norm(self, kind: str, weight: Tensor) -> Tensor:
        """The diagonal of a gain in the new directions. What is left of a stream is shorter, and the norm makes it as
        long as if nothing were missing, once for each feature: both are made good here."""
        if kind == "bias":
            return weight @ self.directions_dk
        width, narrower = self.directions_dk.shape
        gain: Tensor = (weight + self.offset) @ self.directions_dk.square()
        return gain * math.sqrt(self.share * width / narrower) - self.offset


def cut_weights(teacher: Transformer, student: Transformer, layers: Sequence[int]) -> None:
    """Give a student the weights of its teacher, as far as they can be cut to its shape; others it keeps.

    Args:
        layers: which layer of the teacher each of the student's begins with.
    """
    stream_dd = gram(teacher.embed.weight)  # what the layers add lies in much the same directions
    directions_dk = principal_directions(stream_dd, student.config.dim)
    share = (directions_dk.T @ stream_dd @ directions_dk).trace() / stream_dd.trace()
    kept = [_kept(teacher, student, layer) for layer in layers]
    cut = Cut(directions_dk.float(), float(share), float(teacher.config.norm_offset), kept)
    theirs = dict(teacher.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, weight in student.named_parameters():
            origin = re.sub(r"^layers\.(\d+)\.", lambda found: f"layers.{layers[int(found[1])]}.", name)
            found = cut.of(name, theirs[origin])
            if found is not None and found.shape == weight.shape:
                weight.copy_(found)


def gram(rows_nd: Tensor) -> Tensor:
    """(dim, dim) fp64."""
    rows = rows_nd.detach().double()
    return rows.T @ rows


def principal_directions(gram_dd: Tensor, k: int) -> Tensor:
    """The k orthonormal directions, (dim, k), that keep as much of the squares of some rows as k numbers a row can hold
    (Eckart and Young 1936); at full width the features themselves.

    Args:
        gram_dd: :func:`gram` of the rows.
    """
    if k == len(gram_dd):
        return torch.eye(k, dtype=gram_dd.dtype)
    directions_dd: Tensor = torch.linalg.eigh(gram_dd).eigenvectors  # in rising order
    return directions_dd.flip(1)[:, :k]


def _kept(teacher: Transformer, student: Transformer, layer: int) -> dict[Axis, Tensor]:
    """Rows of the heads and hidden units that weigh most; query heads that share a key head stay together."""
    theirs, mine = teacher.config, student.config

    def squares(name: str, axis: int) -> Tensor:
        return teacher.get_parameter(f"layers.{layer}.{name}.weight").detach().square().sum(axis)

    kept: dict[Axis, Tensor] = {}
    as_grouped = theirs.n_heads * mine.n_kv_heads == mine.n_heads * theirs.n_kv_heads
    if theirs.head_dim == mine.head_dim and as_grouped and mine.n_kv_heads <= theirs.n_kv_heads:
        n_groups, query_rows = theirs.n_kv_heads, theirs.n_heads // theirs.n_kv_heads * theirs.head_dim
        out_g = squares("attention.o_proj", 0).view(n_groups, query_rows).sum(1)
        values_g = squares("attention.v_proj", 1).view(n_groups, theirs.head_dim).sum(1)
        groups = _heaviest(out_g * values_g, mine.n_kv_heads)
        kept["query"], kept["key"] = _rows(groups, query_rows), _rows(groups, theirs.head_dim)
    if theirs.experts is None and mine.ffn_dim <= theirs.ffn_dim:
        weight_h = squares("mlp.down_proj", 0) * squares("mlp.up_proj", 1)
        if theirs.gated:
            weight_h = weight_h * squares("mlp.gate_proj", 1)
        kept["hidden"] = _heaviest(weight_h, mine.ffn_dim)
    return kept


def _heaviest(weights: Tensor, n: int) -> Tensor:
    """The places of the n largest, in rising order."""
    return weights.topk(n).indices.sort().values


def _rows(groups: Tensor, size: int) -> Tensor:
    """The rows of groups of so many rows each."""
    return (groups[:, None] * size + torch.arange(size)).flatten()
