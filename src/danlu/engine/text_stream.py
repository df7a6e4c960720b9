"""Text that can be shown while it is made."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from danlu.tokenizer.tokenizer import Tokenizer


class TextStream:
    """Tokens in, text out, as early as it is certain.

    Held back are bytes that do not make a whole character yet (they are dropped if it never comes) and text that may
    turn out to be the start of a stop string. The text does not depend on how it is cut into tokens: it ends before the
    stop string that is complete first (of several that end at the same place: the longest). Special tokens are left
    out, but for those that structure an answer (thinking, tool calls), as in :meth:`Tokenizer.decode`.

    Args:
        begins_text: the tokens continue nothing: a space that the tokenizer puts in front of a text is left out.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, begins_text: bool = False) -> None:
        self._tokenizer, self._stop, self._at_begin = tokenizer, stop, begins_text
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._held = ""
        self.stop_text: str | None = None
        """The stop string that was found; nothing more will come."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self.stop_text is not None

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is now certain (often empty)."""
        if self._tokenizer.is_special(token_id):
            return ""
        data = self._tokenizer.decode_bytes([token_id])
        if self._at_begin:
            self._at_begin = False
            if data.startswith(b" ") and not self._tokenizer.decode([token_id]).startswith(" "):
                data = data[1:]
        return self.push_bytes(data)

    def push_bytes(self, data: bytes) -> str:
        """Add the bytes of a token."""
        if self.stopped:
            return ""
        text = self._held + self._decode(data)
        found = [(start + len(stop), start, stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            _, start, self.stop_text = min(found)
            self._held = ""
            return text[:start]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """No more tokens: what was held back for a stop string that did not come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a start of ``stop`` (but not all of it)."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
