"""Text that is on the page but not of it: banners, navigation, licence headers, lines that stand in many documents."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

import numpy as np

_BANNER_START = re.compile(
    "|".join(
        (
            r"(?:we|(?:this|our) (?:web)?site) uses? (?:\w+ )?cookies",
            r"(?:skip|jump) to (?:main )?(?:content|navigation|search)",
            r"(?:back|return|go|scroll) to (?:the )?(?:top|home(?:page)?)\b",
            r"(?:©|\(c\)|copyright\b).{0,80}\b(?:19|20)\d\d\b",
            r"(?:terms of (?:use|service)|privacy policy)\b.{0,40}$",
            r"(?:sign|log) (?:in|up|out)(?: (?:to|for|with) .{0,40})?$",
            r"subscribe (?:to our|now|today)\b|(?:follow|like) us on\b|share (?:this|on)\b.{0,40}$",
            r"(?:please )?(?:enable|turn on) (?:javascript|cookies)\b",
            r"(?:previous|next) (?:article|page|post)s?$",
            r"(?:home|menu|search|login|register|share|print|advertisement)$",
            r"(?:home|首页) ?(?:[|>»·/] ?[^\s|>»·/]+ ?){2,}$",
            r"(?:返回|回到)(?:顶部|首页)|(?:上一篇|下一篇|上一页|下一页)\b",
            r"(?:分享到|扫一扫|关注我们|责任编辑)[：:]?.{0,20}$",
        )
    ),
    re.IGNORECASE,
)
_BANNER_WITHIN = re.compile(
    r"(?:accept|reject|allow|manage) (?:all )?cookies?|cookie (?:policy|settings|preferences)$|all rights reserved\.?$"
    r"|版权所有|版权声明|ICP备\d+号|公网安备|接受(?:所有|全部) ?cookie",
    re.IGNORECASE,
)
_BANNER_HINTS = ("cookie", "rights reserved", "版权", "备", "接受")  # one of them is in whatever _BANNER_WITHIN finds
_BANNER_MAX_CHARS = 160
"""A longer line is a sentence that speaks of cookies or copyright."""

_LICENCE = re.compile(
    r"copyright|\(c\) (?:19|20)\d\d|©|licen[cs]ed? |spdx-license|all rights reserved|permission is hereby granted"
    r"|permission to use, copy|redistribut|warrant(?:y|ies)|as is\b|liab(?:le|ility)|see the file .{0,20}licen[cs]e",
    re.IGNORECASE,
)
_COMMENT = re.compile(r"\s*(?:#|//|--|;;|%|\*|/\*)")
_KEEP_ON_TOP = re.compile(r"#!|#.*?coding[:=]|<\?(?:xml|php)")


def strip_banner_lines(text: str) -> str:
    """Prose without cookie banners, navigation and copyright lines."""
    lowered = text.lower()
    look_within = any(hint in lowered for hint in _BANNER_HINTS)

    def is_banner(line: str) -> bool:
        line = line.strip()
        return bool(_BANNER_START.match(line) or (look_within and _BANNER_WITHIN.search(line)))

    kept = [line for line in text.split("\n") if len(line) > _BANNER_MAX_CHARS or not is_banner(line)]
    return "\n".join(kept)


def strip_licence_header(text: str) -> str:
    """Source code without those paragraphs of its leading comment that speak of copyright and licence.

    The shebang, the coding line and everything else the comment says stay. Only the comment before the first line of
    code is touched.
    """
    lines = text.split("\n")
    top = 0
    while top < len(lines) and (_KEEP_ON_TOP.match(lines[top]) or (top > 0 and not lines[top].strip())):
        top += 1
    end = top
    in_block = False
    while end < len(lines):
        line = lines[end].strip()
        in_block = (in_block or line.startswith("/*")) and "*/" not in line
        if line and not in_block and not _COMMENT.match(line) and "*/" not in line:
            break
        end += 1
    header = lines[top:end]
    if not _LICENCE.search("\n".join(header)):
        return text
    if any("/*" in line for line in header):
        kept = _without_licence_blocks(header)
    else:
        kept = _without_licence_paragraphs(header)
    if not any(line.strip(" \t#/*-;%") for line in kept):
        kept = []
    rest = lines[end:]
    while not kept and rest and not rest[0].strip():
        rest = rest[1:]
    return "\n".join(lines[:top] + kept + rest)


def _without_licence_paragraphs(header: list[str]) -> list[str]:
    """Paragraphs of a line comment end at an empty line, or one that is a bare comment sign."""
    kept: list[str] = []
    paragraph: list[str] = []
    for line in [*header, ""]:
        paragraph.append(line)
        if not line.strip(" \t#/*-;%="):
            if not _LICENCE.search("\n".join(paragraph)):
                kept += paragraph
            paragraph = []
    return kept[:-1] if kept and not kept[-1] else kept


def _without_licence_blocks(header: list[str]) -> list[str]:
    """A ``/* ... */`` block that holds a licence goes as a whole, so that its delimiters stay in pairs."""
    text, kept, at = "\n".join(header), [], 0
    while (start := text.find("/*", at)) >= 0 and (end := text.find("*/", start + 2)) >= 0:
        end += 3 if text.startswith("\n", end + 2) else 2
        kept.append(text[at:start])
        if not _LICENCE.search(text, start, end):
            kept.append(text[start:end])
        at = end
    return "".join([*kept, text[at:]]).split("\n")


class RepeatedLines:
    """Finds lines that stand in many documents (menus, disclaimers, signatures) with bounded memory.

    A count-min sketch (Cormode & Muthukrishnan 2005) of 2 x 4M counters of 16 bits (16 MB): counts are never too low,
    and too high by chance only in corpora of many millions of different lines, where two rows make that rare.
    """

    WIDTH = 1 << 22
    MIN_DOCUMENTS = 20
    MIN_SHARE = 0.01

    def __init__(self) -> None:
        self._counts = np.zeros((2, self.WIDTH), np.uint16)
        self._n_documents = 0

    def add(self, text: str) -> None:
        """Count the different lines of one document. Copies of a document should be added once."""
        self._n_documents += 1
        lines = {line.strip() for line in text.split("\n")}
        lines.discard("")
        if lines:
            at = self._slots(lines)
            for row in (0, 1):
                slots = np.unique(at[row])
                self._counts[row, slots] += self._counts[row, slots] < np.iinfo(np.uint16).max

    def limit(self) -> int:
        """Documents from which on a line counts as boilerplate."""
        return max(self.MIN_DOCUMENTS, round(self.MIN_SHARE * self._n_documents))

    def strip_from(self, text: str) -> str:
        """``text`` without the lines that stand in too many documents."""
        lines = text.split("\n")
        keys = [line.strip() for line in lines]
        wordy = sorted({key for key in keys if any(map(str.isalnum, key))})  # rules and bullets are layout
        if not wordy:
            return text
        counts = self._counts[np.arange(2)[:, None], self._slots(wordy)].min(axis=0)
        repeated = {key for key, count in zip(wordy, counts, strict=True) if count >= min(self.limit(), 65535)}
        if not repeated:
            return text
        return "\n".join(line for line, key in zip(lines, keys, strict=True) if key not in repeated)

    def _slots(self, lines: Iterable[str]) -> np.ndarray[tuple[int, int], np.dtype[np.uint32]]:
        """(2, lines) counters of each line."""
        digests = b"".join(hashlib.blake2b(line.encode(), digest_size=8).digest() for line in lines)
        return np.frombuffer(digests, np.uint32).reshape(-1, 2).T % self.WIDTH
