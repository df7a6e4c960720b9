"""Which of many texts is much like another, by ROUGE-L over their words."""

from __future__ import annotations

from collections.abc import Sequence

from danlu.data.repetition import WORDS
from danlu.evaluation.rouge import rouge_l


def words_of(text: str) -> list[str]:
    """Words without regard to case and punctuation; in scripts without spaces every character is one."""
    return [word.lower() for word in WORDS.findall(text)]


def most_alike(words: Sequence[str], others: Sequence[Sequence[str]], limit: float) -> tuple[float, int] | None:
    """The first of ``others`` whose ROUGE-L with ``words`` is at least ``limit``, as (ROUGE-L, index); None where there
    is none."""
    for i, other in enumerate(others):
        # The common part is no longer than the shorter text, which rules most of them out at once.
        if 2 * min(len(words), len(other)) < limit * (len(words) + len(other)):
            continue
        if (found := rouge_l(words, other)) >= limit:
            return found, i
    return None
