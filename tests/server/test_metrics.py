"""Prometheus' metrics: read back with the parsers of prometheus_client, the reference for both formats."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from danlu.server.operation.metrics import Metrics, router


@dataclass
class Cost:
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"danlu_{name}", labels)


def stats(**more: float) -> dict[str, float]:
    zero = dict.fromkeys(("steps", "prompt_tokens", "cached_tokens", "new_tokens", "preemptions", "drafted"), 0.0)
    return {**zero, "accepted": 0.0, "running": 0.0, "waiting": 0.0, **more}


def test_a_request_is_counted_once_with_its_tokens_and_times() -> None:
    metrics = Metrics(["m"])
    metrics.request_begun("m", "/v1/chat/completions")
    assert value(metrics, "requests_in_flight", model="m") == 1
    metrics.first_token("m", 0.2)
    metrics.tokens("m", 4, 0.4)
    metrics.request_ended("m", "/v1/chat/completions", 200, Cost(10, 4, 5), 0.7)
    assert value(metrics, "requests_in_flight", model="m") == 0
    assert value(metrics, "requests_total", model="m", route="/v1/chat/completions", status="200") == 1
    assert [value(metrics, f"{name}_total", model="m") for name in
            ("prompt_tokens", "cached_prompt_tokens", "completion_tokens")] == [10, 4, 5]  # fmt: skip
    assert value(metrics, "inter_token_seconds_count", model="m") == 4
    assert value(metrics, "inter_token_seconds_sum", model="m") == pytest.approx(0.4)
    assert value(metrics, "inter_token_seconds_bucket", model="m", le="0.1") == 4
    assert value(metrics, "time_to_first_token_seconds_bucket", model="m", le="0.1") == 0
    assert value(metrics, "time_to_first_token_seconds_bucket", model="m", le="0.25") == 1


@given(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=5), min_size=1, max_size=4))
def test_counters_of_processes_that_come_and_go_add_up(lives: list[list[int]]) -> None:
    """Each process tells running totals from 0; the counter is the sum over all of them."""
    metrics = Metrics(["m"])
    for number, steps in enumerate(lives):
        total = 0
        metrics.loaded("m")
        for step in steps:
            total += step
            metrics.engine("m", stats(new_tokens=total))
        (metrics.crashed if number % 2 else metrics.unloaded)("m")
    assert value(metrics, "engine_new_tokens_total", model="m") == sum(map(sum, lives))
    assert value(metrics, "model_loads_total", model="m") == len(lives)
    crashes, unloads = (value(metrics, f"model_{name}_total", model="m") or 0 for name in ("crashes", "unloads"))
    assert (crashes, unloads) == (len(lives) // 2, len(lives) - len(lives) // 2)


def test_a_fall_of_a_counter_is_a_new_process_even_if_nobody_said_so() -> None:
    metrics = Metrics(["m"])
    for total in (5, 9, 3, 3):
        metrics.engine("m", stats(preemptions=total))
    assert value(metrics, "preemptions_total", model="m") == 9 + 3


def test_what_a_gone_process_held_is_not_shown_any_more() -> None:
    metrics = Metrics(["m"])
    held = 1000.0
    metrics.watch_memory("m", lambda: held)
    metrics.loaded("m")
    metrics.engine("m", stats(running=3, waiting=2, prompt_tokens=10, cached_tokens=4))
    shown = ("running", "queue", "prefix_hit_share", "model_loaded", "model_memory_bytes")
    assert [value(metrics, name, model="m") for name in shown] == [3, 2, 0.4, 1, 1000]
    held = 0
    metrics.crashed("m")
    assert [value(metrics, name, model="m") for name in shown] == [0, 0, 0, 0, 0]


@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20), st.text(max_size=20))
def test_clients_cannot_make_new_time_series(model: str, method: str, reason: str, code: str) -> None:
    metrics = Metrics(["m"])
    metrics.request_begun(model, "/r")
    metrics.request_ended(model, "/r", 200, None, 0.1)
    metrics.aborted(model, reason)
    metrics.http_ended(method, "/r", 200, 0.1, code.upper() + "!")
    known = {
        "m",
        "other",
        "GET",
        "HEAD",
        "POST",
        "PUT",
        "PATCH",
        "DELETE",
        "OPTIONS",
        "disconnect",
        "deadline",
        "drain",
    }
    labels = ("model", "method", "reason", "code")
    found = {
        sample.labels[name]
        for family in metrics.registry.collect()
        for sample in family.samples
        for name in labels
        if name in sample.labels
    }
    assert found <= known


def test_two_servers_of_one_process_do_not_share_numbers() -> None:
    one, other = Metrics(["m"]), Metrics(["m"])
    one.loaded("m")
    assert value(other, "model_loads_total", model="m") == 0


async def scrape(app: FastAPI, accept: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return await client.get("/metrics", headers={"accept": accept} if accept else {})


@pytest.mark.parametrize(
    "accept", ["", "*/*", "application/openmetrics-text; version=1.0.0", "text/plain;version=0.0.4"]
)
def test_the_route_speaks_both_formats(accept: str) -> None:
    app = FastAPI()
    app.include_router(router)
    app.state.metrics = metrics = Metrics(["m"])
    metrics.http_ended("GET", "/v1/models/{model}", 404, 0.01, "model_not_found")
    response = asyncio.run(scrape(app, accept))
    open_metrics = "openmetrics" in accept
    assert response.headers["content-type"].startswith(
        "application/openmetrics-text" if open_metrics else "text/plain; version=0.0.4"
    )
    parse = parse_openmetrics if open_metrics else parse_text
    samples = {
        (sample.name, tuple(sample.labels.items())): sample.value
        for family in parse(response.text)
        for sample in family.samples
    }
    labels = (("method", "GET"), ("route", "/v1/models/{model}"), ("status", "404"))
    assert samples["danlu_http_requests_total", labels] == 1
    assert samples["danlu_errors_total", (("code", "model_not_found"),)] == 1
    assert any(name == "process_resident_memory_bytes" for name, _ in samples)
    assert any(name == "danlu_build_info" for name, _ in samples)
