"""Responses that are kept for later: in the database, each for the key that asked for it."""

from __future__ import annotations

import json
import sqlite3
import time
import zlib
from dataclasses import dataclass
from typing import Any, Final

from danlu.server.access.database import Database
from danlu.server.api.response_items import ItemDict
from danlu.server.errors import ApiError

TABLE: Final = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY,
    caller TEXT NOT NULL,
    created REAL NOT NULL,
    previous TEXT,
    response TEXT NOT NULL,
    items TEXT NOT NULL,
    events BLOB,
    size INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS responses_of_caller ON responses (caller, created, size);
CREATE INDEX IF NOT EXISTS responses_by_age ON responses (created);
"""
"""``items`` are what the request itself brought; ``previous`` leads to what was before. ``events`` (zlib) are kept of
a response that was written in the background."""

KEPT_DAYS, MOST_RESPONSES, MOST_BYTES = 30, 10_000, 256 << 20
"""Of one caller; past that the oldest go."""

_CHAIN: Final = """
WITH RECURSIVE chain (id, previous, response, items, depth) AS (
    SELECT id, previous, response, items, 0 FROM responses WHERE id = ? AND caller = ? AND created > ?
    UNION ALL
    SELECT r.id, r.previous, r.response, r.items, depth + 1
    FROM responses r JOIN chain ON r.id = chain.previous WHERE r.caller = ?
)
SELECT previous, response, items FROM chain ORDER BY depth DESC
"""


@dataclass(frozen=True)
class Stored:
    """A response as it was written down last.

    Attributes:
        events: of its stream, as they were sent; None where they were not kept.
    """

    response: dict[str, Any]
    events: list[bytes] | None


class ResponseStore:
    """The table of responses."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, caller: str, response: dict[str, Any], items: list[ItemDict]) -> None:
        """Keep a response that begins. The caller's oldest ones make room for it."""
        row = (
            response["id"], caller, time.time(), response["previous_response_id"], *map(_text, (response, items))
        )  # fmt: skip
        size = len(row[-1]) + len(row[-2])

        def work(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, NULL, ?)", (*row, size))
            _trim(connection, caller)

        await self._database.write(work)

    async def put(self, response: dict[str, Any], events: list[bytes] | None = None) -> None:
        """Write down how a response stands; nothing happens if it was deleted meanwhile."""
        text = _text(response)
        packed = None if events is None else zlib.compress(b"".join(events), 1)
        sql = """
            UPDATE responses SET response = ?, events = ?, size = ? + ? + length(items) WHERE id = ?
        """
        row = (text, packed, len(text), len(packed or b""), response["id"])
        await self._database.write(lambda connection: connection.execute(sql, row))

    async def get(self, caller: str, response_id: str) -> Stored:
        """One of the caller's.

        Raises:
            ApiError: 404, there is none.
        """
        sql = "SELECT response, events FROM responses WHERE id = ? AND caller = ? AND created > ?"
        row = await self._database.read(lambda c: c.execute(sql, (response_id, caller, _oldest())).fetchone())
        if row is None:
            raise _unknown(response_id)
        response, packed = row
        return Stored(json.loads(response), None if packed is None else _cut(zlib.decompress(packed)))

    async def delete(self, caller: str, response_id: str) -> None:
        """Forget one of the caller's.

        Raises:
            ApiError: 404, there is none.
        """
        sql = "DELETE FROM responses WHERE id = ? AND caller = ? AND created > ?"
        gone = await self._database.write(lambda c: c.execute(sql, (response_id, caller, _oldest())).rowcount)
        if not gone:
            raise _unknown(response_id)

    async def input(self, caller: str, response_id: str) -> list[ItemDict]:
        """What a response had as its input, all that went before included.

        Raises:
            ApiError: 404, there is no such response, or one before it is gone.
        """
        *before, (_, items) = await self._chain(caller, response_id)
        return [item for response, own in before for item in own + response["output"]] + items

    async def conversation(self, caller: str, response_id: str) -> list[ItemDict]:
        """A response's input and output, to go on from.

        Raises:
            ApiError: 400, there is no such response, or it is not whole.
        """
        try:
            chain = await self._chain(caller, response_id)
        except ApiError as error:
            message = error.message.replace("response_id", "previous_response_id", 1)
            raise ApiError(400, message, param="previous_response_id", code="previous_response_not_found") from None
        status = chain[-1][0]["status"]
        if status not in ("completed", "incomplete"):
            raise ApiError(
                400, f"previous_response_id: {response_id!r} is no whole response but {status}; go on from another",
                param="previous_response_id", code="invalid_value",
            )  # fmt: skip
        return [item for response, own in chain for item in own + response["output"]]

    async def _chain(self, caller: str, response_id: str) -> list[tuple[dict[str, Any], list[ItemDict]]]:
        row = (response_id, caller, _oldest(), caller)
        chain = await self._database.read(lambda connection: connection.execute(_CHAIN, row).fetchall())
        if not chain:
            raise _unknown(response_id)
        if (missing := chain[0][0]) is not None:
            raise ApiError(
                404, f"response_id: {response_id!r} goes on from {missing!r}, which is gone; send the whole input",
                param="response_id", code="response_not_found",
            )  # fmt: skip
        return [(json.loads(response), json.loads(items)) for _, response, items in chain]


def _trim(connection: sqlite3.Connection, caller: str) -> None:
    connection.execute("DELETE FROM responses WHERE created <= ?", (_oldest(),))
    connection.execute(
        """
        DELETE FROM responses WHERE id IN (
            SELECT id FROM (
                SELECT id, row_number() OVER newest AS place, sum(size) OVER newest AS bytes
                FROM responses WHERE caller = ? WINDOW newest AS (ORDER BY created DESC, rowid DESC)
            ) WHERE place > ? OR (bytes > ? AND place > 1)
        )
        """,
        (caller, MOST_RESPONSES, MOST_BYTES),
    )


def _oldest() -> float:
    return time.time() - KEPT_DAYS * 86400


def _unknown(response_id: str) -> ApiError:
    message = f"response_id: there is no response {response_id!r}"
    return ApiError(404, message, param="response_id", code="response_not_found")


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _cut(events: bytes) -> list[bytes]:
    """Events that were stored in one."""
    return [event + b"\n\n" for event in events.split(b"\n\n")[:-1]]
