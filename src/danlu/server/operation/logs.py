"""The outermost layer of the server: each request gets an id, a line in the log, its place in the metrics and, where
there is a collector, a trace. What nobody caught ends here, as a 500.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from danlu.engine.config import SamplingParams
from danlu.server.errors import ApiError
from danlu.server.operation.drain import shutting_down
from danlu.server.operation.log_format import log, request_id_now
from danlu.server.operation.metrics import Metrics, TokenUsage
from danlu.server.streaming import ClientGone

if TYPE_CHECKING:
    from danlu.server.operation.tracing import Tracing

CLIENT_GONE = 499
"""Status in the log and in the metrics of a request whose client did not wait (nginx's number)."""

UNMATCHED = "unmatched"
"""Route of a request that no route takes."""

QUIET = frozenset({"/health", "/health/live", "/health/ready", "/metrics"})
"""Asked for every few seconds by machines: logged only where they fail."""

LONGEST_PATH = 200

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Timings(Protocol):
    """Seconds after a prompt was handed to the engine: until its first step, its first token, its last."""

    @property
    def queued_seconds(self) -> float: ...
    @property
    def first_token_seconds(self) -> float: ...
    @property
    def total_seconds(self) -> float: ...


@dataclass(frozen=True)
class RequestRecord:
    """What is known of a request when it has ended.

    The layers below leave it in ``request.state``: ``caller`` (auth.py); ``model``, ``cost``, ``params``, ``prompt``
    and ``answer`` (serving.py); ``error_code`` (errors.py, and whoever ends a stream with an error).

    Attributes:
        path: None, if the request has found a route.
        submitted_at: when the engine got it, seconds since 1970.
        status: CLIENT_GONE, if the client did not wait for the end.
        seconds: from head to end.
        prompt, answers: None, unless they may be told.
    """

    request_id: str
    method: str
    route: str
    path: str | None
    status: int
    seconds: float
    key: str | None
    model: str | None
    cost: TokenUsage | None
    timings: Timings | None
    submitted_at: float | None
    params: SamplingParams | None
    finish_reasons: list[str]
    error_code: str | None
    prompt: Any
    answers: list[str] | None

    @classmethod
    def of(cls, scope: Scope, exchange: Exchange, seconds: float, with_text: bool) -> RequestRecord:
        """Gather it."""
        state = scope["state"]
        route, answer = _route(scope), state.get("answer")
        status = CLIENT_GONE if exchange.gone else exchange.status
        code = state.get("error_code") or (f"status_{status}" if status >= 400 else None)
        return cls(
            request_id=exchange.request_id,
            method=scope["method"],
            route=route,
            path=scope["path"][:LONGEST_PATH] if route == UNMATCHED else None,
            status=status,
            seconds=seconds,
            key=getattr(state.get("caller"), "name", None),
            model=state.get("model"),
            cost=answer.usage if answer is not None else state.get("cost"),
            timings=answer.timings if answer is not None else None,
            submitted_at=answer.submitted_at if answer is not None else None,
            params=state.get("params"),
            finish_reasons=list(answer.finish_reasons) if answer is not None else [],
            error_code=None if exchange.gone else code,
            prompt=state.get("prompt") if with_text else None,
            answers=answer.texts if answer is not None and with_text else None,
        )


class RequestLog:
    """ASGI middleware. It sets ``request.state.request_id`` and answers it as the header x-request-id.

    Args:
        log_prompts: what was asked and answered is told too.
        tracing: gets a span for each request.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, *, log_prompts: bool = False, tracing: Tracing | None = None
    ) -> None:
        self.app, self.metrics, self.log_prompts, self.tracing = app, metrics, log_prompts, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = Exchange(_request_id(scope), receive, send)
        scope.setdefault("state", {})["request_id"] = exchange.request_id
        began = time.perf_counter()
        span = self.tracing.begin(scope) if self.tracing is not None else None
        token = request_id_now.set(exchange.request_id)
        try:
            await self._answer(scope, exchange)
        finally:
            record = RequestRecord.of(scope, exchange, time.perf_counter() - began, self.log_prompts)
            self.metrics.http_ended(record.method, record.route, record.status, record.seconds, record.error_code)
            if self.tracing is not None and span is not None:
                self.tracing.end(span, record)
            _write_line(record)
            request_id_now.reset(token)

    async def _answer(self, scope: Scope, exchange: Exchange) -> None:
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except (ClientGone, ClientDisconnect):
            exchange.gone = True
        except asyncio.CancelledError:  # the server ends and waits no longer
            await exchange.fail(scope, shutting_down())
        except Exception as error:
            log.error("unexpected %s", type(error).__name__, exc_info=error)
            told = ApiError(500, "the server failed to answer; its log says more", code="internal_error")
            await exchange.fail(scope, told)


class Exchange:
    """One request's ``receive`` and ``send``, watched.

    Attributes:
        status: that was answered; 500 while nothing was.
        gone: the client did not wait for the end.
    """

    def __init__(self, request_id: str, receive: Receive, send: Send) -> None:
        self.request_id, self._receive, self._send = request_id, receive, send
        self.status = 500
        self.started = self.ended = self.gone = False

    async def receive(self) -> Message:
        """A message of the client."""
        message = await self._receive()
        self.gone = self.gone or (message["type"] == "http.disconnect" and not self.ended)
        return message

    async def send(self, message: Message) -> None:
        """A message to the client; the first one gets the id of the request."""
        if message["type"] == "http.response.start":
            self.started, self.status = True, message["status"]
            headers = [(name, value) for name, value in message.get("headers", []) if name.lower() != b"x-request-id"]
            message = {**message, "headers": [*headers, (b"x-request-id", self.request_id.encode())]}
        elif message["type"] == "http.response.body":
            self.ended = not message.get("more_body", False)
        await self._send(message)

    async def fail(self, scope: Scope, error: ApiError) -> None:
        """Answer with an error, if nothing was answered yet. A response that has begun is left unfinished: the server
        closes the connection, so that the client does not take it for whole."""
        scope["state"]["error_code"] = error.code
        if self.started or self.gone:
            return
        body = json.dumps(error.body(scope["path"], self.request_id)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def _request_id(scope: Scope) -> str:
    """The client's own, if it is one that can stand in a log; else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text = value.decode("latin-1")
            if _REQUEST_ID.fullmatch(text):
                return str(text)
    return secrets.token_hex(16)


def _route(scope: Scope) -> str:
    """Template of the path that a request has matched."""
    route = scope.get("route")
    return str(getattr(route, "path_format", None) or getattr(route, "path", None) or UNMATCHED)


def _write_line(record: RequestRecord) -> None:
    if record.route in QUIET and record.status != 500:
        return
    cost, timings = record.cost, record.timings
    fields: dict[str, Any] = {
        "method": record.method,
        "route": record.route,
        "path": record.path,
        "status": record.status,
        "ms": round(record.seconds * 1e3, 1),
        "key": record.key,
        "model": record.model,
        "prompt_tokens": None if cost is None else cost.prompt_tokens,
        "cached_tokens": None if cost is None else cost.cached_tokens,
        "completion_tokens": None if cost is None else cost.completion_tokens,
        "ttft_ms": None if timings is None else round(timings.first_token_seconds * 1e3, 1),
        "finish": ",".join(record.finish_reasons) or None,
        "error": record.error_code,
        "prompt": record.prompt,
        "answers": record.answers,
    }
    write = log.error if record.status == 500 else log.info
    write("request", extra={"fields": {key: value for key, value in fields.items() if value is not None}})
