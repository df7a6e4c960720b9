"""Options of whatever reads rows with labels. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from danlu.config import option


@dataclass(frozen=True, kw_only=True)
class LabelledOptions:
    """Where texts and labels stand in a row, what labels are, and how many rows a step has."""

    batch_size: int = option(0, "Rows per optimizer step, for labels and pairs; 0: 16.", unit="rows", ge=0, le=65536)
    text_column: str = option("", "Column of the texts, words or sources; default: by its usual names.")
    text2_column: str = option("", "Column of the second text of a pair (classify).")
    label_column: str = option("", "Column of the labels, tags or targets; default: by its usual names.")
    label_kind: Literal["auto", "single", "multi", "number"] = option(
        "auto",
        "classify: one label a row, several (lists, or text split at |), or a number. auto: lists are several, numbers "
        "with a fraction are numbers.",
    )
    label_names: tuple[str, ...] = option((), "Names of the labels that the data calls 0, 1, 2, ..., in this order.")
