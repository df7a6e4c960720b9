"""What Prometheus is told: requests, tokens, times, the cache, the models; at GET /metrics."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from fastapi import APIRouter, Request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder
from starlette.responses import Response

from danlu import __version__
from danlu.server.errors import documented

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
ABORT_REASONS = frozenset({"disconnect", "deadline", "drain"})
OTHER = "other"
"""Label of what a client made up: it must not be able to make new time series."""

FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
GAP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5)
WHOLE_BUCKETS = (0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

ENGINE_GAUGES = {
    "running": ("running", "Answers that are written."),
    "waiting": ("queue", "Answers that wait for the engine."),
    "blocks_used": ("cache_blocks_used", "Blocks of the KV cache that answers hold."),
    "blocks_free": ("cache_blocks_free", "Blocks of the KV cache that can be taken."),
    "blocks_cached": ("cache_blocks_cached", "Free blocks that hold a known prefix."),
}
"""Field of EngineStats -> metric and its help."""

ENGINE_COUNTERS = {
    "steps": ("engine_steps", "Steps of the engine."),
    "prompt_tokens": (
        "engine_prompt_tokens",
        "Tokens of prompts that the engine has begun, from the cache or computed.",
    ),
    "cached_tokens": ("engine_cached_tokens", "Tokens of prompts that were found in the prefix cache."),
    "new_tokens": ("engine_new_tokens", "Tokens that the engine has written."),
    "preemptions": ("preemptions", "Answers that were set back for want of cache."),
    "drafted": ("drafted_tokens", "Tokens that were guessed."),
    "accepted": ("accepted_tokens", "Guessed tokens that were right."),
}
"""The same, for fields that only grow while a process lives."""


class TokenUsage(Protocol):
    """What a request has cost."""

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def completion_tokens(self) -> int: ...


class Metrics:
    """All metrics of a server, in a registry of their own. Every method is for the event loop, and cheap.

    Args:
        models: the names that may be labels; other names are counted as "other".
    """

    def __init__(self, models: Collection[str] = ()) -> None:
        self.registry = CollectorRegistry()
        self._models = frozenset(models)
        self._told: dict[str, dict[str, float]] = {}  # counters of each model's process as they were told last

        self.http_requests = self._counter("http_requests", "HTTP requests.", "method", "route", "status")
        self.http_seconds = self._histogram("http_request_seconds", "Whole HTTP requests.", WHOLE_BUCKETS, "route")
        self.errors = self._counter("errors", "Requests that failed, by the code of the error.", "code")
        self.requests = self._counter("requests", "Requests to a model.", "model", "route", "status")
        self.in_flight = self._gauge("requests_in_flight", "Requests to a model that have not ended.", "model")
        self.request_seconds = self._histogram(
            "request_seconds", "From a request to the last token.", WHOLE_BUCKETS, "model", "route"
        )
        self.first_token_seconds = self._histogram(
            "time_to_first_token_seconds", "From a request to its first token.", FIRST_TOKEN_BUCKETS, "model"
        )
        self.gap_seconds = self._histogram(
            "inter_token_seconds", "Between two tokens of an answer.", GAP_BUCKETS, "model"
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts, as usage tells them.", "model")
        self.cached_tokens = self._counter("cached_prompt_tokens", "Those of them that were cached.", "model")
        self.completion_tokens = self._counter("completion_tokens", "Tokens of answers, as usage tells them.", "model")
        self.aborts = self._counter("aborts", "Requests that were ended before their answer was.", "model", "reason")
        self.loads = self._counter("model_loads", "Times that a model was loaded.", "model")
        self.unloads = self._counter("model_unloads", "Times that a model was unloaded.", "model")
        self.crashes = self._counter("model_crashes", "Times that a model's process ended by itself.", "model")
        self.is_loaded = self._gauge("model_loaded", "1 while the model is loaded.", "model")
        self.memory = self._gauge("model_memory_bytes", "Resident memory of the model's process.", "model")
        self.hit_share = self._gauge(
            "prefix_hit_share", "Share of prompt tokens found in the cache since the model was loaded.", "model"
        )
        self._engine_gauges = {field: self._gauge(name, text, "model") for field, (name, text) in ENGINE_GAUGES.items()}
        self._engine_counters = {
            field: self._counter(name, text, "model") for field, (name, text) in ENGINE_COUNTERS.items()
        }
        build = self._gauge("build_info", "What runs here.", "version", "python")
        build.labels(__version__, platform.python_version()).set(1)
        ProcessCollector(registry=self.registry)
        for name in self._models:  # a series that begins at 0 shows its first event as a rise
            for metric in (self.loads, self.unloads, self.crashes, self.is_loaded, self.in_flight):
                metric.labels(name)

    def http_ended(self, method: str, route: str, status: int, seconds: float, code: str | None = None) -> None:
        """Any HTTP request has ended.

        Args:
            route: template of the path, as ``/v1/models/{model}``; never the path.
            code: of the error, if it failed.
        """
        self.http_requests.labels(method if method in METHODS else OTHER, route, str(status)).inc()
        self.http_seconds.labels(route).observe(seconds)
        if code is not None:
            self.errors.labels(code if re.fullmatch("[a-z_]{1,40}", code) else OTHER).inc()

    def request_begun(self, model: str, route: str) -> None:
        """A request to a model has been admitted."""
        self.in_flight.labels(self._known(model)).inc()

    def first_token(self, model: str, seconds: float) -> None:
        """The first token of a request is there, so long after the request."""
        self.first_token_seconds.labels(self._known(model)).observe(seconds)

    def tokens(self, model: str, n: int, gap_seconds: float) -> None:
        """``n`` further tokens of an answer have come, so long after those before."""
        histogram = self.gap_seconds.labels(self._known(model))
        for _ in range(n):
            histogram.observe(gap_seconds / n)

    def request_ended(self, model: str, route: str, status: int, usage: TokenUsage | None, seconds: float) -> None:
        """A request for which :meth:`request_begun` was called has ended, in whatever way."""
        model = self._known(model)
        self.in_flight.labels(model).dec()
        self.requests.labels(model, route, str(status)).inc()
        self.request_seconds.labels(model, route).observe(seconds)
        if usage is not None:
            self.prompt_tokens.labels(model).inc(usage.prompt_tokens)
            self.cached_tokens.labels(model).inc(usage.cached_tokens)
            self.completion_tokens.labels(model).inc(usage.completion_tokens)

    def aborted(self, model: str, reason: str) -> None:
        """A request was ended early: "disconnect", "deadline" or "drain"."""
        self.aborts.labels(self._known(model), reason if reason in ABORT_REASONS else OTHER).inc()

    def watch_memory(self, model: str, read: Callable[[], float]) -> None:
        """``read`` tells the resident bytes of a model's process (0: there is none) whenever the metrics are read."""
        self.memory.labels(self._known(model)).set_function(read)

    def engine(self, model: str, stats: Mapping[str, float]) -> None:
        """What the engine of a model tells of itself.

        Args:
            stats: fields of :class:`~danlu.engine.engine.EngineStats`. Its counters start at 0 with each process; a
                fall shows that it is another one.
        """
        model = self._known(model)
        told = self._told.setdefault(model, {})
        for field, gauge in self._engine_gauges.items():
            if field in stats:
                gauge.labels(model).set(stats[field])
        for field, counter in self._engine_counters.items():
            if field in stats:
                before = told.get(field, 0.0)
                counter.labels(model).inc(stats[field] - before if stats[field] >= before else stats[field])
                told[field] = stats[field]
        if told.get("prompt_tokens"):
            self.hit_share.labels(model).set(told.get("cached_tokens", 0.0) / told["prompt_tokens"])

    def loaded(self, model: str) -> None:
        """A process has loaded a model."""
        model = self._known(model)
        self.loads.labels(model).inc()
        self.is_loaded.labels(model).set(1)

    def unloaded(self, model: str) -> None:
        """The process of a model was ended."""
        self.unloads.labels(self._known(model)).inc()
        self._gone(self._known(model))

    def crashed(self, model: str) -> None:
        """The process of a model has ended by itself."""
        self.crashes.labels(self._known(model)).inc()
        self._gone(self._known(model))

    def _gone(self, model: str) -> None:
        self._told.pop(model, None)
        self.is_loaded.labels(model).set(0)
        for gauge in (self.hit_share, *self._engine_gauges.values()):
            gauge.labels(model).set(0)

    def _known(self, model: str) -> str:
        return model if model in self._models else OTHER

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"danlu_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"danlu_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"danlu_{name}", text, labels, registry=self.registry, buckets=buckets)


TEXT = {"schema": {"type": "string"}}

router = APIRouter(tags=["operation"])


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {
            "description": "In Prometheus' text format, or in OpenMetrics where it is asked for.",
            "content": {"text/plain": TEXT, "application/openmetrics-text": TEXT},
        },
        **documented(),
    },
)
async def metrics(request: Request) -> Response:
    """Counters, gauges and histograms of the server and its models."""
    found: Metrics = request.app.state.metrics
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(found.registry), headers={"content-type": content_type})
