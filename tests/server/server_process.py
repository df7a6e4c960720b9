"""A real `danlu serve` in a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

START_SECONDS = 120


class ServerProcess:
    """`danlu serve` with the arguments; `.url` once it listens. Its log is in `.lines`."""

    def __init__(self, *arguments: str | Path, data: Path, env: dict[str, str] | None = None) -> None:
        self.data = data
        self.process = subprocess.Popen(
            [sys.executable, "-m", "danlu", "serve", *map(str, arguments), "--port", "0", "--data", str(data)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        )
        self.lines: list[str] = []
        self.url = ""
        self._listening = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def wait_until_listening(self) -> ServerProcess:
        """The port is open; models may still load."""
        if not self._listening.wait(START_SECONDS) or not self.url:
            self.kill()
            raise AssertionError(f"the server did not start:\n{self.log}")
        return self

    def wait_until_ready(self) -> ServerProcess:
        """The first model is loaded."""
        self.wait_until_listening()
        end = time.monotonic() + START_SECONDS
        with httpx.Client(trust_env=False) as client:
            while time.monotonic() < end and self.process.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    if client.get(f"{self.url}/health/ready").status_code == 200:
                        return self
                time.sleep(0.05)
        self.kill()
        raise AssertionError(f"the server did not get ready:\n{self.log}")

    def stop(self, signal_number: int = signal.SIGTERM, seconds: float = 30) -> int:
        """Ask it to end; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait()

    @property
    def log(self) -> str:
        """All that it has printed."""
        return "".join(self.lines)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if not self.url and (found := re.search(r"http://[\w.\[\]:-]+:\d+", line)):
                self.url = found[0]
                self._listening.set()
        self._listening.set()


@contextlib.contextmanager
def serving(*arguments: str | Path, data: Path, env: dict[str, str] | None = None) -> Iterator[ServerProcess]:
    """A server that is ready, and ended with the block."""
    server = ServerProcess(*arguments, data=data, env=env)
    try:
        yield server.wait_until_ready()
    finally:
        server.stop()
