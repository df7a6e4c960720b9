"""Examples of all lengths in rows without much padding, and what was computed at their targets put back by example.

Preference pairs, rollouts and answers to distil are judged by sequence, not by token: packed, they cost what their own
tokens cost; laid out again as (examples, targets), they are what the formulas speak of. Answers to one prompt stand
behind one copy of it: each sees the prompt and itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from danlu.data.packing import IGNORE, pack_pieces

Example = tuple[Sequence[int], Sequence[bool]]
"""Token ids, and which of them are targets; the first never is."""

SHARED_FROM = 16
"""Tokens that examples have in common at their beginning from which on they are laid down once."""

SHARED_ROW = 512
"""Tokens that a row with shared prompts may have, where no example needs more: under a mask, attention computes all of
a row. Of the time of 8 rows, 8 answers of 64 tokens behind a prompt of 67 take 0.65 in two rows of 322, 0.61 in one
(SmolLM2)."""


@dataclass(frozen=True)
class PackedExamples:
    """Rows ready for the model, the first five (rows, row_len) int64, as in :class:`~danlu.data.packing.Batch`.

    The n targets are ordered by example and, within it, by place:

    Attributes:
        prefixes: the segment that each token sees besides its own: the prompt that it goes on from, or its own again.
        slots_n: where each target is predicted, in the flattened rows; one slot for several in what examples share.
        owners_n: the example that each target belongs to.
        steps_n: its number within the example's targets, from 0.
        lengths_b: targets of each example, which may be 0.
    """

    ids: Tensor
    targets: Tensor
    positions: Tensor
    segments: Tensor
    prefixes: Tensor
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


def pack_examples(
    examples: Sequence[Example], *, row_len: int = 0, pad_id: int = 0, shared_from: int = SHARED_FROM
) -> PackedExamples:
    """Whole examples into as few rows as best-fit finds; none is cut, and none sees another, but for the tokens that it
    begins with as its neighbours do.

    Args:
        row_len: tokens a row; at least, and by default, what the longest example needs, or examples that share their
            prompt. Longer rows waste less and, under a mask, attend to more that is hidden.
        shared_from: tokens that neighbours have to share.
    """
    ids = _ids(examples)
    wanted = [np.asarray(mask, dtype=bool)[1:] for _, mask in examples]
    room = max([row_len, SHARED_ROW, *(len(tokens) - 1 for tokens in ids)])
    families = [part for family in _families(ids, shared_from) for part in family.split(ids, room)]
    lengths = [family.n_tokens(ids) for family in families]
    row_len = max([row_len, 1, *lengths])
    rows = pack_pieces([(f, 0, n) for f, n in enumerate(lengths) if n > 0], row_len)

    shape = (len(rows), row_len)
    ids_rt, targets = np.full(shape, pad_id, dtype=np.int64), np.full(shape, IGNORE, dtype=np.int64)
    positions, segments = np.zeros(shape, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
    prefixes = segments.copy()
    slots: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)] * len(examples)
    for r, row in enumerate(rows):
        at = segment = 0
        for f, _, _ in row:
            family, prefix = families[f], segment
            parts = [(i, family.n_shared, len(ids[i]) - 1) for i in family.members]
            places = []
            for i, start, end in [(family.members[0], 0, family.n_shared), *parts]:
                here = slice(at, at + end - start)
                ids_rt[r, here], positions[r, here] = ids[i][start:end], np.arange(start, end)
                segments[r, here], prefixes[r, here] = segment, prefix
                places.append(r * row_len + np.arange(here.start, here.stop))
                at, segment = here.stop, segment + 1
            for i, own in zip(family.members, places[1:], strict=True):
                slots[i] = np.concatenate([places[0], own])[wanted[i]]
                targets.flat[slots[i]] = ids[i][1:][wanted[i]]
    counts = np.array([len(one) for one in slots], dtype=np.int64)
    owners = np.repeat(np.arange(len(examples)), counts)
    steps = np.concatenate([np.arange(n) for n in counts]) if len(counts) else counts
    all_slots = np.concatenate(slots) if slots else counts
    arrays = (ids_rt, targets, positions, segments, prefixes, all_slots, owners, steps, counts)
    return PackedExamples(*(torch.from_numpy(array.astype(np.int64, copy=False)) for array in arrays))


def n_tokens(examples: Sequence[Example], shared_from: int = SHARED_FROM) -> int:
    """Tokens that a model reads of packed examples: what neighbours share counts once."""
    ids = _ids(examples)
    return sum(family.n_tokens(ids) for family in _families(ids, shared_from))


Ids = Sequence[NDArray[np.int64]]


def _ids(examples: Sequence[Example]) -> Ids:
    return [np.asarray(tokens, dtype=np.int64) for tokens, _ in examples]


@dataclass
class _Family:
    """Examples that begin with the same ``n_shared`` tokens, all but the last of what they have in common: that one
    predicts something else in each."""

    n_shared: int
    members: list[int]

    def n_tokens(self, ids: Ids) -> int:
        return self.n_shared + sum(len(ids[i]) - 1 - self.n_shared for i in self.members)

    def split(self, ids: Ids, room: int) -> Iterator[_Family]:
        """In parts of about the same size that have room in a row, each with the common tokens."""
        longest = max(len(ids[i]) - 1 - self.n_shared for i in self.members)
        n_each = max(1, (room - self.n_shared) // max(1, longest))
        for part in np.array_split(np.array(self.members), -(-len(self.members) // n_each)):
            yield _Family(self.n_shared, part.tolist())


def _families(ids: Ids, shared_from: int) -> list[_Family]:
    """Neighbours that share enough; one more joins them unless less is saved with it than without."""
    families: list[_Family] = []
    for i, tokens in enumerate(ids):
        if families:
            last, n = families[-1], len(families[-1].members)
            shared = _n_common(tokens, ids[last.members[0]][: last.n_shared + 1]) - 1
            if shared >= shared_from and n * shared >= (n - 1) * last.n_shared:
                last.n_shared = shared
                last.members.append(i)
                continue
        families.append(_Family(len(tokens) - 1, [i]))
    return families


def _n_common(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    n = min(len(one), len(other))
    differ = one[:n] != other[:n]
    return int(differ.argmax()) if differ.any() else n
