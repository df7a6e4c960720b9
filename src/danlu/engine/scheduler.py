"""Which tokens the next step runs (continuous batching: Yu et al. 2022, Orca; chunked prefill: Agrawal et al. 2023,
arXiv:2308.16369).

Every answer that is being written gets its next token; what is left of the step's budget of tokens goes to prompts, in
the order in which they came, in pieces. So a long prompt holds up the others by no more than one step of that budget.
(An encoder reads a source whole, and at once; no more begins in that step once the budget is spent.)
When blocks run out, what came last gives its blocks up and waits in front; it is computed again from what is left of it
in the prefix cache.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np

from danlu.engine.batch import FREED, Batch
from danlu.engine.blocks import BlockManager, BlockTable, Copies
from danlu.engine.drafts import Draft
from danlu.engine.kv_memory import most_blocks
from danlu.engine.request import Sequence, Unit

OBSERVED_ROWS = 128
"""Positions of a prompt whose logits are wanted at once: a row is as wide as the vocabulary."""


@dataclass(slots=True)
class Piece:
    """What one sequence runs in a step.

    Attributes:
        n: how many of its known tokens; the drafted ones come behind them.
        n_rows: at how many positions, counted from the last, logits or hidden states are wanted.
        completes: whether the next token can be chosen afterwards.
    """

    sequence: Sequence
    n: int
    n_rows: int
    completes: bool
    draft: Draft | None = None


@dataclass(slots=True)
class Plan:
    """One step: the pieces whose logits are wanted, those whose hidden states are, and the blocks to copy first."""

    pieces: list[Piece]
    hidden: list[Piece]
    copies: Copies


class Scheduler:
    """The sequences that wait and those that run, the earliest first.

    Args:
        step_tokens: tokens that a step runs at most.
        max_running: sequences that have blocks at most; not above ``step_tokens``.
    """

    def __init__(self, blocks: BlockManager, step_tokens: int, max_running: int) -> None:
        self.blocks, self.step_tokens, self.max_running = blocks, step_tokens, max_running
        self.running: list[Unit] = []
        self.waiting: OrderedDict[Unit, None] = OrderedDict()
        self.n_running = 0
        """Sequences that run or, for a beam search, may come to."""
        self._failed: tuple[Unit | None, list[int]] = (
            None,
            [],
        )  # who did not fit last time, and into how many free blocks

    def add(self, unit: Unit) -> None:
        """Behind all others."""
        self.waiting[unit] = None

    def remove(self, unit: Unit) -> None:
        """It has ended: give back what it has."""
        if unit in self.waiting:
            del self.waiting[unit]
        else:
            self._stop(unit)

    def split(self, unit: Unit, sequence: Sequence) -> Unit:
        """Let a sequence that goes on like the one of ``unit`` run beside it; it shares its blocks."""
        new = Unit(unit.request, [sequence])
        parent = unit.sequences[0]
        if self.n_running < self.max_running:
            assert parent.table is not None
            sequence.table, sequence.n_computed = self.blocks.fork(parent.table), parent.n_computed
            self.running.insert(self.running.index(unit) + 1, new)
            self.n_running += 1
        else:
            self._wait_in_front(new)
        return new

    def schedule(self, draft: Callable[[Sequence, int], Draft | None] | None = None) -> Plan:
        """The next step. If anything runs or waits, at least one token is in it.

        Args:
            draft: guesses at most so many tokens that follow a sequence, if any.
        """
        plan = Plan([], [], [[] for _ in self.blocks.groups])
        prompts: deque[Unit] = deque()
        budget, place = self.step_tokens, 0
        while place < len(self.running):
            unit = self.running[place]
            if not _is_decoding(unit):
                prompts.append(unit)
                place += 1
                continue
            # What a search copies for its first beams counts only if there is room for all of them.
            copies = plan.copies if len(unit.sequences) == 1 else [[] for _ in self.blocks.groups]
            while not self._extend(unit, copies):
                victim = self.running[-1]
                self._preempt(victim)
                if victim is unit:
                    break
            else:
                if copies is not plan.copies:
                    for all_copies, ours in zip(plan.copies, copies, strict=True):
                        all_copies += ours
                budget -= len(unit.sequences)
                place += 1
                for sequence in unit.sequences:
                    piece = Piece(sequence, 1, 1, True)
                    if draft is not None and sequence.drafter is not None:
                        room = min(budget - (self.n_running - place), self.step_tokens // 2)
                        budget -= self._add_draft(piece, draft, room, plan.copies)
                    _add(plan, piece)
        blocked = False
        while prompts and budget > 0 and not blocked:
            unit = prompts.popleft()
            while (taken := self._add_prompt(unit, budget, plan)) is None and prompts:
                self._preempt(prompts.pop())
            blocked = taken is None
            budget -= taken or 0
        while self.waiting and budget > 0 and not blocked and not prompts:
            unit = next(iter(self.waiting))
            source = unit.request.source if unit.request.begun_at is None else None  # it is encoded once
            if not self._admit(unit):
                break
            budget -= self._add_prompt(unit, budget, plan) or 0
            budget -= 0 if source is None else len(source.ids_s)
        return plan

    def _extend(self, unit: Unit, copies: Copies) -> bool:
        """Room for one more token of each sequence."""
        for sequence in unit.sequences:
            start = sequence.n_computed
            assert sequence.table is not None
            if not self.blocks.reserve(sequence.table, start, start + 1, copies):
                return False
        return True

    def _add_draft(
        self, piece: Piece, draft: Callable[[Sequence, int], Draft | None], room: int, copies: Copies
    ) -> int:
        """Tokens that were added: guesses are welcome, but nobody gives up blocks for them."""
        sequence = piece.sequence
        k = min(room, sequence.request.max_len - len(sequence.token_ids) - 1)
        found = draft(sequence, k) if k > 0 else None
        if found is None or not found.ids:
            return 0
        end = sequence.n_computed + 1
        assert sequence.table is not None
        if not self.blocks.reserve(sequence.table, end, end + len(found.ids), copies):
            return 0
        piece.draft, piece.n_rows = found, 1 + len(found.ids)
        return len(found.ids)

    def _add_prompt(self, unit: Unit, budget: int, plan: Plan) -> int | None:
        """Tokens that were added of what a unit has still to compute; None: there are not enough blocks."""
        added = 0
        for sequence in unit.sequences:
            request, start = sequence.request, sequence.n_computed
            # Beams choose together: the last token of each waits until the others have come as far.
            n = min(budget - added, len(sequence.token_ids) - start - (len(unit.sequences) > 1))
            observing = request.observes and request.observed < len(request.prompt_ids)
            if observing and request.task != "embed":
                n = min(n, OBSERVED_ROWS)
            if n <= 0:
                continue
            assert sequence.table is not None
            if not self.blocks.reserve(sequence.table, start, start + n, plan.copies):
                return added or None
            completes = start + n == len(sequence.token_ids)
            n_rows = max(int(completes), start + n - max(start, request.observed) if observing else 0)
            _add(plan, Piece(sequence, n, n_rows, completes))
            added += n
        return added

    def _admit(self, unit: Unit) -> bool:
        """Let a unit run, if all that it has to compute fits beside the others."""
        free = [pool.n_free for pool in self.blocks.pools]
        if self.n_running + unit.request.width > self.max_running:
            return False
        unit_failed, free_then = self._failed
        if unit is unit_failed and all(now <= then for now, then in zip(free, free_then, strict=True)):
            return False  # looking for its prefix again would cost each step
        for sequence in unit.sequences:
            self._open(sequence)
        needed = [0] * len(free)
        for sequence in unit.sequences:
            table = sequence.table
            assert table is not None
            most = most_blocks(self.blocks.groups, self.blocks.block_size, len(sequence.token_ids), self.step_tokens)
            for g, n in enumerate(most):
                needed[g] += max(0, min(n, self.blocks.blocks_for(len(sequence.token_ids)) - table.n_blocks))
        if any(pool.n_free < n for pool, n in zip(self.blocks.pools, needed, strict=True)) and self.running:
            self._failed = (unit, free)
            self._close(unit)
            return False
        self._failed = (None, [])
        request = unit.request
        if request.begun_at is None:
            request.begun_at = time.perf_counter()
            request.cached_tokens = unit.sequences[0].n_computed
        del self.waiting[unit]
        self.running.append(unit)
        self.n_running += request.width
        return True

    def _open(self, sequence: Sequence) -> None:
        request = sequence.request
        # What is in the cache already is not run again, and cannot be observed.
        reuse = not request.observes or request.observed == len(request.prompt_ids)
        sequence.table = self.blocks.open(sequence.token_ids, request.max_len, request.salt, reuse=reuse)
        sequence.n_computed = sequence.table.n_blocks * self.blocks.block_size

    def _close(self, unit: Unit) -> None:
        for sequence in unit.sequences:
            self.close_table(sequence)

    def close_table(self, sequence: Sequence) -> None:
        """Give back the blocks of a sequence."""
        if sequence.table is not None:
            self.blocks.close(sequence.table)
            sequence.table, sequence.n_computed = None, 0

    def _stop(self, unit: Unit) -> None:
        self.running.remove(unit)
        self.n_running -= unit.request.width
        self._close(unit)

    def _preempt(self, unit: Unit) -> None:
        self._stop(unit)
        unit.request.preemptions += 1
        self._wait_in_front(unit)

    def _wait_in_front(self, unit: Unit) -> None:
        self.waiting[unit] = None
        self.waiting.move_to_end(unit, last=False)


def _is_decoding(unit: Unit) -> bool:
    """Whether each sequence has but its newest token to compute."""
    return all(len(sequence.token_ids) - sequence.n_computed == 1 for sequence in unit.sequences)


def _add(plan: Plan, piece: Piece) -> None:
    (plan.hidden if piece.sequence.request.task == "embed" else plan.pieces).append(piece)


def batch_of(pieces: Items[Piece]) -> Batch:
    """What the pieces run, end to end."""
    n = len(pieces)
    ids: list[int] = []
    positions: list[int] = []
    starts = [0]
    logits_at: list[int] = []
    places: list[BlockTable] = []
    prompt_from = 0
    for piece in pieces:
        line, first = piece.sequence, piece.sequence.n_computed
        end = first + piece.n
        if piece.draft is None and piece.n == 1:
            ids.append(line.token_ids[first])
            positions.append(first)
        else:
            ids += line.token_ids[first:end]
            if piece.draft is not None:
                ids += piece.draft.ids
                end += len(piece.draft.ids)
            positions += range(first, end)
        assert line.table is not None
        places.append(line.table)
        if first >= len(line.request.prompt_ids):
            prompt_from = len(ids)
        starts.append(len(ids))
        logits_at += range(len(ids) - piece.n_rows, len(ids))
    tables = []
    width = max(table.n_blocks for table in places)
    for group in range(len(places[0].rows)):
        table_sb = np.full((n, width), FREED, dtype=np.int32)
        for s, table in enumerate(places):
            table_sb[s, : table.n_blocks] = table.rows[group][: table.n_blocks]
        tables.append(table_sb)
    return Batch(
        np.array(ids, dtype=np.int32),
        np.array(positions, dtype=np.int32),
        np.array(starts, dtype=np.int32),
        tuple(tables),
        np.array(logits_at, dtype=np.int32),
        np.array([piece.sequence.request.max_len for piece in pieces], dtype=np.int32),
        prompt_from,
        tuple(piece.sequence.request.adapter for piece in pieces),
        tuple(source for piece in pieces if (source := piece.sequence.request.source) is not None),
    )
