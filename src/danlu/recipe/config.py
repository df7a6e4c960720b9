"""Options of `danlu run` and `danlu quickstart`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from danlu.config import REQUIRED, option


@dataclass(frozen=True)
class RunConfig:
    """What `danlu run` takes."""

    recipe: Path = option(REQUIRED, "Recipe file (YAML) with `vars` and `stages`.", positional=True)
    overrides: tuple[str, ...] = option((), "Values for the recipe's vars, as name=value.", positional=True)
    until: str | None = option(None, "Stop after the stage of this name.")
