"""A process of `inference_peers.py` and the other end of its line protocol."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PEERS_FILE = Path(__file__).with_name("inference_peers.py")


class PeerFailed(Exception):
    """An engine cannot be opened, has died, or answers nonsense; the message says which."""


@dataclass(frozen=True)
class Run:
    """One run of a peer.

    Attributes:
        tokens: the new ones of each prompt.
        seconds: until the last of them.
        first_seconds: until the first of them.
    """

    tokens: list[list[int]]
    seconds: float
    first_seconds: float

    @property
    def decode_rate(self) -> float:
        """Tokens of one prompt a second, after its first."""
        return (len(self.tokens[0]) - 1) / (self.seconds - self.first_seconds)


def environment(threads: int) -> dict[str, str]:
    """Of a process that computes with so many threads."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads)}


class PausedProcess:
    """A program that answers a line of JSON with another, in a process that is stopped unless it is asked something:
    whatever its threads do while they wait takes nothing from the others.

    Attributes:
        opened: the line that it says by itself when it is ready.

    Raises:
        PeerFailed: it says why it cannot be opened, or has died.
    """

    def __init__(self, command: list[str], threads: int) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the process)
        self._process = subprocess.Popen(
            command, env=environment(threads), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            text=True,
        )  # fmt: skip
        self.opened = self._read()
        self._process.send_signal(signal.SIGSTOP)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """What it answers.

        Raises:
            PeerFailed: it says why it cannot, or has died.
        """
        with self._awake():
            return self._answer(request)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    @contextlib.contextmanager
    def _awake(self) -> Iterator[None]:
        self._process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGSTOP)

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            how = f"signal {-status} ({signal.strsignal(-status)})" if status < 0 else f"status {status}"
            raise PeerFailed(f"its process ended with {how}{self._last_words()}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise PeerFailed(found["error"])
        return found

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return f": {lines[-1]}" if lines else ""


class Worker(PausedProcess):
    """An engine with the model open, in a process of its own.

    Attributes:
        idle_cores: what it computes while it waits for a question, in cores, half a second after an answer.

    Raises:
        PeerFailed: the engine does not open the model.
    """

    def __init__(self, engine: str, python: str, settings: dict[str, Any]) -> None:
        self.idle_cores: float | None = None
        super().__init__([python, str(PEERS_FILE), engine, json.dumps(settings)], settings["threads"])

    def complete(self, prompts: list[list[int]], new_tokens: int, cached: int = 0) -> Run:
        """Continue the prompts, all at once, greedily. ``cached``: tokens of the prompt that the last call left behind.

        Raises:
            PeerFailed: the process died, or there are more or fewer tokens than were asked for.
        """
        found = self.ask({"prompts": prompts, "new_tokens": new_tokens, "cached": cached})
        counts = [len(tokens) for tokens in found["tokens"]]
        if counts != [new_tokens] * len(prompts):
            raise PeerFailed(f"made {counts} tokens where {new_tokens} each were asked for")
        return Run(**found)

    def peak_memory(self) -> int:
        """Largest resident set of the process so far, in bytes."""
        return int(self.ask({})["peak_memory"])

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """As :meth:`PausedProcess.ask`; the first time, it is watched afterwards."""
        with self._awake():
            found = self._answer(request)
            if self.idle_cores is None:
                time.sleep(0.5)
                before, start = self._cpu_seconds(), time.perf_counter()
                time.sleep(1.0)
                self.idle_cores = (self._cpu_seconds() - before) / (time.perf_counter() - start)
        return found

    def _cpu_seconds(self) -> float:
        """User and system time of all its threads."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
