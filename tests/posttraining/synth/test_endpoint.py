"""Endpoints that answer, and those that do not: each kind of rubbish is a counted failure with its reason."""

from __future__ import annotations

import contextlib
import email.utils
import json
import socket
import time
from collections.abc import Sequence
from http.client import HTTPMessage
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_endpoint import Reply, Script, answer, endpoint, error, user

from danlu.config import load
from danlu.errors import DanluError
from danlu.posttraining.synth import endpoint as module
from danlu.posttraining.synth.config import SynthConfig
from danlu.posttraining.synth.endpoint import (
    EndpointTeacher,
    RowError,
    TryAgain,
    completions_url,
    read_answer,
    retry_after,
)
from danlu.posttraining.synth.jobs import Answer, Failure, Job


def config(url: str, **changes: Any) -> SynthConfig:
    values = {"teacher": url, "model": "m", "out": "out", "data": "data", "retry_wait": 0.01, "timeout": 5, **changes}
    return load(SynthConfig, values=values)


def jobs(*questions: str) -> list[Job]:
    return [Job([{"role": "user", "content": q}], i, f"row {i}") for i, q in enumerate(questions)]


def ask(script: Script, asked: Sequence[Job], **changes: Any) -> tuple[dict[str, Answer | Failure], list[Any]]:
    found: dict[str, Answer | Failure] = {}
    with endpoint(script) as server, EndpointTeacher(config(server.url, **changes)) as teacher:
        teacher.answer(asked, lambda job, outcome: found.update({str(job.messages[-1]["content"]): outcome}))
    return found, server.requests


def test_asks_as_the_api_has_it_and_delivers_each_answer_to_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", "sk-secret")
    questions = [f"question {i}" for i in range(30)]
    found, requests = ask(
        lambda body, _: answer(user(body).upper()),
        jobs(*questions),
        api_key_env="THE_KEY",
        temperature=0.3,
        body={"min_p": 0.1, "seed": None},
    )
    assert found == {q: Answer(q.upper(), "stop", 7, 5) for q in questions}
    path, headers, body = requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer sk-secret"
    assert (body["model"], body["temperature"], body["max_tokens"], body["min_p"]) == ("m", 0.3, 1024, 0.1)
    assert "seed" not in body


def test_tries_again_what_failed_for_now_and_waits_as_long_as_it_is_told() -> None:
    def script(body: dict[str, Any], before: int) -> Reply:
        if before == 0:
            return error(429, headers={"Retry-After": "0.5"})
        return error(503) if before == 1 else answer("at last")

    started = time.monotonic()
    found, requests = ask(script, jobs("a"))
    assert found["a"] == Answer("at last", "stop", 7, 5)
    assert len(requests) == 3
    assert time.monotonic() - started >= 0.5


@pytest.mark.parametrize(
    ("reply", "reason", "tries"),
    [
        (error(500, "out of order"), "500 Internal Server Error: out of order", 3),
        ((200, {}, b"<html>Bad gateway</html>"), "HTML", 3),
        ((200, {}, b"hello"), "no JSON", 3),
        ((200, {}, b"[" * 100_000), "no JSON", 3),
        ((200, {}, b'["a"]'), "without choices", 3),
        ((200, {}, b"{}"), "no choices", 3),
        ((200, {}, b'{"choices": [null]}'), "no choices", 3),
        ((200, {"Content-Length": "1000"}, b'{"choices": ['), "no JSON", 3),
        ((200, {}, b'{"error": {"message": "no model is loaded"}}'), "no model is loaded", 3),
        (answer(None), "the answer is empty", 1),
        (answer("  "), "the answer is empty", 1),
        (answer(None, refusal="not that"), "refuses: not that", 1),
        (answer("", tool_calls=[{"id": "1"}]), "calls a tool", 1),
        (answer("\ud800"), "surrogate", 1),
        (error(400, "the prompt is too long"), "the prompt is too long", 1),
    ],
)
def test_rubbish_is_a_failure_that_says_why(reply: Reply, reason: str, tries: int) -> None:
    found, requests = ask(lambda body, _: answer("fine") if user(body) == "b" else reply, jobs("a", "b"), retries=2)
    assert found["b"] == Answer("fine", "stop", 7, 5)
    failure = found["a"]
    assert isinstance(failure, Failure)
    assert reason in failure.reason
    assert len([r for r in requests if user(r[2]) == "a"]) == tries


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (error(401, "wrong key sk-secret"), r"401.*wrong key \*\*\*; look at the key in THE_KEY"),
        (error(404, "no such model"), "404.*no such model.*model 'm'"),
        (error(429, code="insufficient_quota"), "no credit left"),
        (error(302, headers={"Location": "/elsewhere"}), "302.*URL of the teacher"),
    ],
)
def test_what_no_waiting_mends_ends_the_run(reply: Reply, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", "sk-secret")
    with pytest.raises(DanluError, match=reason):
        ask(lambda body, _: reply, jobs("a"), api_key_env="THE_KEY")


def test_time_is_limited_also_for_an_answer_that_drips(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(body: dict[str, Any], before: int) -> Reply:
        time.sleep(0.6)
        return answer("late")

    found, _ = ask(never, jobs("a"), timeout=0.2, retries=0)
    assert found["a"] == Failure("no answer within 0.2 seconds")

    class Dripping:
        def read1(self, n: int) -> bytes:
            time.sleep(0.02)
            return b" "

    with pytest.raises(TimeoutError):
        module._read(Dripping(), time.monotonic() + 0.1)


def test_a_response_without_end_is_not_read_to_its_end() -> None:
    class Endless:
        def read1(self, n: int) -> bytes:
            return b" " * n

    with pytest.raises(TryAgain, match="bytes"):
        module._read(Endless(), time.monotonic() + 60)


def test_nobody_there_is_told_as_such() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        found: list[Answer | Failure] = []
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        EndpointTeacher(config(url, retries=1)).answer(jobs("a"), lambda job, outcome: found.append(outcome))
    (failure,) = found
    assert isinstance(failure, Failure)
    assert failure.unreachable
    assert "refused" in failure.reason
    assert "2 tries" in failure.reason


def test_an_error_of_who_listens_ends_the_asking() -> None:
    def deliver(job: Job, outcome: Answer | Failure) -> None:
        raise DanluError("enough")

    with endpoint(lambda body, _: answer("x")) as server, pytest.raises(DanluError, match="enough"):
        EndpointTeacher(config(server.url, concurrency=1)).answer(jobs(*map(str, range(500))), deliver)
    assert len(server.requests) < 400


def test_thoughts_told_apart_stay_apart_and_a_cut_off_thought_is_an_answer_that_was_cut_off() -> None:
    assert read_answer(answer("42", reasoning_content="17 + 25")[2]).message == {
        "role": "assistant",
        "content": "42",
        "reasoning_content": "17 + 25",
    }
    assert read_answer(answer(None, "length")[2]) == Answer("", "length", 7, 5)


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda x: (
            st.lists(x)
            | st.dictionaries(
                st.sampled_from(["choices", "message", "content", "usage", "finish_reason", "error", "prompt_tokens"]),
                x,
            )
        ),
    )
)
def test_any_json_is_an_answer_or_a_reason(body: Any) -> None:
    with contextlib.suppress(TryAgain, RowError):
        assert isinstance(read_answer(json.dumps(body).encode()).text, str)


def test_addresses_as_people_give_them() -> None:
    whole = "http://host:8000/v1/chat/completions"
    for url in ("http://host:8000", "http://host:8000/", "http://host:8000/v1", "http://host:8000/v1/", whole):
        assert completions_url(url) == whole
    assert completions_url("https://host/openai/deployments/x") == "https://host/openai/deployments/x/chat/completions"


def test_retry_after_is_read_in_both_forms() -> None:
    def after(value: str) -> float | None:
        headers = HTTPMessage()
        headers["Retry-After"] = value
        return retry_after(headers)

    assert after("3") == 3
    assert after("-3") == 0
    soon = after(email.utils.formatdate(time.time() + 30, usegmt=True))
    assert soon is not None
    assert 27 < soon <= 30
    assert [after(value) for value in ("", "soon", "nan", "inf")] == [None] * 4


def test_a_key_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("THE_KEY", raising=False)
    with pytest.raises(DanluError, match="THE_KEY is not set"):
        EndpointTeacher(config("http://host", api_key_env="THE_KEY"))
