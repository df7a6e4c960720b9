"""How much of a text repeats itself, and the limits above which it is thrown away.

Measures and limits are those of Gopher (Rae et al. 2021, "Scaling Language Models", table A1). They are meant for
prose: good source code repeats short lines and n-grams all the time. Words are runs of letters and digits, and single
characters in scripts without spaces (Chinese, Japanese, Thai), where the limits on *word* pairs would otherwise mean
nothing.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
from numpy.typing import NDArray

WORDS = re.compile(
    r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|[^\W\u0e00-\u0eff\u3040-\u9fff\uf900-\ufaff]+"
)

DUPLICATE_LINES = 0.30
DUPLICATE_LINE_CHARS = 0.20
DUPLICATE_PARAGRAPHS = 0.30
DUPLICATE_PARAGRAPH_CHARS = 0.20
TOP_NGRAM_CHARS = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE_NGRAM_CHARS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
MIN_WORDS = 50
"""Shorter texts are not judged by n-grams: a single repeated phrase is a large share of them."""


def too_repetitive(text: str) -> str | None:
    """Why ``text`` is too repetitive, with the measure and its limit; None when it is not."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    paragraphs = [paragraph.strip() for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
    for what, parts, limit, limit_chars in (
        ("lines", lines, DUPLICATE_LINES, DUPLICATE_LINE_CHARS),
        ("paragraphs", paragraphs, DUPLICATE_PARAGRAPHS, DUPLICATE_PARAGRAPH_CHARS),
    ):
        share, chars = duplicate_shares(parts)
        if share > limit:
            return f"{share:.0%} of the {what} are repeated (limit {limit:.0%})"
        if chars > limit_chars:
            return f"{chars:.0%} of the characters are in repeated {what} (limit {limit_chars:.0%})"
    words = WORDS.findall(text)
    if len(words) < MIN_WORDS:
        return None
    vocabulary: dict[str, int] = {}
    ids = np.array([vocabulary.setdefault(word, len(vocabulary)) for word in words], np.int64)
    lengths = np.array([len(word) for word in words], np.int64)
    ranks = ids  # ranks[i] names the n-gram that begins at word i, for growing n
    for n in range(2, max(DUPLICATE_NGRAM_CHARS) + 1):
        _, ranks = np.unique(ranks[:-1] * (len(vocabulary) + 1) + ids[n - 1 :], return_inverse=True)
        if n in TOP_NGRAM_CHARS and (share := top_ngram_share(ranks, lengths, n)) > TOP_NGRAM_CHARS[n]:
            return f"one {n}-gram makes up {share:.0%} of the characters (limit {TOP_NGRAM_CHARS[n]:.0%})"
        if n in DUPLICATE_NGRAM_CHARS:
            share, limit = duplicate_ngram_share(ranks, lengths, n), DUPLICATE_NGRAM_CHARS[n]
            if share > limit:
                return f"{share:.0%} of the characters are in repeated {n}-grams (limit {limit:.0%})"
            if share <= min(DUPLICATE_NGRAM_CHARS.values()):
                return None  # what is in a repeated (n+1)-gram is in a repeated n-gram: the share can only fall
    return None


def duplicate_shares(parts: list[str]) -> tuple[float, float]:
    """Share of parts that stood before, and share of the characters that are in them."""
    total_chars = sum(map(len, parts))
    if not total_chars:
        return 0.0, 0.0
    counts = Counter(parts)
    repeated = sum(count - 1 for count in counts.values())
    chars = sum((count - 1) * len(part) for part, count in counts.items())
    return repeated / len(parts), chars / total_chars


def top_ngram_share(ranks: NDArray[np.int64], lengths: NDArray[np.int64], n: int) -> float:
    """Share of the characters of all words that lie in the most frequent n-gram (0 when none occurs twice).

    Args:
        ranks: (words - n + 1,) which n-gram begins at each word.
        lengths: (words,) characters per word.
    """
    counts = np.bincount(ranks)
    if len(counts) == 0 or counts.max() < 2:
        return 0.0
    top = int(counts.argmax())
    first = int(np.flatnonzero(ranks == top)[0])
    return float(counts[top] * lengths[first : first + n].sum() / lengths.sum())


def duplicate_ngram_share(ranks: NDArray[np.int64], lengths: NDArray[np.int64], n: int) -> float:
    """Share of the characters of all words that lie in an n-gram which occurs more than once; arguments as above."""
    repeated = np.bincount(ranks)[ranks] > 1
    edges = np.zeros(len(lengths) + 1, np.int64)
    edges[: len(repeated)] += repeated
    edges[n : n + len(repeated)] -= repeated
    covered = np.cumsum(edges[:-1]) > 0
    return float(lengths[covered].sum() / lengths.sum())
