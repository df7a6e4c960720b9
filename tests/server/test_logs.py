"""The outermost layer: ids, log lines, errors, clients that go away. Apps of the test behind the real layer."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from app_thread import serving_app
from fastapi import FastAPI, Request
from hypothesis import given
from hypothesis import strategies as st
from starlette.middleware import Middleware

from danlu.server.config import ServeConfig
from danlu.server.errors import ApiError, answer_error
from danlu.server.operation.log_format import JsonLines, TextLines, log, set_up_logs, visible
from danlu.server.operation.logs import RequestLog
from danlu.server.operation.metrics import Metrics
from danlu.server.streaming import EventStream, sse, until_disconnect

SECRET = "sk-danlu-verysecret"
NASTY = st.text(st.characters(codec=None), max_size=60) | st.sampled_from(
    ["\n", "\r\n", "\x1b[31m", "\u202e", "\ud800"]
)


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What the log holds; the loggers of the test run are put back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    set_up_logs("json", stream)
    yield stream
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)


def logged(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def make_app(log_prompts: bool = False) -> tuple[FastAPI, Metrics]:
    metrics = Metrics(["m"])
    app = FastAPI(
        middleware=[Middleware(RequestLog, metrics=metrics, log_prompts=log_prompts)],
        exception_handlers={ApiError: answer_error},
    )

    @app.get("/things/{name}")
    async def thing(request: Request, name: str) -> str:
        log.info("inside")
        return str(request.state.request_id)

    @app.post("/answer")
    async def answer(request: Request) -> str:
        state = request.state
        state.caller, state.model = SimpleNamespace(name="ann\nINFO forged"), "m"
        state.prompt = "what is\nasked"
        state.cost = SimpleNamespace(prompt_tokens=7, cached_tokens=3, completion_tokens=5)
        return "done"

    @app.get("/boom")
    async def boom() -> None:
        raise RuntimeError("line one\n2026-01-01T00:00:00.000Z INFO    forged" + "x" * 5000)

    @app.get("/v1/messages/boom")
    async def anthropic_boom() -> None:
        raise RuntimeError

    @app.get("/slow")
    async def slow(request: Request) -> str:
        await until_disconnect(request, asyncio.sleep(30))
        return ""

    @app.get("/stream")
    async def stream() -> EventStream:
        async def events() -> Any:
            for number in range(300):
                yield sse({"n": number})
                await asyncio.sleep(0.1)

        return EventStream(events())

    @app.get("/half")
    async def half() -> EventStream:
        async def events() -> Any:
            yield sse({"n": 1})
            raise RuntimeError("in mid-answer")

        return EventStream(events())

    return app, metrics


def ask(app: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


@pytest.mark.parametrize(
    ("sent", "taken"),
    [
        ("abc-1.2_X", True),
        ("x" * 64, True),
        ("x" * 65, False),
        ("a b", False),
        ("a\tb", False),
        ("é", False),
        ("", False),
    ],
)
def test_a_request_id_is_taken_over_only_if_it_can_stand_in_a_log(lines: io.StringIO, sent: str, taken: bool) -> None:
    app, _ = make_app()
    response = ask(app, "GET", "/things/1", headers={"X-Request-Id": sent.encode()})
    told = response.headers["x-request-id"]
    assert (told == sent) is taken
    assert response.json() == told
    assert {line["request_id"] for line in logged(lines)} == {told}
    assert len(ask(app, "GET", "/things/1").headers.get_list("x-request-id")) == 1


def test_a_finished_request_is_one_line_without_secrets_or_text(lines: io.StringIO) -> None:
    app, metrics = make_app()
    headers = {"Authorization": f"Bearer {SECRET}", "Cookie": f"session={SECRET}", "X-Api-Key": SECRET}
    ask(app, "POST", f"/answer?key={SECRET}", headers=headers)
    (line,) = logged(lines)
    assert SECRET not in lines.getvalue()
    assert "asked" not in lines.getvalue()
    assert 0 <= line.pop("ms") < 5000
    for name in ("time", "request_id", "logger"):
        line.pop(name)
    assert line == {
        "level": "info", "message": "request", "method": "POST", "route": "/answer", "status": 200, "model": "m",
        "key": "ann\nINFO forged", "prompt_tokens": 7, "cached_tokens": 3, "completion_tokens": 5,
    }  # fmt: skip
    labels = {"method": "POST", "route": "/answer", "status": "200"}
    assert metrics.registry.get_sample_value("danlu_http_requests_total", labels) == 1


def test_prompts_are_told_if_that_is_asked_for(lines: io.StringIO) -> None:
    app, _ = make_app(log_prompts=True)
    ask(app, "POST", "/answer")
    assert logged(lines)[0]["prompt"] == "what is\nasked"


def test_paths_are_not_labels_and_unknown_ones_are_told_short(lines: io.StringIO) -> None:
    app, metrics = make_app()
    for number in range(3):
        assert ask(app, "GET", f"/things/{number}").status_code == 200
        assert ask(app, "GET", f"/no%0a/{number}/{'x' * 1000}?key={SECRET}").status_code == 404
    routes = {
        sample.labels["route"]: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "danlu_http_requests_total"
    }
    assert routes == {"/things/{name}": 3, "unmatched": 3}
    unmatched = [line for line in logged(lines) if line.get("route") == "unmatched"]
    assert [len(line["path"]) for line in unmatched] == [200] * 3
    assert SECRET not in lines.getvalue()


def test_what_nobody_caught_is_a_500_whose_cause_only_the_log_tells(lines: io.StringIO) -> None:
    app, metrics = make_app()
    response = ask(app, "GET", "/boom")
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "line one" not in response.text
    assert response.headers["x-request-id"]
    trace, line = logged(lines)
    assert "RuntimeError: line one" in trace["error"]
    assert len(trace["error"]) < 4000
    assert (line["status"], line["level"], line["error"]) == (500, "error", "internal_error")
    assert metrics.registry.get_sample_value("danlu_errors_total", {"code": "internal_error"}) == 1
    anthropic = ask(app, "GET", "/v1/messages/boom").json()
    assert (anthropic["type"], anthropic["error"]["type"]) == ("error", "api_error")


@pytest.mark.parametrize("path", ["/slow", "/stream"])
def test_a_client_that_goes_away_is_499_and_no_error(lines: io.StringIO, path: str) -> None:
    app, metrics = make_app()
    with serving_app(app, ServeConfig()) as address:
        with socket.create_connection(address) as client:
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            time.sleep(0.3)
        end = time.monotonic() + 5
        while not lines.getvalue() and time.monotonic() < end:
            time.sleep(0.02)
    (line,) = logged(lines)
    assert (line["status"], line["level"], line["route"]) == (499, "info", path)
    assert not any(sample.name == "danlu_errors_total" for f in metrics.registry.collect() for sample in f.samples)


def test_an_answer_that_breaks_off_does_not_look_whole(lines: io.StringIO) -> None:
    app, _ = make_app()
    with serving_app(app, ServeConfig()) as (host, port), pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"http://{host}:{port}/half", trust_env=False)
    assert any("in mid-answer" in line.get("error", "") for line in logged(lines))


def record_of_log(message: str, **fields: Any) -> logging.LogRecord:
    record = logging.LogRecord("danlu.server", logging.INFO, __file__, 1, message, (), None)
    record.fields = fields
    return record


@given(NASTY, NASTY)
def test_no_field_can_forge_a_line_or_a_field(message: str, value: str) -> None:
    text = TextLines().format(record_of_log(message, model=value, status=200))
    assert text.isprintable()
    assert text.endswith(" status=200")
    told = text.removesuffix(" status=200").partition(f"INFO    {visible(message)} model=")[2]
    if told.startswith('"'):
        assert '"' not in told[1:-1].replace("\\\\", "").replace('\\"', "")
    else:
        assert " " not in told
        assert "=" not in told
    line = JsonLines().format(record_of_log(message, model=value))
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line)["model"] == value


def test_lines_of_a_traceback_cannot_pass_for_log_lines() -> None:
    try:
        raise ValueError("x\n2026-01-01T00:00:00.000Z INFO    forged\r\x1b[2Jy")
    except ValueError as error:
        record = logging.LogRecord("a", logging.ERROR, __file__, 1, "m", (), (ValueError, error, error.__traceback__))
    first, *rest = TextLines().format(record).split("\n")
    assert first.endswith("ERROR   m")
    assert all(line.startswith("    ") and line.isprintable() for line in rest)
    assert any("forged" in line for line in rest)


def test_loggers_of_libraries_speak_the_same_format(lines: io.StringIO) -> None:
    logging.getLogger("uvicorn.error").warning("Invalid\nrequest %s", "x")
    logging.getLogger("uvicorn.error").info("Started")
    logging.getLogger("asyncio").error("never retrieved")
    assert [(line["logger"], line["message"]) for line in logged(lines)] == [
        ("uvicorn.error", "Invalid\nrequest x"),
        ("asyncio", "never retrieved"),
    ]
