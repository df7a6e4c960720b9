"""Who is asked: a model folder through the engine (`folder_teacher.py`), or an endpoint over HTTP (`endpoint.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from danlu.posttraining.synth.config import SynthConfig
from danlu.posttraining.synth.jobs import Answer, Failure, Job

Deliver = Callable[[Job, Answer | Failure], None]


class Teacher(AbstractContextManager["Teacher"], Protocol):
    """Answers jobs, several at the same time."""

    def answer(self, jobs: Sequence[Job], deliver: Deliver) -> None:
        """Answer all jobs; each is delivered when it is done, in the caller's thread. An error in ``deliver`` ends it.

        Raises:
            DanluError: there is no use in asking on.
        """


def open_teacher(config: SynthConfig, path: Path | None, *, with_systems: bool) -> Teacher:
    """The teacher of a config.

    Args:
        path: of the model; None for an endpoint, which needs no torch.
        with_systems: system messages will be sent.

    Raises:
        DanluError: it cannot be opened.
    """
    if path is None:
        from danlu.posttraining.synth.endpoint import EndpointTeacher

        return EndpointTeacher(config)
    from danlu.posttraining.synth.folder_teacher import FolderTeacher

    return FolderTeacher(path, config, with_systems=with_systems)
