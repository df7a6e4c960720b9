"""OpenTelemetry: a span for each request, with what the engine did for it, sent to a collector as OTLP over HTTP.

Attributes follow the semantic conventions for HTTP and for generative AI clients and servers
(https://opentelemetry.io/docs/specs/semconv/gen-ai/). The text of prompts and answers is told only where the log may
have it too.
"""

from __future__ import annotations

import itertools
import json
from typing import Any
from urllib.parse import urlsplit

from starlette.types import Scope

from danlu import __version__
from danlu.errors import DanluError, MissingExtra
from danlu.server.operation.logs import CLIENT_GONE, RequestRecord

try:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as error:
    raise MissingExtra("opentelemetry-exporter-otlp-proto-http", "tracing", "--traces") from error

SIGNAL_PATH = "/v1/traces"
"""Where a collector takes traces, below its address."""

EXPORT_SECONDS = 5.0

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
"""Route -> gen_ai.operation.name."""

REQUEST_ATTRIBUTES = {
    "max_new_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "seed": "gen_ai.request.seed",
    "n": "gen_ai.request.choice.count",
}
"""Field of SamplingParams -> attribute."""


class Tracing:
    """Sends spans in a thread of its own; a collector that is away costs spans, never time.

    Args:
        url: of the collector, as ``http://host:4318``.

    Raises:
        DanluError: the URL is none.
    """

    def __init__(self, url: str) -> None:
        endpoint = _endpoint(url)
        resource = Resource.create({"service.name": "danlu", "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=EXPORT_SECONDS)))
        self._tracer = self._provider.get_tracer("danlu.server", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, scope: Scope) -> Span:
        """The span of a request; it goes on with the trace that the client has begun (W3C traceparent)."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        attributes: dict[str, Any] = {
            "http.request.method": scope["method"],
            "url.scheme": scope.get("scheme", "http"),
            "url.path": scope["path"],
        }
        host, port = scope.get("server") or (None, None)
        if host is not None and port is not None:
            attributes |= {"server.address": host, "server.port": port}
        return self._tracer.start_span(
            scope["method"], self._propagator.extract(headers), kind=SpanKind.SERVER, attributes=attributes
        )

    def end(self, span: Span, record: RequestRecord) -> None:
        """The request has ended: say what came of it."""
        span.update_name(f"{record.method} {record.route}")
        span.set_attributes(_attributes(record))
        if record.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        self._add_phases(span, record)
        span.end()

    def close(self) -> None:
        """Send what was not sent yet; takes at most some seconds."""
        self._provider.shutdown()

    def _add_phases(self, span: Span, record: RequestRecord) -> None:
        """Spans of what the engine did, from the times it has told."""
        if record.timings is None or record.submitted_at is None:
            return
        submitted = int(record.submitted_at * 1e9)
        times = record.timings
        marks = [0.0, times.queued_seconds, times.first_token_seconds, times.total_seconds]
        for name, (begin, end) in zip(("queue", "prefill", "decode"), itertools.pairwise(marks), strict=True):
            child = self._tracer.start_span(name, set_span_in_context(span), start_time=submitted + int(begin * 1e9))
            child.end(submitted + int(end * 1e9))


def _endpoint(url: str) -> str:
    """Where the collector at an address takes traces."""
    try:
        parts = urlsplit(url)
        named = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        named = False
    if not named:
        raise DanluError(f"traces: {url!r} is no address of a collector; give it as http://host:4318")
    return url if parts.path.endswith(SIGNAL_PATH) else url.rstrip("/") + SIGNAL_PATH


def _attributes(record: RequestRecord) -> dict[str, Any]:
    found: dict[str, Any] = {
        "http.route": record.route,
        "http.response.status_code": record.status,
        "http.request.header.x-request-id": [record.request_id],
        "error.type": "client_gone" if record.status == CLIENT_GONE else record.error_code,
    }
    if record.model is not None:
        found |= {
            "gen_ai.operation.name": OPERATIONS.get(record.route),
            "gen_ai.provider.name": "danlu",
            "gen_ai.request.model": record.model,
            "gen_ai.response.model": record.model,
            "gen_ai.response.finish_reasons": record.finish_reasons or None,
        }
    if record.cost is not None:
        found |= {
            "gen_ai.usage.input_tokens": record.cost.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": record.cost.cached_tokens,
            "gen_ai.usage.output_tokens": record.cost.completion_tokens,
        }
    if record.timings is not None:
        found["gen_ai.response.time_to_first_chunk"] = record.timings.first_token_seconds
    if record.params is not None:
        found |= {name: getattr(record.params, field) for field, name in REQUEST_ATTRIBUTES.items()}
    if record.prompt is not None:
        found["gen_ai.input.messages"] = json.dumps(record.prompt, default=str, ensure_ascii=False)
    if record.answers:
        found["gen_ai.output.messages"] = json.dumps(record.answers, ensure_ascii=False)
    return {name: value for name, value in found.items() if value is not None}
