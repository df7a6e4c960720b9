"""Who gets in: keys in every form, revocation, no keys on this machine only, other sites, the page's login."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest
from guarded_app import bearer, guarded, listening, make_key, opened

from danlu.server.access.key_file import end_key
from danlu.server.access.keys import Caller
from danlu.server.access.login import language_of
from danlu.server.access.sessions import COOKIE, LIFETIME, Sessions

Visit = Callable[[httpx.AsyncClient], Awaitable[None]]
HTML = {"Accept": "text/html,application/xhtml+xml;q=0.9"}


def visit(folder: Path, steps: Visit, base_url: str = "http://127.0.0.1:8000", **options: object) -> None:
    """Run ``steps`` with a client of a new application."""

    async def run() -> None:
        async with opened(guarded(folder, **options), base_url) as client:  # type: ignore[arg-type]
            await steps(client)

    asyncio.run(run())


# ------------------------------------------------------------------------------------------------------- with keys


def test_a_key_is_taken_in_each_form_and_nothing_else_is(tmp_path: Path) -> None:
    key = make_key(tmp_path)

    async def steps(client: httpx.AsyncClient) -> None:
        for headers in ({"x-api-key": key}, bearer(key), {"Authorization": f"bearer  {key} "}):
            answer = await client.get("/v1/who", headers=headers)
            assert (answer.status_code, answer.json()) == (200, "alice"), headers
        answer = await client.get("/v1/who", headers={"Authorization": "Basic eDp5", "x-api-key": key})
        assert answer.json() == "alice"  # Basic is for a proxy in front
        for headers in (
            {}, bearer(""), bearer(key[:-1]), bearer(key + "a"), bearer(key.upper()), {"x-api-key": ""},
            {"Authorization": key}, {"Authorization": f"Basic {key}"}, {"Cookie": f"{COOKIE}={key}"},
            {"x-api-key": b"\xff\xfe"}, bearer(key) | {"x-api-key": key, "Authorization": "Bearer wrong"},
        ):  # fmt: skip
            answer = await client.get("/v1/who", headers=headers)
            assert answer.status_code in (401, 429), headers
            assert "Bearer" in answer.headers.get("www-authenticate", "Bearer")
            assert answer.json()["error"]["type"] in ("authentication_error", "rate_limit_error")

    visit(tmp_path, steps)


def test_every_path_but_health_needs_a_key(tmp_path: Path) -> None:
    make_key(tmp_path)
    paths = ("/", "/v1/who", "/api/usage", "/nowhere", "/openapi.json", "/health/../v1/who", "/healthy",
             "//health/live", "/logout", "/LOGIN", "/login/x", "/v1/stream")  # fmt: skip

    async def steps(client: httpx.AsyncClient) -> None:
        for path in paths:
            for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "BREW"):
                answer = await client.send(httpx.Request(method, httpx.URL(f"http://127.0.0.1:8000{path}")))
                assert answer.status_code == 401, (method, path)
        assert (await client.get("/health/live")).status_code == 200
        anthropic = (await client.post("/v1/messages", json={"value": 1})).json()
        assert anthropic["type"] == "error"
        assert anthropic["error"]["type"] == "authentication_error"

    visit(tmp_path, steps)


def test_a_websocket_is_closed(tmp_path: Path) -> None:
    sent = []

    async def run() -> None:
        app = guarded(tmp_path)

        async def send(message: dict[str, object]) -> None:
            sent.append(message["type"])

        async def receive() -> dict[str, object]:
            return {"type": "websocket.connect"}

        scope = {"type": "websocket", "path": "/v1/who", "headers": [], "query_string": b""}
        await app(scope, receive, send)  # type: ignore[arg-type]
        await app.state.serving.database.close()

    asyncio.run(run())
    assert sent == ["websocket.close"]


def test_a_key_that_is_revoked_while_the_server_runs(tmp_path: Path) -> None:
    alice, bob = make_key(tmp_path, "alice"), make_key(tmp_path, "bob")

    async def steps(client: httpx.AsyncClient) -> None:
        login = await client.post("/login", json={"key": alice})
        cookie = {"Cookie": f"{COOKIE}={login.cookies[COOKIE]}"}
        client.cookies.clear()
        for headers in (bearer(alice), cookie):
            assert (await client.get("/v1/who", headers=headers)).status_code == 200
        end_key(tmp_path / "keys.json", "alice")
        end = time.monotonic() + 5
        while (await client.get("/v1/who", headers=bearer(alice))).status_code == 200:
            assert time.monotonic() < end
            await asyncio.sleep(0.05)
        assert (await client.get("/v1/who", headers=cookie)).status_code == 401
        assert (await client.get("/v1/who", headers=bearer(bob))).json() == "bob"

    visit(tmp_path, steps)


def test_limits_are_told_in_headers(tmp_path: Path) -> None:
    key = make_key(tmp_path, requests_per_minute=5, tokens_per_minute=1000)

    async def steps(client: httpx.AsyncClient) -> None:
        answer = await client.get("/v1/who", headers=bearer(key))
        told = {name: value for name, value in answer.headers.items() if name.startswith("x-ratelimit")}
        assert told == {
            "x-ratelimit-limit-requests": "5",
            "x-ratelimit-remaining-requests": "5",
            "x-ratelimit-reset-requests": "0s",
            "x-ratelimit-limit-tokens": "1000",
            "x-ratelimit-remaining-tokens": "1000",
            "x-ratelimit-reset-tokens": "0s",
        }

    visit(tmp_path, steps)


def test_own_usage(tmp_path: Path) -> None:
    key = make_key(tmp_path, tokens_per_day=500)

    async def run() -> None:
        app = guarded(tmp_path)
        async with opened(app) as client:
            caller: Caller = app.state.serving.keys.check(key.encode(), "")
            for other in (caller, Caller("key_other", "other")):
                await app.state.serving.usage.record(
                    other, model="m", route="r", request_id="r", prompt_tokens=30, cached_tokens=16, completion_tokens=4
                )
            told = (await client.get("/api/usage", headers=bearer(key))).json()
        sums = {"requests": 1, "prompt_tokens": 30, "cached_tokens": 16, "completion_tokens": 4}
        assert told["key"] == "alice"
        assert told["models"] is None
        assert told["today"] == told["total"] == sums
        assert [{**day, "day": None} for day in told["days"]] == [{**sums, "day": None}]
        assert told["limits"]["tokens_per_day"] == 500

    asyncio.run(run())


# ---------------------------------------------------------------------------------------------------- without keys


@pytest.mark.parametrize(
    ("listens", "asked", "status"),
    [
        ("127.0.0.1", "127.0.0.1:8000", 200),
        ("127.0.0.1", "localhost:8000", 200),
        ("127.0.0.1", "LOCALHOST", 200),
        ("127.0.0.1", "127.8.9.1", 200),
        ("127.0.0.1", "[::1]:8000", 200),
        ("127.0.0.1", "evil.example:8000", 403),  # its DNS says 127.0.0.1 now
        ("127.0.0.1", "localhost.evil.example", 403),
        ("127.0.0.1", "127.0.0.1.evil.example", 403),
        ("127.0.0.1", "evil.example#@localhost", 403),
        ("127.0.0.1", "192.168.1.5:8000", 403),
        ("127.0.0.1", "[::1", 403),
        ("127.0.0.1", "", 403),
        ("192.168.1.5", "192.168.1.5:8000", 200),
        ("192.168.1.5", "evil.example", 403),
        ("my-host", "My-Host:8000", 200),
        ("0.0.0.0", "any.name:8000", 200),
    ],
)
def test_without_keys_only_own_names_are_answered(tmp_path: Path, listens: str, asked: str, status: int) -> None:
    async def steps(client: httpx.AsyncClient) -> None:
        for method in ("GET", "POST"):
            answer = await client.request(method, "/v1/who", headers={"Host": asked})
            assert answer.status_code == status
            assert answer.json() == "local" if status == 200 else answer.json()["error"]["code"] == "host_not_allowed"
        assert (await client.get("/health/live", headers={"Host": asked})).status_code == 200

    visit(tmp_path, steps, host=listens)


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        ("http://localhost:8000", 200),
        ("https://localhost:8000", 200),  # a proxy in front may speak TLS
        ("https://chat.example", 200),  # listed
        ("http://chat.example", 403),
        ("https://evil.example", 403),
        ("http://localhost:3000", 403),
        ("http://localhost", 403),
        ("http://127.0.0.1:8000", 403),
        ("null", 403),
        ("", 403),
        ("http://localhost:8000.evil.example", 403),
        ("http://localhost:99999", 403),
    ],
)
def test_without_keys_pages_of_other_origins_change_nothing(tmp_path: Path, origin: str | None, status: int) -> None:
    headers = {"Host": "localhost:8000"} | ({} if origin is None else {"Origin": origin})

    async def steps(client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/who", headers=headers)
        assert answer.status_code == status
        assert (await client.get("/v1/who", headers=headers)).status_code == 200  # which they cannot read
        readable = answer.headers.get("access-control-allow-origin")
        assert readable == (origin if origin == "https://chat.example" else None)

    visit(tmp_path, steps, cors_origin=("https://chat.example",))


def test_a_listed_origin_may_send_what_the_official_clients_send(tmp_path: Path) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-stainless-os"}

    async def steps(client: httpx.AsyncClient) -> None:
        allowed = await client.options("/v1/echo", headers={"Origin": "https://chat.example", **asks})
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
        assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in allowed.headers
        refused = await client.options("/v1/echo", headers={"Origin": "https://evil.example", **asks})
        assert refused.status_code == 400
        assert "access-control-allow-origin" not in refused.headers

    visit(tmp_path, steps, cors_origin=("https://chat.example",))


def test_once_there_are_keys_they_are_needed(tmp_path: Path) -> None:
    async def steps(client: httpx.AsyncClient) -> None:
        assert (await client.get("/v1/who")).status_code == 200
        key = make_key(tmp_path)
        await asyncio.sleep(0.6)
        assert (await client.get("/v1/who")).status_code == 401
        assert (await client.get("/v1/who", headers=bearer(key))).status_code == 200
        (tmp_path / "keys.json").unlink()
        await asyncio.sleep(0.6)
        assert (await client.get("/v1/who")).status_code == 401

    visit(tmp_path, steps)


# ------------------------------------------------------------------------------------------------------- the login


def test_the_login_page_and_its_cookie(tmp_path: Path) -> None:
    key = make_key(tmp_path)

    async def steps(client: httpx.AsyncClient) -> None:
        page = await client.get("/", headers=HTML)
        assert page.status_code == 401
        assert 'action="/login"' in page.text
        assert "script" not in page.text
        assert "default-src 'none'" in page.headers["content-security-policy"]
        wrong = await client.post("/login", data={"key": "wrong"}, headers=HTML)
        assert wrong.status_code == 401
        assert 'role="alert"' in wrong.text
        assert COOKIE not in wrong.cookies
        login = await client.post("/login", data={"key": f" {key} "}, headers=HTML)
        assert (login.status_code, login.headers["location"]) == (303, "/")
        name, *flags = [part.strip() for part in login.headers["set-cookie"].split(";")]
        assert {flag.lower() for flag in flags} == {"httponly", "samesite=strict", "path=/", f"max-age={LIFETIME}"}
        token = name.partition("=")[2]
        assert len(token) == 43
        assert token not in (tmp_path / "server.sqlite3").read_bytes().decode("latin-1")
        assert (await client.get("/", headers=HTML)).text.startswith("<!doctype html><title>the page</title>")
        assert (await client.get("/v1/who")).json() == "alice"
        assert (await client.get("/login", headers=HTML)).headers["location"] == "/"
        # A key that is sent counts, not the cookie beside it.
        assert (await client.get("/v1/who", headers=bearer("wrong"))).status_code == 401
        # Other sites cannot use the cookie, even where a browser sends it along.
        evil = {"Origin": "https://evil.example"}
        assert (await client.post("/v1/who", headers=evil)).status_code == 403
        assert (await client.post("/login", json={"key": key}, headers=evil)).status_code == 403
        assert (await client.post("/v1/who", headers=evil | bearer(key))).status_code == 200
        assert (await client.post("/logout")).status_code == 204
        assert COOKIE not in client.cookies
        assert (await client.get("/v1/who", headers={"Cookie": f"{COOKIE}={token}"})).status_code == 401

    visit(tmp_path, steps)


def test_a_cookie_is_secure_over_https(tmp_path: Path) -> None:
    key = make_key(tmp_path)

    async def steps(client: httpx.AsyncClient) -> None:
        login = await client.post("/login", json={"key": key})
        assert login.json() == {"name": "alice"}
        assert "secure" in login.headers["set-cookie"].lower()

    visit(tmp_path, steps, "https://chat.example")


def test_a_forwarded_proto_alone_changes_nothing(tmp_path: Path) -> None:
    key = make_key(tmp_path)

    async def steps(client: httpx.AsyncClient) -> None:
        login = await client.post("/login", json={"key": key}, headers={"X-Forwarded-Proto": "https"})
        assert "secure" not in login.headers["set-cookie"].lower()

    visit(tmp_path, steps)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "application/x-www-form-urlencoded"),
        (b"key=a&key=b", "application/x-www-form-urlencoded"),
        (b"other=a", "application/x-www-form-urlencoded"),
        (b"key", "application/x-www-form-urlencoded"),
        (b"\xff\xfe", "application/x-www-form-urlencoded"),
        (b"&" * 9999, "application/x-www-form-urlencoded"),
        (b"{}", "application/json"),
        (b"", "application/json"),
        (b"[]", "application/json"),
        (b'{"key": 1}', "application/json"),
        (b'{"key": "a", "more": 1}', "application/json"),
        (b'{"key": "' + b"a" * 600 + b'"}', "application/json"),
    ],
)
def test_a_login_that_is_none_is_refused(tmp_path: Path, content: bytes, kind: str) -> None:
    make_key(tmp_path)

    async def steps(client: httpx.AsyncClient) -> None:
        answer = await client.post("/login", content=content, headers={"Content-Type": kind})
        assert answer.status_code == 400

    visit(tmp_path, steps)


def test_wrong_keys_are_held_up_and_the_form_says_so(tmp_path: Path) -> None:
    key = make_key(tmp_path)

    async def steps(client: httpx.AsyncClient) -> None:
        for _ in range(5):
            assert (await client.post("/login", data={"key": "wrong"})).status_code == 401
        answer = await client.post("/login", data={"key": "wrong"}, headers={"Accept-Language": "zh-TW,en"})
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) > 0
        assert "错误次数过多" in answer.text
        assert (await client.post("/login", json={"key": "wrong"})).json()["error"]["code"] == "rate_limit_exceeded"
        assert (await client.post("/login", data={"key": key})).status_code == 303

    visit(tmp_path, steps)


def test_there_is_nothing_to_log_in_to_without_keys(tmp_path: Path) -> None:
    async def steps(client: httpx.AsyncClient) -> None:
        assert (await client.post("/login", json={"key": "a"})).json()["error"]["code"] == "no_keys"

    visit(tmp_path, steps)


def test_sessions_end_after_30_days_and_outlive_the_server(tmp_path: Path) -> None:
    now = [1e9]

    async def run() -> None:
        app = guarded(tmp_path)
        database = app.state.serving.database
        first, second = (Sessions(database, clock=lambda: now[0]) for _ in range(2))
        token = await first.begin("key_alice")
        for passed, whose in ((LIFETIME - 1, "key_alice"), (LIFETIME, None)):
            now[0] = 1e9 + passed
            for sessions in (first, second):
                assert await sessions.key_id(token) == whose
                assert await sessions.key_id(token + "x") is None
        await first.begin("key_bob")  # takes what has ended away
        assert await database.read(lambda c: c.execute("SELECT key_id FROM sessions").fetchall()) == [("key_bob",)]
        await database.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("accepted", "language"),
    [("", "en"), ("zh", "zh-CN"), ("zh-Hant-TW,zh;q=0.9,en;q=0.8", "zh-CN"), ("de,en;q=0.5,zh;q=0.3", "en"),
     ("fr", "en"), ("zhx", "en"), (";;,,", "en")],
)  # fmt: skip
def test_the_login_page_speaks_the_readers_language(accepted: str, language: str) -> None:
    assert language_of(accepted) == language


def test_security_headers_are_on_every_answer(tmp_path: Path) -> None:
    make_key(tmp_path)

    async def steps(client: httpx.AsyncClient) -> None:
        for path in ("/", "/v1/who", "/nowhere", "/health/live"):
            headers = (await client.get(path, headers=HTML)).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert "frame-ancestors 'none'" in headers["content-security-policy"]
            assert headers["cache-control"] == "no-store"
            assert headers["cross-origin-opener-policy"] == "same-origin"
            assert headers["referrer-policy"] == "same-origin"
            assert "camera=()" in headers["permissions-policy"]
            assert len(headers.get_list("content-security-policy")) == 1

    visit(tmp_path, steps)


def test_the_login_in_a_real_browser(tmp_path: Path) -> None:
    """The policy lets the form's style and its way through, the cookie comes back, and no script is needed."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = next(
        (path for path in (Path("/usr/bin/chromium"), Path("/usr/bin/chromium-browser")) if path.exists()), None
    )
    if chromium is None:
        pytest.skip("there is no chromium")
    key = make_key(tmp_path)
    with listening(guarded(tmp_path)) as (host, port), playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(chromium), args=["--no-sandbox", "--disable-gpu"])
        context = browser.new_context(java_script_enabled=False, locale="zh-CN")
        page = context.new_page()
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(f"http://{host}:{port}/")
        assert page.locator("html").get_attribute("lang") == "zh-CN"
        assert page.locator("button").evaluate("e => getComputedStyle(e).fontWeight") == "600"  # the style is let in
        page.fill("#key", "wrong")
        page.click("button")
        assert "密钥无效" in page.locator("[role=alert]").inner_text()
        page.fill("#key", key)
        page.click("button")
        assert page.locator("h1").inner_text() == "the page"
        cookie = next(one for one in context.cookies() if one["name"] == COOKIE)
        assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
        page.reload()
        assert page.locator("h1").inner_text() == "the page"
        browser.close()
    assert [text for text in complaints if "401" not in text] == []
