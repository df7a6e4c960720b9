"""Which documents are copies or near-copies of others: exact by hash, near by MinHash and locality-sensitive hashing.

Signatures are cut into 32 bands of 4 values; documents that agree in a whole band are candidates (Leskovec et al.,
"Mining of Massive Datasets", ch. 3). A pair of similarity s becomes one with probability 1 - (1 - s^4)^32: 1.000 at
0.8, 0.987 at 0.6, 0.87 at 0.5, 0.05 at 0.2. So many bands cost few comparisons and serve both uses: *near-duplicates*
(checked on the exact sets) are removed, and documents that are merely *related* stay but are kept on one side of the
train/held-out split.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from danlu.data.minhash import N_PERMUTATIONS, estimate, jaccard, shingles, signature

BANDS, ROWS = 32, 4
RELATED = 0.4
"""Estimated similarity from which on two documents must not be on both sides of the split: two standard errors below
the 0.5 that is meant, since a relative too many in a group does no harm."""
MARGIN = 0.1
"""Pairs whose estimate is within this of the threshold are compared exactly (twice the standard error of the
estimate).
"""
BUCKET_ALL_PAIRS = 32
"""In larger buckets every document is compared to the first and to its neighbour only; 32 bands give many other
chances.
"""


@dataclass
class Duplicates:
    """What was found about documents ``0 .. n-1``.

    Attributes:
        copy_of: (n,) the kept document that stands for each; itself for those kept. It is always an earlier one.
        group: (n,) the smallest document of the group of related documents each belongs to.
        n_exact, n_near: documents that are not kept.
        pairs: some near-duplicates (later, earlier, similarity), to look at.
    """

    copy_of: NDArray[np.int64]
    group: NDArray[np.int64]
    n_exact: int = 0
    n_near: int = 0
    pairs: list[tuple[int, int, float]] = field(default_factory=list)

    @classmethod
    def none(cls, n: int) -> Duplicates:
        """Every document stands for itself."""
        return cls(np.arange(n), np.arange(n))


class UnionFind:
    """Disjoint sets of 0 .. n-1; the smallest member stands for its set."""

    def __init__(self, n: int) -> None:
        self.parent = list(range(n))

    def find(self, item: int) -> int:
        """The smallest member of the set of ``item``."""
        root = item
        while self.parent[root] != root:
            root = self.parent[root]
        while self.parent[item] != root:  # later searches are short
            self.parent[item], item = root, self.parent[item]
        return root

    def union(self, left: int, right: int) -> None:
        """Make one set of two."""
        left, right = self.find(left), self.find(right)
        self.parent[max(left, right)] = min(left, right)

    def roots(self) -> NDArray[np.int64]:
        """(n,) the representative of each."""
        return np.array([self.find(item) for item in range(len(self.parent))], np.int64)


class Deduplicator:
    """Takes documents one after the other, keeps 16 bytes (exact) or 528 bytes (near) of each, then tells which are
    copies.

    Args:
        near: also look for near-duplicates.
        threshold: Jaccard similarity of word 3-grams from which on a document is a near-duplicate.
    """

    def __init__(self, near: bool = True, threshold: float = 0.8) -> None:
        self.near = near
        self.threshold = threshold
        self._first: dict[bytes, int] = {}
        self._exact: list[int] = []
        self._signatures: list[NDArray[np.uint32]] = []
        self._with_signature: list[int] = []

    def add(self, text: str) -> bool:
        """Take the next document; True when it is the exact copy (but for white space) of an earlier one."""
        index = len(self._exact)
        key = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()
        first = self._first.setdefault(key, index)
        self._exact.append(first)
        if self.near and first == index:
            shingle_set = shingles(text)
            if len(shingle_set):
                self._signatures.append(signature(shingle_set))
                self._with_signature.append(index)
        return first != index

    def find(self, text_of: Callable[[int], str]) -> Duplicates:
        """All copies. ``text_of(i)`` reads document i again, for the exact comparison of candidates."""
        n = len(self._exact)
        copies, related = UnionFind(n), UnionFind(n)
        for index, first in enumerate(self._exact):
            copies.union(index, first)
            related.union(index, first)
        n_exact = sum(first != index for index, first in enumerate(self._exact))
        shingles_of = functools.lru_cache(maxsize=256)(lambda index: shingles(text_of(index)))
        pairs: list[tuple[int, int, float]] = []
        for left, right, guess in self._candidates():
            if guess >= RELATED:
                related.union(left, right)
            if guess < self.threshold - MARGIN or copies.find(left) == copies.find(right):
                continue
            similarity = jaccard(shingles_of(left), shingles_of(right))
            if similarity >= self.threshold:
                copies.union(left, right)
                related.union(left, right)
                if len(pairs) < 20:
                    pairs.append((right, left, similarity))
        copy_of = copies.roots()
        n_removed = int((copy_of != np.arange(n)).sum())
        return Duplicates(copy_of, related.roots(), n_exact, n_removed - n_exact, pairs)

    def _candidates(self) -> Iterator[tuple[int, int, float]]:
        """Pairs (earlier, later, estimated similarity) that share a band, each band's in order; a pair may come
        again.
        """
        if len(self._signatures) < 2:
            return
        signatures = np.stack(self._signatures)
        index_of = np.array(self._with_signature)
        assert BANDS * ROWS == N_PERMUTATIONS
        seen: set[int] = set()
        for band in range(BANDS):
            keys = np.ascontiguousarray(signatures[:, band * ROWS : (band + 1) * ROWS]).view(f"V{4 * ROWS}").ravel()
            _, bucket, sizes = np.unique(keys, return_inverse=True, return_counts=True)
            order = np.argsort(bucket, kind="stable")
            ends = np.cumsum(sizes)
            for end, size in zip(ends[sizes > 1], sizes[sizes > 1], strict=True):
                members = order[end - size : end]
                lefts, rights = _pairs_within(members)
                guesses = estimate(signatures[lefts], signatures[rights])
                for left, right, guess in zip(lefts.tolist(), rights.tolist(), guesses.tolist(), strict=True):
                    pair = left * len(signatures) + right
                    if guess < min(RELATED, self.threshold - MARGIN) or pair in seen:
                        continue
                    seen.add(pair)
                    yield int(index_of[left]), int(index_of[right]), guess


def _pairs_within(members: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if len(members) <= BUCKET_ALL_PAIRS:
        left, right = np.triu_indices(len(members), 1)
        return members[left], members[right]
    first = np.full(len(members) - 1, members[0])
    return np.concatenate((first, members[1:-1])), np.concatenate((members[1:], members[2:]))
