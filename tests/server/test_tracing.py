"""Traces, as a real collector gets them: an HTTP server that reads OTLP's protobuf messages."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI, Request
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from otlp_collector import Collector, attributes, collecting
from starlette.middleware import Middleware

from danlu.engine.config import SamplingParams
from danlu.errors import DanluError
from danlu.server.operation.logs import RequestLog
from danlu.server.operation.metrics import Metrics
from danlu.server.operation.tracing import Tracing

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as found:
        yield found


def make_app(tracing: Tracing, log_prompts: bool = False) -> FastAPI:
    middleware = [Middleware(RequestLog, metrics=Metrics(["m"]), log_prompts=log_prompts, tracing=tracing)]
    app = FastAPI(middleware=middleware)

    @app.post("/v1/chat/completions")
    async def answer(request: Request) -> str:
        cost = SimpleNamespace(prompt_tokens=7, cached_tokens=3, completion_tokens=5)
        request.state.model, request.state.cost = "m", cost
        request.state.params = SamplingParams(temperature=0.5, seed=None, max_new_tokens=9)
        request.state.prompt = {"messages": [{"role": "user", "content": "a private question"}]}
        request.state.answer = SimpleNamespace(
            usage=cost,
            timings=SimpleNamespace(queued_seconds=0.1, first_token_seconds=0.3, total_seconds=0.8),
            submitted_at=time.time() - 0.9,
            finish_reasons=["stop"],
            texts=["a private answer"],
        )
        return "done"

    @app.get("/boom")
    async def boom() -> None:
        raise RuntimeError

    return app


def ask(app: FastAPI, method: str, path: str, **headers: str) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(send())


def traced(collector: Collector, method: str, path: str, log_prompts: bool = False, **headers: str) -> list[Span]:
    tracing = Tracing(collector.url)
    ask(make_app(tracing, log_prompts), method, path, **headers)
    tracing.close()
    return collector.spans


def test_a_request_is_a_span_with_the_phases_of_the_engine(collector: Collector) -> None:
    spans = {
        span.name: span
        for span in traced(collector, "POST", "/v1/chat/completions", traceparent=f"00-{TRACE}-{PARENT}-01")
    }
    assert collector.paths == ["/v1/traces"]
    server = spans["POST /v1/chat/completions"]
    assert server.kind == Span.SPAN_KIND_SERVER
    assert (server.trace_id.hex(), server.parent_span_id.hex()) == (TRACE, PARENT)
    found = attributes(server)
    assert found.items() >= {
        "http.request.method": "POST", "http.route": "/v1/chat/completions", "http.response.status_code": 200,
        "gen_ai.operation.name": "chat", "gen_ai.request.model": "m", "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 5, "gen_ai.usage.cache_read.input_tokens": 3, "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5, "gen_ai.response.finish_reasons": ["stop"],
    }.items()  # fmt: skip
    assert "gen_ai.request.seed" not in found
    phases = [spans[name] for name in ("queue", "prefill", "decode")]
    assert {phase.parent_span_id for phase in phases} == {server.span_id}
    assert {phase.trace_id.hex() for phase in phases} == {TRACE}
    seconds = [(phase.end_time_unix_nano - phase.start_time_unix_nano) / 1e9 for phase in phases]
    assert seconds == pytest.approx([0.1, 0.2, 0.5], abs=1e-6)
    assert phases[0].end_time_unix_nano == phases[1].start_time_unix_nano
    assert 0 < (server.end_time_unix_nano - phases[-1].end_time_unix_nano) / 1e9 < 1
    (resource,) = {
        next(a.value.string_value for a in one.resource.attributes if a.key == "service.name")
        for request in collector.requests
        for one in request.resource_spans
    }
    assert resource == "danlu"


def test_text_is_told_only_where_the_log_has_it(collector: Collector) -> None:
    traced(collector, "POST", "/v1/chat/completions")
    assert b"private" not in b"".join(one.SerializeToString() for one in collector.requests)
    collector.requests.clear()
    traced(collector, "POST", "/v1/chat/completions", log_prompts=True)
    found = attributes(next(span for span in collector.spans if span.name.startswith("POST")))
    assert "a private question" in found["gen_ai.input.messages"]
    assert "a private answer" in found["gen_ai.output.messages"]


def test_errors_are_errors_and_secrets_are_not_told(collector: Collector) -> None:
    (span,) = traced(collector, "GET", "/boom?key=sekrit", authorization="Bearer sekrit")
    assert span.status.code == 2
    assert attributes(span)["error.type"] == "internal_error"
    assert b"sekrit" not in span.SerializeToString()


@pytest.mark.parametrize(
    "header", ["", "garbage", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01", "00-\xe9-1-1"]
)
def test_a_broken_traceparent_begins_a_new_trace(collector: Collector, header: str) -> None:
    tracing = Tracing(collector.url)
    begun = tracing.begin({"method": "GET", "path": "/", "headers": [(b"traceparent", header.encode("latin-1"))]})
    begun.end()
    tracing.close()
    (span,) = collector.spans
    assert span.parent_span_id == b""
    assert span.trace_id.hex() not in (TRACE, "0" * 32)


def test_a_client_that_wants_no_trace_gets_none(collector: Collector) -> None:
    assert traced(collector, "GET", "/boom", traceparent=f"00-{TRACE}-{PARENT}-00") == []


def test_a_collector_that_is_away_costs_no_time(caplog: pytest.LogCaptureFixture) -> None:
    tracing = Tracing("http://127.0.0.1:9")
    app = make_app(tracing)
    begun = time.monotonic()
    assert ask(app, "POST", "/v1/chat/completions").status_code == 200
    assert time.monotonic() - begun < 1
    with caplog.at_level(logging.CRITICAL):
        tracing.close()
    assert time.monotonic() - begun < 8


@pytest.mark.parametrize("url", ["", "collector:4318", "ftp://collector", "http://", "http://[::1", "http://a:99999"])
def test_what_is_no_collector_is_refused(url: str) -> None:
    with pytest.raises(DanluError, match="traces"):
        Tracing(url)


def test_without_the_extra_it_is_named() -> None:
    script = "import sys; sys.modules['opentelemetry.sdk'] = None\nimport danlu.server.operation.tracing"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "pip install 'danlu[tracing]'" in done.stderr
