"""Log probabilities in the shape of OpenAI's completions: four lists side by side."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any, Final

from danlu.server.protocol import TokenLogprob

LOWEST: Final = -9999.0
"""Stands for the logarithm of 0, which JSON does not have."""


class LegacyLogprobs:
    """The log probabilities of one stretch of text, in as many parts as it comes in.

    An offset says where in the choice's text a token begins, in characters. A character that is cut into several tokens
    is the place of all of them; tokens that are no part of the text (special ones) have the place of what follows.

    Args:
        start: characters of the choice's text before the stretch.
        ahead: tokens may come before their text, which is held back while it may be the start of a stop text. Special
            tokens can then not be told from text that is to come.
    """

    def __init__(self, start: int = 0, *, ahead: bool = False) -> None:
        self._start, self._ahead, self._at, self._text = start, ahead, 0, ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, tokens: Iterable[tuple[bytes, TokenLogprob | None]], text: str) -> dict[str, Any]:
        """The entries of further tokens.

        Args:
            tokens: bytes and log probabilities, None for a token that has none (the first of a prompt).
            text: what has become certain of the stretch since the last call.
        """
        self._text += text
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for data, one in tokens:
            lists["tokens"].append(token_name(data))
            lists["token_logprobs"].append(None if one is None else max(one.logprob, LOWEST))
            lists["top_logprobs"].append(None if one is None else top_of(one))
            lists["text_offset"].append(self._start + self._place(data))
        return lists

    def _place(self, data: bytes) -> int:
        """Where a token begins. The text is believed more than the token: that may be left out of it, or have a space
        in front that it does not have (SentencePiece)."""
        at, before = self._at, self._decoder.getstate()
        letters = self._decoder.decode(data)
        for written in (letters, letters.removeprefix(" ")):
            known = self._text[at : at + len(written)]
            if known == written or (self._ahead and written.startswith(known)):
                self._at += len(written)
                return at
        self._decoder.setstate(before)
        return at


def token_name(data: bytes) -> str:
    """A token's text, or its bytes where they are no text by themselves."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def top_of(one: TokenLogprob) -> dict[str, float]:
    """The most likely tokens, and the one that stands there. Of tokens with the same text, the likeliest counts."""
    found: dict[str, float] = {}
    for _, data, logprob in one.top:
        found.setdefault(token_name(data), max(logprob, LOWEST))
    found.setdefault(token_name(one.text), max(one.logprob, LOWEST))
    return found


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The lists of several stretches as one."""
    return {name: [one for part in parts for one in part[name]] for name in parts[0]}
