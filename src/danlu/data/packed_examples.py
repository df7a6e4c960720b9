"""Examples of all lengths in rows without much padding, and what was computed at their targets put back by example.

Preference pairs, rollouts and answers to distil are judged by sequence, not by token: packed, they cost what their own
tokens cost; laid out again as (examples, targets), they are what the formulas speak of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from danlu.data.packing import IGNORE, pack_pieces

Example = tuple[Sequence[int], Sequence[bool]]
"""Token ids, and which of them are targets; the first never is."""


@dataclass(frozen=True)
class PackedExamples:
    """Rows ready for the model, the first four (rows, row_len) int64 as in :class:`~danlu.data.packing.Batch`.

    The n targets are ordered by example and, within it, by place:

    Attributes:
        slots_n: where each target is predicted, in the flattened rows.
        owners_n: the example that each target belongs to.
        steps_n: its number within the example's targets, from 0.
        lengths_b: targets of each example, which may be 0.
    """

    ids: Tensor
    targets: Tensor
    positions: Tensor
    segments: Tensor
    slots_n: Tensor
    owners_n: Tensor
    steps_n: Tensor
    lengths_b: Tensor

    @property
    def n_tokens(self) -> int:
        """Tokens that the model reads, padding included."""
        return self.ids.numel()

    @cached_property
    def width(self) -> int:
        """Most targets of an example."""
        return int(self.lengths_b.max()) if len(self.lengths_b) else 0

    @property
    def mask_bt(self) -> Tensor:
        """(examples, width) bool: where an example has a target."""
        return torch.arange(self.width, device=self.lengths_b.device) < self.lengths_b[:, None]

    def at_targets(self, values: Tensor) -> Tensor:
        """Of what was computed at each position, (rows, row_len, ...), that which predicts a target: (n, ...)."""
        return values.flatten(0, 1).index_select(0, self.slots_n)

    def by_example(self, values_n: Tensor) -> Tensor:
        """What was computed for each target, laid out as (examples, width); 0 behind the end of an example."""
        laid_out = values_n.new_zeros(len(self.lengths_b), self.width)
        return laid_out.index_put((self.owners_n, self.steps_n), values_n)

    def to(self, device: torch.device) -> PackedExamples:
        """The same on a device."""
        return PackedExamples(*(getattr(self, field.name).to(device) for field in fields(self)))


def pack_examples(examples: Sequence[Example], *, row_len: int = 0, pad_id: int = 0) -> PackedExamples:
    """Whole examples into as few rows as best-fit finds; none is cut, and none sees another.

    Args:
        row_len: tokens a row; at least, and by default, what the longest example needs. Longer rows waste less and
            attend to more that is masked.
    """
    lengths = [len(ids) - 1 for ids, _ in examples]
    row_len = max([row_len, 1, *lengths])
    rows = pack_pieces([(i, 0, n) for i, n in enumerate(lengths) if n > 0], row_len)
    shape = (len(rows), row_len)
    ids_rt, targets = np.full(shape, pad_id, dtype=np.int64), np.full(shape, IGNORE, dtype=np.int64)
    positions, segments = np.zeros(shape, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
    slots: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = [np.empty(0, dtype=np.int64)] * len(examples)
    for r, row in enumerate(rows):
        at = 0
        for number, (i, _, length) in enumerate(row):
            tokens, wanted = np.asarray(examples[i][0], dtype=np.int64), np.asarray(examples[i][1], dtype=bool)[1:]
            here = slice(at, at + length)
            ids_rt[r, here], targets[r, here] = tokens[:-1], np.where(wanted, tokens[1:], IGNORE)
            positions[r, here], segments[r, here] = np.arange(length), number
            slots[i] = r * row_len + at + np.flatnonzero(wanted)
            at += length
    counts = np.array([len(one) for one in slots], dtype=np.int64)
    owners = np.repeat(np.arange(len(examples)), counts)
    steps = np.concatenate([np.arange(n) for n in counts]) if len(counts) else counts
    all_slots = np.concatenate(slots) if slots else counts
    arrays = (ids_rt, targets, positions, segments, all_slots, owners, steps, counts)
    return PackedExamples(*(torch.from_numpy(array.astype(np.int64, copy=False)) for array in arrays))
