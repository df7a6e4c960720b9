"""How sure a figure is that was measured on few cases."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def share_interval(share: float, n: int) -> list[float]:
    """The 95 % interval of a share of ``n`` independent cases (Wilson 1927), also near 0 and 1: [low, high]."""
    z = 1.959964
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [middle - half if share > 0 else 0.0, middle + half if share < 1 else 1.0]


def mean_interval(values: Sequence[float]) -> list[float]:
    """The 95 % interval of the mean of at least two independent values, by the normal distribution: [low, high]. Of
    differences between two models on the same cases, it is narrower than the intervals of each tell."""
    half = 1.959964 * statistics.stdev(values) / math.sqrt(len(values))
    return [statistics.fmean(values) - half, statistics.fmean(values) + half]
