"""The list of filters: each a named, documented, separately switchable pure function from a text to a text, or to a
reason to drop it.

A filter says for which types of text it is meant: prose, source code, chats. Of a chat it sees one message after the
other.
"""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from danlu.data.boilerplate import strip_banner_lines, strip_licence_header
from danlu.data.pii import mask
from danlu.data.readers import TextType
from danlu.data.repetition import WORDS, too_repetitive
from danlu.errors import MissingExtra


@dataclass(frozen=True)
class Removed:
    """A document is dropped, and why."""

    reason: str


@dataclass(frozen=True)
class Limits:
    """What the filters take from the config."""

    min_chars: int = 40
    languages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Filter:
    """``run`` gets the text, its type and the limits. It is None for the one filter that needs the whole corpus."""

    name: str
    help: str
    types: tuple[TextType, ...]
    run: Callable[[str, TextType, Limits], str | Removed] | None


# --- the filters --------------------------------------------------------------------------------------------------

MIN_ALPHANUMERIC = 10
MAX_SYMBOLS_PER_WORD = 0.1  # Gopher
MIN_WORDS_WITH_LETTERS = 0.8  # Gopher
MAX_BULLET_LINES = 0.9  # Gopher
MAX_ELLIPSIS_LINES = 0.3  # Gopher
MIN_CODE_ALPHANUMERIC = 0.25  # StarCoder
MAX_CODE_LINE_MEAN = 100  # StarCoder
MAX_CODE_LINE = 1000  # StarCoder

_INVISIBLE = "\u00ad\u200b\u2060\ufeff\ufffe\uffff"
_BIDI = "\u202a-\u202e\u2066-\u2069"  # can show code that is not the code (CVE-2021-42574)
_CONTROL_PROSE = re.compile(rf"[\x00-\x08\x0e-\x1f\x7f-\x9f{_INVISIBLE}{_BIDI}]")
_CONTROL_CODE = re.compile(rf"[\x00\ufeff{_BIDI}]")
_BREAKS_PROSE = re.compile("\r\n?|[\x0b\x0c\u2028\u2029]")
_ALPHANUMERIC = r"[^\W_]"
_ENOUGH_ALPHANUMERIC = re.compile(rf"(?:[\W_]*{_ALPHANUMERIC}){{{MIN_ALPHANUMERIC}}}")
_BREAKS_CODE = re.compile("\r\n?")


def repair_unicode(text: str, type: TextType, limits: Limits) -> str:
    """Text decoded with the wrong encoding once (mojibake: "donâ€™t") is repaired, and composed (NFC). Quotes,
    ligatures, full-width forms and HTML entities are the author's and stay.
    """
    if text.isascii():
        return text
    import ftfy

    return ftfy.fix_text(text, _ftfy_config())


@functools.cache
def _ftfy_config() -> Any:
    import ftfy

    return ftfy.TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        remove_control_chars=False,
        normalization="NFC",
        explain=False,
    )


def strip_control(text: str, type: TextType, limits: Limits) -> str:
    """Line ends become LF. In prose, control and invisible characters go; in code only NUL, marks and bidirectional
    overrides.
    """
    if type == "code":
        return _CONTROL_CODE.sub("", _BREAKS_CODE.sub("\n", text))
    return _CONTROL_PROSE.sub("", _BREAKS_PROSE.sub("\n", text))


def strip_boilerplate(text: str, type: TextType, limits: Limits) -> str:
    """Licence headers of code; banners, navigation and copyright lines of prose."""
    return strip_licence_header(text) if type == "code" else strip_banner_lines(text)


def remove_near_empty(text: str, type: TextType, limits: Limits) -> str | Removed:
    """Hardly a letter or digit."""
    if _ENOUGH_ALPHANUMERIC.match(text):
        return text
    return Removed(f"{len(re.findall(_ALPHANUMERIC, text))} letters and digits (at least {MIN_ALPHANUMERIC})")


def remove_by_length(text: str, type: TextType, limits: Limits) -> str | Removed:
    """Too short; or code whose lines are so long that a machine wrote it."""
    length = len(text.strip())
    if length < limits.min_chars:
        return Removed(f"{length} characters (at least {limits.min_chars})")
    if type == "code":
        longest, mean = max(map(len, text.split("\n"))), len(text) / (text.count("\n") + 1)
        if longest > MAX_CODE_LINE or mean > MAX_CODE_LINE_MEAN:
            return Removed(
                f"lines of {mean:.0f} characters, up to {longest} (limits {MAX_CODE_LINE_MEAN}, {MAX_CODE_LINE})"
            )
    return text


def remove_symbols(text: str, type: TextType, limits: Limits) -> str | Removed:
    """More symbols than words: tables of numbers, ASCII art, hex dumps, lists without sentences."""
    if type == "code":
        share = len(re.sub(r"[\W_]+", "", text)) / max(len(text), 1)
        if share < MIN_CODE_ALPHANUMERIC:
            return Removed(
                f"{share:.0%} of the characters are letters or digits (at least {MIN_CODE_ALPHANUMERIC:.0%})"
            )
        return text
    words = WORDS.findall(text)
    if not words:
        return Removed("no words")
    for symbol in ("#", "…", "..."):
        share = text.count(symbol) / len(words)
        if share > MAX_SYMBOLS_PER_WORD:
            return Removed(f"{share:.2f} {symbol!r} per word (at most {MAX_SYMBOLS_PER_WORD})")
    share = 1 - sum(map(str.isdigit, words)) / len(words)
    if share < MIN_WORDS_WITH_LETTERS:
        return Removed(f"{share:.0%} of the words have letters (at least {MIN_WORDS_WITH_LETTERS:.0%})")
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    share = sum(line.startswith(("•", "-", "*", "●", "·")) for line in lines) / len(lines)
    if share > MAX_BULLET_LINES and len(lines) > 3:
        return Removed(f"{share:.0%} of the lines are bullets (at most {MAX_BULLET_LINES:.0%})")
    share = sum(line.endswith(("...", "…")) for line in lines) / len(lines)
    if share > MAX_ELLIPSIS_LINES:
        return Removed(f"{share:.0%} of the lines end in an ellipsis (at most {MAX_ELLIPSIS_LINES:.0%})")
    return text


def remove_repetitive(text: str, type: TextType, limits: Limits) -> str | Removed:
    """Repeats its lines, paragraphs or n-grams (Gopher)."""
    reason = too_repetitive(text)
    return text if reason is None else Removed(reason)


def remove_other_languages(text: str, type: TextType, limits: Limits) -> str | Removed:
    """Written in a language that was not asked for (py3langid)."""
    if not limits.languages:
        return text
    try:
        from py3langid.langid import classify
    except ImportError as error:
        raise MissingExtra("py3langid", "data", "the option languages") from error
    language = classify(text[:5000])[0]
    return (
        text
        if language in limits.languages
        else Removed(f"language {language} (wanted: {', '.join(limits.languages)})")
    )


def mask_pii(text: str, type: TextType, limits: Limits) -> str:
    """Personal data and secrets become tags."""
    return mask(text, is_code=type == "code")


_PROSE: tuple[TextType, ...] = ("prose",)
_TEXT: tuple[TextType, ...] = ("prose", "code")
_ALL: tuple[TextType, ...] = ("prose", "code", "chat")
FILTERS: tuple[Filter, ...] = (
    Filter("unicode", "Repair mojibake, compose characters (NFC).", ("prose", "chat"), repair_unicode),
    Filter("control", "Unify line ends; drop control, invisible and bidirectional characters.", _ALL, strip_control),
    Filter(
        "boilerplate", "Drop banner and navigation lines of prose, licence headers of code.", _TEXT, strip_boilerplate
    ),
    Filter("repeated_lines", "Drop lines that stand in at least 20 documents and 1 % of them.", _PROSE, None),
    Filter("near_empty", "Remove documents with hardly a letter.", _TEXT, remove_near_empty),
    Filter(
        "length", "Remove documents that are too short, and code with machine-made long lines.", _TEXT, remove_by_length
    ),
    Filter("symbols", "Remove documents with more symbols than words.", _TEXT, remove_symbols),
    Filter("repetition", "Remove prose that repeats lines, paragraphs or n-grams (Gopher).", _PROSE, remove_repetitive),
    Filter("language", "Remove prose not in one of `languages` (off without them).", _PROSE, remove_other_languages),
    Filter("pii", "Mask e-mail addresses, phone, ID, card and account numbers, keys and tokens.", _ALL, mask_pii),
)
FILTER_NAMES = tuple(each.name for each in FILTERS)


# --- running them -------------------------------------------------------------------------------------------------

N_SAMPLES = 5
EXCERPT = 160


@dataclass
class FilterReport:
    """What one filter did to a corpus. ``samples`` are drawn evenly from everything it did."""

    name: str
    help: str
    documents_removed: int = 0
    documents_changed: int = 0
    bytes_removed: int = 0
    samples: list[dict[str, str]] = field(default_factory=list)
    _random: random.Random = field(default_factory=lambda: random.Random(0), repr=False)

    def record(self, path: str, before: str, after: str | Removed) -> None:
        """Count a document that the filter changed or removed."""
        self.bytes_removed += len(before.encode())
        if isinstance(after, Removed):
            self.documents_removed += 1
        else:
            self.documents_changed += 1
            self.bytes_removed -= len(after.encode())
        seen = self.documents_removed + self.documents_changed
        slot = seen - 1 if seen <= N_SAMPLES else self._random.randrange(seen)  # reservoir sampling
        if slot < N_SAMPLES:
            del self.samples[slot : slot + 1]
            self.samples.insert(slot, {"path": path, **_excerpt(before, after)})

    def to_dict(self) -> dict[str, Any]:
        """For the card."""
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}


class Cleaner:
    """Runs the chosen filters in order and keeps a report for each."""

    def __init__(self, chosen: Iterable[str] = (), skipped: Iterable[str] = (), limits: Limits | None = None) -> None:
        names = set(chosen) or set(FILTER_NAMES)
        self.limits = limits or Limits()
        if not self.limits.languages:
            names.discard("language")
        self.filters = [each for each in FILTERS if each.name in names.difference(skipped)]
        self.reports = {each.name: FilterReport(each.name, each.help) for each in self.filters}

    def clean(self, text: str, type: TextType, path: str) -> str | None:
        """The cleaned text, or None for a document that is removed. ``path`` names it in the samples."""
        for each in self.filters:
            if each.run is None or type not in each.types:
                continue
            result = self._on_messages(each, text) if type == "chat" else each.run(text, type, self.limits)
            if result != text:
                self.reports[each.name].record(path, text, result)
            if isinstance(result, Removed):
                return None
            text = result
        return text

    def after_repeated_lines(self, text: str, stripped: str, path: str, report: bool) -> str | None:
        """What is left when `repeated_lines` made ``stripped`` out of ``text``: None when that is too little for a
        document.
        """
        if stripped == text:
            return text
        result: str | Removed = stripped
        for check in (remove_near_empty, remove_by_length):
            if isinstance(verdict := check(stripped, "prose", self.limits), Removed):
                result = verdict
        if report:
            self.reports["repeated_lines"].record(path, text, result)
        return None if isinstance(result, Removed) else result

    def _on_messages(self, each: Filter, text: str) -> str | Removed:
        assert each.run is not None
        chat = json.loads(text)
        for message in chat["messages"]:
            for part in ("content", "reasoning_content"):
                if isinstance(said := message.get(part), str):
                    result = each.run(said, "chat", self.limits)
                    if isinstance(result, Removed):
                        return result
                    message[part] = result
        return json.dumps(chat, ensure_ascii=False)


def _excerpt(before: str, after: str | Removed) -> dict[str, str]:
    """What changed, with a little of what stands around it."""
    if isinstance(after, Removed):
        return {"before": before[:EXCERPT], "after": f"removed: {after.reason}"}
    same = _common_prefix(before, after)
    tail = _common_prefix(before[same:][::-1], after[same:][::-1])
    start = max(0, same - EXCERPT // 4)
    ends = [min(len(text) - tail + EXCERPT // 4, start + EXCERPT) for text in (before, after)]
    return {"before": before[start : ends[0]], "after": after[start : ends[1]]}


def _common_prefix(left: str, right: str) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(left), len(right)))
