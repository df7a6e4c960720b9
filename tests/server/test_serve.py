"""`danlu serve` from start to end: real processes, real sockets, real signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_process import ServerProcess

from danlu.errors import DanluError
from danlu.server.config import ServeConfig
from danlu.server.key_file import Limits, add_key
from danlu.server.serve import serve

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True}
client = httpx.Client(trust_env=False, timeout=30)


@pytest.fixture
def start(model_folder: Path, tmp_path: Path) -> Iterator[Any]:
    """Starts servers; what is left of them ends with the test."""
    started: list[ServerProcess] = []

    def start_one(*arguments: str | Path, model: str | Path = model_folder, **env: str) -> ServerProcess:
        server = ServerProcess(f"--model=tiny={model}", *arguments, data=tmp_path / "data", env=env)
        started.append(server)
        return server

    yield start_one
    for server in started:
        if server.process.poll() is None:
            server.kill()


def workers(server: ServerProcess) -> list[int]:
    """Its child processes."""
    pid = server.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(condition: Any, seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.02)


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids if Path(f"/proc/{pid}").exists())


class Stream:
    """A streamed answer, read by a thread."""

    def __init__(self, url: str, n: int, max_tokens: int) -> None:
        self.events: list[str] = []
        self.error: Exception | None = None
        body = {**CHAT, "n": n, "max_tokens": max_tokens, "temperature": 0}
        self._thread = threading.Thread(target=self._read, args=(url, body), daemon=True)
        self._thread.start()
        wait_until(lambda: len(self.events) > 2 or not self._thread.is_alive())

    def _read(self, url: str, body: dict[str, Any]) -> None:
        try:
            with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
                self.events += [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
        except httpx.HTTPError as error:
            self.error = error

    def end(self) -> list[str]:
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.events


# ------------------------------------------------------------------------------------------------ what is refused


def test_a_server_without_keys_is_for_this_machine_alone(tmp_path: Path) -> None:
    with pytest.raises(DanluError, match=r"danlu keys create(?s:.*)--public-without-keys"):
        serve(ServeConfig(host="0.0.0.0", port=0, data=tmp_path))


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(DanluError, match=rf"{port}(?s:.*)in use(?s:.*)--port"):
            serve(ServeConfig(port=port, data=tmp_path))


def test_what_is_no_model_is_told_before_it_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DanluError, match="nonsense"):
        serve(ServeConfig(model=("smollm2", "other=./nonsense"), port=0, data=tmp_path))


def test_a_data_folder_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DanluError, match="--data"):
        serve(ServeConfig(port=0, data=tmp_path / "file"))


def test_a_host_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(DanluError, match="host"):
        serve(ServeConfig(host="no such host", port=0, data=tmp_path, public_without_keys=True))


def test_the_command_line_tells_mistakes_in_a_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "danlu", "serve", "--host", "0.0.0.0", "--data", tmp_path],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: host: 0.0.0.0")
    assert done.stderr.count("\n") == 1


def test_a_first_model_that_cannot_be_loaded_ends_the_server(start: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    server = start(model=broken)
    assert server.process.wait(60) == 2
    wait_until(lambda: "error: " in server.log)
    assert "broken.gguf" in server.log
    assert "Traceback" not in server.log


# ------------------------------------------------------------------------------------------------ start


def test_it_answers_while_it_loads_and_says_when_it_is_ready(start: Any) -> None:
    server = start().wait_until_listening()
    live = client.get(f"{server.url}/health/live")
    early = client.get(f"{server.url}/health/ready")
    assert (live.status_code, live.json()) == (200, {"status": "alive"})
    assert (early.status_code, early.json()) == (503, {"status": "loading", "models": 1, "loaded": 0})
    server.wait_until_ready()
    for path in ("/health/ready", "/health"):
        ready = client.get(server.url + path)
        assert (ready.status_code, ready.json()) == (200, {"status": "ready", "models": 1, "loaded": 1})
        head = client.head(server.url + path)
        assert (head.status_code, head.content) == (200, b"")
    assert client.head(f"{server.url}/health/live").status_code == 200
    for told in (f"page  {server.url}/", f"API   {server.url}/v1", "Ctrl-C stops it"):
        assert told in server.log


def test_the_front_holds_no_torch_and_no_numpy(tiny_server: ServerProcess) -> None:
    maps = Path(f"/proc/{tiny_server.process.pid}/maps").read_text()
    assert "libpython" in maps or "python" in maps
    assert "torch" not in maps
    assert "numpy" not in maps
    (worker,) = workers(tiny_server)
    assert "torch" in Path(f"/proc/{worker}/maps").read_text()


def test_with_keys_it_may_be_public_and_health_needs_none(start: Any, tmp_path: Path) -> None:
    _, secret = add_key(tmp_path / "data" / "keys.json", "ann", limits=Limits())
    server = start("--host", "0.0.0.0").wait_until_ready()
    assert "http://127.0.0.1:" in server.url
    for path in ("/v1/models", "/metrics"):
        assert client.get(server.url + path).status_code == 401
        assert client.get(server.url + path, headers={"Authorization": f"Bearer {secret}"}).status_code == 200
    assert client.get(f"{server.url}/health/live").status_code == 200
    assert secret not in server.log
    assert "key=ann" in server.log


def test_localhost_is_all_of_its_addresses(start: Any) -> None:
    server = start("--host", "localhost").wait_until_listening()
    port = int(server.url.rpartition(":")[2])
    addresses = {address[0] for *_, address in socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM)}
    for address in addresses:
        with socket.create_connection((address, port)) as one:
            one.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert one.recv(100).startswith(b"HTTP/1.1 200")


def test_systemd_is_told(start: Any, tmp_path: Path) -> None:
    address = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(address))
        systemd.settimeout(60)
        server = start(NOTIFY_SOCKET=str(address))
        assert systemd.recv(100) == b"READY=1"
        server.wait_until_ready()
        assert server.stop() == 0
        assert systemd.recv(100) == b"STOPPING=1"


# ------------------------------------------------------------------------------------------------ logs and metrics


def test_a_log_in_json_is_json_to_the_last_line(start: Any, model_folder: Path) -> None:
    server = start("--log-format=json", "--max-running=8").wait_until_ready()
    Stream(server.url, 1, 8).end()
    client.get(f"{server.url}/%0aforged\x1b", params={"key": "sekrit"})
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as garbage:
        garbage.sendall(b"\x00\x01\r\n\r\n")
        garbage.recv(1000)
    os.kill(workers(server)[0], signal.SIGKILL)
    wait_until(lambda: "ended by itself" in server.log)
    assert server.stop() == 0
    lines = [json.loads(line) for line in server.lines]
    assert {"time", "level", "logger", "message"} <= set.intersection(*map(set, lines))
    (line,) = [line for line in lines if line.get("route") == "/v1/chat/completions"]
    assert (line["model"], line["key"], line["completion_tokens"], line["finish"]) == ("tiny", "local", 8, "length")
    assert line["ttft_ms"] > 0
    assert line["request_id"]
    assert "prompt" not in line
    assert "sekrit" not in server.log


def test_what_was_asked_is_logged_only_if_that_is_wanted(start: Any, tiny_server: ServerProcess) -> None:
    body = {**CHAT, "stream": False, "max_tokens": 2, "messages": [{"role": "user", "content": "my secret wish"}]}
    server = start("--log-prompts").wait_until_ready()
    for one in (server, tiny_server):
        assert client.post(f"{one.url}/v1/chat/completions", json=body).status_code == 200
        wait_until(lambda one=one: "completion_tokens=2" in one.log)
    assert "my secret wish" in server.log
    assert "my secret wish" not in tiny_server.log


def test_metrics_tell_what_the_server_does(start: Any) -> None:
    server = start().wait_until_ready()

    def metric(name: str, **labels: str) -> float | None:
        from prometheus_client.parser import text_string_to_metric_families

        for family in text_string_to_metric_families(client.get(f"{server.url}/metrics").text):
            for sample in family.samples:
                if sample.name == f"danlu_{name}" and labels.items() <= sample.labels.items():
                    return sample.value
        return None

    Stream(server.url, 2, 10).end()
    route = "/v1/chat/completions"
    wait_until(lambda: metric("requests_total", model="tiny", route=route, status="200") == 1)
    assert metric("completion_tokens_total", model="tiny") == 20
    assert metric("engine_new_tokens_total", model="tiny") == 20
    assert metric("time_to_first_token_seconds_count", model="tiny") == 1
    assert metric("inter_token_seconds_count", model="tiny") == 18
    assert (metric("running", model="tiny"), metric("queue", model="tiny")) == (0, 0)
    assert metric("cache_blocks_used", model="tiny") == 0
    assert metric("model_loaded", model="tiny") == 1
    assert (metric("model_memory_bytes", model="tiny") or 0) > 50e6
    assert client.post(f"{server.url}/v1/chat/completions", json={**CHAT, "model": "x" * 50}).status_code == 404
    assert metric("errors_total", code="model_not_found") == 1
    with client.stream("POST", server.url + route, json={**CHAT, "n": 8, "max_tokens": 3000}) as response:
        next(response.iter_lines())
    wait_until(lambda: metric("aborts_total", model="tiny", reason="disconnect") == 1)
    wait_until(lambda: (metric("running", model="tiny"), metric("requests_in_flight", model="tiny")) == (0, 0))
    os.kill(workers(server)[0], signal.SIGKILL)
    wait_until(lambda: metric("model_crashes_total", model="tiny") == 1)
    assert metric("model_memory_bytes", model="tiny") == 0
    assert client.get(f"{server.url}/health/ready").status_code == 200
    Stream(server.url, 1, 5).end()
    assert metric("engine_new_tokens_total", model="tiny") >= 25
    assert metric("model_loads_total", model="tiny") == 2


# ------------------------------------------------------------------------------------------------ the end


def test_sigterm_lets_what_runs_end_and_nothing_new_in(start: Any) -> None:
    server = start("--drain", "25").wait_until_ready()
    pids = workers(server)
    stream = Stream(server.url, 16, 1500)
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: client.get(f"{server.url}/health/ready").status_code == 503)
    assert client.get(f"{server.url}/health/ready").json()["status"] == "draining"
    assert client.get(f"{server.url}/health/live").status_code == 200
    refused = client.post(f"{server.url}/v1/chat/completions", json=CHAT)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert refused.json()["error"]["code"] == "shutting_down"
    events = stream.end()
    assert events[-1] == "[DONE]"
    reasons = [json.loads(event)["choices"][0]["finish_reason"] for event in events[:-1]]
    assert reasons.count("length") == 16
    assert server.stop() == 0
    assert gone(pids)
    assert "Traceback" not in server.log


def test_what_takes_longer_than_the_drain_ends_with_an_error(start: Any) -> None:
    server = start("--drain", "0.3").wait_until_ready()
    pids = workers(server)
    stream = Stream(server.url, 32, 3500)
    begun = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - begun < 6
    events = stream.end()
    assert stream.error is None
    error = next(json.loads(event)["error"] for event in events if '"error"' in event)
    assert error["code"] == "shutting_down"
    assert gone(pids)
    assert "Traceback" not in server.log


@pytest.mark.parametrize("when", ["idle", "loading"])
def test_ctrl_c_ends_it_and_says_so(start: Any, when: str) -> None:
    server = start().wait_until_listening()
    if when == "idle":
        server.wait_until_ready()
    wait_until(lambda: workers(server))
    pids = workers(server)
    assert server.stop(signal.SIGINT) == 130
    assert server.log.endswith("interrupted\n")
    assert "Traceback" not in server.log
    wait_until(lambda: gone(pids))


def test_a_second_signal_ends_it_at_once(start: Any) -> None:
    server = start("--drain", "600").wait_until_ready()
    pids = workers(server)
    Stream(server.url, 32, 3500)
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "ending: " in server.log)
    begun = time.monotonic()
    assert server.stop() != 0
    assert time.monotonic() - begun < 2
    wait_until(lambda: gone(pids))


@pytest.mark.parametrize("when", ["idle", "busy", "loading", "stopped"])
def test_no_process_outlives_a_server_that_is_killed(start: Any, when: str) -> None:
    server = start().wait_until_listening()
    wait_until(lambda: workers(server))
    pids = workers(server)
    if when != "loading":
        server.wait_until_ready()
    if when == "busy":
        Stream(server.url, 32, 3500)
    if when == "stopped":  # it cannot see that its socket was closed
        os.kill(pids[0], signal.SIGSTOP)
    server.kill()
    try:
        wait_until(lambda: gone(pids))
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
