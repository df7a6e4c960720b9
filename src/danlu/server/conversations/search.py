"""The list of conversations, newest first, and search in it."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import time
from collections.abc import Iterator

from danlu.server.conversations.store import CONVERSATIONS
from danlu.server.errors import ApiError
from danlu.server.schema import JsonObject

INDEXED_LETTERS = 3
"""A shorter word is in no index of trigrams, so the texts are looked through for it."""

WORDS = 16
SECONDS = 2.0
"""A search that takes longer is given up: others wait for the database meanwhile."""

SNIPPET_LETTERS = 60
"""Shown before and after a hit."""


def list_conversations(
    connection: sqlite3.Connection, caller: str, query: str = "", limit: int = CONVERSATIONS, before: str | None = None
) -> tuple[list[JsonObject], str | None]:
    """Summaries of a key's conversations, and where the next ones begin (None: there are no more).

    Args:
        query: words; each has to be in the title or in a message, in either case (of letters without accents, if the
            word has fewer than three). Chinese needs no spaces.
        before: what the previous call returned, or a time.

    Raises:
        ApiError: there are too many words, or the search takes too long.
    """
    words = [word for word in re.split(r"[\s\x00-\x1f]+", query) if word]
    if len(words) > WORDS:
        raise ApiError(400, f"q: has {len(words)} words, more than {WORDS}", param="q", code="invalid_value")
    clauses = ["caller = ?"]
    arguments: list[str | float] = [caller]
    if before is not None:
        at, _, id = before.partition("_")
        clauses.append("(updated_at, id) < (?, ?)")
        arguments += [float(at), id]
    for word in words:
        clause, pattern = _contains(word)
        clauses.append(clause)
        arguments += [pattern, pattern]
    with _limited(connection):
        rows = connection.execute(
            "SELECT number, id, title, models, created_at, updated_at FROM conversations "
            f"WHERE {' AND '.join(clauses)} ORDER BY updated_at DESC, id DESC LIMIT ?",
            (*arguments, limit + 1),
        ).fetchall()
        shown = rows[:limit]
        hits = _hits(connection, [row[0] for row in shown], max(words, key=len)) if words and shown else {}
    summaries = [
        {
            "id": id,
            "title": title,
            "models": json.loads(models),
            "created_at": created_at,
            "updated_at": updated_at,
            "snippet": hits.get(number),
        }
        for number, id, title, models, created_at, updated_at in shown
    ]
    more = len(rows) > limit
    return summaries, f"{summaries[-1]['updated_at']!r}_{summaries[-1]['id']}" if more else None


def snippet(text: str, word: str) -> str:
    """The text round a word."""
    found = re.search(re.escape(word), text, re.IGNORECASE)
    start, end = found.span() if found else (0, 0)
    begin, stop = max(0, start - SNIPPET_LETTERS), end + SNIPPET_LETTERS
    shown = " ".join(text[begin:stop].split())
    return f"{'…' if begin else ''}{shown}{'…' if stop < len(text) else ''}"


def _contains(word: str) -> tuple[str, str]:
    """A condition on a row of `conversations`, and what its two marks stand for."""
    if len(word) >= INDEXED_LETTERS:
        clause = (
            "(number IN (SELECT rowid FROM conversation_titles WHERE title MATCH ?) OR number IN (SELECT conversation "
            "FROM conversation_messages WHERE number IN (SELECT rowid FROM conversation_texts WHERE content MATCH ?)))"
        )
    else:
        clause = (
            "(title LIKE ? ESCAPE '!' OR EXISTS (SELECT 1 FROM conversation_messages m "
            "WHERE m.conversation = conversations.number AND m.content LIKE ? ESCAPE '!'))"
        )
    return clause, _pattern(word)


def _pattern(word: str) -> str:
    """For MATCH: the word as a phrase; for LIKE: as it stands anywhere."""
    if len(word) >= INDEXED_LETTERS:
        return '"' + word.replace('"', '""') + '"'
    return "%" + re.sub("([%_!])", r"!\1", word) + "%"


def _hits(connection: sqlite3.Connection, numbers: list[int], word: str) -> dict[int, str]:
    """A snippet of the first message with the word, for each of the conversations that has one."""
    marks = ", ".join("?" * len(numbers))
    condition = "content LIKE ? ESCAPE '!'"
    if len(word) >= INDEXED_LETTERS:
        condition = "number IN (SELECT rowid FROM conversation_texts WHERE content MATCH ?)"
    rows = connection.execute(
        "SELECT conversation, content, min(number) FROM conversation_messages "
        f"WHERE conversation IN ({marks}) AND {condition} "
        "GROUP BY conversation",
        (*numbers, _pattern(word)),
    )
    return {number: snippet(content, word) for number, content, _ in rows}


@contextlib.contextmanager
def _limited(connection: sqlite3.Connection) -> Iterator[None]:
    """Give up what takes too long."""
    until = time.monotonic() + SECONDS
    connection.set_progress_handler(lambda: time.monotonic() > until, 100)
    try:
        yield
    except sqlite3.OperationalError as error:
        if time.monotonic() <= until:
            raise
        raise ApiError(400, "q: the search takes too long; search for a longer word", param="q",
                       code="search_too_long") from error  # fmt: skip
    finally:
        connection.set_progress_handler(None, 0)
