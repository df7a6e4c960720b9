"""Labelled rows into batches of like length: each is padded to its longest row, and little of it is padding.

As in :class:`~danlu.data.packing.RowStream` everything follows from (seed, epoch), and two whole numbers resume it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from danlu.data.epochs import EpochStream
from danlu.data.packing import IGNORE

POOL = 50
"""Batches whose rows are sorted by length among each other; the order of rows is random up to that."""


@dataclass(frozen=True)
class Example:
    """A row to learn.

    Attributes:
        ids: tokens that the model reads.
        types: 0 for a token of the first text, 1 for one of the second; empty: all are 0.
        target: the number of a label; numbers, one a label; or one for each token (IGNORE: no loss).
        decoder_ids: what a decoder is given; empty where there is none.
    """

    ids: Sequence[int]
    target: int | float | Sequence[int] | Sequence[float]
    types: Sequence[int] = ()
    decoder_ids: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.ids) + len(self.decoder_ids)


@dataclass
class PaddedBatch:
    """Rows ready for the model, padded on the right.

    Attributes:
        ids, real, types: (batch, seq); ``real`` is False for padding.
        targets: (batch,) labels, int64, or numbers, fp32; (batch, labels) fp32; or (batch, seq) int64 with IGNORE, of
            the decoder where there is one.
        decoder_ids, decoder_real: (batch, target), or (batch, 0) without a decoder.
    """

    ids: Tensor
    real: Tensor
    types: Tensor
    targets: Tensor
    decoder_ids: Tensor
    decoder_real: Tensor

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def n_targets(self) -> int:
        """What carries loss."""
        return self.targets.numel() if self.targets.is_floating_point() else int((self.targets != IGNORE).sum())

    @property
    def n_tokens(self) -> int:
        """Tokens that the model reads, padding included."""
        return self.ids.numel() + self.decoder_ids.numel()

    def split(self, rows: int) -> Iterator[PaddedBatch]:
        """Micro-batches of at most ``rows`` rows."""
        for parts in zip(*(torch.split(tensor, rows) for tensor in self._tensors()), strict=True):
            yield PaddedBatch(*parts)

    def to(self, device: torch.device) -> PaddedBatch:
        """The batch on a device."""
        return PaddedBatch(*(tensor.to(device, non_blocking=True) for tensor in self._tensors()))

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.ids, self.real, self.types, self.targets, self.decoder_ids, self.decoder_real


def collate(examples: Sequence[Example], pad_id: int) -> PaddedBatch:
    """Examples of one kind as one batch."""
    ids, real = _padded([e.ids for e in examples], pad_id)
    types, _ = _padded([e.types or [0] * len(e.ids) for e in examples], 0)
    decoder_ids, decoder_real = _padded([e.decoder_ids for e in examples], pad_id)
    first = examples[0].target
    if isinstance(first, Sequence) and (not first or isinstance(first[0], int)):
        targets, _ = _padded([e.target for e in examples], IGNORE)  # type: ignore[misc]
    else:
        targets = torch.tensor([e.target for e in examples], dtype=torch.long if isinstance(first, int) else None)
    return PaddedBatch(ids, real, types, targets, decoder_ids, decoder_real)


def _padded(rows: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """(rows, longest) int64, and where it is no padding."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    padded = torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.long)
    return padded.view(len(rows), width), torch.arange(width) < lengths[:, None]


class PaddedStream(EpochStream[int]):
    """Endless batches over epochs.

    Args:
        batch: rows a step will take; rows are grouped by length in such batches.
    """

    def __init__(self, examples: Sequence[Example], batch: int, seed: int, pad_id: int) -> None:
        self.examples, self.batch, self.seed, self.pad_id = examples, batch, seed, pad_id
        super().__init__()

    @property
    def row_len(self) -> int:
        """Tokens of the longest row."""
        return max(map(len, self.examples))

    def next(self, n_rows: int) -> PaddedBatch:
        """The next rows."""
        return collate([self.examples[i] for i in self.take(n_rows)], self.pad_id)

    def order(self, epoch: int) -> list[int]:
        """Rows in random order, sorted by length within each pool, cut into batches, the batches in random order."""
        rng = np.random.default_rng((self.seed, epoch))
        shuffled = rng.permutation(len(self.examples)).tolist()
        pool = POOL * self.batch
        batches: list[list[int]] = []
        for start in range(0, len(shuffled), pool):
            by_length = sorted(shuffled[start : start + pool], key=lambda i: len(self.examples[i]))
            batches += [by_length[at : at + self.batch] for at in range(0, len(by_length), self.batch)]
        return [i for b in rng.permutation(len(batches)).tolist() for i in batches[b]]


def batches_by_length(examples: Sequence[Example], batch: int, pad_id: int) -> Iterator[tuple[list[int], PaddedBatch]]:
    """All examples once, longest first, with their places: for predictions."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]))
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        yield places, collate([examples[i] for i in places], pad_id)
