"""Sixty-four clients at once, a fifth of which go away: nothing fails, nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from server_process import ServerProcess, serving

from danlu.server.app import create_app
from danlu.server.config import ServeConfig

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from server_soak import Soak, metric, soak

SECONDS = float(os.environ.get("DANLU_LOAD_SECONDS", "10"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A model that is faster than HTTP, and a cache so small that answers push each other out of it."""
    data = tmp_path_factory.mktemp("load")
    with serving(f"--model=tiny={model_folder}", "--kv-memory=2", data=data) as started:
        yield started


@pytest.fixture(scope="module")
def outcome(server: ServerProcess) -> Soak:
    """After some seconds in which all is made that is made once."""
    soak(server.url, server.process.pid, max(5.0, SECONDS / 3), seed=1)
    return soak(server.url, server.process.pid, SECONDS)


def test_no_request_fails(outcome: Soak, server: ServerProcess) -> None:
    assert outcome.failed == {}
    assert outcome.answered > outcome.left > 0
    assert "Traceback" not in server.log
    assert "socket.send" not in server.log  # which asyncio says of those who keep writing to a client that is gone


def test_no_block_of_the_cache_is_lost(outcome: Soak, server: ServerProcess) -> None:
    assert outcome.blocks_held == 0
    assert metric(server.url, "requests_in_flight") == metric(server.url, "queue") == 0
    assert metric(server.url, "aborts_total") >= outcome.left / 2  # some leave in the moment of the end


def test_memory_stays_what_it_was(outcome: Soak) -> None:
    allowed = 0.01 if SECONDS >= 60 else 0.03  # in the first half minute the allocator still takes its share
    assert max(outcome.growth.values()) < allowed, outcome


def test_the_server_says_at_once_that_it_is_alive(smollm2_server: ServerProcess) -> None:
    """While a real model has both cores."""
    soak(smollm2_server.url, smollm2_server.process.pid, 2.0, seed=1)
    outcome = soak(smollm2_server.url, smollm2_server.process.pid, SECONDS)
    assert outcome.failed == {}
    # Alone on two cores it is 0.034 (`benchmarks/server.py --soak 120`); other tests may have one of them now.
    assert outcome.live_p99 < (0.25 if "PYTEST_XDIST_WORKER" in os.environ else 0.05), outcome


def test_the_engines_own_books_are_right(model_folder: Path, tmp_path: Path) -> None:
    """The server runs in this process, so that its model's process can be asked to check its tables of blocks."""
    config = ServeConfig(model=(f"tiny={model_folder}",), data=tmp_path, kv_memory=1, threads=1)
    app = create_app(config)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    loops: list[asyncio.AbstractEventLoop] = []

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve()

    async def check() -> dict[str, int]:
        models = app.state.serving.models
        async with models.use(models.entry("tiny")) as remote:
            return await remote.ask("check")  # fails where the tables disagree

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        assert asyncio.run_coroutine_threadsafe(check(), loops[0]).result(60)["blocks_used"] == 0
        outcome = soak(url, os.getpid(), 3.0, leaving=0.5)
        assert outcome.failed == {}
        assert outcome.left > 0
        stats = asyncio.run_coroutine_threadsafe(check(), loops[0]).result(60)
        assert (stats["blocks_used"], stats["running"], stats["waiting"]) == (0, 0, 0)
    finally:
        server.should_exit = True
        thread.join(60)
