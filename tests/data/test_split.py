"""The split is by group, near its share, deterministic, and never empty on one side."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.data.split import choose_heldout, unit_hash
from danlu.errors import DanluError


def split(groups: list[int], share: float, seed: int = 0) -> set[int]:
    return choose_heldout(range(len(groups)), np.array(groups), str, share, seed)


@given(st.lists(st.integers(0, 40), min_size=2, max_size=200), st.floats(0.01, 0.9), st.integers(0, 3))
def test_groups_stay_together_and_no_side_is_empty(groups: list[int], share: float, seed: int) -> None:
    if len(set(groups)) == 1:
        with pytest.raises(DanluError, match="too small to hold anything out"):
            split(groups, share, seed)
        return
    heldout = split(groups, share, seed)
    assert 0 < len(heldout) < len(groups)
    assert {groups[i] for i in heldout}.isdisjoint({groups[i] for i in range(len(groups)) if i not in heldout})
    assert heldout == split(groups, share, seed)


def test_the_share_is_kept() -> None:
    assert len(split(list(range(1000)), 0.05)) == 50
    assert len(split([i // 3 for i in range(999)], 0.1)) in range(99, 111)
    assert split(list(range(10)), 0) == set()
    assert len(split(list(range(3)), 0.05)) == 1


def test_other_seeds_hold_out_others_and_more_documents_change_little() -> None:
    few, more = split(list(range(1000)), 0.1), split(list(range(1100)), 0.1)
    assert len(few & split(list(range(1000)), 0.1, seed=1)) < 30
    assert len(few & more) > 80


def test_a_large_family_does_not_swallow_the_held_out_side() -> None:
    groups = [0] * 90 + list(range(1, 11))
    assert len(split(groups, 0.05)) == 5


def test_one_document_is_too_small() -> None:
    with pytest.raises(DanluError, match=r"\(1 document, 1 unrelated\).*--separator.*--heldout 0"):
        split([0], 0.05)


@given(st.integers(0, 5), st.text())
def test_unit_hash(seed: int, key: str) -> None:
    assert 0 <= unit_hash(seed, "a", key) < 1
    assert unit_hash(seed, "a", key) != unit_hash(seed, "b", key)
