"""The servers that `benchmarks/server.py` compares, each in processes of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference_worker import PeerFailed, environment

START_SECONDS = 300

END_TOKENS = (0, 2)
"""Of SmolLM2: what an answer has to go on past, so that all are of one length."""


@dataclass(frozen=True)
class Peer:
    """How a server is started and asked.

    Attributes:
        distribution: what has to be installed.
        command: arguments of Python, from the model, the port, the number of threads and a folder for its files.
        ready: path that answers 200 when the model is loaded.
        fields: of a request, beside the messages, which make an answer greedy and go on past its end; from the model
            and the number of tokens.
        opens_gguf: otherwise it gets the model as a folder in bf16.
    """

    distribution: str
    command: Callable[[Path, int, int, str], list[str]]
    ready: str
    fields: Callable[[Path, int], dict[str, Any]]
    opens_gguf: bool = True


def _transformers_fields(model: Path, n: int) -> dict[str, Any]:
    settings = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "eos_token_id": -1}
    return {"model": str(model), "generation_config": json.dumps(settings)}


PEERS = {
    "danlu": Peer(
        "danlu",
        lambda model, port, threads, folder: [
            "-m", "danlu", "serve", "--model", f"smollm2={model}", "--port", str(port), "--data", folder,
            "--threads", str(threads),
        ],
        "/health/ready",
        lambda _, n: {"max_tokens": n, "temperature": 0, "ignore_eos": True, "stream_options": {"include_usage": True}},
    ),
    "llama.cpp": Peer(
        "llama-cpp-python",
        lambda model, port, threads, _: [
            "-m", "llama_cpp.server", "--model", str(model), "--port", str(port), "--n_ctx", "2048",
            "--n_threads", str(threads), "--n_threads_batch", str(threads),
            "--interrupt_requests", "false",  # by default a request ends the one before
        ],
        "/v1/models",
        lambda _, n: {"max_tokens": n, "temperature": 0, "logit_bias": {str(i): -100 for i in END_TOKENS}},
    ),
    "transformers": Peer(
        "transformers",
        lambda model, port, _, __: [
            "-c", "from transformers.cli.transformers import main; main()", "serve", "--continuous-batching",
            "--cb-block-size", "32", "--cb-num-blocks", "1024",  # by default it takes most of the memory
            "--host", "127.0.0.1", "--port", str(port), str(model),
        ],
        "/health",
        _transformers_fields,
        opens_gguf=False,
    ),
}  # fmt: skip


class Server:
    """A server with the model loaded, whose processes are stopped unless it is awake.

    Raises:
        PeerFailed: it does not start.
    """

    def __init__(self, peer: str, python: str, model: Path, threads: int) -> None:
        self._peer, self._model = PEERS[peer], model
        self._folder = tempfile.TemporaryDirectory()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the process)
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [python, *self._peer.command(model, port, threads, self._folder.name)],
            env=environment(threads),
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
            start_new_session=True,  # one group of processes, to stop and to end together
        )  # fmt: skip
        self._wait_until_ready()
        os.killpg(self._process.pid, signal.SIGSTOP)

    @property
    def process(self) -> int:
        """Its id."""
        return self._process.pid

    def body(self, messages: list[dict[str, str]], n: int) -> dict[str, Any]:
        """A request for a streamed answer of n tokens."""
        return {"messages": messages, "stream": True, **self._peer.fields(self._model, n)}

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """It runs within the block."""
        os.killpg(self._process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            os.killpg(self._process.pid, signal.SIGSTOP)

    def last_words(self) -> str:
        """The last line of its log."""
        self._log.seek(0)
        return " ".join(self._log.read().strip().splitlines()[-1:])

    def close(self) -> None:
        """End its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()
        self._folder.cleanup()

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if (status := self._process.poll()) is not None:
                last = self.last_words()
                self.close()
                raise PeerFailed(f"ended with status {status}: {last}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}{self._peer.ready}", timeout=5).close()
                return
            time.sleep(0.2)
        self.close()
        raise PeerFailed(f"not ready after {START_SECONDS} s")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
