"""Answers on disk from the moment they arrive: what a killed run has paid for is not asked for again."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from danlu import console, files
from danlu.errors import DanluError
from danlu.posttraining.synth.jobs import Answer, Job

FOLDER = "spool"
SYNC_SECONDS = 1.0
"""A killed process loses nothing, a power cut at most the answers of so long."""


class Spool:
    """`spool/answers.jsonl` in the folder of a run: a line an answer, in the order of their arrival. A last line that
    was not written to its end is dropped.

    Raises:
        DanluError: another process writes it, a line is not what was written, or the folder cannot be written.
    """

    def __init__(self, out: Path) -> None:
        self.path = files.require_writable(out / FOLDER) / "answers.jsonl"
        self.answers: dict[str, Answer] = {}
        try:
            self._file = open(self.path, "ab+")  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise files.as_user_error(error, self.path) from error
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise
        self._synced = time.monotonic()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DanluError(f"{self.path}: another run is writing it; let it end, or choose another --out") from None

    def _read(self) -> None:
        self._file.seek(0)
        *lines, torn = self._file.read().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                key = row.pop("key")
                answer = Answer(**row)
                if not (isinstance(key, str) and isinstance(answer.text, str) and isinstance(answer.reasoning, str)):
                    raise TypeError("a text is missing")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DanluError(f"{self.path}:{number}: is not what was written ({error}); delete the line") from error
            self.answers[key] = answer
        if torn:
            self._file.truncate(self._file.tell() - len(torn))
        if lines:
            console.note(f"{self.path}: {len(lines):,} answers of an earlier run are kept")

    def append(self, job: Job, answer: Answer) -> None:
        """Keep an answer."""
        line = json.dumps({"key": job.key, **dataclasses.asdict(answer)}, ensure_ascii=False).encode() + b"\n"
        try:
            self._file.write(line)
            self._file.flush()
            if time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            raise files.as_user_error(error, self.path) from error
        self.answers[job.key] = answer

    def remove(self) -> None:
        """The run is finished: its folder holds what was made of the answers."""
        shutil.rmtree(self.path.parent, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
