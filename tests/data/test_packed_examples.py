"""Packed examples: nothing is lost, nothing meets, and what was computed comes back to its place."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from danlu.data.packed_examples import pack_examples
from danlu.data.packing import IGNORE

EXAMPLES = st.lists(
    st.lists(st.tuples(st.integers(1, 50), st.booleans()), min_size=1, max_size=12).map(
        lambda pairs: ([token for token, _ in pairs], [learned for _, learned in pairs])
    ),
    min_size=1,
    max_size=8,
)


@given(EXAMPLES, st.integers(0, 20))
def test_targets_come_back_in_order(examples: list[tuple[list[int], list[bool]]], row_len: int) -> None:
    packed = pack_examples(examples, row_len=row_len)
    targets = packed.targets.flatten()[packed.slots_n]
    laid_out = packed.by_example(targets)
    for i, (ids, mask) in enumerate(examples):
        wanted = [token for token, learned in zip(ids[1:], mask[1:], strict=True) if learned]
        assert laid_out[i][packed.mask_bt[i]].tolist() == wanted
        assert packed.lengths_b[i] == len(wanted)
    assert int((packed.targets != IGNORE).sum()) == len(targets)
    # What predicts a target is the token before it, at its place in the example.
    positions, before = packed.positions.flatten()[packed.slots_n], packed.ids.flatten()[packed.slots_n]
    for owner, position, token in zip(packed.owners_n.tolist(), positions.tolist(), before.tolist(), strict=True):
        assert examples[owner][0][position] == token


@given(EXAMPLES)
def test_segments_tell_examples_apart(examples: list[tuple[list[int], list[bool]]]) -> None:
    packed = pack_examples(examples)
    for ids, positions, segments in zip(packed.ids, packed.positions, packed.segments, strict=True):
        for (p, s), (q, t) in pairwise(zip(positions.tolist(), segments.tolist(), strict=True)):
            assert (q == p + 1 and t == s) or (q == 0 and t != s) or t == -1
        assert len(ids) == max(len(one) - 1 for one, _ in examples) or max(len(one) for one, _ in examples) == 1


def test_gradients_pass() -> None:
    packed = pack_examples([([1, 2, 3], [False, True, True]), ([4, 5], [False, True])])
    values = torch.ones(3, requires_grad=True)
    packed.by_example(values * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1, 2, 3]
