"""How much of one text stands in another in the same order: ROUGE-L (Lin 2004)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Sequence

CHARACTERS = "\u3040-\u30ff\u4e00-\u9fff"
TOKEN = re.compile(rf"[{CHARACTERS}]|[^\W\d_{CHARACTERS}]+|\d+|[^\w\s]|_")
"""Words, numbers, Chinese characters and signs one by one; a name_with_parts is its parts."""


def tokens(text: str) -> list[str]:
    """What ROUGE-L compares, in lower case."""
    return TOKEN.findall(text.lower())


def rouge_l(answer: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    """F1 of the longest common subsequence, 0 to 1; of two empty texts 0."""
    total = len(answer) + len(reference)
    return 2 * common_subsequence(answer, reference) / total if total else 0.0


def common_subsequence(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence, a row of the table at a time in the bits of one number (Hyyrö 2004)."""
    places: dict[Hashable, int] = defaultdict(int)
    for i, token in enumerate(a):
        places[token] |= 1 << i
    whole = (1 << len(a)) - 1
    row = whole  # a bit that is 0: the subsequence grows by one there
    for token in b:
        matches = row & places.get(token, 0)
        row = ((row + matches) | (row - matches)) & whole
    return len(a) - row.bit_count()
