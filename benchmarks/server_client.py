"""A client of chat servers that takes little of the machine: raw sockets, and what came is read when all is over."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


class RequestFailed(Exception):
    """A server answered with an error, or with half an answer."""


@dataclass
class Answer:
    """What came of one request.

    Attributes:
        begun: clock when it was sent.
        pieces: what was received, and when.
    """

    begun: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def status(self) -> int:
        """Of the response; 0: there was none."""
        return int(self.pieces[0][1].split(b" ", 2)[1]) if self.pieces else 0

    @property
    def seconds(self) -> float:
        """Until the last byte."""
        return self.pieces[-1][0] - self.begun

    def header(self, name: str) -> str | None:
        """A header of the response."""
        head = b"".join(piece for _, piece in self.pieces).partition(b"\r\n\r\n")[0].decode("latin-1")
        fields = (line.partition(":") for line in head.split("\r\n")[1:])
        return next((value.strip() for key, _, value in fields if key.lower() == name), None)

    def body(self) -> bytes:
        """The response's body."""
        head, _, body = b"".join(piece for _, piece in self.pieces).partition(b"\r\n\r\n")
        return _joined(body) if b"transfer-encoding: chunked" in head.lower() else body

    def events(self, *, with_done: bool = True) -> list[dict[str, Any]]:
        """The events of a stream.

        Args:
            with_done: it has to end with [DONE], as OpenAI's do; not every server's does.

        Raises:
            RequestFailed: it is none, breaks off, or tells of an error.
        """
        if self.status != 200:
            raise RequestFailed(f"status {self.status}: {self.body()[:200].decode(errors='replace')}")
        texts = [
            line[5:].strip() for line in self.body().decode(errors="replace").splitlines() if line.startswith("data:")
        ]
        try:
            events = [json.loads(text) for text in texts if text != "[DONE]"]
        except ValueError as error:
            raise RequestFailed(f"the stream breaks off in {texts[-1]}") from error
        finished = any(choice.get("finish_reason") for event in events for choice in event.get("choices", ()))
        if not (texts[-1:] == ["[DONE]"] if with_done else finished):
            raise RequestFailed(f"the stream breaks off after {texts[-1:]}")
        if wrong := [event for event in events if "error" in event]:
            raise RequestFailed(f"the stream tells of an error: {wrong[0]}")
        return events

    def text_times(self) -> list[float]:
        """When text came: a time for each piece with some, and twice as many pieces for two that came together."""
        return [
            at for at, piece in self.pieces for _ in range(piece.count(b'"content":') - piece.count(b'"content":""'))
        ]


def chat(url: str, body: dict[str, Any]) -> bytes:
    """A request to a server's chat completions, as it goes over the line. The server closes the connection."""
    text = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(text)}\r\nConnection: close\r\n\r\n".encode() + text


async def send(url: str, request: bytes, leave_after: float | None = None) -> Answer:
    """Send a request and collect what comes, to the end or for so many seconds.

    Raises:
        OSError: there is no server.
    """
    ended = asyncio.get_running_loop().create_future()
    place = urlsplit(url)
    answer = Answer(time.perf_counter())

    class Connection(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            transport.write(request)  # type: ignore[attr-defined]

        def data_received(self, data: bytes) -> None:
            answer.pieces.append((time.perf_counter(), data))

        def connection_lost(self, error: Exception | None) -> None:
            if not ended.done():
                ended.set_result(None)

    transport, _ = await asyncio.get_running_loop().create_connection(Connection, place.hostname, place.port)
    try:
        await asyncio.wait_for(ended, leave_after)
    except TimeoutError:
        pass
    finally:
        transport.abort()
    return answer


def send_all(url: str, requests: Sequence[bytes]) -> list[Answer]:
    """Send all at once and wait for all."""

    async def sending() -> list[Answer]:
        return list(await asyncio.gather(*(send(url, request) for request in requests)))

    return asyncio.run(sending())


def _joined(chunked: bytes) -> bytes:
    """A body from its chunks."""
    found, at = [], 0
    while True:
        end = chunked.find(b"\r\n", at)
        if end < 0 or (size := int(chunked[at:end], 16)) == 0:
            return b"".join(found)
        found.append(chunked[end + 2 : end + 2 + size])
        at = end + 2 + size + 2
