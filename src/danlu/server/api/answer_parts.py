"""What a model writes, taken apart while it comes: reasoning, the answer, tool calls.

The parts do not depend on how the text was cut into pieces. What may still turn out to be the beginning of a tag is
held back until it is one or is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from danlu.tokenizer.special import THINK


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Thoughts, which are no part of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Said:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallBegun:
    """A tool is called; its arguments follow.

    Attributes:
        call: which of the answer's calls, from 0.
    """

    call: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of the arguments of a call: a piece of the text of a JSON object, exactly as the model wrote it."""

    call: int
    text: str


Part = Reasoning | Said | ToolCallBegun | ToolCallArguments


class CallScanner(Protocol):
    """Finds the tool calls in an answer; see :mod:`danlu.server.api.tool_calls`."""

    def push(self, text: str) -> list[Part]:
        """More of the answer."""

    def finish(self) -> list[Part]:
        """The answer has ended."""


class AnswerParser:
    """Text in pieces in, parts out.

    A thought is what stands between ``<think>`` and ``</think>`` at the beginning of an answer; white space round it is
    left out. One that never ends is reasoning to the end.

    Args:
        thinking: the prompt has opened the thought already.
        calls: finds tool calls; None: whatever looks like one is text.
    """

    def __init__(self, *, thinking: bool = False, calls: CallScanner | None = None) -> None:
        self._calls = calls
        self._held = ""
        self._read = self._reasoning if thinking else self._beginning
        self._told = False

    @property
    def answering(self) -> bool | None:
        """Whether what comes next is the answer, no thought; None while that cannot be told."""
        return None if self._read == self._beginning else self._read == self._answer

    def push(self, text: str) -> list[Part]:
        """The next piece of text; returns what has become certain."""
        self._held += text
        parts: list[Part] = []
        before = None
        while self._read != before:  # one that comes to its end hands on to the next
            before = self._read
            parts += self._read()
        return parts

    def finish(self) -> list[Part]:
        """The text has ended; returns what was held back."""
        held, self._held = self._held, ""
        if self._read == self._reasoning:
            return self._think(held.rstrip())
        if self._calls is None:
            return [Said(held)] if held else []
        return self._calls.push(held) + self._calls.finish()

    def _beginning(self) -> list[Part]:
        opening = THINK[0]
        start = self._held.lstrip()
        if start.startswith(opening):
            self._held = start.removeprefix(opening)
            self._read = self._reasoning
        elif not opening.startswith(start):
            self._read = self._answer
        return []

    def _reasoning(self) -> list[Part]:
        closing = THINK[1]
        text, closed, rest = self._held.partition(closing)
        if closed:
            self._held, self._read = rest, self._after_thought
            return self._think(text.rstrip())
        # What may be the white space before the closing tag is held back with what may be the tag.
        certain = text[: len(text) - overlap(text, closing)].rstrip()
        self._held = text[len(certain) :]
        return self._think(certain)

    def _think(self, text: str) -> list[Part]:
        if not self._told:
            text = text.lstrip()
        self._told = self._told or bool(text)
        return [Reasoning(text)] if text else []

    def _after_thought(self) -> list[Part]:
        self._held = self._held.lstrip()
        if self._held:
            self._read = self._answer
        return []

    def _answer(self) -> list[Part]:
        text, self._held = self._held, ""
        if self._calls is not None:
            return self._calls.push(text)
        return [Said(text)] if text else []


def overlap(text: str, tag: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``tag`` (but not all of it)."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)
