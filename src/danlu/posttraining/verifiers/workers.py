"""Processes that answer questions, one line of JSON each, and are not trusted to: who takes too long, says too much or
dies is ended with all its group, and another takes its place."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from danlu.errors import DanluError

MAX_REPLY = 2**20
STARTING_SECONDS = 120.0
"""For importing what the user's function imports, such as torch."""


class WorkerError(Exception):
    """A worker gave no reply; the message says why."""


class Worker:
    """A process that reads requests on its stdin and writes replies on its stdout; its stderr is ours.

    Raises:
        DanluError: it cannot be started, or says ``{"error": ...}`` first, in place of ``{"ready": true}``.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None, hello: Mapping[str, Any]) -> None:
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=None if environment is None else dict(environment),
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            raise DanluError(f"{command[0]}: cannot be started ({error.strerror})") from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self._unread = b""
        try:
            self._write(json.dumps(hello).encode() + b"\n", time.monotonic() + STARTING_SECONDS)
            ready = self._read(time.monotonic() + STARTING_SECONDS)
        except WorkerError as error:
            self.end()
            raise DanluError(f"a worker of the verifiers does not start: it {error}") from None
        if "error" in ready:
            self.end()
            raise DanluError(str(ready["error"]))

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The reply to a request.

        Raises:
            WorkerError: there is none; the worker is of no use any more.
        """
        deadline = time.monotonic() + seconds
        self._write(json.dumps(request, default=str).encode() + b"\n", deadline)
        return self._read(deadline)

    def end(self) -> None:
        """Kill it and its group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _write(self, content: bytes, deadline: float) -> None:
        left = memoryview(content)
        while left:
            self._wait(self._in, select.POLLOUT, deadline)
            try:
                left = left[os.write(self._in, left) :]
            except BlockingIOError:
                continue
            except OSError:
                raise WorkerError("ended") from None

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._unread:
            self._wait(self._out, select.POLLIN, deadline)
            try:
                piece = os.read(self._out, 65536)
            except BlockingIOError:
                continue
            if not piece:
                raise WorkerError("ended")
            self._unread += piece
            if len(self._unread) > MAX_REPLY:
                raise WorkerError(f"said more than {MAX_REPLY} bytes")
        line, _, self._unread = self._unread.partition(b"\n")
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise WorkerError("said something that is no reply")
        return reply

    def _wait(self, descriptor: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise WorkerError("took too long")


class Workers:
    """A few workers that share the requests. The first is started at once, so that what is wrong with the command is
    told at once; the others, and those that follow a dead one, when there is work for them.

    Args:
        command: the same for all.
        environment: theirs; None: the same as ours.
        hello: their first line.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        hello: Mapping[str, Any],
        processes: int,
    ) -> None:
        self._command, self._environment, self._hello = command, environment, hello
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        self._processes = processes
        for _ in range(processes - 1):
            self._idle.put(None)
        self._idle.put(self._start())

    def _start(self) -> Worker:
        return Worker(self._command, self._environment, self._hello)

    def ask_all(self, requests: Sequence[Mapping[str, Any]], seconds: float) -> list[dict[str, Any] | WorkerError]:
        """A reply, or why there is none, for each request.

        Args:
            seconds: for each.
        """

        def ask(request: Mapping[str, Any]) -> dict[str, Any] | WorkerError:
            worker = self._idle.get()
            try:
                worker = worker or self._start()
                return worker.ask(request, seconds)
            except DanluError as error:  # it did start once; the sample is lost, not the run
                return WorkerError(f"cannot be started again ({error})")
            except WorkerError as error:
                assert worker is not None
                worker.end()
                worker = None
                return error
            finally:
                self._idle.put(worker)

        assert not self._idle.empty(), "closed"

        with ThreadPoolExecutor(self._processes) as threads:
            return list(threads.map(ask, requests))

    def close(self) -> None:
        """End them all."""
        with contextlib.suppress(queue.Empty):
            while True:
                worker = self._idle.get_nowait()
                if worker is not None:
                    worker.end()
