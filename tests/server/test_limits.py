"""Hostile bodies: each is refused at once and by name, and a stream beside them goes on."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from guarded_app import guarded, listening
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.server.access.limits import MAX_CONTAINERS, MAX_DEPTH, MAX_QUERY, Limits, parse
from danlu.server.errors import ApiError

MIB = 1 << 20
JSON = {"Content-Type": "application/json"}
text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(text, inner, max_size=5),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    with listening(guarded(tmp_path_factory.mktemp("limits"), max_body=MIB, seconds=0.5)) as address:
        yield address


@pytest.fixture
def client(address: tuple[str, int]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{address[0]}:{address[1]}", trust_env=False, timeout=10) as client:
        yield client


# ------------------------------------------------------------------------------------------------------- the parser


@given(st.dictionaries(text, values, max_size=5), st.booleans())
@settings(max_examples=40, deadline=None)
def test_what_json_means_is_what_is_parsed(value: dict[str, Any], ascii_only: bool) -> None:
    assert parse(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@given(st.binary() | st.text().map(str.encode) | values.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=40, deadline=None)
def test_what_is_let_through_is_json(body: bytes) -> None:
    """Whatever is let through, the standard library's parser takes for the same."""
    try:
        parsed = parse(body)
    except ApiError:
        return
    assert isinstance(parsed, dict)
    assert parsed == json.loads(body)


@given(st.integers(0, 8), st.sampled_from(["", "x", "\\\\n"]))
@settings(max_examples=40, deadline=None)
def test_nul_is_found_behind_any_number_of_backslashes(backslashes: int, before: str) -> None:
    body = f'{{"a": "{before}{chr(92) * backslashes}u0000"}}'.encode()
    try:
        has_nul = "\0" in json.loads(body)["a"]
    except ValueError:
        has_nul = True
    if has_nul:
        with pytest.raises(ApiError, match=r"U\+0000|escape"):
            parse(body)
    else:
        assert parse(body) == json.loads(body)


@given(st.integers(1, 3 * MAX_DEPTH), st.data())
@settings(max_examples=40, deadline=None)
def test_depth_is_counted(depth: int, data: st.DataObject) -> None:
    value: Any = 1
    for kind in [*data.draw(st.lists(st.booleans(), min_size=depth - 1, max_size=depth - 1)), True]:
        value = {"a": value, "b": "[{" * 70} if kind else [value, 0]
    if depth <= MAX_DEPTH:
        assert parse(json.dumps(value).encode()) == value
    else:
        with pytest.raises(ApiError, match=r"nested more than 64 deep|recursion limit"):
            parse(json.dumps(value).encode())


def many(item: bytes, size: int = 4 * MIB) -> bytes:
    return b'{"a":[' + b",".join([item] * (size // (len(item) + 1))) + b"]}"


OPEN = b"[" * 300_000  # more than may be, and none is closed

HOSTILE = {
    "empty list": b"[]",
    "number": b"1",
    "null": b"null",
    "text": b'"a"',
    "nothing": b" ",
    "cut off": b'{"a": 1',
    "more behind": b"{} {}",
    "comment": b"{} // a",
    "comma": b'{"a": 1,}',
    "single quotes": b"{'a': 1}",
    "NaN": b'{"a": NaN}',
    "infinity": b'{"a": -Infinity}',
    "1e999": b'{"a": [[1, -1e999]]}',
    "many digits": b'{"a": ' + b"9" * 5000 + b"}",
    "many digits and a point": b'{"a": ' + b"9" * 400 + b".5}",
    "no UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf{}",
    "surrogate": b'{"a": "\\ud800"}',
    "raw surrogate": b'{"a": "\xed\xa0\x80"}',
    "low surrogate": b'{"a": "\\udc00x"}',
    "surrogate in key": b'{"\\ud800": 1}',
    "NUL": b'{"a": "x\\u0000"}',
    "NUL in key": b'{"\\u0000": 1}',
    "raw NUL": b'{"a": "\0"}',
    "NUL behind backslashes": b'{"a":"' + b"\\" * 2 * MIB + b'\\u0000"}',
    "deep lists": b'{"a":' + b"[" * 60_000 + b"]" * 60_000 + b"}",
    "deep objects": b'{"a":' * 60_000 + b"1" + b"}" * 60_000,
    "deep and open": b"[" * 4 * MIB,
    "a little too deep": b'{"a":' + b"[" * 64 + b"]" * 64 + b"}",
    "many lists": many(b"[]"),
    "many objects": many(b"{}"),
    "many lists and a text": many(b"[]").replace(b'"a"', b'"a\\\\\\""'),
    "many quotes": OPEN + b'"' * 3 * MIB,
    "escaped quotes": OPEN + b'"' + b'\\"' * MIB,
    "escaped quotes and a backslash": OPEN + b'"' + b'\\"' * MIB + b"\\",
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_hostile_json_is_refused_fast(body: bytes) -> None:
    begun = time.process_time()
    with pytest.raises(ApiError, match=r"^the body is not JSON that this server takes: ") as error:
        parse(body)
    assert time.process_time() - begun < 1
    assert len(error.value.message) < 300


@pytest.mark.parametrize(
    "body",
    [
        {"a": "\\u0000 \\\\u0000"},
        {"a": "[" * 300_000 + '"{' + "\\" * 999},
        {"a": [[0]] * (MAX_CONTAINERS - 2)},
        {"a": "e999 " * 1000, "b": 10**300, "c": 1e308, "d": "9" * 1000},
        {"a": [0] * 100_000},
        {"🙂": "\ud83d\ude42".encode("utf-16", "surrogatepass").decode("utf-16")},
    ],
    ids=["escaped backslashes", "brackets in text", "many lists", "large numbers", "many numbers", "pairs"],
)
def test_large_and_odd_but_sound_json_is_taken(body: dict[str, Any]) -> None:
    assert parse(json.dumps(body).encode()) == body


# -------------------------------------------------------------------------------------------- through a real server


def test_a_body_is_parsed_once(client: httpx.Client) -> None:
    assert client.post("/v1/parsed-once", json={"value": {"a": [1]}}).json() is True
    echoed = {"value": ["丹炉", 1.5, None, {"a": math.pi}]}
    assert client.post("/v1/echo", json=echoed).json() == echoed["value"]


@pytest.mark.parametrize(
    ("headers", "content", "status", "code"),
    [
        (JSON, b"[]", 400, "invalid_json"),
        (JSON, b'{"value": "\\u0000"}', 400, "invalid_json"),
        (JSON, b'{"other": 1}', 400, "unsupported_parameter"),
        ({}, b"{}", 415, "unsupported_media_type"),
        ({"Content-Type": "text/plain"}, b'{"value": 1}', 415, "unsupported_media_type"),
        ({"Content-Type": "multipart/form-data; boundary=x"}, b"--x--", 415, "unsupported_media_type"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, b"value=1", 415, "unsupported_media_type"),
        ({"Content-Type": "application/json; charset=latin-1"}, b"{}", 415, "unsupported_charset"),
        ({**JSON, "Content-Encoding": "gzip"}, b"\x1f\x8b", 415, "unsupported_encoding"),
        (JSON, b'{"value": "' + b"a" * MIB + b'"}', 413, "body_too_large"),
        (JSON, b" " * 3 * MIB, 413, "body_too_large"),
        (JSON, iter([b"a" * 65536] * 32), 413, "body_too_large"),
    ],
)
def test_bodies_that_are_refused(
    client: httpx.Client, headers: dict[str, str], content: bytes, status: int, code: str
) -> None:
    answer = client.post("/v1/echo", headers=headers, content=content)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON", 'application/json; charset="UTF-8"'])
def test_json_by_its_names(client: httpx.Client, kind: str) -> None:
    assert client.post("/v1/echo", headers={"Content-Type": kind}, content=b'{"value": 1}').json() == 1


def test_requests_without_a_body_need_no_type(client: httpx.Client) -> None:
    assert client.post("/v1/who").json() == "local"
    assert client.post("/v1/who", headers={"Content-Length": "0"}).json() == "local"
    missing = client.post("/v1/echo", headers=JSON)
    assert (missing.status_code, missing.json()["error"]["code"]) == (400, "missing_required_parameter")


def test_a_body_of_chunks_is_put_together(client: httpx.Client) -> None:
    content = json.dumps({"value": "丹" * 1000}).encode()
    pieces = (content[at : at + 7] for at in range(0, len(content), 7))
    assert client.post("/v1/echo", headers=JSON, content=pieces).json() == "丹" * 1000


def test_a_long_query_is_refused(client: httpx.Client) -> None:
    answer = client.get("/v1/who?" + "a" * (MAX_QUERY + 1))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "query_too_long")
    assert client.get("/v1/who?" + "a" * MAX_QUERY).status_code == 200


def test_anthropic_clients_get_their_errors(client: httpx.Client) -> None:
    answer = client.post("/v1/messages", headers=JSON, content=b"[]").json()
    assert answer["type"] == "error"
    assert answer["error"]["type"] == "invalid_request_error"


HEAD = b"POST /v1/echo HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_a_body_that_trickles_is_cut_off(address: tuple[str, int]) -> None:
    begun = time.monotonic()
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
        stop = threading.Event()

        def trickle() -> None:
            while not stop.wait(0.1):
                try:
                    connection.sendall(b" ")
                except OSError:
                    return

        thread = threading.Thread(target=trickle)
        thread.start()
        answer = connection.recv(65536)
        stop.set()
        thread.join()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert 0.4 < time.monotonic() - begun < 5


def test_a_client_that_asks_first_is_told_before_it_sends(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(HEAD + b"Content-Length: 9999999\r\nExpect: 100-continue\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(HEAD + b"Content-Length: 12\r\nExpect: 100-continue\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b'{"value": 1}')
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_leaves_in_the_middle_of_its_body_harms_nobody(
    address: tuple[str, int], client: httpx.Client
) -> None:
    for _ in range(5):
        with socket.create_connection(address, timeout=10) as connection:
            connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
    assert client.post("/v1/echo", json={"value": 1}).json() == 1


def test_a_stream_goes_on_beside_hostile_bodies(address: tuple[str, int], client: httpx.Client) -> None:
    gaps: list[float] = []

    def listen() -> None:
        last = time.monotonic()
        with httpx.stream("GET", f"http://{address[0]}:{address[1]}/v1/stream", trust_env=False) as answer:
            for _ in answer.iter_lines():
                now = time.monotonic()
                gaps.append(now - last)
                last = now

    listener = threading.Thread(target=listen)
    listener.start()
    bodies = [body for body in HOSTILE.values() if len(body) <= MIB]
    statuses = {client.post("/v1/echo", headers=JSON, content=body).status_code for body in bodies}
    listener.join()
    assert statuses == {400}
    assert len(gaps) == 20
    assert max(gaps) < 1


def test_the_body_is_read_before_the_handler_and_disconnects_come_after() -> None:
    """What follows the body reaches the handler: that is how an answer learns that its client is gone."""
    asked = 0

    async def run() -> list[str]:
        received: list[str] = []

        async def receive() -> dict[str, Any]:
            nonlocal asked
            asked += 1
            if asked == 1:
                return {"type": "http.request", "body": b'{"value"', "more_body": True}
            if asked == 2:
                return {"type": "http.request", "body": b": 1}", "more_body": False}
            return {"type": "http.disconnect"}

        async def inner(scope: Any, receive: Any, send: Any) -> None:
            for _ in range(2):
                message = await receive()
                received.append(f"{message['type']} {message.get('body', b'').decode()}")

        headers = [(b"content-type", b"application/json"), (b"transfer-encoding", b"chunked")]
        scope = {"type": "http", "path": "/", "query_string": b"", "headers": headers, "method": "POST"}
        await Limits(inner, max_body=100, seconds=5)(scope, receive, None)  # type: ignore[arg-type]
        return received

    assert asyncio.run(run()) == ['http.request {"value": 1}', "http.disconnect "]
