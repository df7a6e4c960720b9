"""Where numbers go while a model trains: `metrics.jsonl` always, TensorBoard, Trackio and W&B when asked."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from danlu.errors import MissingExtra

Numbers = dict[str, float | int | None]


class MetricsLog(AbstractContextManager["MetricsLog"]):
    """Appends one JSON line per call; a resumed run first drops the lines behind the step it resumes from."""

    def __init__(self, out: Path, *, log_to: tuple[str, ...], resume_step: int, config: dict[str, Any]) -> None:
        path = out / "metrics.jsonl"
        drop_lines_after(path, resume_step)
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed in __exit__)
        self.sinks: list[Callable[[int, Numbers], None]] = []
        self.closers: list[Callable[[], Any]] = [self.file.close]
        for name in log_to:
            {"tensorboard": self._tensorboard, "wandb": self._wandb, "trackio": self._trackio}[name](
                out, resume_step, config
            )

    def write(self, step: int, numbers: Numbers) -> None:
        """One line of the log."""
        self.file.write(json.dumps({"step": step, **numbers}) + "\n")
        self.file.flush()
        for sink in self.sinks:
            sink(step, numbers)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for close in self.closers:
            close()

    def _tensorboard(self, out: Path, resume_step: int, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(out / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)

        def sink(step: int, numbers: Numbers) -> None:
            for name, value in numbers.items():
                if value is not None:
                    writer.add_scalar(name, value, step)

        self.sinks.append(sink)
        self.closers.append(writer.close)

    def _wandb(self, out: Path, resume_step: int, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtra("wandb", "wandb", "log_to=wandb") from error
        run = wandb.init(project="danlu", name=out.name, dir=str(out), config=config, resume="allow")
        self.sinks.append(lambda step, numbers: run.log(numbers, step=step))
        self.closers.append(run.finish)

    def _trackio(self, out: Path, resume_step: int, config: dict[str, Any]) -> None:
        try:
            import trackio
        except ImportError as error:
            raise MissingExtra("trackio", "trackio", "log_to=trackio") from error
        trackio.init(project="danlu", name=out.name, config=config, resume="allow")
        self.sinks.append(lambda step, numbers: trackio.log(numbers, step=step))
        self.closers.append(trackio.finish)


def drop_lines_after(path: Path, step: int) -> None:
    """Leave the lines of a log up to a step: a killed run may have written more than it goes on from."""
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Lines of a `metrics.jsonl`; a last line cut short by a crash is left out."""
    if not Path(path).exists():
        return []
    lines = []
    for text in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
