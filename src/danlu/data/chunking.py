"""Long documents are cut where their structure allows it: Python between definitions, Markdown before headings,
everything between paragraphs, then lines, then sentences (Chinese and Japanese ones too), then words, and only as a
last resort anywhere.

The chunks put together are the document again, character by character.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

Structure = Literal["python", "markdown", "plain"]

# Every match marks one place where a text may be cut: where the match ends. Coarse structure first.
_DEFINITION = re.compile(r"\n(?=@|(?:async[ \t]+)?def[ \t]|class[ \t]|if __name__)")
_HEADING = re.compile(r"\n(?=#{1,6}[ \t])")
_PARAGRAPH = re.compile(r"\n\s*\n")
_LINE = re.compile(r"\n")
_SENTENCE = re.compile(r"[。！？…]+[”’」』）]*|[.!?]{1,9}[\"')\]]{0,3}[ \t]+")
_WORD = re.compile(r"\s+")
_LOOK_AHEAD = 20  # characters behind a chunk that tell whether a definition begins there
_COMMON = (_PARAGRAPH, _LINE, _SENTENCE, _WORD)
_LEVELS: dict[Structure, tuple[re.Pattern[str], ...]] = {
    "python": (_DEFINITION, *_COMMON),
    "markdown": (_HEADING, *_COMMON),
    "plain": _COMMON,
}


def chunks(text: str, max_chars: int, structure: Structure = "plain") -> list[str]:
    """Cut ``text`` into pieces of 1 to ``max_chars`` characters, so that ``"".join(chunks(text, n)) == text``.

    A chunk ends at the last place of the coarsest structure that fits into it and leaves it at least half full; a
    top-level definition is cut only when it is longer than that. Python is cut by its lines, not by its syntax tree,
    so that a file that does not parse (Python 2, a template) is cut just as well.
    """
    pieces: list[str] = []
    start = 0
    while len(text) - start > max_chars:
        end = _best_cut(text, start, max_chars, _LEVELS[structure])
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _best_cut(text: str, start: int, max_chars: int, levels: Sequence[re.Pattern[str]]) -> int:
    half, limit = start + max_chars // 2, start + max_chars
    for pattern in levels:
        cut = 0
        for match in pattern.finditer(text, half, limit + _LOOK_AHEAD):
            if half < match.end() <= limit:
                cut = match.end()
        if pattern is _DEFINITION and cut:
            cut = _before_decorators(text, cut, half)
        if cut:
            return cut
    return limit


def _before_decorators(text: str, cut: int, lowest: int) -> int:
    """A definition takes the decorators and comments right above it along."""
    while True:
        line_start = text.rfind("\n", lowest, cut - 1) + 1
        if line_start <= lowest or text[line_start] not in "@#":
            return cut
        cut = line_start
