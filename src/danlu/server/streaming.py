"""Answers that come in pieces, and clients that go away before the end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

PING = b": ping\n\n"
PING_SECONDS = 15.0
"""Proxies cut connections that say nothing for longer."""

DOCUMENTED: dict[str, Any] = {
    "text/event-stream": {
        "itemSchema": {
            "type": "object",
            "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
            "required": ["data"],
        }
    }
}
"""``content`` of a route that streams, for the OpenAPI document."""


class ClientGone(Exception):
    """Nobody is there to be answered."""


def sse(data: dict[str, Any] | str, event: str | None = None) -> bytes:
    """A server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    head = "" if event is None else f"event: {event}\n"
    return f"{head}data: {text}\n\n".encode()


class EventStream(Response):
    """Server-sent events. When the client goes away, or the server ends, ``events`` is closed at once."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], background: BackgroundTask | None = None) -> None:
        super().__init__(
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},  # proxies: hand it on as it comes
            background=background,
        )
        del self.headers["content-length"]
        self._events = events
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        tasks = [asyncio.create_task(work) for work in (self._write(send), _until_gone(receive), self._ping(send))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._events.aclose()
        if tasks[0].cancelled():
            raise ClientGone
        if (error := tasks[0].exception()) is not None:
            raise error
        if self.background is not None:
            await self.background()

    async def _write(self, send: Send) -> None:
        async for body in self._events:
            self._sent_at = time.monotonic()
            await send({"type": "http.response.body", "body": body, "more_body": True})
            await asyncio.sleep(0)  # with many pieces in the queue: others get their turn, and a client's end is seen
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _ping(self, send: Send) -> None:
        while True:
            await asyncio.sleep(PING_SECONDS)
            if time.monotonic() - self._sent_at > PING_SECONDS / 2:
                await send({"type": "http.response.body", "body": PING, "more_body": True})


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client goes away.

    Raises:
        ClientGone: it did.
    """
    working = asyncio.create_task(work)
    listening = asyncio.create_task(_until_gone(request.receive))
    try:
        await asyncio.wait((working, listening), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            raise ClientGone
        return working.result()
    finally:
        for task in (working, listening):
            task.cancel()
        await asyncio.gather(working, listening, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
