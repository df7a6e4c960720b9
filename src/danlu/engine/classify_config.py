"""Options of `danlu classify`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from danlu.config import REQUIRED, option
from danlu.engine.engine_config import DEVICE_HELP, PRECISION_HELP, Precision


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig:
    """What `danlu classify` takes."""

    model: Path = option(REQUIRED, "Model folder with labels, as `danlu finetune --task classify|tag` makes it.",
                         positional=True)  # fmt: skip
    text: str | None = option(None, "Text to label; without it and --file, each line of standard input is one.")
    text2: str | None = option(None, "Second text, for models that were trained on pairs.")
    file: Path | None = option(
        None, "JSON Lines, JSON, CSV, TSV or Parquet rows with a text (or words), or a text file with one a line."
    )
    text_column: str = option("", "Column of the texts or words; default: by its usual names.")
    text2_column: str = option("", "Column of the second text of a pair.")
    batch_size: int = option(32, "Texts read together.", ge=1)
    device: str = option("auto", DEVICE_HELP)
    precision: Precision = option("auto", PRECISION_HELP)

    def problems(self) -> list[str]:
        """What cannot be right between the options."""
        found = []
        if self.text is not None and self.file is not None:
            found.append("text and file are both given; choose one")
        if self.text2 is not None and self.text is None:
            found.append("text2 goes with text")
        if (self.text_column or self.text2_column) and self.file is None:
            found.append("text_column and text2_column name columns of a file; give one with --file")
        return found
