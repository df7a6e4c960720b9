"""Whoever has no key, or somebody else's; and what is no request at all: heads, paths and names that lie."""

from __future__ import annotations

import json
import re
import socket
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from bystander import Bystander, wait_until_idle
from guarded_app import bearer, make_key
from server_process import ServerProcess, serving

COMPLETIONS = "/v1/completions"
client = httpx.Client(trust_env=False, timeout=30)


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    data = tmp_path_factory.mktemp("hostile-keys")
    return data, make_key(data, "alice"), make_key(data, "bob")


@pytest.fixture(scope="module")
def server(model_folder: Path, secrets: tuple[Path, str, str]) -> Iterator[ServerProcess]:
    with serving(f"--model=tiny={model_folder}", "--header-timeout=1", "--log-format=json", data=secrets[0]) as found:
        yield found


@pytest.fixture(scope="module")
def alice(secrets: tuple[Path, str, str]) -> dict[str, str]:
    return bearer(secrets[1])


@pytest.fixture(scope="module")
def bob(secrets: tuple[Path, str, str]) -> dict[str, str]:
    return bearer(secrets[2])


@pytest.fixture(scope="module")
def bystander(server: ServerProcess, alice: dict[str, str]) -> Iterator[Bystander]:
    found = Bystander(server.url, alice)
    yield found
    found.end()
    wait_until_idle(server.url, alice)


@pytest.fixture(autouse=True)
def unharmed(server: ServerProcess, bystander: Bystander) -> Iterator[None]:
    yield
    assert not bystander.harmed
    assert server.process.poll() is None


def connected(server: ServerProcess) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def said(connection: socket.socket, data: bytes, seconds: float = 1.0) -> bytes:
    """What the server says to it until it closes, or says nothing for so long."""
    connection.settimeout(seconds)
    found = b""
    try:
        connection.sendall(data)
        while part := connection.recv(65536):
            found += part
    except (ConnectionError, TimeoutError):
        pass
    return found


# ------------------------------------------------------------------------------------------------ keys


def test_every_route_but_health_needs_a_key(server: ServerProcess, alice: dict[str, str]) -> None:
    paths: dict[str, Any] = client.get(f"{server.url}/openapi.json", headers=alice).json()["paths"]
    asked = [(method, re.sub(r"\{\w+\}", "x", path)) for path, methods in paths.items() for method in methods]
    asked += [
        ("get", path) for path in ("/", "/openapi.json", "/page/js/main.js", "/page/x", "/docs", "/nowhere", "//")
    ]
    asked += [
        ("get", "/health/../metrics"),
        ("get", "/HEALTH"),
        ("head", "/metrics"),
    ]
    assert len(asked) > 35
    for method, path in asked:
        if (path.startswith("/health") and ".." not in path) or (method, path) == ("post", "/login"):
            continue
        for headers in ({}, bearer("sk-danlu-wrong"), {"x-api-key": ""}, {"Cookie": "danlu_session=wrong"}):
            response = client.request(method, server.url + path, headers=headers)
            assert response.status_code in (401, 429), f"{method} {path}"
            if response.status_code == 429:  # many wrong keys from one address are held up
                break
    assert client.get(f"{server.url}/health%2f..%2fmetrics").status_code == 404
    assert client.get(f"{server.url}/health/live").status_code == 200


def test_a_wrong_key_takes_as_long_however_much_of_it_is_right(
    tmp_path: Path, model_folder: Path, secrets: tuple[Path, str, str]
) -> None:
    """Keys are hashed before they are looked up, so the time tells nothing of them; here, of the whole way."""
    from danlu.server.access.key_file import hash_key

    secret = secrets[1].encode()
    times: dict[str, list[float]] = {"first": [], "last": []}
    for _ in range(300):
        for name, wrong in (("first", b"x" + secret[1:]), ("last", secret[:-1] + b"x")):
            begun = time.perf_counter()
            hash_key(wrong)
            times[name].append(time.perf_counter() - begun)
    assert 0.5 < statistics.median(times["first"]) / statistics.median(times["last"]) < 2


def test_what_one_key_has_no_other_key_sees(server: ServerProcess, alice: dict[str, str], bob: dict[str, str]) -> None:
    asked = {"input": "hi", "max_output_tokens": 4}
    response = client.post(f"{server.url}/v1/responses", json=asked, headers=alice).json()["id"]
    conversation = client.post(f"{server.url}/api/conversations", json={"title": "mine"}, headers=alice).json()["id"]
    message = {"role": "user", "content": "secret"}
    own = f"/api/conversations/{conversation}"
    assert client.put(f"{server.url}{own}/messages/m1", json=message, headers=alice).status_code == 200
    for method, path, body in [
        ("GET", f"/v1/responses/{response}", None),
        ("GET", f"/v1/responses/{response}/input_items", None),
        ("POST", f"/v1/responses/{response}/cancel", None),
        ("DELETE", f"/v1/responses/{response}", None),
        ("GET", own, None),
        ("GET", f"{own}/export", None),
        ("PATCH", own, {"title": "bob's"}),
        ("PUT", f"{own}/messages/m1", message),
        ("PUT", f"{own}/messages/m2", message),
        ("DELETE", f"{own}/messages/m1", None),
        ("DELETE", own, None),
    ]:
        assert client.request(method, server.url + path, json=body, headers=bob).status_code == 404, path
    going_on = {**asked, "previous_response_id": response}
    assert client.post(f"{server.url}/v1/responses", json=going_on, headers=bob).status_code == 400
    found = client.get(f"{server.url}/api/conversations", params={"q": "secret"}, headers=bob).json()
    assert found["data"] == []
    assert client.get(f"{server.url}{own}", headers=alice).json()["messages"][0]["content"] == "secret"


@pytest.mark.parametrize(
    "query",
    ['"', "'", "* OR 1", "a* NEAR b", "content:x", "%", "_", "\\", '") OR 1=1 --', "-secret", "^a", "(((", "AND"],
)
def test_a_search_is_text_and_no_query_language(
    server: ServerProcess, alice: dict[str, str], bob: dict[str, str], query: str
) -> None:
    title = f"here: {query} :there"
    made = client.post(f"{server.url}/api/conversations", json={"title": title}, headers=alice)
    assert made.status_code == 201
    for caller, titles in ((alice, {title}), (bob, set())):
        found = client.get(f"{server.url}/api/conversations", params={"q": query}, headers=caller)
        assert found.status_code == 200
        assert titles <= {one["title"] for one in found.json()["data"]}
    client.delete(f"{server.url}/api/conversations/{made.json()['id']}", headers=alice)


@pytest.mark.parametrize(
    "title", ['x"\r\nSet-Cookie: a=b', "../../etc/passwd", '";<script>', "\u202egnp.exe", "丹炉 ☃"]
)
def test_the_name_of_an_export_is_a_plain_name(server: ServerProcess, alice: dict[str, str], title: str) -> None:
    made = client.post(f"{server.url}/api/conversations", json={"title": title}, headers=alice).json()
    for form in ("json", "markdown"):
        found = client.get(f"{server.url}/api/conversations/{made['id']}/export?format={form}", headers=alice)
        assert found.status_code == 200
        assert "set-cookie" not in found.headers
        name = re.fullmatch(
            r"attachment; filename=\"([^\"]*)\"; filename\*=UTF-8''(\S*)", found.headers["content-disposition"]
        )
        assert name is not None
        assert not set(name[1]) & set("/\\<>:|?*\r\n")
        assert found.headers["x-content-type-options"] == "nosniff"


# ------------------------------------------------------------------------------------------------ heads


def test_ids_and_names_cannot_forge_headers_or_lines_of_the_log(server: ServerProcess, alice: dict[str, str]) -> None:
    for value in ("x" * 10_000, "a b", 'a","status":200,"x":"', "é".encode().decode("latin-1"), "\x1b[31m"):
        headers = {**alice, "x-request-id": value}
        found = client.get(f"{server.url}/v1/models", headers={k: v.encode("latin-1") for k, v in headers.items()})
        assert found.status_code in (200, 400)
        assert re.fullmatch("[0-9a-f]{32}", found.headers.get("x-request-id", "0" * 32))
    forged = 'tiny\n{"level":"info","message":"forged"}'
    body = {"model": forged, "prompt": "a"}
    assert client.post(server.url + COMPLETIONS, json=body, headers=alice).status_code == 404
    client.get(f"{server.url}/nowhere%0A%7B%22message%22%3A%22forged%22%7D", headers=alice)
    time.sleep(0.2)
    lines = [json.loads(line) for line in server.lines if line.startswith("{")]
    assert lines
    assert not [line for line in lines if line["message"] == "forged"]


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: a\r\n" * 10_000 + b"\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: \x00\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\r\n" * 50_000,
        b"\x00" * 100_000,
    ],
    ids=lambda head: ascii(head[:40]),
)
def test_what_is_hardly_a_request_is_refused(server: ServerProcess, head: bytes) -> None:
    begun = time.monotonic()
    with connected(server) as connection:
        answer = said(connection, head)
    assert time.monotonic() - begun < 6
    assert not answer or re.match(rb"HTTP/1.1 4\d\d ", answer)


def test_a_request_smuggled_behind_another_is_garbage(server: ServerProcess, alice: dict[str, str]) -> None:
    """Two lengths of a body: the server must not take what is behind the first for a second request."""
    head = (
        f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: {alice['Authorization']}\r\n"
        "Content-Type: application/json\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
        "0\r\n\r\nGET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
    )
    with connected(server) as connection:
        answer = said(connection, head.encode())
    assert answer.count(b"HTTP/1.1 ") <= 2
    assert b" 200 " not in answer


def test_a_head_and_a_body_that_trickle_are_cut_off(server: ServerProcess, alice: dict[str, str]) -> None:
    begun = time.monotonic()
    slow = [connected(server) for _ in range(20)]
    whole = (
        f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: {alice['Authorization']}\r\n"
        "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    ).encode()
    for number, connection in enumerate(slow):
        connection.sendall(whole[:-2] if number % 2 else whole + b"{")
    for connection in slow:
        with connection:
            answer = said(connection, b"", 10)
            assert not answer or b" 408 " in answer.partition(b"\r\n")[0] + b" "
    assert time.monotonic() - begun < 10


def test_a_body_over_the_limit_is_refused_in_either_way_of_sending_it(
    server: ServerProcess, alice: dict[str, str]
) -> None:
    headers = {**alice, "Content-Type": "application/json"}
    huge = b'{"prompt": "' + b"x" * (5 << 20) + b'"}'
    told = client.post(server.url + COMPLETIONS, content=huge, headers=headers)
    chunked = client.post(server.url + COMPLETIONS, content=iter([huge[:1000], huge[1000:]]), headers=headers)
    assert [told.status_code, chunked.status_code] == [413, 413]


# ------------------------------------------------------------------------------------------------ names and paths


def test_other_names_and_origins_reach_no_server_without_keys(tiny_url: str) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost@evil.example", "[::1", "", "evil.example:80"):
        assert client.get(f"{tiny_url}/v1/models", headers={"Host": host}).status_code in (400, 403), host
    for origin in ("https://evil.example", "null", "http://localhost:1", "file://"):
        found = client.post(f"{tiny_url}{COMPLETIONS}", json={"prompt": "a"}, headers={"Origin": origin})
        assert found.status_code == 403, origin
        assert "access-control-allow-origin" not in found.headers


@pytest.mark.parametrize(
    "path",
    [
        "/page/../app.py", "/page/..%2fapp.py", "/page/%2e%2e/app.py", "/page/%2e%2e%2fconfig.py", "/page//etc/passwd",
        "/page/js/..%5c..%5capp.py", "/page/%00", "/page/index.html%00.js", "//etc/passwd", "/page/....//app.py",
        "/%2e%2e/%2e%2e/etc/passwd", "/page/%252e%252e%252fapp.py", "/v1/models/..%2f..%2fkeys.json", "/keys.json",
    ],
)  # fmt: skip
def test_paths_lead_nowhere_else(server: ServerProcess, alice: dict[str, str], path: str) -> None:
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {alice['Authorization']}\r\nConnection: close\r\n\r\n"
    with connected(server) as connection:
        answer = said(connection, request.encode())
    assert re.match(rb"HTTP/1.1 4\d\d ", answer), answer[:200]
    assert b"root:" not in answer
    assert b"import" not in answer
