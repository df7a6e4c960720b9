"""What a step runs: who comes first, who waits, who gives way."""

from __future__ import annotations

import pytest

from danlu.engine.batch import FREED, KVGroup
from danlu.engine.blocks import BlockManager
from danlu.engine.config import SamplingParams
from danlu.engine.drafts import Draft
from danlu.engine.request import Request, Sequence, Unit
from danlu.engine.scheduler import Plan, Scheduler, batch_of


def scheduler(n_blocks: int = 64, step_tokens: int = 16, max_running: int = 4) -> Scheduler:
    blocks = BlockManager([KVGroup((0,), None)], [n_blocks], 4, prefix_cache=False)
    return Scheduler(blocks, step_tokens, max_running)


def submit(to: Scheduler, name: str, n_tokens: int) -> Sequence:
    ids = list(range(n_tokens))
    request = Request(
        id=name, prompt_ids=ids, params=SamplingParams(), task="generate", seed=0, max_len=64, salt=None
    )  # fmt: skip
    sequence = Sequence(request, 0, list(ids))
    sequence.unit = Unit(request, [sequence])
    to.add(sequence.unit)
    return sequence


def step(of: Scheduler, plan: Plan | None = None) -> list[tuple[str, int]]:
    """Run a step as a model would; (request, tokens) of each piece."""
    plan = plan or of.schedule()
    for piece in plan.pieces:
        sequence = piece.sequence
        sequence.n_computed += piece.n
        assert sequence.table is not None
        of.blocks.commit(sequence.table, sequence.token_ids, sequence.n_computed)
        if piece.completes:
            sequence.token_ids.append(99)
    of.blocks.check([s.table for unit in of.running for s in unit.sequences if s.table is not None])
    return [(piece.sequence.request.id, piece.n) for piece in plan.pieces]


def test_decodes_come_first_and_prompts_share_what_is_left_in_order() -> None:
    s = scheduler()
    submit(s, "a", 5)
    assert step(s) == [("a", 5)]
    submit(s, "b", 20)
    submit(s, "c", 8)
    assert step(s) == [("a", 1), ("b", 15)]
    assert step(s) == [("a", 1), ("b", 5), ("c", 8)]
    assert step(s) == [("a", 1), ("b", 1), ("c", 1)]


def test_no_more_run_than_may_and_the_first_to_wait_is_the_first_to_run() -> None:
    s = scheduler(max_running=2)
    waiting = [submit(s, name, 2) for name in "abcd"]
    assert step(s) == [("a", 2), ("b", 2)]
    s.remove(waiting[0].unit)
    assert step(s) == [("b", 1), ("c", 2)]
    s.remove(waiting[3].unit)
    s.remove(waiting[2].unit)
    assert step(s) == [("b", 1)]
    assert not s.waiting


def test_who_came_last_gives_way_and_is_the_first_to_come_back() -> None:
    """Five blocks of four tokens: a and b have two each, and both need a third."""
    s = scheduler(n_blocks=5)
    a, b = submit(s, "a", 8), submit(s, "b", 8)
    submit(s, "c", 4)
    assert step(s) == [("a", 8), ("b", 8)]
    assert step(s) == [("a", 1)]
    assert (b.table, b.n_computed, b.request.preemptions) == (None, 0, 1)
    assert [unit.request.id for unit in s.waiting] == ["b", "c"]
    for _ in range(3):
        assert step(s) == [("a", 1)]  # c would fit, but b came before
    s.remove(a.unit)
    assert step(s) == [("b", 9), ("c", 4)]


def test_a_prompt_that_runs_does_not_take_blocks_from_answers() -> None:
    s = scheduler(n_blocks=6, step_tokens=8)
    submit(s, "a", 4)
    step(s)
    submit(s, "b", 16)
    assert step(s) == [("a", 1), ("b", 7)]
    assert step(s) == [("a", 1), ("b", 7)]
    for _ in range(3):
        assert dict(step(s))["a"] == 1


def test_one_who_is_alone_gets_all_blocks() -> None:
    s = scheduler(n_blocks=5, step_tokens=8)
    submit(s, "a", 20)
    assert [step(s), step(s), step(s)] == [[("a", 8)], [("a", 8)], [("a", 4)]]


def test_waiting_requests_cost_nothing() -> None:
    s = scheduler(max_running=1)
    units = [submit(s, str(i), 4).unit for i in range(2000)]
    looked_at = 0

    def count(*_: object) -> bool:
        nonlocal looked_at
        looked_at += 1
        return False

    s._admit = count  # type: ignore[method-assign]
    s.schedule()
    assert looked_at == 1
    s.remove(units[1000])
    assert len(s.waiting) == 1999


@pytest.mark.parametrize(("wanted", "n_blocks", "drafted"), [(3, 64, 3), (50, 64, 8), (3, 2, 0)])
def test_drafts_take_what_is_left(wanted: int, n_blocks: int, drafted: int) -> None:
    s = scheduler(n_blocks=n_blocks)
    sequence = submit(s, "a", 7)
    step(s)
    sequence.drafter = object()  # type: ignore[assignment]
    plan = s.schedule(lambda line, k: Draft([7] * min(wanted, k)))
    (piece,) = plan.pieces
    assert (0 if piece.draft is None else len(piece.draft.ids)) == drafted
    assert piece.n_rows == 1 + drafted
    batch = batch_of(plan.pieces)
    assert batch.ids_t.tolist() == [99, *[7] * drafted]
    assert batch.positions_t.tolist() == list(range(7, 8 + drafted))


def test_a_batch_has_all_tokens_end_to_end() -> None:
    s = scheduler()
    submit(s, "a", 5)
    step(s)
    submit(s, "b", 10)
    batch = batch_of(s.schedule().pieces)
    assert batch.ids_t.tolist() == [99, *range(10)]
    assert batch.positions_t.tolist() == [5, *range(10)]
    assert batch.starts_s.tolist() == [0, 1, 11]
    assert batch.logits_at.tolist() == [0, 10]
    assert batch.rope_lengths_s.tolist() == [64, 64]
    (table_sb,) = batch.tables
    assert table_sb.shape == (2, 3)
    assert (table_sb == FREED).tolist() == [[False, False, True], [False, False, False]]
    assert {array.dtype.name for array in (batch.ids_t, batch.positions_t, batch.starts_s, table_sb)} == {"int32"}
