"""Documents into rows of equal length: nothing is discarded, and no token sees another document.

A long document is cut into pieces of one row each; what is left over is packed best-fit, longest first. Inside a row
positions start at 0 with every piece and `segments` numbers the pieces, so that attention can be kept within each
(Krell et al. 2021, arXiv:2107.02027). Everything follows from (seed, epoch): a stream is resumed by two whole numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from danlu.data.epochs import EpochStream

IGNORE = -100
"""Target of positions that carry no loss: padding, prompts."""


class Sequences(Protocol):
    """Training sequences: ``inputs[j]`` predicts ``targets[j]`` (IGNORE: no loss), both of ``lengths[i]`` tokens."""

    lengths: NDArray[np.int64]

    def __getitem__(self, i: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...


class DocumentSequences:
    """Pre-training sequences: each document, begun by its BOS, predicts its next token and, at its end,
    ``<|endoftext|>``.

    Args:
        ids: all documents one after the other, each starting with BOS.
        offsets: (n_docs + 1,) where each begins.
        end_id: target behind the last token of a document.
    """

    def __init__(self, ids: NDArray[np.unsignedinteger], offsets: NDArray[np.int64], end_id: int) -> None:
        self.ids, self.offsets, self.end_id = ids, offsets, end_id
        self.lengths = np.diff(offsets)

    def __getitem__(self, i: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        inputs = self.ids[self.offsets[i] : self.offsets[i + 1]].astype(np.int64)
        return inputs, np.append(inputs[1:], self.end_id)


class MaskedSequences:
    """Fine-tuning sequences: ``mask[j]`` says that token ``j`` is learned; the first token of a sequence never is."""

    def __init__(self, examples: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> None:
        self.examples = examples
        self.lengths = np.array([len(ids) - 1 for ids, _ in examples], dtype=np.int64)

    def __getitem__(self, i: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        ids, mask = np.array(self.examples[i][0], dtype=np.int64), np.array(self.examples[i][1], dtype=bool)
        return ids[:-1], np.where(mask[1:], ids[1:], IGNORE)


@dataclass
class Batch:
    """Rows ready for the model, each field (rows, seq_len) int64. Padding has target IGNORE and a segment of its
    own."""

    ids: Tensor
    targets: Tensor
    positions: Tensor
    segments: Tensor

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def n_targets(self) -> int:
        """Tokens that carry loss."""
        return int((self.targets != IGNORE).sum())

    @property
    def n_tokens(self) -> int:
        """Tokens that the model reads, padding included."""
        return self.ids.numel()

    def split(self, rows: int) -> Iterator[Batch]:
        """Micro-batches of at most ``rows`` rows."""
        for parts in zip(
            *(torch.split(t, rows) for t in (self.ids, self.targets, self.positions, self.segments)), strict=True
        ):
            yield Batch(*parts)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return Batch(
            *(t.to(device, non_blocking=True) for t in (self.ids, self.targets, self.positions, self.segments))
        )


Piece = tuple[int, int, int]
"""(sequence, start, length)"""


def pack_pieces(pieces: list[Piece], row_len: int) -> list[list[Piece]]:
    """Best-fit decreasing: each piece, longest first, goes to the fullest row that still has room for it."""
    rows: list[list[Piece]] = []
    rows_by_room: dict[int, list[int]] = defaultdict(list)
    # Bit r is set while some row has room for exactly r tokens: the best fit is one shift and one lowest bit away.
    rooms = 0
    for piece in sorted(pieces, key=lambda piece: -piece[2]):
        length = piece[2]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = row_len, len(rows)
            rows.append([])
        rows[row].append(piece)
        if left := room - length:
            rows_by_room[left].append(row)
            rooms |= 1 << left
    return rows


def pack_epoch(lengths: NDArray[np.int64], row_len: int, *, seed: int, epoch: int) -> list[list[Piece]]:
    """The rows of one epoch in training order.

    From the second epoch on, documents longer than a row are cut at other places, so that their tokens are seen in new
    contexts.
    """
    rng = np.random.default_rng((seed, epoch))
    first_cuts = rng.integers(1, row_len + 1, size=len(lengths)) if epoch else np.full(len(lengths), row_len)
    rows: list[list[Piece]] = []
    leftovers: list[Piece] = []
    for i, length in enumerate(lengths.tolist()):
        start = 0
        while start < length:
            size = min(length - start, row_len)
            if start == 0 and length > row_len:
                size = int(first_cuts[i])
            (rows.append([(i, start, size)]) if size == row_len else leftovers.append((i, start, size)))
            start += size
    leftovers = [leftovers[j] for j in rng.permutation(len(leftovers))]  # equal lengths do not always meet
    rows += pack_pieces(leftovers, row_len)
    return [rows[j] for j in rng.permutation(len(rows))]


class RowStream(EpochStream[list[Piece]]):
    """Endless rows over epochs; those of a later epoch are cut otherwise, and may be a few more or less."""

    def __init__(self, sequences: Sequences, row_len: int, *, seed: int, pad_id: int) -> None:
        self.sequences, self.row_len, self.seed, self.pad_id = sequences, row_len, seed, pad_id
        super().__init__()

    def order(self, epoch: int) -> list[list[Piece]]:
        return pack_epoch(self.sequences.lengths, self.row_len, seed=self.seed, epoch=epoch)

    def next(self, n_rows: int) -> Batch:
        """The next ``n_rows`` rows."""
        return self.assemble(self.take(n_rows))

    def first_rows(self, n_rows: int) -> Batch:
        """The first rows in a fixed order, without moving the stream (held-out measurements)."""
        return self.assemble(self._order[:n_rows])

    def assemble(self, rows: list[list[Piece]]) -> Batch:
        """Look the tokens of these rows up."""
        shape = (len(rows), self.row_len)
        ids, targets = np.full(shape, self.pad_id, dtype=np.int64), np.full(shape, IGNORE, dtype=np.int64)
        positions, segments = np.zeros(shape, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
        for r, row in enumerate(rows):
            at = 0
            for number, (i, start, length) in enumerate(row):
                inputs, wanted = self.sequences[i]
                here = slice(at, at + length)
                ids[r, here], targets[r, here] = inputs[start : start + length], wanted[start : start + length]
                positions[r, here], segments[r, here] = np.arange(length), number
                at += length
        return Batch(*(torch.from_numpy(array) for array in (ids, targets, positions, segments)))
