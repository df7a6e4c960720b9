"""What the cross-attention of a paged step looks at: the encoder's side of many sequences whose tokens stand in one
row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from danlu.nn.paged import Rows
from danlu.nn.sdpa import attend


@dataclass(frozen=True)
class Sources:
    """The encoder's side of sequences with equally many new tokens.

    Attributes:
        keys_values: of each layer, (sequences, n_kv_heads, source, head_dim) each.
        mask: additive, (sequences, 1, 1, source), where some are padded.
    """

    rows: Rows
    keys_values: Sequence[tuple[Tensor, Tensor]]
    mask: Tensor | None


@dataclass(frozen=True)
class LayerMemory:
    """The memory of one layer, in place of a pair of keys and values."""

    sources: Sequence[Sources]
    layer: int

    def attend(self, q_bhtd: Tensor, *, scale: float, softcap: float | None) -> Tensor:
        """From every query of the row to the source of its own sequence, (1, heads, tokens, head_dim)."""
        q_thd = q_bhtd[0].transpose(0, 1)
        y_thd = q_thd.new_empty(q_thd.shape)
        for part in self.sources:
            k, v = part.keys_values[self.layer]
            part.rows.put(y_thd, attend(part.rows.take(q_thd), k, v, part.mask, scale=scale, softcap=softcap))
        return y_thd.transpose(0, 1)[None]


class PagedMemory:
    """The memory of a step, for all layers; a :class:`danlu.models.transformer.Memory` whose masks are inside."""

    real_bs: None = None

    def __init__(self, sources: Sequence[Sources]) -> None:
        self.keys_values = [LayerMemory(sources, layer) for layer in range(len(sources[0].keys_values))]
