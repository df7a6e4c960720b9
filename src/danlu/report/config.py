"""Options of `danlu show` and `danlu report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from danlu.config import REQUIRED, option


@dataclass(frozen=True)
class ShowConfig:
    """What `danlu show` takes."""

    folder: Path = option(
        REQUIRED, "A data, tokenizer, model or evaluation folder, made by danlu or not.", positional=True
    )
    json: bool = option(False, "Print JSON instead of tables.")
