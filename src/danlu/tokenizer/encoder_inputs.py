"""What an encoder reads: one text or two with the special tokens of its family round them, cut to its length."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers

from danlu.errors import DanluError


def encode(
    plain: tokenizers.Tokenizer, full: tokenizers.Tokenizer, text: str, pair: str | None, max_length: int | None
) -> tuple[list[int], list[int]]:
    """Ids and types (0: first text, 1: second), as the post-processor of ``full`` puts them together.

    Raises:
        DanluError: ``max_length`` has no room for the special tokens.
    """
    first = plain.encode(text, add_special_tokens=False)
    second = plain.encode(pair, add_special_tokens=False) if pair is not None else None
    if max_length is not None:
        room = _room(full, max_length, is_pair=second is not None)
        n_first, n_second = longest_first(len(first), len(second) if second is not None else 0, room)
        first.truncate(n_first)
        if second is not None:
            second.truncate(n_second)
    whole = full.post_process(first, second, add_special_tokens=True)
    return list(whole.ids), list(whole.type_ids)


def encode_words(
    plain: tokenizers.Tokenizer, full: tokenizers.Tokenizer, words: Sequence[str], max_length: int | None
) -> tuple[list[int], list[int | None]]:
    """Ids and, of each, the index of its word; ``None`` for special tokens.

    Raises:
        DanluError: ``max_length`` has no room for the special tokens.
    """
    found = plain.encode(list(words), is_pretokenized=True, add_special_tokens=False)
    if max_length is not None:
        found.truncate(min(len(found), _room(full, max_length, is_pair=False)))
    whole = full.post_process(found, None, add_special_tokens=True)
    return list(whole.ids), list(whole.word_ids)


def longest_first(n_first: int, n_second: int, room: int) -> tuple[int, int]:
    """How much of each text to keep: tokens go from the longer one until both fit, and then from both in turn."""
    if n_first + n_second <= room:
        return n_first, n_second
    short = min(n_first, n_second, room // 2)
    long = room - short
    return (short, long) if n_first <= n_second else (long, short)


def _room(full: tokenizers.Tokenizer, max_length: int, is_pair: bool) -> int:
    n_special = int(full.num_special_tokens_to_add(is_pair))
    if max_length < n_special:
        raise DanluError(f"max_length: {max_length} has no room for the {n_special} special tokens of this tokenizer")
    return max_length - n_special
