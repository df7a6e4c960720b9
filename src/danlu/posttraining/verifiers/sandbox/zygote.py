"""The sandbox's own process: a small Python that has the common modules loaded and forks itself for each answer, which
costs a millisecond or two where a new Python would cost twenty.

It is started as a script by ``sandbox/__init__.py``, with an empty environment and the standard library alone, and
speaks lines of JSON: jobs on its stdin, verdicts on its stdout. No answer runs in it. It ends with its stdin.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import mmap
import os
import select
import signal
import socket
import sys
import time
import types
from collections.abc import Sequence
from typing import Any

PRELOADED = (
    *("abc", "array", "asyncio", "bisect", "collections.abc", "copy", "dataclasses", "datetime", "decimal", "enum"),
    *(
        "fractions",
        "functools",
        "hashlib",
        "heapq",
        "io",
        "itertools",
        "json",
        "logging",
        "math",
        "numbers",
        "operator",
    ),
    *("queue", "random", "re", "statistics", "string", "textwrap", "threading", "traceback", "typing", "uuid"),
)
MAX_OUTPUT = 4000
"""Bytes of what an answer prints that are kept; the rest is read and dropped."""
MAX_REPORT = 10_000
SCRATCH_PLACES = ("/tmp", "/var/tmp", "/mnt", "/media")


def main() -> None:
    """Serve jobs until stdin ends."""
    settings = json.loads(sys.stdin.buffer.readline())
    readable: list[str] = settings["readable"]
    jail, harness = _load("jail"), _load("harness")
    for name in PRELOADED:
        importlib.import_module(name)
    apart = jail.leave_namespaces()
    places = (p for p in SCRATCH_PLACES if os.path.isdir(p) and not any(f"{r}/".startswith(f"{p}/") for r in readable))
    scratch = next(places, None) if apart else None
    gc.freeze()
    _say({"ready": True})
    mounted = False
    for line in sys.stdin.buffer:
        job = json.loads(line)
        if scratch is not None and not (mounted := jail.fresh_scratch(scratch, mounted=mounted)):
            scratch = None
        verdict = _in_child(job, jail, harness, readable, scratch)
        _say(verdict | {"namespaces": apart, "scratch": scratch})


def _load(name: str) -> Any:
    """A module beside this file, which is in no folder that is searched."""
    spec = importlib.util.spec_from_file_location(name, os.path.join(os.path.dirname(__file__), f"{name}.py"))
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[name] = module  # dataclasses look for it there
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def _say(message: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(message).encode() + b"\n")
    sys.stdout.buffer.flush()


def _in_child(job: dict[str, Any], jail: Any, harness: Any, readable: Sequence[str], scratch: str | None) -> Any:
    """Fork, confine and run; what came of it."""
    token = os.urandom(16).hex().encode()
    (output, output_in), (result, result_in) = os.pipe(), os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            _become_the_answer(job, jail, harness, readable, scratch, token, output_in, result_in)
        except BaseException as error:  # before the answer began: it is not to blame
            os.write(3, token + f"0 0 the sandbox fails ({error!r})".encode())
        finally:
            os._exit(70)
    os.close(output_in)
    os.close(result_in)
    printed, report, in_time = _listen(output, result, job["clock_seconds"])
    # The group, for where seccomp is missing there may be more than the child.
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    os.close(output)
    os.close(result)
    told: dict[str, Any] = {"output": printed.decode("utf-8", "replace")}
    if report.startswith(token):
        return told | {"report": report.removeprefix(token).decode("utf-8", "replace")}
    if not in_time:
        return told | {"ended": f"took longer than {job['clock_seconds']:g} s"}
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        spent = name == "SIGXCPU" or usage.ru_utime + usage.ru_stime >= job["seconds"]
        return told | {"ended": f"took longer than {job['seconds']:g} s" if spent else f"was killed by {name}"}
    return told | {"ended": f"ended the process (exit status {os.WEXITSTATUS(status)}) before the tests were through"}


def _listen(output: int, result: int, seconds: float) -> tuple[bytes, bytes, bool]:
    """The first of what the child prints, and its report, until it closes that; False: the time was over before."""
    kept = {output: b"", result: b""}
    limits = {output: MAX_OUTPUT, result: MAX_REPORT}
    poll, deadline = select.poll(), time.monotonic() + seconds
    for descriptor in (output, result, 0):
        # Stdin is only watched for its end: nobody is left to tell.
        poll.register(descriptor, select.POLLHUP if descriptor == 0 else select.POLLIN)
    while (left := deadline - time.monotonic()) > 0:
        for descriptor, event in poll.poll(left * 1000):
            if descriptor == 0:
                return b"", b"", False
            piece = os.read(descriptor, 65536) if event & select.POLLIN else b""
            kept[descriptor] += piece[: limits[descriptor] - len(kept[descriptor])]
            if not piece:
                if descriptor == result:
                    return kept[output], kept[result], True
                poll.unregister(descriptor)
    return kept[output], kept[result], False


def _become_the_answer(
    job: dict[str, Any],
    jail: Any,
    harness: Any,
    readable: Sequence[str],
    scratch: str | None,
    token: bytes,
    output: int,
    result: int,
) -> None:
    os.setsid()
    nothing = os.open("/dev/null", os.O_RDONLY)
    for descriptor, number in ((nothing, 0), (output, 1), (output, 2), (result, 3)):
        # Pipes may have these numbers already; those of the parent are not needed any more.
        os.dup2(descriptor, number + 20)
    for number in range(4):
        os.dup2(number + 20, number)
    os.closerange(4, 1024)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.chdir(scratch or "/")
    os.environ.update(TMPDIR=scratch or "/", HOME=scratch or "/")
    jail.confine(seconds=job["seconds"], memory_bytes=job["memory_bytes"], readable=readable, scratch=scratch)
    if job["kind"] == "probe":
        seen = (p for p in job["elsewhere"] if os.path.isdir(p) and not f"{p}/".startswith(f"{scratch}/"))
        os.write(3, token + json.dumps(_try_all(next(seen, ""), job["memory_bytes"])).encode())
        os._exit(0)
    # Nothing of ours is left where an import finds it.
    for name in ("jail", "harness", "ctypes", "_ctypes"):
        sys.modules.pop(name, None)
    sys.modules["__main__"] = types.ModuleType("__main__")
    harness.run(job["answer"], job["tests"], job["entry_point"], token, 3)


def _try_all(elsewhere: str, memory_bytes: int) -> dict[str, bool]:
    """What is refused, found by trying. ``elsewhere``: a folder that the user can write."""

    def fork() -> None:
        if os.fork() == 0:
            os._exit(0)
        os.wait()

    def write() -> None:
        os.close(os.open(elsewhere, os.O_TMPFILE | os.O_WRONLY))  # a file without a name

    return {
        "processes": _is_refused(fork),
        "programs": _is_refused(lambda: os.execv("/nowhere", ["nowhere"])),
        "signals": _is_refused(lambda: os.kill(os.getppid(), 0)),
        "network": _is_refused(lambda: socket.socket(socket.AF_INET).close()),
        "reading": _is_refused(lambda: os.listdir(elsewhere)),
        "writing": _is_refused(write),
        "memory": _is_refused(lambda: mmap.mmap(-1, memory_bytes).close(), OSError),
    }


def _is_refused(action: Any, refusal: type[OSError] = PermissionError) -> bool:
    """Whether the kernel refuses it; any other failure proves nothing."""
    try:
        action()
    except refusal:
        return True
    except OSError:
        return False
    return False


if __name__ == "__main__":
    main()
