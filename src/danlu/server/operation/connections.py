"""How long and how much a connection may hold on to the server: uvicorn's HTTP/1.1, with limits that it has no options
for.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from functools import partial
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from danlu.server.config import ServeConfig
from danlu.server.errors import ApiError
from danlu.server.operation.drain import LAST_WORDS_SECONDS

LARGEST_HEAD = 64 << 10
"""Bytes of a request's head."""

KEEP_ALIVE_SECONDS = 30
BACKLOG = 2048

STALL_SECONDS = 60.0
"""A client that reads nothing of its answer for so long is cut off."""

ROOM_TO_REFUSE = 64
"""So many connections over the limit are told so; more are closed unheard, which bounds the open files."""

BUSY = ApiError(503, "too many connections; try again", code="too_many_connections", headers={"Retry-After": "1"})
SLOW = ApiError(408, "the request did not come in time", code="request_timeout")


def uvicorn_config(config: ServeConfig, app: ASGIApp) -> uvicorn.Config:
    """How uvicorn serves an application."""
    limits = ConnectionLimits(config.header_timeout, config.max_connections)
    return uvicorn.Config(
        app,
        http=partial(LimitedProtocol, limits=limits),  # type: ignore[arg-type]
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=LAST_WORDS_SECONDS,
        h11_max_incomplete_event_size=LARGEST_HEAD,
    )


@dataclass(frozen=True)
class ConnectionLimits:
    """
    Attributes:
        header_timeout: seconds from the first byte of a request (of the first one: from the connection) to the end of
            its head. For its body, limits.py has the time.
        max_connections: at the same time; requests on others are answered with 503.
    """

    header_timeout: float
    max_connections: int


class LimitedProtocol(H11Protocol):
    """One connection."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is here."""
        super().connection_made(transport)
        over = len(self.connections) - self._limits.max_connections
        if over > 0:
            self.app = _busy
        if over > ROOM_TO_REFUSE:
            transport.abort()
        else:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._stop_watching()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """It has sent something."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """It has been answered; what it did not send of its body yet is still waited for."""
        super().on_response_complete()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """What it sent is not HTTP."""
        self._refuse(ApiError(400, "this is no HTTP request, or its head is too large", code="invalid_http"))

    # ---------------------------------------------------------------------------------------------- slow to send

    def _watch(self) -> None:
        """Keep a timer while a head is on its way, or a body that nobody reads any more."""
        theirs, ours = self.conn.their_state, self.conn.our_state
        in_head = theirs is h11.IDLE and self.timeout_keep_alive_task is None
        unread_body = theirs is h11.SEND_BODY and ours is h11.DONE
        if self.transport.is_closing() or not (in_head or unread_body):
            self._stop_watching()
        elif self._timer is None:
            self._timer = self.loop.call_later(self._limits.header_timeout, self._too_slow)

    def _stop_watching(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(SLOW)
        else:
            self.transport.abort()

    def _refuse(self, error: ApiError) -> None:
        """Answer a request that never became one, and close."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        body = json.dumps(error.body()).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        head = h11.Response(status_code=error.status, headers=headers)
        self.transport.write(
            b"".join(self.conn.send(e) or b"" for e in (head, h11.Data(data=body), h11.EndOfMessage()))
        )
        self.transport.close()

    # ---------------------------------------------------------------------------------------------- slow to read

    def pause_writing(self) -> None:
        """It does not read as fast as we write."""
        super().pause_writing()
        self._watch_reading(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """It has caught up."""
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
        super().resume_writing()

    def _watch_reading(self, unread: int) -> None:
        self._stall_timer = self.loop.call_later(STALL_SECONDS, self._check_reading, unread)

    def _check_reading(self, unread_then: int) -> None:
        unread = self.transport.get_write_buffer_size()
        if unread < unread_then:
            self._watch_reading(unread)
        else:
            self.transport.abort()


async def _busy(scope: Scope, receive: Receive, send: Send) -> None:
    """Stands for the application while there are too many connections."""
    body = json.dumps(BUSY.body(scope["path"])).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"retry-after", b"1"),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": BUSY.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
