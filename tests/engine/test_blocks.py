"""Block accounting against a plain model of who may share what, in random lives of many sequences."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.engine.batch import FREED, KVGroup
from danlu.engine.blocks import BlockManager, BlockTable, Copies

FULL = [KVGroup((0,), None)]
MIXED = [KVGroup((0,), None), KVGroup((1,), 6)]
WINDOWED = [KVGroup((0,), 6)]
SIZE = 4


def manager(groups: list[KVGroup] = FULL, n: int = 16, *, prefix_cache: bool = True) -> BlockManager:
    return BlockManager(groups, [n] * len(groups), SIZE, prefix_cache=prefix_cache)


def compute(blocks: BlockManager, table: BlockTable, ids: list[int], start: int, end: int) -> Copies:
    copies: Copies = [[] for _ in blocks.groups]
    assert blocks.reserve(table, start, end, copies)
    blocks.commit(table, ids, end)
    return copies


def opened(blocks: BlockManager, ids: list[int], salt: object = None) -> tuple[BlockTable, int]:
    """A table for ids, all of them computed, and how many were known."""
    table = blocks.open(ids, 64, salt)
    known = table.n_blocks * SIZE
    compute(blocks, table, ids, known, len(ids))
    return table, known


def test_a_second_prompt_takes_what_is_equal_and_full() -> None:
    blocks = manager()
    first, known = opened(blocks, list(range(10)))
    assert known == 0
    second, known = opened(blocks, [0, 1, 2, 3, 4, 5, 99])
    assert known == 4
    assert second.rows[0][0] == first.rows[0][0]
    assert second.rows[0][1] != first.rows[0][1]
    blocks.check([first, second])


def test_one_token_is_left_to_compute() -> None:
    blocks = manager()
    blocks.close(opened(blocks, list(range(8)))[0])
    assert opened(blocks, list(range(8)))[1] == 4  # the second block is known too, but the last token needs its logits
    assert blocks.open(list(range(9)), 64, None).n_blocks == 2


def test_equal_blocks_behind_other_tokens_are_not_shared() -> None:
    """Nor if all hashes are equal: the tokens are compared."""

    class Colliding(int):
        def __hash__(self) -> int:
            return 1

    blocks = manager()
    tail = [7, 7, 7, 7, 8]
    tables = [
        opened(blocks, [Colliding(i) for i in [*head, *tail]]) for head in ([1, 2, 3, 4], [1, 2, 3, 5], [4, 3, 2, 1])
    ]
    assert [known for _, known in tables] == [0, 0, 0]
    assert len({int(table.rows[0][1]) for table, _ in tables}) == 3
    assert opened(blocks, [Colliding(i) for i in [1, 2, 3, 5, *tail]])[1] == 8


def test_a_salt_keeps_caches_apart() -> None:
    blocks = manager()
    ids = list(range(9))
    assert opened(blocks, ids, "adapter a")[1] == 0
    assert opened(blocks, ids, "adapter b")[1] == 0
    assert opened(blocks, ids, "adapter a")[1] == 8


def test_the_ends_of_what_was_unused_longest_are_lost_first() -> None:
    blocks = manager(n=8)
    old, new = [1] * 13, [2] * 13
    for ids in (old, new):
        blocks.close(opened(blocks, ids)[0])
    assert blocks.pools[0].n_cached == 6
    other, _ = opened(blocks, [3] * 13)  # 4 blocks: 2 were empty, the last 2 of `old` go
    known = [blocks.open(ids, 64, None).n_blocks for ids in (old, new)]
    assert known == [1, 3]
    blocks.close(other)


def test_a_shared_block_is_copied_before_it_is_written_to() -> None:
    blocks = manager()
    ids = list(range(6))
    parent, _ = opened(blocks, ids)
    child = blocks.fork(parent)
    blocks.check([parent, child])
    shared = int(parent.rows[0][1])
    copies = compute(blocks, child, [*ids, 50], 6, 7)
    assert copies == [[(shared, int(child.rows[0][1]))]]
    assert compute(blocks, parent, [*ids, 60], 6, 7) == [[]]  # alone with it again
    assert parent.rows[0].tolist()[:2] == [child.rows[0][0], shared]
    blocks.check([parent, child])
    blocks.close(parent)
    blocks.close(child)
    blocks.check([])
    assert blocks.pools[0].n_free == 16


def test_a_fork_at_the_end_of_a_block_copies_nothing() -> None:
    blocks = manager()
    parent, _ = opened(blocks, list(range(8)))
    child = blocks.fork(parent)
    assert compute(blocks, child, [*range(8), 1], 8, 9) == [[]]
    assert compute(blocks, parent, [*range(8), 2], 8, 9) == [[]]
    blocks.check([parent, child])


def test_blocks_before_the_window_are_given_back() -> None:
    blocks = manager(MIXED)
    table = blocks.open(list(range(40)), 64, None)
    ids = list(range(40))
    for end in range(1, 41):
        compute(blocks, table, ids, end - 1, end)
        held = [row[: table.n_blocks] != FREED for row in table.rows]
        assert held[0].all()
        seen = range(max(0, end - 6 + 1), end)  # by the token at `end`
        assert all(held[1][position // SIZE] for position in seen)
        assert held[1].sum() <= 4
        blocks.check([table])


def test_a_prefix_needs_in_a_windowed_group_what_is_still_seen() -> None:
    """The next token, 16, sees 11 and on: blocks 2 and 3, while block 0 and 1 may be gone."""
    blocks = manager(MIXED, 8)
    ids = list(range(17))
    blocks.close(opened(blocks, ids)[0])
    table = blocks.open(ids, 64, None)
    assert table.n_blocks == 4
    assert table.rows[1][:2].tolist() == [FREED, FREED]
    assert (table.rows[1][2:4] != FREED).all()
    blocks.check([table])


def test_refused_drafts_give_their_blocks_back() -> None:
    blocks = manager()
    table, _ = opened(blocks, list(range(7)))
    copies: Copies = [[]]
    assert blocks.reserve(table, 7, 16, copies)
    assert table.n_blocks == 4
    blocks.commit(table, list(range(9)), 8)
    assert table.n_blocks == 2
    blocks.check([table])


def test_too_few_blocks_change_nothing() -> None:
    blocks = manager(n=3)
    table, _ = opened(blocks, list(range(8)))
    assert not blocks.reserve(table, 8, 17, [[]])
    assert (table.n_blocks, blocks.pools[0].n_free) == (2, 1)
    blocks.check([table])


def test_the_check_finds_a_leak() -> None:
    blocks = manager()
    table, _ = opened(blocks, list(range(8)))
    with pytest.raises(AssertionError):
        blocks.check([])
    blocks.pools[0].references[int(table.rows[0][0])] += 1
    with pytest.raises(AssertionError):
        blocks.check([table])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), groups=st.sampled_from([FULL, MIXED, WINDOWED]), prefix_cache=st.booleans())
def test_random_lives(seed: int, groups: list[KVGroup], prefix_cache: bool) -> None:
    """What is read back through a table is what the sequence's own tokens would have written."""
    random_ = random.Random(seed)
    blocks = manager(groups, 24, prefix_cache=prefix_cache)
    content: list[dict[tuple[int, int], tuple[int, ...]]] = [{} for _ in groups]
    lives: list[tuple[list[int], BlockTable]] = []
    for _ in range(80):
        what = random_.random()
        if what < 0.3 or not lives:
            ids = [random_.randrange(2) for _ in range(random_.randrange(1, 20))]
            table = blocks.open(ids, 64, random_.randrange(2))
            start = table.n_blocks * SIZE
            grow = (ids, table, start)
            lives.append((ids, table))
        elif what < 0.7:
            ids, table = random_.choice(lives)
            grow = (ids, table, len(ids))
            if len(ids) < 60:
                ids.extend(random_.randrange(2) for _ in range(random_.randrange(1, 4)))
        elif what < 0.85 and len(lives) < 8:
            ids, table = random_.choice(lives)
            lives.append((list(ids), blocks.fork(table)))
            continue
        else:
            _, table = lives.pop(random_.randrange(len(lives)))
            blocks.close(table)
            blocks.check([table for _, table in lives])
            continue
        ids, table, start = grow
        copies: Copies = [[] for _ in groups]
        if start == len(ids):
            continue
        if not blocks.reserve(table, start, len(ids), copies):
            lives[:] = [life for life in lives if life[1] is not table]
            blocks.close(table)
            continue
        for g, group in enumerate(groups):
            for source, target in copies[g]:
                for slot in range(SIZE):
                    content[g][target, slot] = content[g].get((source, slot), ())
            for position in range(start, len(ids)):
                for seen in range(max(0, position - (group.window or 99) + 1), position):
                    block = int(table.rows[g][seen // SIZE])
                    assert content[g][block, seen % SIZE] == tuple(ids[: seen + 1])
                content[g][int(table.rows[g][position // SIZE]), position % SIZE] = tuple(ids[: position + 1])
        blocks.commit(table, ids, len(ids))
        blocks.check([table for _, table in lives])
    for _, table in lives:
        blocks.close(table)
    blocks.check([])
    assert all(pool.n_free == pool.n_blocks for pool in blocks.pools)
    if not prefix_cache:
        assert not blocks.pools[0].n_cached
