"""MinHash signatures (Broder 1997, "On the resemblance and containment of documents"), vectorised over characters.

A document is the set of its word 3-grams (shingles); two documents are as alike as the Jaccard similarity of their
sets. The share of equal slots of two signatures estimates it with a standard error of sqrt(J (1 - J) / 128), at most
0.044.

Three words rather than the usual five: when 3 % of the words are edited here and there, the similarity of 3-grams is
still 0.84, that of 5-grams 0.75, while unrelated texts share few of either.
"""

from __future__ import annotations

import functools
import unicodedata

import numpy as np
from numpy.typing import NDArray

N_PERMUTATIONS = 128
SHINGLE_WORDS = 3
_SLICE = 1 << 20  # characters looked at together, so that memory stays bounded
_BLOCK = 4096  # shingles hashed together: 128 x 4096 x 4 bytes stay in the second-level cache

_LONGEST_WORD = 256  # characters behind it all weigh the same

_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by the golden ratio

_SPACE, _WORD, _SINGLE = 0, 1, 2
_SCRIPTS_WITHOUT_SPACES = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3040, 0x30FF),
    (0x3400, 0x9FFF),
    (0xF900, 0xFAFF),
)
"""Thai and Lao, Burmese, Khmer, kana, Chinese ideographs."""


def shingles(text: str) -> NDArray[np.uint32]:
    """The sorted set of 32-bit hashes of the word 3-grams of a text, without regard to case, spacing and punctuation.

    A word is a run of letters, digits and underscores; in scripts without spaces every character is a word. A text
    shorter than three words is one shingle; a text without words is the empty set.
    """
    parts = [_shingles_of_slice(text[start : start + _SLICE]) for start in range(0, len(text), _SLICE)]
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, np.uint32)


def signature(shingle_set: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """(128,) smallest value of each of 128 fixed pseudo-random permutations over a set of hashes; all ones for the
    empty set.
    """
    multiply, add = _permutations()
    smallest = np.full(N_PERMUTATIONS, np.iinfo(np.uint32).max, np.uint32)
    for start in range(0, len(shingle_set), _BLOCK):
        block = shingle_set[start : start + _BLOCK]
        np.minimum(smallest, (block[None, :] * multiply + add).min(axis=1), out=smallest)
    return smallest


def estimate(left: NDArray[np.uint32], right: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Estimated Jaccard similarities of signatures ``(..., 128)`` with ``(..., 128)``."""
    return np.asarray((left == right).mean(axis=-1))


def jaccard(left: NDArray[np.uint32], right: NDArray[np.uint32]) -> float:
    """Exact Jaccard similarity of two sorted sets (1 for two empty ones)."""
    common = len(np.intersect1d(left, right, assume_unique=True))
    union = len(left) + len(right) - common
    return common / union if union else 1.0


@functools.cache
def _permutations() -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """x -> a x + b mod 2^32 with odd a, which permutes the 32-bit integers; the x are well mixed already."""
    random = np.random.default_rng(0x6D696E68)  # fixed for ever: signatures must not change between runs
    multiply = random.integers(0, 1 << 31, (N_PERMUTATIONS, 1), np.uint32) * np.uint32(2) + np.uint32(1)
    return multiply, random.integers(0, 1 << 32, (N_PERMUTATIONS, 1), np.uint32)


def _shingles_of_slice(text: str) -> NDArray[np.uint32]:
    chars = np.frombuffer(text.lower().encode("utf-32-le", "replace"), np.uint32)
    kinds, codes = _tables()
    low = np.minimum(chars, len(kinds) - 1)
    kind = kinds[low]
    before = np.concatenate(([np.uint8(_SPACE)], kind[:-1]))
    starts = np.flatnonzero((kind != _SPACE) & ((kind != before) | (kind == _SINGLE)))
    if len(starts) == 0:
        return np.empty(0, np.uint32)
    # Hash of a word: the sum of code(char) * B^(place in the word), mod 2^64.
    start_of = np.zeros(len(chars), np.int64)
    start_of[starts] = starts
    place = np.arange(len(chars)) - np.maximum.accumulate(start_of)
    values = (codes[low] ^ chars) * _powers()[np.minimum(place, _LONGEST_WORD - 1)]
    values[kind == _SPACE] = 0
    words = _mix(np.add.reduceat(values, starts))
    n = min(SHINGLE_WORDS, len(words))
    grams = words[: len(words) - n + 1]
    for offset in range(1, n):
        grams = _mix(grams * _ODD + words[offset : len(words) - n + 1 + offset])  # times: the order of words counts
    return (grams >> np.uint64(32)).astype(np.uint32)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al. 2014): every bit of the input changes half of the output's."""
    values = values + _ODD
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@functools.cache
def _powers() -> NDArray[np.uint64]:
    return np.cumprod(np.full(_LONGEST_WORD, _ODD, np.uint64), dtype=np.uint64)


@functools.cache
def _tables() -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
    """Kind and random code of every character of the basic plane; the last entry stands for all others, each a word
    of its own.
    """
    kinds = np.full((1 << 16) + 1, _SINGLE, np.uint8)
    for code in range(1 << 16):
        char = chr(code)
        if not (char.isalnum() or char == "_" or unicodedata.category(char).startswith("M")):
            kinds[code] = _SPACE
        elif not any(first <= code <= last for first, last in _SCRIPTS_WITHOUT_SPACES):
            kinds[code] = _WORD
    return kinds, _mix(np.arange(len(kinds), dtype=np.uint64))
