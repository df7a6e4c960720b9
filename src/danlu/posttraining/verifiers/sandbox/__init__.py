"""A place to run code that a model wrote: no files but Python's own, no network, no other processes, little time and
memory. What holds on this machine is found by trying (:func:`protections`), and without the essential part nothing is
run unless the user says so in so many words.

Python's standard library is there, installed packages are not. A folder in memory can be written where Linux permits to
mount one. Answers can still see that a file exists (not what is in it), and learn the time and the machine's name.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danlu.errors import DanluError
from danlu.posttraining.verifiers.workers import WorkerError, Workers

ZYGOTE = Path(__file__).with_name("zygote.py")
CLOCK = 3.0
"""How many times as long as its processor time an answer may take by the clock: it shall not fail because the machine
is busy, and not sleep for ever."""
GRACE_SECONDS = 10.0
"""How much longer the sandbox itself is waited for."""
MIN_MEMORY_MIB = 128

MEANING = {
    "processes": "code cannot start processes (seccomp)",
    "programs": "code cannot run programs (seccomp)",
    "signals": "code cannot end other processes (seccomp)",
    "network": "code cannot open connections (seccomp)",
    "reading": "code cannot read your files (Landlock)",
    "writing": "code cannot write your files (Landlock)",
    "memory": "code cannot take more memory than it may",
    "namespaces": "network and mounts of its own (namespaces)",
    "scratch": "a folder in memory for temporary files",
}
ESSENTIAL = frozenset(MEANING) - {"namespaces", "scratch"}


@dataclass(frozen=True)
class Protection:
    """What the sandbox keeps code from, and whether it does so here."""

    name: str
    meaning: str
    in_force: bool
    essential: bool


@dataclass(frozen=True)
class Outcome:
    """What came of running tests on an answer.

    Attributes:
        total: how many tests there are; 0: they cannot be judged by, and ``reason`` says why.
        passed: how many of them hold.
        reason: of the first that does not, or of the end of it all; empty where all hold.
        output: the first of what was printed.
    """

    passed: int
    total: int
    reason: str
    output: str


class Sandbox:
    """Runs tests on answers, a few at a time.

    Args:
        seconds: of processor time (counted in whole ones) for an answer with all its tests; :data:`CLOCK` times as many
            by the clock.
        memory_mib: of addresses, about 60 of them Python's own.
        processes: how many answers run at a time; default: one a processor.
        allow_weak: run even where essential protections are missing.

    Raises:
        DanluError: essential protections are missing, the memory is too little, or it cannot be started.
    """

    def __init__(
        self, *, seconds: float = 5.0, memory_mib: int = 512, processes: int | None = None, allow_weak: bool = False
    ) -> None:
        if memory_mib < MIN_MEMORY_MIB:
            raise DanluError(
                f"memory_mib={memory_mib}: is too little for Python itself; allow {MIN_MEMORY_MIB} MiB or more"
            )
        self._seconds, self._memory_bytes = seconds, memory_mib * 2**20
        self._workers = Workers(
            [sys.executable, "-s", "-S", "-P", "-B", str(ZYGOTE)],
            # The seed makes sets and hashes the same every time. With arenas a thread would take 128 MB of addresses.
            environment={"LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "MALLOC_ARENA_MAX": "1"},
            hello={"readable": _readable()},
            processes=processes or len(os.sched_getaffinity(0)),
        )
        missing = [p.meaning for p in self.protections() if p.essential and not p.in_force]
        if missing and not allow_weak:
            self.close()
            raise DanluError(
                "the sandbox for code that a model wrote is weak on this machine; it cannot warrant that "
                + "; ".join(missing)
                + ". Use Linux 5.13 or newer with Landlock and seccomp, or a throw-away container or virtual machine "
                "with --allow-weak-sandbox"
            )

    def protections(self) -> list[Protection]:
        """Each protection, and whether an attempt to break it failed just now.

        Raises:
            DanluError: the attempts cannot be made.
        """
        # Where the user can write, so that a refusal is the sandbox's. The scratch folder may hide some of them.
        places = [os.path.expanduser("~"), "/var/tmp", "/dev/shm", "/tmp"]
        elsewhere = [os.path.realpath(place) for place in places if os.access(place, os.W_OK | os.X_OK)]
        (reply,) = self._ask([{"kind": "probe", "elsewhere": elsewhere}])
        held = _probed(reply)
        return [Protection(name, meaning, bool(held.get(name)), name in ESSENTIAL) for name, meaning in MEANING.items()]

    def run(self, jobs: Sequence[tuple[str, str, str | None]]) -> list[Outcome | WorkerError]:
        """Run tests on answers; an error where the sandbox itself failed.

        Args:
            jobs: (answer, tests, name of the function that is asked for or None): Python source, see
                ``harness.py: read_tests``.
        """
        requests = [
            {"kind": "tests", "answer": answer, "tests": tests, "entry_point": entry_point}
            for answer, tests, entry_point in jobs
        ]
        return [reply if isinstance(reply, WorkerError) else _outcome(reply) for reply in self._ask(requests)]

    def _ask(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any] | WorkerError]:
        clock = CLOCK * self._seconds
        limits = {"seconds": self._seconds, "clock_seconds": clock, "memory_bytes": self._memory_bytes}
        return self._workers.ask_all([request | limits for request in requests], clock + GRACE_SECONDS)

    def close(self) -> None:
        """End its processes."""
        self._workers.close()


def protections() -> list[Protection]:
    """What holds on this machine, for ``danlu doctor``.

    Raises:
        DanluError: the sandbox cannot be started here at all.
    """
    sandbox = Sandbox(processes=1, allow_weak=True)
    try:
        return sandbox.protections()
    finally:
        sandbox.close()


def _probed(reply: dict[str, Any] | WorkerError) -> dict[str, Any]:
    if isinstance(reply, WorkerError):
        raise DanluError(f"the sandbox for code cannot be tried out: it {reply}")
    try:
        held = json.loads(reply["report"])
    except (KeyError, ValueError):
        told = reply.get("report") or f"the attempt {reply['ended']}"
        raise DanluError(f"the sandbox for code cannot be tried out: {told.removeprefix('0 0 ')}") from None
    return {**held, "namespaces": reply["namespaces"], "scratch": reply["scratch"]}


def _outcome(reply: dict[str, Any]) -> Outcome:
    if "report" not in reply:
        return Outcome(0, 1, f"the answer {reply['ended']}", reply["output"])
    passed, total, *reason = reply["report"].split(" ", 2)
    return Outcome(int(passed), int(total), "".join(reason), reply["output"])


def _readable() -> list[str]:
    """Where Python's standard library and the shared libraries that it needs are."""
    found = {sysconfig.get_path("stdlib"), sysconfig.get_config_var("DESTSHARED") or ""}
    found |= {"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo"}
    found |= {"/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"}
    return sorted({os.path.realpath(path) for path in found if os.path.exists(path)})
