"""Keys, limits, usage and the login on a real server, with the official client and the real verbs."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from guarded_app import bearer, make_key
from server_process import ServerProcess

from danlu import KeysUsageConfig, keys_usage
from danlu.server.access.key_file import Limits, add_key
from danlu.server.access.sessions import COOKIE


@pytest.fixture(scope="module")
def served(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Two names of the tiny model; the keys are made before it starts."""
    data = tmp_path_factory.mktemp("keys-served")
    models = (f"--model=tiny={model_folder}", f"--model=other={model_folder}")
    make_key(data, "first")
    server = ServerProcess(*models, data=data)
    try:
        yield server.wait_until_ready()
    finally:
        server.kill()


def get(served: ServerProcess, path: str, headers: dict[str, str]) -> httpx.Response:
    return httpx.get(f"{served.url}{path}", headers=headers, trust_env=False, timeout=60)


def client_of(served: ServerProcess, name: str, models: tuple[str, ...] | None = None, **limits: int) -> openai.OpenAI:
    """The official client with a new key, which the server knows."""
    _, secret = add_key(served.data / "keys.json", name, models=models, limits=Limits(**limits))
    time.sleep(1)  # within which the server has seen it; to try sooner would be to send wrong keys
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=secret, http_client=httpx.Client(trust_env=False))


def complete(client: openai.OpenAI, max_tokens: int = 8, model: str = "tiny") -> openai.types.Completion:
    return client.completions.create(model=model, prompt="def f1(x):", max_tokens=max_tokens)


def test_what_is_used_is_counted_and_survives_kill(served: ServerProcess) -> None:
    client = client_of(served, "counted")
    told = [complete(client).usage for _ in range(3)]
    sums = {
        "requests": 3,
        "prompt_tokens": sum(usage.prompt_tokens for usage in told if usage),
        "completion_tokens": sum(usage.completion_tokens for usage in told if usage),
    }
    own = get(served, "/api/usage", bearer(client.api_key)).json()
    assert own["key"] == "counted"
    assert sums.items() <= own["total"].items()
    rows = {row["name"]: row for row in keys_usage(KeysUsageConfig(data=served.data, json=True))}
    assert sums.items() <= rows["counted"]["today"].items()


def test_a_daily_quota_ends_and_the_client_does_not_try_again(served: ServerProcess) -> None:
    client = client_of(served, "bounded", tokens_per_day=60)
    error, used = None, []
    while error is None:
        try:
            used.append(complete(client, max_tokens=10).usage)
        except openai.RateLimitError as refusal:
            error = refusal
    assert error.code == "insufficient_quota"
    rows = {row["name"]: row["total"] for row in keys_usage(KeysUsageConfig(data=served.data, json=True))}
    counted = rows["bounded"]["prompt_tokens"] + rows["bounded"]["completion_tokens"]
    assert counted == sum(usage.total_tokens for usage in used if usage)
    # The length of a prompt is guessed when it is let in; of an answer, nothing more is written than there is room for.
    last = used[-1]
    assert last is not None
    assert 60 - 10 - last.prompt_tokens <= counted <= 60 + last.prompt_tokens


def test_requests_a_minute_are_held(served: ServerProcess) -> None:
    client = client_of(served, "slow", requests_per_minute=2).with_options(max_retries=0)
    answer = client.completions.with_raw_response.create(model="tiny", prompt="x", max_tokens=1)
    assert answer.headers["x-ratelimit-limit-requests"] == "2"
    assert answer.headers["x-ratelimit-remaining-requests"] == "1"
    complete(client)
    with pytest.raises(openai.RateLimitError) as error:
        complete(client)
    assert error.value.code == "rate_limit_exceeded"
    assert 1 <= int(error.value.response.headers["retry-after"]) <= 60


def test_a_key_for_one_model_sees_no_other(served: ServerProcess) -> None:
    client = client_of(served, "narrow", models=("other",))
    assert [model.id for model in client.models.list()] == ["other"]
    complete(client, model="other")
    with pytest.raises(openai.NotFoundError):
        complete(client)


def test_revoking_works_while_the_server_runs(served: ServerProcess) -> None:
    client = client_of(served, "leaked")
    complete(client)
    command = [sys.executable, "-m", "danlu", "keys", "revoke", "leaked", "--data", str(served.data)]
    subprocess.run(command, check=True, capture_output=True)
    time.sleep(1)
    with pytest.raises(openai.AuthenticationError):
        complete(client)


def test_a_login_outlives_a_server_that_is_killed(served: ServerProcess, model_folder: Path) -> None:
    """As does what was used; this test ends the server, so it is the last."""
    key = client_of(served, "browser").api_key
    with httpx.Client(base_url=served.url, trust_env=False, timeout=60) as browser:
        assert browser.get("/", headers={"Accept": "text/html"}).status_code == 401
        assert browser.post("/login", data={"key": key}).status_code == 303
        assert browser.get("/", headers={"Accept": "text/html"}).status_code == 200
        assert browser.get("/v1/models").status_code == 200
        cookie = {"Cookie": f"{COOKIE}={browser.cookies[COOKIE]}"}
    before = keys_usage(KeysUsageConfig(data=served.data, json=True))
    served.kill()
    again = ServerProcess(f"--model=tiny={model_folder}", data=served.data)
    try:
        again.wait_until_listening()
        assert get(again, "/v1/models", cookie).status_code == 200
        assert keys_usage(KeysUsageConfig(data=served.data, json=True)) == before
    finally:
        again.stop()
