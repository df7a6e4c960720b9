"""Options of `danlu show` and `danlu report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from danlu.config import REQUIRED, option


@dataclass(frozen=True)
class ShowConfig:
    """What `danlu show` takes."""

    folder: Path = option(
        REQUIRED, "A data, tokenizer, model, adapter or evaluation folder, made by danlu or not.", positional=True
    )
    json: bool = option(False, "Print JSON instead of tables.")


@dataclass(frozen=True)
class ReportConfig:
    """What `danlu report` takes."""

    model: Path = option(REQUIRED, "Model folder to tell about.", positional=True)
    out: Path | None = option(None, "HTML file to write; by default MODEL/report.html.", affects_result=False)
    evaluations: tuple[Path, ...] = option(
        (),
        "Evaluation folders to use; by default those in or beside the model folder that measured it or its forebears.",
    )
    title: str | None = option(None, "Heading of the page; by default the name of the model folder.")
    beside: tuple[Path, ...] = option(
        (), "Other model folders to tell about with it, such as one that another method made from the same model."
    )
    samples: int = option(6, "Most functions and prompts whose answers are shown side by side.", ge=0, le=100)
