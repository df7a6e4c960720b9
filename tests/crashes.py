"""Runs that end in the middle."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from danlu.training.loop import Trainer


def crash(run: Callable[[], object], *, at_step: int) -> None:
    """Call what trains, and let it crash before the step after ``at_step``: its checkpoints are left, as after a power
    failure."""
    step = Trainer._step

    def broken(self: Trainer) -> tuple[float, float, float]:
        if self.progress.step == at_step:
            raise RuntimeError("crash")
        return step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", broken)
        with pytest.raises(RuntimeError, match="crash"):
            run()
