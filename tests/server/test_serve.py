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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from otlp_collector import Collector, attributes, collecting
from prometheus_client.parser import text_string_to_metric_families
from server_process import ServerProcess

from danlu.errors import DanluError
from danlu.server.access.key_file import Limits, add_key
from danlu.server.config import ServeConfig
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


@dataclass
class Watched:
    """A server that says all it can, to systemd too; and what it answered before it was ready."""

    server: ServerProcess
    told_systemd: bytes
    collector: Collector
    early: list[httpx.Response]

    def metric(self, name: str, **labels: str) -> float | None:
        for family in text_string_to_metric_families(client.get(f"{self.server.url}/metrics").text):
            for sample in family.samples:
                if sample.name == f"danlu_{name}" and labels.items() <= sample.labels.items():
                    return sample.value
        return None

    def log_of(self, request_id: str) -> list[dict[str, Any]]:
        return [line for line in map(json.loads, self.server.lines) if line.get("request_id") == request_id]


@pytest.fixture(scope="module")
def watched(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    address = folder / "systemd"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd, collecting() as collector:
        systemd.bind(str(address))
        systemd.settimeout(60)
        options = ("--host=localhost", "--log-format=json", "--log-prompts", f"--traces={collector.url}")
        env = {"NOTIFY_SOCKET": str(address), "OTEL_BSP_SCHEDULE_DELAY": "100"}
        server = ServerProcess(f"--model=tiny={model_folder}", *options, data=folder / "data", env=env)
        try:
            server.wait_until_listening()
            early = [client.get(server.url + path) for path in ("/health/live", "/health/ready")]
            yield Watched(server.wait_until_ready(), systemd.recv(100), collector, early)
        finally:
            assert server.stop() == 0
        assert systemd.recv(100) == b"STOPPING=1"


def workers(server: ServerProcess) -> list[int]:
    """Its child processes."""
    pid = server.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(condition: Any, seconds: float = 60) -> None:
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
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        self.events.append(line[6:])
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


# ------------------------------------------------------------------------------------------------ what it says


def test_it_answers_while_it_loads_and_says_when_it_is_ready(watched: Watched) -> None:
    live, loading = watched.early
    assert (live.status_code, live.json()) == (200, {"status": "alive"})
    assert (loading.status_code, loading.json()) == (503, {"status": "loading", "models": 1, "loaded": 0})
    for path in ("/health/ready", "/health"):
        ready = client.get(watched.server.url + path)
        assert (ready.status_code, ready.json()) == (200, {"status": "ready", "models": 1, "loaded": 1})
    for path in ("/health/live", "/health/ready", "/health"):
        head = client.head(watched.server.url + path)
        assert (head.status_code, head.content) == (200, b"")
    assert watched.told_systemd == b"READY=1"


def test_the_front_holds_no_torch_and_no_numpy(watched: Watched) -> None:
    maps = Path(f"/proc/{watched.server.process.pid}/maps").read_text()
    assert "pydantic_core" in maps
    assert "torch" not in maps
    assert "numpy" not in maps


def test_localhost_is_all_of_its_addresses(watched: Watched) -> None:
    port = int(watched.server.url.rpartition(":")[2])
    addresses = {address[0] for *_, address in socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM)}
    for address in addresses:
        with socket.create_connection((address, port)) as one:
            one.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert one.recv(100).startswith(b"HTTP/1.1 200")


def test_a_log_in_json_is_json_to_the_last_line(watched: Watched) -> None:
    url = watched.server.url
    body = {**CHAT, "stream": False, "max_tokens": 8, "ignore_eos": True}
    body["messages"] = [{"role": "user", "content": "a wish\n"}]
    client.post(f"{url}/v1/chat/completions", json=body, headers={"x-request-id": "wish"})
    client.get(f"{url}/%0aforged%1b", params={"key": "sekrit"}, headers={"x-request-id": "forged"})
    with socket.create_connection(("localhost", int(url.rpartition(":")[2]))) as garbage:
        garbage.sendall(b"\x00\x01\r\n\r\n")
        garbage.recv(1000)
    wait_until(lambda: watched.log_of("forged") and watched.log_of("wish"))
    (line,) = watched.log_of("wish")
    assert (line["model"], line["key"], line["completion_tokens"], line["finish"]) == ("tiny", "local", 8, "length")
    assert line["ttft_ms"] > 0
    assert "a wish\n" in json.dumps(line["prompt"], ensure_ascii=False).replace("\\n", "\n")
    assert len(line["answers"]) == 1
    assert watched.log_of("forged")[0]["path"] == "/\nforged\x1b"
    lines = [json.loads(line) for line in watched.server.lines]
    assert {"time", "level", "logger", "message"} <= set.intersection(*map(set, lines))
    assert "sekrit" not in watched.server.log


def test_a_log_without_prompts_has_none(tiny_server: ServerProcess) -> None:
    body = {**CHAT, "stream": False, "max_tokens": 2, "messages": [{"role": "user", "content": "my secret wish"}]}
    response = client.post(f"{tiny_server.url}/v1/chat/completions", json=body)
    wait_until(lambda: response.headers["x-request-id"] in tiny_server.log)
    assert "my secret wish" not in tiny_server.log


def test_traces_tell_what_the_engine_did(watched: Watched) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    body = {**CHAT, "stream": False, "max_tokens": 20, "temperature": 0}
    headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
    client.post(f"{watched.server.url}/v1/chat/completions", json=body, headers=headers)

    def spans() -> dict[str, Any]:
        return {span.name: span for span in watched.collector.spans if span.trace_id.hex() == trace}

    wait_until(lambda: len(spans()) == 4)
    server, *phases = (spans()[name] for name in ("POST /v1/chat/completions", "queue", "prefill", "decode"))
    found = attributes(server)
    assert (found["gen_ai.request.model"], found["gen_ai.usage.output_tokens"]) == ("tiny", 20)
    assert found["gen_ai.request.max_tokens"] == 20
    assert "hi" in found["gen_ai.input.messages"]
    times = [(phase.start_time_unix_nano, phase.end_time_unix_nano) for phase in phases]
    assert all(begin < end for begin, end in times)
    assert times[-1][0] < times[-1][1] <= server.end_time_unix_nano + 5_000_000  # clocks of two processes
    assert server.start_time_unix_nano <= times[0][0]


def test_metrics_tell_what_the_server_does(watched: Watched) -> None:
    route, tiny = "/v1/chat/completions", {"model": "tiny"}

    def counts() -> list[float]:
        names = ("completion_tokens_total", "engine_new_tokens_total", "time_to_first_token_seconds_count",
                 "inter_token_seconds_count")  # fmt: skip
        return [watched.metric(name, **tiny) or 0 for name in names]

    before = counts()
    Stream(watched.server.url, 2, 10).end()
    wait_until(lambda: [now - then for now, then in zip(counts(), before, strict=True)] == [20, 20, 1, 18])
    assert (watched.metric("requests_total", route=route, status="200", **tiny) or 0) >= 1
    for name in ("running", "queue", "requests_in_flight", "cache_blocks_used"):
        wait_until(lambda name=name: watched.metric(name, **tiny) == 0)
    assert watched.metric("model_loaded", **tiny) == 1
    assert (watched.metric("model_memory_bytes", **tiny) or 0) > 50e6
    assert client.post(watched.server.url + route, json={**CHAT, "model": "x" * 50}).status_code == 404
    assert watched.metric("errors_total", code="model_not_found") == 1

    with client.stream("POST", watched.server.url + route, json={**CHAT, "n": 8, "max_tokens": 3000}) as response:
        next(response.iter_lines())
    wait_until(lambda: watched.metric("aborts_total", reason="disconnect", **tiny) == 1)
    wait_until(lambda: (watched.metric("running", **tiny), watched.metric("requests_in_flight", **tiny)) == (0, 0))

    told = watched.metric("engine_new_tokens_total", **tiny) or 0
    os.kill(workers(watched.server)[0], signal.SIGKILL)
    wait_until(lambda: watched.metric("model_crashes_total", **tiny) == 1)
    assert watched.metric("model_memory_bytes", **tiny) == 0
    assert client.get(f"{watched.server.url}/health/ready").status_code == 200  # the next request loads it
    Stream(watched.server.url, 1, 5).end()
    wait_until(lambda: watched.metric("engine_new_tokens_total", **tiny) == told + 5)
    assert watched.metric("model_loads_total", **tiny) == 2


# ------------------------------------------------------------------------------------------------ the end


def test_sigterm_lets_what_runs_end_and_cuts_off_what_takes_too_long(start: Any) -> None:
    server = start("--drain=2").wait_until_ready()
    pids = workers(server)
    long, short = Stream(server.url, 16, 3900), Stream(server.url, 1, 60)
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: client.get(f"{server.url}/health/ready").status_code == 503)
    assert client.get(f"{server.url}/health/ready").json()["status"] == "draining"
    assert client.get(f"{server.url}/health/live").status_code == 200
    refused = client.post(f"{server.url}/v1/chat/completions", json=CHAT)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert refused.json()["error"]["code"] == "shutting_down"
    assert server.process.wait(60) == 0
    assert short.end()[-1] == "[DONE]"
    assert "length" in short.end()[-2]
    assert (long.error, short.error) == (None, None)
    error = next(json.loads(event)["error"] for event in long.end() if '"error"' in event)
    assert error["code"] == "shutting_down"
    assert gone(pids)
    assert "Traceback" not in server.log


def test_with_keys_it_may_be_public_and_ctrl_c_ends_it(start: Any, tmp_path: Path) -> None:
    _, secret = add_key(tmp_path / "data" / "keys.json", "ann", limits=Limits())
    server = start("--host=0.0.0.0").wait_until_listening()
    for path in ("/v1/models", "/metrics"):
        assert client.get(server.url + path).status_code == 401
        assert client.get(server.url + path, headers={"Authorization": f"Bearer {secret}"}).status_code == 200
    assert client.get(f"{server.url}/health/live").status_code == 200
    wait_until(lambda: "docs " in server.log and "key=ann" in server.log)
    for told in (f"page  {server.url}/", f"API   {server.url}/v1", "Ctrl-C stops it"):
        assert told in server.log
    assert server.url.startswith("http://127.0.0.1:")
    assert secret not in server.log
    pids = workers(server)
    assert server.stop(signal.SIGINT) == 130
    wait_until(lambda: server.log.endswith("interrupted\n"))
    assert "Traceback" not in server.log
    wait_until(lambda: gone(pids))


def test_a_hub_that_does_not_answer_does_not_keep_it_from_ending(start: Any, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hub:
        hub.settimeout(60)
        address = f"http://127.0.0.1:{hub.getsockname()[1]}"
        env = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "DANLU_HOME": str(tmp_path)}
        server = start(model="hf:some/model", **env).wait_until_listening()
        asked, _ = hub.accept()
        with asked:
            assert asked.recv(4)
            assert server.stop(seconds=10) == 0


def test_a_second_signal_ends_it_at_once(start: Any) -> None:
    server = start("--drain=600").wait_until_ready()
    pids = workers(server)
    Stream(server.url, 16, 3900)
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "ending: " in server.log)
    assert server.stop(seconds=5) == 128 + signal.SIGTERM
    wait_until(lambda: gone(pids))


@pytest.mark.parametrize("when", ["loading", "stopped"])
def test_no_process_outlives_a_server_that_is_killed(start: Any, when: str) -> None:
    server = start().wait_until_listening()
    wait_until(lambda: workers(server))
    pids = workers(server)
    if when == "stopped":  # it cannot see that its socket was closed
        server.wait_until_ready()
        os.kill(pids[0], signal.SIGSTOP)
    server.kill()
    try:
        wait_until(lambda: gone(pids))
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
