"""The process in which a user's function judges; started by ``entry_point.py``, ended with its stdin.

It reads lines of JSON: first what to call, then samples. What the function prints goes to stderr.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import numbers
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_TEXT = 500
"""Characters of a reason or an error."""


def main() -> None:
    """Serve until there is nothing to read."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    process = os.getpid()

    def say(reply: dict[str, Any]) -> None:
        if os.getpid() != process:  # a copy that the function made of us
            os._exit(0)
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()

    hello = json.loads(requests.readline())
    try:
        function = _find(hello["function"])
    except BaseException as error:
        say({"error": f"verifier {hello['function']}: {_told(error)}"})
        return
    _limit_memory(hello["memory_bytes"])
    say({"ready": True})
    for line in requests:
        sample = json.loads(line)
        # Who asks ends us when the time is over; the alarm is for when nobody is left to do it.
        signal.alarm(math.ceil(hello["seconds"]) + 10)
        reply = _call(function, sample, hello["fixed"])
        signal.alarm(0)
        say(reply)


def _find(name: str) -> Callable[..., Any]:
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise TypeError("is no function")
    return found  # type: ignore[no-any-return]


def _limit_memory(n_bytes: int) -> None:
    """Of what is taken from now on: libraries such as torch reserve gigabytes of addresses when they are imported."""
    with contextlib.suppress(OSError, IndexError):
        used = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (used + n_bytes, used + n_bytes))


def _call(function: Callable[..., Any], sample: dict[str, Any], fixed: dict[str, Any]) -> dict[str, Any]:
    try:
        given = function(sample["prompt"], sample["answer"], sample["row"], **fixed)
    except BaseException as error:
        return {"problem": f"raised {_told(error)}"}
    score, reason = given if isinstance(given, tuple) and len(given) == 2 else (given, "")
    if score is None:
        return {"problem": f"could not judge{f': {reason}'[:MAX_TEXT] if reason else ''}"}
    if not isinstance(score, numbers.Real) or not isinstance(reason, str):
        return {"problem": f"gave {type(given).__name__}, not a number"}
    return {"score": float(score), "reason": reason[:MAX_TEXT]}


def _told(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:MAX_TEXT]
    except Exception:
        return type(error).__name__


if __name__ == "__main__":
    main()
