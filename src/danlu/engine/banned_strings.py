"""Texts that never occur in an answer: the tokens that would complete one are barred.

It is exact on the bytes of the answer, also where a text is spread over several tokens or begins inside one; case and
spaces count. What stands in the prompt does not: a text that began there may be completed. Special tokens are no part
of an answer's text, so they do not interrupt one.
"""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from danlu.engine.sampling import Ids

if TYPE_CHECKING:
    from danlu.tokenizer.tokenizer import Tokenizer


class TokenTexts:
    """What each token adds to the text of an answer, made to be searched."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.of = [b"" if tokenizer.is_special(i) else tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
        self._order = sorted(range(len(self.of)), key=self.of.__getitem__)
        self._sorted = [self.of[i] for i in self._order]
        self._joined = b"".join(self.of)
        self._ends = np.cumsum([len(text) for text in self.of])
        self.longest = max(map(len, self.of))

    @classmethod
    def for_tokenizer(cls, tokenizer: Tokenizer) -> TokenTexts:
        """Made once for each tokenizer."""
        if tokenizer not in _TEXTS:
            _TEXTS[tokenizer] = cls(tokenizer)
        return _TEXTS[tokenizer]

    def beginning_with(self, start: bytes) -> list[int]:
        """Tokens whose text begins so."""
        first = bisect.bisect_left(self._sorted, start)
        behind = bisect.bisect_right(self._sorted, start, lo=first, key=lambda text: text[: len(start)])
        return self._order[first:behind]

    def containing(self, part: bytes) -> list[int]:
        """Tokens whose text has this in it."""
        found, place = [], self._joined.find(part)
        while place >= 0:
            token_id = int(np.searchsorted(self._ends, place, side="right"))
            if place + len(part) <= self._ends[token_id]:
                found.append(token_id)
            place = self._joined.find(part, place + 1)
        return found


_TEXTS: weakref.WeakKeyDictionary[Tokenizer, TokenTexts] = weakref.WeakKeyDictionary()


class BannedStrings:
    """The texts that one answer must not have in it, and its last bytes."""

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer) -> None:
        self._tokens = TokenTexts.for_tokenizer(tokenizer)
        banned = [text.encode(errors="surrogatepass") for text in texts]
        self._always = np.unique([i for text in banned for i in self._tokens.containing(text)]).astype(np.int64)
        # what the answer may end with -> tokens that would complete a text then
        self._completing: dict[bytes, list[int]] = {}
        for text in banned:
            for cut in range(max(1, len(text) - self._tokens.longest), len(text)):
                if ids := self._tokens.beginning_with(text[cut:]):
                    self._completing.setdefault(text[:cut], []).extend(ids)
        self._lengths = sorted({len(begun) for begun in self._completing})
        self._longest = max(map(len, banned)) - 1
        self._tail = b""

    def completing(self) -> Ids:
        """Tokens that would complete a text."""
        ends = [self._tail[-length:] for length in self._lengths if length <= len(self._tail)]
        found = [self._completing[end] for end in ends if end in self._completing]
        return np.concatenate([self._always, *found]).astype(np.int64)

    def accept(self, token_id: int) -> None:
        """The token was written."""
        if token_id < len(self._tokens.of) and self._longest:
            self._tail = (self._tail + self._tokens.of[token_id])[-self._longest :]

    def fork(self) -> BannedStrings:
        """The same texts for another answer that begins as this one does."""
        other = object.__new__(BannedStrings)
        other.__dict__.update(self.__dict__)
        return other
