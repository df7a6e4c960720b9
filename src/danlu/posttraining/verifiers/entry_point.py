"""A function of the user's as a verifier: ``package.module:function``.

It is called as ``function(prompt, answer, row)`` and gives a number, a pair of a number and a reason, or None where it
cannot judge. It runs in processes of its own, which may do what the user may, but not for longer than the limit nor
with more memory: a function that raises, hangs, is killed or gives something else costs its sample, and nothing more.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from danlu.posttraining.verifiers.base import MOST, Sample, Verdict
from danlu.posttraining.verifiers.workers import WorkerError, Workers

NAME = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*(?:\.[^\W\d]\w*)*")


class EntryPoint:
    """Judges by a function.

    Args:
        name: ``package.module:function``; the module is looked for where Python looks, and in the current folder.
        fixed: keyword arguments that are passed on with each call.
        seconds, memory_mib: of a call; memory beyond what the module takes when it is imported.
        processes: how many run at a time.

    Raises:
        DanluError: the module cannot be imported, or has no such function.
    """

    def __init__(
        self, name: str, *, seconds: float, memory_mib: int, processes: int, fixed: Mapping[str, Any] | None = None
    ) -> None:
        self._name, self._seconds = name, seconds
        self._workers = Workers(
            [sys.executable, "-m", "danlu.posttraining.verifiers.entry_worker"],
            hello={
                "function": name,
                "fixed": dict(fixed or {}),
                "seconds": seconds,
                "memory_bytes": memory_mib * 2**20,
            },
            processes=processes,
        )

    def judge(self, samples: Sequence[Sample]) -> list[Verdict]:
        requests = [{"prompt": s.prompt, "answer": s.answer, "row": s.row} for s in samples]
        return [self._read(reply) for reply in self._workers.ask_all(requests, self._seconds)]

    def _read(self, reply: dict[str, Any] | WorkerError) -> Verdict:
        if isinstance(reply, WorkerError):
            return Verdict(None, f"{self._name} {reply}")
        if "problem" in reply:
            return Verdict(None, f"{self._name} {reply['problem']}")
        score = reply["score"]
        if not abs(score) <= MOST:
            return Verdict(None, f"{self._name} gave {score}; scores are numbers of at most {MOST:,.0f}")
        return Verdict(float(score), reply["reason"])

    def close(self) -> None:
        self._workers.close()
