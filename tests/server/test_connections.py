"""What a connection may take of the server: raw sockets against uvicorn as `danlu serve` runs it."""

from __future__ import annotations

import asyncio
import json
import select
import socket
import time
from collections.abc import Iterator

import pytest
from app_thread import serving_app
from fastapi import FastAPI, Request
from starlette.responses import PlainTextResponse, StreamingResponse

from danlu.server.config import ServeConfig
from danlu.server.operation import connections

CONFIG = ServeConfig(header_timeout=0.5, max_connections=5)
HEAD = b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n"

app = FastAPI()
ended: list[str] = []


@app.get("/hello")
async def hello() -> PlainTextResponse:
    return PlainTextResponse("hello")


@app.post("/refused")
async def refused() -> PlainTextResponse:
    """Answers without reading the body."""
    return PlainTextResponse("no", status_code=401)


@app.post("/echo")
async def echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


@app.get("/much")
async def much() -> StreamingResponse:
    async def parts() -> object:
        try:
            for _ in range(10_000):
                yield b"x" * 65536
                await asyncio.sleep(0)
        finally:
            ended.append("much")

    return StreamingResponse(parts())


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    with serving_app(app, CONFIG) as found:
        yield found


def rest_of(client: socket.socket, seconds: float = 5) -> bytes:
    """All that comes until the server closes."""
    client.settimeout(seconds)
    found = b""
    try:
        while part := client.recv(65536):
            found += part
    except ConnectionResetError:
        pass
    return found


def one_answer(client: socket.socket) -> bytes:
    client.settimeout(5)
    found = b""
    while b"hello" not in found:
        part = client.recv(65536)
        assert part, found
        found += part
    return found


def test_a_head_that_trickles_in_is_cut_off_in_time(address: tuple[str, int]) -> None:
    """Slow-loris: a byte now and then keeps no connection open."""
    with socket.create_connection(address) as client:
        begun = time.monotonic()
        client.settimeout(0.1)
        answer = b""
        for byte in HEAD[:-1] * 5:
            try:
                client.sendall(bytes([byte]))
                answer = client.recv(4096)
                break
            except TimeoutError:
                continue
        assert time.monotonic() - begun < 1.5
    assert answer.startswith(b"HTTP/1.1 408 ")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    assert json.loads(body)["error"]["code"] == "request_timeout"


def test_a_connection_that_says_nothing_is_closed(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as client:
        begun = time.monotonic()
        assert rest_of(client) == b""
        assert 0.3 < time.monotonic() - begun < 1.5


def test_a_second_request_has_to_come_whole_too(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as client:
        client.sendall(HEAD)
        one_answer(client)
        time.sleep(0.8)  # idle between requests is no fault
        client.sendall(HEAD)
        one_answer(client)
        client.sendall(HEAD[:-3])
        begun = time.monotonic()
        assert rest_of(client).startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - begun < 1.5


def test_a_slow_answer_and_a_slow_body_are_not_cut_by_the_time_of_heads(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as client:
        client.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nConnection: close\r\n\r\n")
        for _ in range(4):
            time.sleep(0.25)
            client.sendall(b"x")
        assert rest_of(client).endswith(b"\r\n\r\n4")


def test_pipelined_requests_are_answered(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as client:
        client.sendall(HEAD * 3)
        client.settimeout(5)
        found = b""
        while found.count(b"hello") < 3:
            found += client.recv(65536)
        client.sendall(HEAD)
        one_answer(client)


def test_a_body_that_nobody_reads_does_not_keep_the_connection(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as client:
        client.sendall(b"POST /refused HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        begun = time.monotonic()
        try:
            while time.monotonic() - begun < 5:
                client.sendall(b"x")
                time.sleep(0.05)
        except OSError:
            pass
        assert time.monotonic() - begun < 2


@pytest.mark.parametrize(
    "garbage", [b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nA" + b"a" * 70_000]
)
def test_what_is_no_http_is_refused_as_json(address: tuple[str, int], garbage: bytes) -> None:
    with socket.create_connection(address) as client:
        client.sendall(garbage + b"\r\n\r\n")
        answer = rest_of(client)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


def test_connections_over_the_limit_are_told_to_come_again(address: tuple[str, int]) -> None:
    held = [socket.create_connection(address) for _ in range(CONFIG.max_connections)]
    try:
        for one in held:
            one.sendall(HEAD)
            one_answer(one)
        with socket.create_connection(address) as client:
            client.sendall(HEAD)
            answer = rest_of(client)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nretry-after: 1\r\n" in answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_many_connections"
        held[0].sendall(HEAD)
        one_answer(held[0])
    finally:
        for one in held:
            one.close()
    time.sleep(0.1)
    with socket.create_connection(address) as client:
        client.sendall(HEAD)
        one_answer(client)


def test_a_flood_of_connections_is_bounded(address: tuple[str, int]) -> None:
    most = CONFIG.max_connections + connections.ROOM_TO_REFUSE
    flood = [socket.create_connection(address) for _ in range(most + 20)]
    try:
        time.sleep(0.2)
        closed, _, _ = select.select(flood, [], [], 0)  # nobody was sent anything: what can be read is the end
        assert len(closed) == 20
    finally:
        for one in flood:
            one.close()


def test_a_client_that_reads_nothing_is_cut_off(address: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "STALL_SECONDS", 0.4)
    ended.clear()
    with socket.create_connection(address) as client:
        client.sendall(b"GET /much HTTP/1.1\r\nHost: x\r\n\r\n")
        end = time.monotonic() + 5
        while not ended and time.monotonic() < end:
            time.sleep(0.02)
    assert ended == ["much"]


def test_a_client_that_reads_slowly_is_not(address: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "STALL_SECONDS", 0.3)
    ended.clear()
    with socket.create_connection(address) as client:
        client.sendall(b"GET /much HTTP/1.1\r\nHost: x\r\n\r\n")
        client.settimeout(2)
        begun, read = time.monotonic(), 0
        while time.monotonic() - begun < 1.5:
            read += len(client.recv(1 << 18))
            time.sleep(0.02)
        assert not ended
        assert read > 1 << 20
