"""Logins of the chat page: an opaque random token in a cookie, of which the database keeps the hash."""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Callable

from danlu.server.access.database import Database
from danlu.server.access.key_file import hash_key

TABLE = """
CREATE TABLE IF NOT EXISTS sessions (
    token_sha256 TEXT PRIMARY KEY,
    key_id TEXT NOT NULL,
    expires_at REAL NOT NULL  -- seconds since 1970
) WITHOUT ROWID;
"""

COOKIE = "danlu_session"
LIFETIME = 30 * 86400
"""Seconds until a login ends."""


class Sessions:
    """The table of logins in the server's database (made with :data:`TABLE`).

    Args:
        clock: seconds since 1970.
    """

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self.database = database
        self._clock = clock
        # Every request of the page asks. The server owns its database, so what was read once stays true.
        self._known: dict[str, tuple[str, float]] = {}  # hash of token -> key id, end

    async def begin(self, key_id: str) -> str:
        """Log a key in; the token is for its browser alone."""
        token, now = secrets.token_urlsafe(32), self._clock()
        kept, end = hash_key(token.encode()), now + LIFETIME

        def insert(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM sessions WHERE expires_at <= ?", (now,))
            connection.execute("INSERT INTO sessions VALUES (?, ?, ?)", (kept, key_id, end))

        await self.database.write(insert)
        self._known = {one: session for one, session in self._known.items() if session[1] > now}
        self._known[kept] = key_id, end
        return token

    async def key_id(self, token: str) -> str | None:
        """Whose session a token is; None: nobody's, or it has ended."""
        kept = hash_key(token.encode())
        if kept not in self._known:
            row = await self.database.read(
                lambda connection: connection.execute(
                    "SELECT key_id, expires_at FROM sessions WHERE token_sha256 = ?", (kept,)
                ).fetchone()
            )
            if row is None:
                return None
            self._known[kept] = row[0], row[1]
        key_id, end = self._known[kept]
        return key_id if self._clock() < end else None

    async def end(self, token: str) -> None:
        """Log out."""
        kept = hash_key(token.encode())
        await self.database.write(
            lambda connection: connection.execute("DELETE FROM sessions WHERE token_sha256 = ?", (kept,))
        )
        self._known.pop(kept, None)
