"""Streams of events, and clients that go away before the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.requests import Request

from danlu.server import streaming
from danlu.server.streaming import ClientGone, EventStream, sse, until_disconnect


class Connection:
    """An ASGI connection whose client goes away when told to."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.gone = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


def stream_to(connection: Connection, events: AsyncGenerator[bytes, None]) -> Any:
    return EventStream(events)({"type": "http"}, connection.receive, connection.send)


def test_events_arrive_one_by_one_and_end() -> None:
    async def events() -> AsyncGenerator[bytes, None]:
        yield sse({"text": "丹\n炉"})
        yield sse("[DONE]", "end")

    async def run() -> Connection:
        connection = Connection()
        await stream_to(connection, events())
        return connection

    connection = asyncio.run(run())
    assert connection.body.decode() == 'data: {"text":"丹\\n炉"}\n\nevent: end\ndata: [DONE]\n\n'
    assert [message.get("more_body") for message in connection.sent] == [None, True, True, False]
    headers = dict(connection.sent[0]["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert b"content-length" not in headers


@pytest.mark.parametrize("waiting", [True, False], ids=["while it waits", "while it writes"])
def test_a_client_that_goes_away_closes_the_events_at_once(waiting: bool) -> None:
    closed = []

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"x"
                await asyncio.sleep(60 if waiting else 0)
        finally:
            closed.append(True)

    async def run() -> None:
        connection = Connection()
        streaming_task = asyncio.create_task(stream_to(connection, events()))
        await asyncio.sleep(0.01)
        assert not closed
        connection.gone.set()
        with pytest.raises(ClientGone):
            await asyncio.wait_for(streaming_task, 1)
        assert closed

    asyncio.run(run())


def test_a_server_that_ends_closes_the_events() -> None:
    closed = []

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            yield b"x"
            await asyncio.sleep(60)
        finally:
            closed.append(True)

    async def run() -> None:
        task = asyncio.create_task(stream_to(Connection(), events()))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert closed

    asyncio.run(run())


def test_an_error_in_the_middle_is_not_swallowed() -> None:
    async def events() -> AsyncGenerator[bytes, None]:
        yield b"x"
        raise RuntimeError("broken")

    async def run() -> None:
        await stream_to(Connection(), events())

    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(run())


def test_a_silent_stream_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "PING_SECONDS", 0.02)

    async def events() -> AsyncGenerator[bytes, None]:
        await asyncio.sleep(0.1)
        yield b"data: x\n\n"

    async def run() -> bytes:
        connection = Connection()
        await stream_to(connection, events())
        return connection.body

    body = asyncio.run(run())
    assert body.startswith(b": ping\n\n")
    assert body.endswith(b"data: x\n\n")


def test_work_for_a_client_that_goes_away_is_cancelled() -> None:
    async def run() -> None:
        connection = Connection()
        request = Request({"type": "http", "headers": []}, connection.receive)
        assert await until_disconnect(request, asyncio.sleep(0, "done")) == "done"
        waiting = asyncio.create_task(until_disconnect(request, asyncio.sleep(60)))
        await asyncio.sleep(0.01)
        connection.gone.set()
        with pytest.raises(ClientGone):
            await waiting

        async def fails() -> None:
            raise ValueError("mine")

        connection.gone.clear()
        with pytest.raises(ValueError, match="mine"):
            await until_disconnect(request, fails())

    asyncio.run(run())
