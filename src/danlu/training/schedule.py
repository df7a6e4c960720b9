"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math


def learning_rate_share(step: int, total: int, *, schedule: str, warmup: int, decay_share: float) -> float:
    """Share of the peak rate at ``step`` (0-based) of ``total``.

    wsd: linear warm-up, constant, then linear to zero over the last ``decay_share`` of the run (Hu et al. 2024,
        arXiv:2404.06395).
    cosine: linear warm-up, then half a cosine to zero. constant: linear warm-up only. Warm-up takes at most a tenth of
        the run.
    """
    warmup = min(warmup, total // 10)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    decay = round(decay_share * total)
    return min(1.0, (total - step) / max(1, decay))


def muon_momentum(step: int, *, start: float = 0.85, end: float = 0.95, warmup: int = 300) -> float:
    """Momentum of Muon, rising over the first steps while the gradients still change direction quickly."""
    return start + (end - start) * min(1.0, step / warmup)
