"""Packing loses nothing, keeps documents apart, and can be resumed anywhere."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.data.packing import IGNORE, DocumentSequences, MaskedSequences, RowStream, pack_epoch, pack_pieces

PAD, EOT = 1, 0
lengths_strategy = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def documents(lengths: list[int]) -> DocumentSequences:
    """Documents whose tokens are all different, so that each token names its place. Id 0 starts each."""
    ids, offsets = [], [0]
    for length in lengths:
        ids += [EOT, *range(100 + len(ids), 100 + len(ids) + length - 1)]
        offsets.append(len(ids))
    return DocumentSequences(np.array(ids, dtype=np.uint16), np.array(offsets, dtype=np.int64), EOT)


@settings(max_examples=200, deadline=None)
@given(lengths=lengths_strategy, row_len=st.integers(2, 16), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_every_token_is_in_exactly_one_row(lengths: list[int], row_len: int, seed: int, epoch: int) -> None:
    rows = pack_epoch(np.array(lengths), row_len, seed=seed, epoch=epoch)
    seen = Counter((i, start + k) for row in rows for i, start, length in row for k in range(length))
    assert seen == Counter((i, k) for i, length in enumerate(lengths) for k in range(length))
    assert all(0 < sum(length for _, _, length in row) <= row_len for row in rows)


@settings(max_examples=100, deadline=None)
@given(lengths=lengths_strategy, row_len=st.integers(2, 16))
def test_targets_are_the_next_token_of_the_same_document(lengths: list[int], row_len: int) -> None:
    sequences = documents(lengths)
    stream = RowStream(sequences, row_len, seed=0, pad_id=PAD)
    batch = stream.next(stream.rows_per_epoch)
    follows = {}
    for i in range(len(lengths)):
        inputs, targets = sequences[i]
        follows.update({(int(a), i): int(b) for a, b in zip(inputs, targets, strict=True)})
        assert targets[-1] == EOT
    allowed = {}
    for (token, _), target in follows.items():
        allowed.setdefault(token, set()).add(target)
    learned = batch.targets != IGNORE
    assert int(learned.sum()) == sum(lengths) == batch.n_targets
    for token, target in zip(batch.ids[learned].tolist(), batch.targets[learned].tolist(), strict=True):
        assert target in allowed[token]
    assert (batch.ids[~learned] == PAD).all()
    # Positions count up inside a segment and start at 0 with each.
    same_segment = batch.segments[:, 1:] == batch.segments[:, :-1]
    steps = batch.positions[:, 1:] - batch.positions[:, :-1]
    real = learned[:, 1:]
    assert (steps[same_segment & real] == 1).all()
    assert (batch.positions[:, 1:][~same_segment] == 0).all()


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60))
def test_best_fit_leaves_at_most_one_row_half_empty(lengths: list[int]) -> None:
    rows = pack_pieces([(i, 0, length) for i, length in enumerate(lengths)], 30)
    fill = sorted(sum(length for _, _, length in row) for row in rows)
    assert all(used > 15 for used in fill[1:])


@settings(max_examples=50, deadline=None)
@given(taken=st.lists(st.integers(1, 5), max_size=12), more=st.integers(1, 9))
def test_resuming_gives_the_same_rows(taken: list[int], more: int) -> None:
    sequences = documents([7, 23, 3, 3, 12, 40, 1])
    stream = RowStream(sequences, 8, seed=3, pad_id=PAD)
    for n in taken:
        stream.next(n)
    state = stream.state()
    expected = stream.next(more)
    fresh = RowStream(sequences, 8, seed=3, pad_id=PAD)
    fresh.restore(state)
    again = fresh.next(more)
    for name in ("ids", "targets", "positions", "segments"):
        assert torch.equal(getattr(again, name), getattr(expected, name))


def test_later_epochs_cut_long_documents_elsewhere() -> None:
    lengths = np.array([100] * 20)
    first, second = (pack_epoch(lengths, 16, seed=0, epoch=epoch) for epoch in (0, 1))
    starts = [{(i, start) for row in rows for i, start, _ in row} for rows in (first, second)]
    assert starts[0] != starts[1]


def test_the_first_token_of_an_example_is_never_learned() -> None:
    sequences = MaskedSequences([([5, 6, 7, 8], [True, False, True, True])])
    inputs, targets = sequences[0]
    assert inputs.tolist() == [5, 6, 7]
    assert targets.tolist() == [IGNORE, 7, 8]


def test_micro_batches_cover_the_batch() -> None:
    batch = RowStream(documents([50]), 8, seed=0, pad_id=PAD).next(7)
    parts = list(batch.split(3))
    assert [len(part) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)
