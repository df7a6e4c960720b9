"""What evaluations measured, stage beside stage: bits per byte, and the functions that each model wrote."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from danlu.evaluation.intervals import mean_interval, share_interval
from danlu.report import numbers
from danlu.report.lineage import Evaluation


@dataclass
class Bar:
    """One line of the score chart; ``share`` is its length as a share of the longest, in percent."""

    label: str
    value: float
    kind: str
    share: float = 0.0


_COMPRESSORS = {
    "gzip": "gzip -9",
    "xz": "xz -9e",
    "xz_primed": "xz -9e primed with the training text",
}


def score_bars(evaluations: list[Evaluation]) -> list[Bar]:
    """Bits per byte of the compressors and of the model at each stage, worst first within each group."""
    bars = []
    compressors: dict[str, Any] = {}
    for evaluation in evaluations:
        compressors |= evaluation.card.metrics.get("compressors") or {}
    for key, label in _COMPRESSORS.items():
        if key in compressors:
            bars.append(Bar(label, float(compressors[key]), "compressor"))
    for evaluation in evaluations:
        if "bits_per_byte" in evaluation.card.metrics:
            bars.append(Bar(evaluation.label, float(evaluation.card.metrics["bits_per_byte"]), "model"))
    longest = max((bar.value for bar in bars), default=1.0) or 1.0
    for bar in bars:
        bar.share = round(100 * bar.value / longest, 2)
    return bars


@dataclass
class ScoreRow:
    """One stage in the table of scores; shares with their 95 % intervals over the functions that were asked for."""

    evaluation: Evaluation
    parsed: str
    change: str
    """What has become of that share since the model it was made from, and over the same functions."""


def score_rows(evaluations: list[Evaluation]) -> list[ScoreRow]:
    """A row for each stage."""
    by_model = {e.model.fingerprint: e for e in evaluations}
    rows = []
    for evaluation in evaluations:
        share, n = evaluation.card.metrics.get("parse_rate"), evaluation.card.metrics.get("functions")
        parsed = numbers.percent(share, 1)
        if isinstance(share, float) and isinstance(n, int) and n > 0 and 0 <= share <= 1:
            low, high = share_interval(share, n)
            parsed += f" ({100 * low:.0f} to {100 * high:.0f})"
        parents = [by_model[f] for role, f in evaluation.model.inputs if role in PARENTS and f in by_model]
        rows.append(ScoreRow(evaluation, parsed, _change(parents[0], evaluation) if parents else numbers.MISSING))
    return rows


PARENTS = ("model", "teacher")
"""Roles of the model that another was made from."""


def _change(before: Evaluation, after: Evaluation) -> str:
    """In points, with the 95 % interval of the mean difference over the functions that both wrote."""
    theirs = {(s["path"], s["name"]): s["parses"] for s in before.card.details.get("samples", [])}
    changes = [
        float(s["parses"]) - float(theirs[s["path"], s["name"]])
        for s in after.card.details.get("samples", [])
        if (s["path"], s["name"]) in theirs
    ]
    if len(changes) < 2:
        return numbers.MISSING
    low, high = mean_interval(changes)
    mean = statistics.fmean(changes)
    return f"{100 * mean:+.1f} points over {before.label} ({100 * low:+.0f} to {100 * high:+.0f})"


@dataclass
class Completion:
    """What one stage made of one function."""

    label: str
    text: str
    parses: bool
    compiles: bool


@dataclass
class Function:
    """One held-out function: what the models were given, what they wrote, what stands in the file."""

    where: str
    prompt: str
    reference: str
    completions: list[Completion] = field(default_factory=list)


def side_by_side(evaluations: list[Evaluation], most: int) -> list[Function]:
    """Functions that every stage was asked to write, in the order of the last evaluation."""
    if not evaluations:
        return []
    by_stage = [{(s["path"], s["name"]): s for s in e.card.details.get("samples", [])} for e in evaluations]
    functions: list[Function] = []
    for key, sample in by_stage[-1].items():
        if len(functions) == most:
            break
        if not all(key in samples for samples in by_stage):
            continue
        function = Function(f"{sample['path']}: {sample['name']}", sample["prompt"], sample.get("reference", ""))
        for evaluation, samples in zip(evaluations, by_stage, strict=True):
            its = samples[key]
            function.completions.append(Completion(evaluation.label, its["completion"], its["parses"], its["compiles"]))
        functions.append(function)
    return functions
