"""`danlu quickstart`: from the text on this disk to a model you can talk to, in one go.

The path itself is a recipe, `recipes/quickstart.yaml`, that anybody can copy and change; here its vars are filled in,
it is run, and what came of it is told. Nothing on the path needs a network. A second run skips the stages that are
finished and goes on with the one that was interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import shlex
import time
from pathlib import Path
from typing import NamedTuple

from danlu import config as configs
from danlu import console
from danlu.recipe.config import QuickstartConfig, RunConfig
from danlu.recipe.run import RECIPES, run_recipe
from danlu.report.lineage import Evaluation, find_evaluations, read_lineage
from danlu.report.numbers import MISSING, decimal, duration, size
from danlu.report.scores import score_rows

RECIPE = RECIPES / "quickstart.yaml"


class Made(NamedTuple):
    """Where the results of a quickstart are."""

    model: Path
    report: Path


def quickstart(config: QuickstartConfig) -> Made:
    """Run the whole path and say what came of it.

    Args:
        config: see :class:`QuickstartConfig`.

    Returns:
        The folder of the model that has learned from its own answers (GRPO), and the HTML report.

    Raises:
        Problems: impossible options, all at once, before any work starts.
        DanluError: a stage cannot be done, for example because the corpus is too small.
    """
    config = configs.validate(config)
    started = time.monotonic()
    if config.size is None:
        config = dataclasses.replace(config, size=_fitting_size())
    if config.student_dim is None:
        config = dataclasses.replace(config, student_dim=32 * (config.size or 1))
    run_recipe(RunConfig(recipe=RECIPE, overrides=tuple(_as_vars(config))))
    made = Made(config.out / "grpo", config.out / "report.html")
    told = (config.out / "student", config.out / "ppo")
    lines = [
        "",
        *_scores(find_evaluations(told, read_lineage(*told))),
        f"time: {duration(time.monotonic() - started)}; peak memory: {size(peak_memory())}",
        "",
        f"model:  {made.model}",
        f"report: {made.report} (open it in a browser)",
        "",
        "next:",
        *(f"  {line}" for line in _next(shlex.quote(str(made.model)))),
    ]
    console.out().print("\n".join(lines), markup=False)
    return made


def _fitting_size() -> int:
    """The depth that learns most in three minutes here (docs/log.md): bf16 hardware has the FLOPs for a larger one."""
    from danlu import hardware

    return 4 if hardware.computes_bf16(hardware.pick_device("auto")) else 3


def _as_vars(config: QuickstartConfig) -> list[str]:
    """The config as overrides of the recipe's vars; JSON is YAML, except that texts stay bare."""
    plain = configs.to_dict(config)
    return [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in plain.items()]


def _scores(evaluations: list[Evaluation]) -> list[str]:
    """One line a stage."""
    lines = []
    for row in score_rows(evaluations):
        name, bits = f"{row.evaluation.label}:", decimal(row.evaluation.card.metrics.get("bits_per_byte"))
        change = f", {row.change}" if row.change != MISSING else ""
        lines.append(f"{name:<13}{bits} bits per held-out byte; {row.parsed} of its functions parse{change}")
    for evaluation in evaluations:
        if (primed := (evaluation.card.metrics.get("compressors") or {}).get("xz_primed")) is not None:
            lines.append(
                f"{'xz:':<13}{decimal(primed)} bits per held-out byte, with the training text as its dictionary"
            )
            break
    return lines


def _next(model: str) -> list[str]:
    """What to type now."""
    return [
        f"danlu chat {model}",
        f"danlu generate {model} --prompt 'def fibonacci(n):'",
        f"danlu show {model}",
    ]


def peak_memory() -> int:
    """Most resident memory that this process, or any one that it started, has had at a time, in bytes."""
    most = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return most * 1024  # Linux counts in kB
