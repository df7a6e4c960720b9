"""What was used, by key: a row a request, and sums by day that quotas are held against."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from pydantic import Field

from danlu.server.access.database import Database
from danlu.server.errors import documented
from danlu.server.schema import Reply

if TYPE_CHECKING:
    from danlu.server.access.keys import Caller

TABLE = """
CREATE TABLE IF NOT EXISTS usage (
    id INTEGER PRIMARY KEY,
    key_id TEXT NOT NULL,
    at REAL NOT NULL,  -- seconds since 1970, when it ended
    model TEXT NOT NULL,
    route TEXT NOT NULL,
    request_id TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    status INTEGER NOT NULL,
    seconds REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS usage_by_key ON usage (key_id, at);
CREATE TABLE IF NOT EXISTS usage_days (
    key_id TEXT NOT NULL,
    day TEXT NOT NULL,  -- 2026-11-22, UTC
    requests INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    PRIMARY KEY (key_id, day)
) WITHOUT ROWID;
"""

DAYS_SHOWN = 30


@dataclass(frozen=True)
class Used:
    """Sums over requests."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Of prompts and answers: what quotas count."""
        return self.prompt_tokens + self.completion_tokens


class Usage:
    """The tables of usage in the server's database (made with :data:`TABLE`)."""

    def __init__(self, database: Database) -> None:
        self.database = database

    async def record(
        self,
        caller: Caller,
        *,
        model: str,
        route: str,
        request_id: str,
        prompt_tokens: int,
        completion_tokens: int,
        cached_tokens: int = 0,
        status: int = 200,
        seconds: float = 0.0,
    ) -> None:
        """Count a request; it is committed when this returns.

        Raises:
            ApiError: 503, the database failed.
        """
        now = time.time()
        row = (
            caller.id,
            now,
            model,
            route,
            request_id,
            prompt_tokens,
            cached_tokens,
            completion_tokens,
            status,
            seconds,
        )
        sums = (caller.id, day_of(now), prompt_tokens, cached_tokens, completion_tokens)

        def insert(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT INTO usage (key_id, at, model, route, request_id, prompt_tokens, cached_tokens,"
                " completion_tokens, status, seconds) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            )
            connection.execute(
                "INSERT INTO usage_days VALUES (?, ?, 1, ?, ?, ?) ON CONFLICT (key_id, day) DO UPDATE SET"
                " requests = requests + 1, prompt_tokens = prompt_tokens + excluded.prompt_tokens,"
                " cached_tokens = cached_tokens + excluded.cached_tokens,"
                " completion_tokens = completion_tokens + excluded.completion_tokens",
                sums,
            )

        await self.database.write(insert)

    async def of(self, key_id: str, day: str | None = None) -> Used:
        """What a key has used, on a day (as 2026-11-22) or altogether."""
        return (await self.database.read(lambda connection: used_by_key(connection, day, key_id))).get(key_id, Used())

    async def days(self, key_id: str) -> list[tuple[str, Used]]:
        """What a key has used on each of the last days that it was used, latest first."""

        def select(connection: sqlite3.Connection) -> list[tuple[str, Used]]:
            rows = connection.execute(
                "SELECT day, requests, prompt_tokens, cached_tokens, completion_tokens FROM usage_days"
                " WHERE key_id = ? ORDER BY day DESC LIMIT ?",
                (key_id, DAYS_SHOWN),
            )
            return [(day, Used(*sums)) for day, *sums in rows]

        return await self.database.read(select)


def used_by_key(connection: sqlite3.Connection, day: str | None = None, key_id: str | None = None) -> dict[str, Used]:
    """{key id: what it has used}, on a day or altogether, of all keys or one."""
    rows = connection.execute(
        "SELECT key_id, sum(requests), sum(prompt_tokens), sum(cached_tokens), sum(completion_tokens) FROM usage_days"
        " WHERE (?1 IS NULL OR day = ?1) AND (?2 IS NULL OR key_id = ?2) GROUP BY key_id",
        (day, key_id),
    )
    return {key: Used(*sums) for key, *sums in rows}


def day_of(seconds: float) -> str:
    """The day (UTC) of a time in seconds since 1970."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


class UsedTokens(Reply):
    """Sums over requests."""

    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class UsedOnDay(UsedTokens):
    """Sums over the requests of a day."""

    day: str = Field(examples=["2026-11-22"])


class KeyLimits(Reply):
    """How much a key may use; null: as much as the server gives."""

    requests_per_minute: int | None
    tokens_per_minute: int | None
    tokens_per_day: int | None
    tokens_total: int | None


class UsageReply(Reply):
    """What the key of the request has used."""

    key: str
    models: list[str] | None = Field(description="Models that the key may use; null: all.")
    limits: KeyLimits
    today: UsedTokens
    total: UsedTokens
    days: list[UsedOnDay]


router = APIRouter()


@router.get("/api/usage", responses=documented(), summary="What your key has used", tags=["usage"])
async def own_usage(request: Request) -> UsageReply:
    """Requests and tokens of the key that asks: today (UTC), altogether, and on each of the last 30 days of use."""
    caller: Caller = request.state.caller
    usage: Usage = request.app.state.serving.usage
    today, total = await usage.of(caller.id, day_of(time.time())), await usage.of(caller.id)
    return UsageReply(
        key=caller.name,
        models=None if caller.models is None else sorted(caller.models),
        limits=KeyLimits(**vars(caller.limits)),
        today=UsedTokens(**vars(today)),
        total=UsedTokens(**vars(total)),
        days=[UsedOnDay(day=day, **vars(used)) for day, used in await usage.days(caller.id)],
    )
