"""The end of a server. After SIGTERM or Ctrl-C it tells that it is no longer ready and refuses what is new, lets what
runs come to its end for a while, ends the rest with an error, and then its models. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from types import FrameType

import uvicorn
from starlette.datastructures import State
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from danlu.server.errors import ApiError, answer_error
from danlu.server.operation.log_format import log

LAST_WORDS_SECONDS = 5
"""Requests that were cut off have so long to say so."""

STILL_OPEN = frozenset({"/health", "/health/live", "/health/ready", "/metrics"})
"""Watched to the end."""


def shutting_down() -> ApiError:
    """What those are told whom the server cannot answer any more."""
    message = "the server is shutting down; try again soon"
    return ApiError(503, message, code="shutting_down", headers={"Retry-After": "5"})


class Gate:
    """ASGI middleware that lets nothing new in once ``app.state.draining`` is set."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        closed = scope["type"] == "http" and getattr(scope["app"].state, "draining", False)
        if not closed or scope["path"] in STILL_OPEN:
            await self.app(scope, receive, send)
            return
        response = await answer_error(Request(scope), shutting_down())
        response.headers["connection"] = "close"
        await response(scope, receive, send)


class DrainingServer(uvicorn.Server):
    """Uvicorn, ending as above.

    Args:
        state: of the application; gets ``draining``.
        drain: seconds that running requests have.
        started: called when connections are accepted.
        draining: called when the first signal has come.
        cut_off: ends the requests that still run after ``drain``.

    Attributes:
        ended_by: the signal, if there was one.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        state: State,
        drain: float,
        started: Callable[[], None],
        draining: Callable[[], None],
        cut_off: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(config)
        self._state, self._drain_seconds = state, drain
        self._on_started, self._on_draining, self._cut_off = started, draining, cut_off
        self.ended_by: signal.Signals | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections."""
        await super().startup(sockets)
        self._on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come."""
        if self.ended_by is not None:
            os._exit(128 + sig)  # models end when their sockets close, and the database loses nothing
        self.ended_by = signal.Signals(sig)
        self._state.draining = True
        self.should_exit = True

    async def main_loop(self) -> None:
        """Serve until a signal comes, and to the end of what runs then."""
        await super().main_loop()
        self._state.draining = True
        self._on_draining()
        until = time.monotonic() + self._drain_seconds
        if running := self._running:
            log.info("ending: %d requests have %g s; a second signal ends them at once", running, self._drain_seconds)
        while self._running and time.monotonic() < until:
            await self.on_tick(0)  # keeps the Date header true
            await asyncio.sleep(0.05)
        if left := self._running:
            log.warning("ending: %d requests are cut off", left)
            await self._cut_off()

    @property
    def _running(self) -> int:
        """Requests, and what is written for nobody who listens."""
        return len(self.server_state.tasks) + len(self._state.response_jobs)
