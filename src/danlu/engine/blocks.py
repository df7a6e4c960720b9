"""The memory of the cache, in blocks: who uses which, what a freed one still holds, and when one must be copied.

A block keeps the keys and values of ``block_size`` tokens in the layers of one :class:`~danlu.engine.batch.KVGroup`.
It is used by as many sequences as its reference count says, or free; a free one may still hold the end of a known
prefix, and is then the last to be overwritten (PagedAttention: Kwon et al. 2023, arXiv:2309.06180).

Prefixes are a tree of full blocks: a node is found by its parent *and* the very tokens of its block, so that no
collision of hashes can hand out the cache of other tokens.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from danlu.engine.batch import FREED, Ints, KVGroup

Copies = list[list[tuple[int, int]]]
"""(source, target) pairs of each group that have to be copied before the next batch runs."""


class Prefix:
    """All tokens up to the end of a full block: a node of the tree of prefixes.

    Attributes:
        blocks: the block of each group that holds this node's last ``block_size`` tokens, or FREED.
        users: nodes that continue it, and tables that have come to it.
    """

    __slots__ = ("blocks", "parent", "tokens", "users")

    def __init__(self, parent: Prefix | None, tokens: Hashable, n_groups: int) -> None:
        self.parent, self.tokens = parent, tokens
        self.blocks = [FREED] * n_groups
        self.users = 0


class BlockPool:
    """The blocks of one group."""

    def __init__(self, n_blocks: int) -> None:
        self.n_blocks = n_blocks
        self.references = [0] * n_blocks
        self.prefixes: list[Prefix | None] = [None] * n_blocks
        """What each block is entered for in the tree of prefixes."""
        self._empty = list(range(n_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # free, with a prefix: the longest unused first

    @property
    def n_free(self) -> int:
        return len(self._empty) + len(self._cached)

    @property
    def n_cached(self) -> int:
        """Free blocks that hold a known prefix."""
        return len(self._cached)

    def take(self) -> tuple[int, Prefix | None]:
        """A free block to write to, and the prefix that is lost by it. There must be one."""
        if self._empty:
            block, lost = self._empty.pop(), None
        else:
            block, _ = self._cached.popitem(last=False)
            lost, self.prefixes[block] = self.prefixes[block], None
        self.references[block] = 1
        return block, lost

    def share(self, block: int) -> None:
        """One more user of a block that is used or cached."""
        if self.references[block] == 0:
            del self._cached[block]
        self.references[block] += 1

    def release(self, block: int) -> None:
        """One user less. Release the blocks of a sequence last first: the ends of prefixes are to be lost first."""
        self.references[block] -= 1
        if self.references[block] == 0:
            if self.prefixes[block] is None:
                self._empty.append(block)
            else:
                self._cached[block] = None

    def check(self, in_tables: Counter[int]) -> None:
        """Raises AssertionError unless each block is used, cached or empty, and counted as often as tables have it."""
        empty, cached = set(self._empty), set(self._cached)
        used = {block for block, count in enumerate(self.references) if count}
        assert len(self._empty) == len(empty), "a block is twice in the list of empty ones"
        assert len(empty) + len(cached) + len(used) == self.n_blocks, "a block leaked, or is free and used at once"
        assert empty | cached | used == set(range(self.n_blocks)), "a block is free and used at once"
        assert {block: self.references[block] for block in used} == dict(in_tables), "references differ from tables"
        assert all(self.prefixes[block] is None for block in empty), "an empty block is entered for a prefix"
        assert all(self.prefixes[block] is not None for block in cached), "a cached block has no prefix"


class BlockTable:
    """Where the cache of one sequence lies.

    Attributes:
        rows: the blocks of each group by place; the first ``n_blocks`` are in use, unless FREED.
        first: for each group, the first place that is not FREED.
        prefix: the node of the full blocks entered into the tree of prefixes, ``n_full`` of them.
        shared: whether the last block may have other users, and must be copied before it is written to.
    """

    __slots__ = ("first", "n_blocks", "n_full", "prefix", "rows", "shared")

    def __init__(self, n_groups: int, capacity: int, prefix: Prefix) -> None:
        self.rows: list[Ints] = [np.full(capacity, FREED, dtype=np.int32) for _ in range(n_groups)]
        self.first = [0] * n_groups
        self.n_blocks = self.n_full = 0
        self.prefix = prefix
        self.shared = False


class BlockManager:
    """Block tables of sequences, over the pools of all groups.

    Args:
        n_blocks: blocks of each group.
        prefix_cache: whether what was computed for one sequence may serve another.
    """

    def __init__(
        self, groups: Sequence[KVGroup], n_blocks: Sequence[int], block_size: int, *, prefix_cache: bool = True
    ) -> None:
        self.groups, self.block_size, self.prefix_cache = list(groups), block_size, prefix_cache
        self.pools = [BlockPool(n) for n in n_blocks]
        self._windows = [(g, group.window) for g, group in enumerate(groups) if group.window is not None]
        self._nodes: dict[tuple[Prefix | None, Hashable], Prefix] = {}

    def blocks_for(self, n_tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-n_tokens // self.block_size)

    def open(self, token_ids: Sequence[int], capacity: int, salt: Hashable, *, reuse: bool = True) -> BlockTable:
        """A table for a sequence that has these tokens to compute, with the longest known prefix in it. At least one
        token is left to compute, for its logits.

        Args:
            capacity: tokens the sequence may grow to.
            salt: what the cache depends on beside the tokens: only prefixes of equal salt are shared.
            reuse: False: begin with an empty table although there are known prefixes.
        """
        root = self._node(None, salt)
        table = BlockTable(len(self.groups), self.blocks_for(capacity), root)
        root.users += 1
        if reuse and self.prefix_cache:
            self._adopt(table, self._find(root, token_ids))
        return table

    def _node(self, parent: Prefix | None, tokens: Hashable) -> Prefix:
        node = self._nodes.get((parent, tokens))
        if node is None:
            node = self._nodes[parent, tokens] = Prefix(parent, tokens, len(self.groups))
            if parent is not None:
                parent.users += 1
        return node

    def _find(self, root: Prefix, token_ids: Sequence[int]) -> list[Prefix]:
        """The longest chain of nodes whose blocks hold all that the token behind them looks at."""
        size = self.block_size
        full = [g for g, group in enumerate(self.groups) if group.window is None]
        runs = [0] * len(self.groups)  # how many nodes in a row, up to this one, have a block of the group
        chain: list[Prefix] = []
        usable, node = 0, root
        for end in range(size, len(token_ids), size):
            found = self._nodes.get((node, tuple(token_ids[end - size : end])))
            if found is None or any(found.blocks[g] == FREED for g in full):
                break
            node = found
            chain.append(node)
            for g, _ in self._windows:
                runs[g] = runs[g] + 1 if node.blocks[g] != FREED else 0
            if all(runs[g] >= len(chain) - self._first_seen(end, window) for g, window in self._windows):
                usable = len(chain)
        return chain[:usable]

    def _first_seen(self, position: int, window: int) -> int:
        """The first place whose block the token at ``position`` still looks at."""
        return max(0, position - window + 1) // self.block_size

    def _adopt(self, table: BlockTable, chain: list[Prefix]) -> None:
        if not chain:
            return
        for g, group in enumerate(self.groups):
            seen = len(chain) * self.block_size
            table.first[g] = 0 if group.window is None else self._first_seen(seen, group.window)
            for place in range(table.first[g], len(chain)):
                block = chain[place].blocks[g]
                self.pools[g].share(block)
                table.rows[g][place] = block
        table.n_blocks = table.n_full = len(chain)
        self._move(table, chain[-1])

    def _move(self, table: BlockTable, node: Prefix) -> None:
        """The table has come to another node."""
        node.users += 1
        left, table.prefix = table.prefix, node
        left.users -= 1
        self._forget(left)

    def _forget(self, node: Prefix | None) -> None:
        """Take out a node that holds nothing and is on nobody's way, and so upwards."""
        while node is not None and node.users == 0 and all(block == FREED for block in node.blocks):
            del self._nodes[node.parent, node.tokens]
            if node.parent is not None:
                node.parent.users -= 1
            node = node.parent

    def reserve(self, table: BlockTable, start: int, end: int, copies: Copies) -> bool:
        """Make the table cover the positions up to ``end``, those from ``start`` on writable; False, and nothing is
        changed, where there are not enough free blocks. What must be copied for it is added to ``copies``."""
        needed = self.blocks_for(end) - table.n_blocks
        if needed <= 0 and not table.shared:
            return True
        place = start // self.block_size  # of the block that is written to first
        split = [
            table.shared and place < table.n_blocks and pool.references[row[place]] > 1
            for row, pool in zip(table.rows, self.pools, strict=True)
        ]
        if any(pool.n_free < needed + copied for pool, copied in zip(self.pools, split, strict=True)):
            return False
        for g, (row, pool) in enumerate(zip(table.rows, self.pools, strict=True)):
            if split[g]:
                source, row[place] = int(row[place]), self._take(g)
                copies[g].append((source, int(row[place])))
                pool.release(source)
            for new in range(table.n_blocks, table.n_blocks + needed):
                row[new] = self._take(g)
        table.n_blocks += max(0, needed)
        table.shared = False
        return True

    def _take(self, g: int) -> int:
        block, lost = self.pools[g].take()
        if lost is not None:
            lost.blocks[g] = FREED
            self._forget(lost)
        return block

    def commit(self, table: BlockTable, token_ids: Sequence[int], n_computed: int) -> None:
        """The first ``n_computed`` tokens are in the cache for good: full blocks become known prefixes, blocks that
        fell out of a window and those behind the last token (reserved for drafts that were refused) are given back."""
        size = self.block_size
        if (surplus := table.n_blocks - self.blocks_for(n_computed)) > 0:
            self._drop_last(table, surplus)
        if n_computed < (table.n_full + 1) * size:
            return
        while (end := (table.n_full + 1) * size) <= n_computed:
            if self.prefix_cache:
                self._enter(table, tuple(token_ids[end - size : end]))
            table.n_full += 1
        for g, window in self._windows:
            first_seen = min(self._first_seen(n_computed, window), table.n_blocks)
            if first_seen > table.first[g]:
                self._release(g, table.rows[g][table.first[g] : first_seen])
                table.rows[g][table.first[g] : first_seen] = FREED
                table.first[g] = first_seen

    def _enter(self, table: BlockTable, tokens: Hashable) -> None:
        node = self._node(table.prefix, tokens)
        for g, row in enumerate(table.rows):
            block = int(row[table.n_full])
            if node.blocks[g] == FREED and block != FREED:
                node.blocks[g] = block
                self.pools[g].prefixes[block] = node
        self._move(table, node)

    def _drop_last(self, table: BlockTable, n: int) -> None:
        kept = table.n_blocks - n
        for g, row in enumerate(table.rows):
            self._release(g, row[kept : table.n_blocks])
            row[kept : table.n_blocks] = FREED
        table.n_blocks = kept

    def _release(self, g: int, row: Ints) -> None:
        pool = self.pools[g]
        for block in reversed(row.tolist()):
            if block != FREED:
                pool.release(block)

    def fork(self, table: BlockTable) -> BlockTable:
        """A table with the same blocks; both will copy the last one before they write to it."""
        child = BlockTable(0, 0, table.prefix)
        child.rows = [row.copy() for row in table.rows]
        child.first, child.n_blocks, child.n_full = list(table.first), table.n_blocks, table.n_full
        child.shared = table.shared = True
        table.prefix.users += 1
        for row, pool in zip(table.rows, self.pools, strict=True):
            for block in row[: table.n_blocks].tolist():
                if block != FREED:
                    pool.share(block)
        return child

    def close(self, table: BlockTable) -> None:
        """Give back all blocks of a table."""
        for g, row in enumerate(table.rows):
            self._release(g, row[: table.n_blocks])
            row[:] = FREED
        table.n_blocks = table.n_full = 0
        table.prefix.users -= 1
        self._forget(table.prefix)

    def forget_prefixes(self) -> None:
        """Begin anew: what is cached belongs to weights that are gone. No table may be open."""
        assert all(pool.n_free == pool.n_blocks for pool in self.pools)
        self.pools = [BlockPool(pool.n_blocks) for pool in self.pools]
        self._nodes.clear()

    def check(self, tables: Iterable[BlockTable]) -> None:
        """Compare all accounts with the tables in use. Raises AssertionError where they disagree."""
        tables = list(tables)
        for g, pool in enumerate(self.pools):
            in_tables: Counter[int] = Counter()
            for table in tables:
                row = table.rows[g]
                assert bool((row[: table.first[g]] == FREED).all()), "a block before the window is still in a table"
                assert bool((row[table.first[g] : table.n_blocks] != FREED).all()), "a table has a hole"
                assert bool((row[table.n_blocks :] == FREED).all()), "a table has blocks behind its end"
                in_tables.update(row[table.first[g] : table.n_blocks].tolist())
            pool.check(in_tables)
            for block, node in enumerate(pool.prefixes):
                assert node is None or node.blocks[g] == block, "a block and its prefix disagree"
        users = Counter(node.parent for node in self._nodes.values()) + Counter(table.prefix for table in tables)
        for key, node in self._nodes.items():
            assert key == (node.parent, node.tokens), "a prefix is entered under another's tokens"
            assert node.users == users[node], "the users of a prefix are counted wrong"
            assert node.users or any(block != FREED for block in node.blocks), "a prefix that holds nothing was kept"
            for g, block in enumerate(node.blocks):
                assert block == FREED or self.pools[g].prefixes[block] is node, "a prefix and its block disagree"
