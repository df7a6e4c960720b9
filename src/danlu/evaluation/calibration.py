"""Whether probabilities mean what they say: of what is given 80 %, does 80 % happen?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def reliability_table(
    probabilities: Sequence[float], happened: Sequence[bool], *, bins: int = 10, low: float = 0.0
) -> list[dict[str, Any]]:
    """Cases sorted into bins of equal width by their probability, empty ones left out.

    Args:
        probabilities: from ``low`` to 1.

    Returns:
        For each bin ``from``, ``to``, ``count``, ``probability`` (the mean of its cases) and ``share`` (of its cases
        that happened).
    """
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(happened, dtype=np.float64)
    edges = np.linspace(low, 1, bins + 1)
    places = np.clip(((p - low) / (1 - low) * bins).astype(np.int64), 0, bins - 1)
    found = []
    for b in range(bins):
        here = places == b
        if here.any():
            found.append(
                {
                    "from": float(edges[b]),
                    "to": float(edges[b + 1]),
                    "count": int(here.sum()),
                    "probability": float(p[here].mean()),
                    "share": float(y[here].mean()),
                }
            )
    return found


def calibration_error(table: Sequence[dict[str, Any]]) -> float:
    """Expected calibration error: the mean distance of probability and share, each bin counting as its cases do (Naeini
    et al. 2015; Guo et al. 2017, arXiv:1706.04599, eq. 3)."""
    total = sum(row["count"] for row in table)
    return float(sum(row["count"] * abs(row["probability"] - row["share"]) for row in table) / total) if total else 0.0
