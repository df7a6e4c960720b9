"""`danlu report`: one self-contained HTML page about a model and everything it was made from.

A report is nothing but the reading of cards: it runs no model and measures nothing, so every figure in it is one that a
verb wrote down when it did the work. The page asks nothing of the network and runs no script; a content security policy
says so to the browser.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from danlu import __version__, console, files
from danlu import config as configs
from danlu.formats.card import Card
from danlu.report import numbers
from danlu.report.config import ReportConfig
from danlu.report.figures import Curve, draw_curves
from danlu.report.graph import Node, draw_graph
from danlu.report.lineage import Artifact, Evaluation, find_evaluations, read_lineage
from danlu.training.metrics import read_metrics

MAX_TEXT = 2_000
"""Letters of a sample that are shown; samples are there to be glanced at."""


def build_report(config: ReportConfig) -> Path:
    """Write the page; returns its path.

    Args:
        config: which model, where to write, which evaluations to take in.

    Raises:
        DanluError: the folder has no card, a given evaluation is none, or the page cannot be written.
    """
    config = configs.validate(config)
    lineage = read_lineage(config.model)
    evaluations = find_evaluations(config.model, lineage, config.evaluations)
    if not evaluations:
        console.warn(
            f"{config.model}: no evaluation of this model was found; the report has no scores. Run danlu evaluate first"
        )
    path = config.out or config.model / "report.html"
    files.write_text(path, render(config, lineage, evaluations))
    return path


def render(config: ReportConfig, lineage: list[Artifact], evaluations: list[Evaluation]) -> str:
    """The page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("danlu.report", "."),
        autoescape=True,  # names, texts and model output come from anywhere
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("count", "decimal", "percent", "size", "duration", "flops", "command", "words", "visible"):
        environment.filters[name] = getattr(numbers, name)
    environment.filters["cut"] = cut
    model = lineage[-1]
    assert model.card is not None  # read_lineage has read it
    return environment.get_template("template.html").render(
        title=config.title or config.model.absolute().name,
        version=__version__,
        card=model.card,
        made=[artifact for artifact in lineage if artifact.card],
        total_seconds=sum(a.card.seconds for a in lineage if a.card),
        tiles=key_figures(model.card, lineage, evaluations),
        scores=score_bars(evaluations),
        comparable=len({i.fingerprint for e in evaluations for i in e.card.inputs if i.role == "data"}) <= 1,
        evaluations=evaluations,
        functions=side_by_side(evaluations, config.samples),
        datasets=[DataPart(a.name, a.card) for a in lineage if a.card and a.card.kind == "data"],
        tokenizers=[a for a in lineage if a.card and a.card.kind == "tokenizer"],
        trainings=[Training.of(a) for a in lineage if a.card and a.card.kind == "model" and "steps" in a.card.metrics],
        graph=lineage_graph(lineage),
        stages=[Stage(a.name, a.card, evaluation=False) for a in lineage if a.card]
        + [Stage(f"evaluation, {e.label}", e.card, evaluation=True) for e in evaluations],
    )


def cut(text: object, letters: int = MAX_TEXT) -> str:
    """A text, shortened where it is long."""
    whole = str(text)
    return whole if len(whole) <= letters else whole[:letters] + " …"


@dataclass
class Tile:
    """One key figure: what it is, its value, and a remark that puts it in proportion."""

    label: str
    value: str
    remark: str = ""


def key_figures(card: Card, lineage: list[Artifact], evaluations: list[Evaluation]) -> list[Tile]:
    """The handful of numbers a reader asks for first; those the cards do not hold are left out."""
    tiles = []
    scored = [e for e in evaluations if "bits_per_byte" in e.card.metrics]
    if scored:
        best = min(scored, key=lambda e: float(e.card.metrics["bits_per_byte"]))
        primed = best.card.metrics.get("compressors", {}).get("xz_primed")
        remark = f"{best.label}; xz with the training text: {numbers.decimal(primed)}" if primed else best.label
        tiles.append(Tile("bits per byte, held out", numbers.decimal(best.card.metrics["bits_per_byte"]), remark))
    wrote = [e for e in evaluations if e.card.metrics.get("functions")]
    if wrote:
        first, last = wrote[0], wrote[-1]
        before = f"{numbers.percent(first.card.metrics.get('parse_rate'))} {first.label}" if first is not last else ""
        tiles.append(Tile("of its functions parse", numbers.percent(last.card.metrics.get("parse_rate")), before))
    trained = [a.card for a in lineage if a.card and a.card.metrics.get("steps")]
    if "parameters" in card.metrics:
        tiles.append(Tile("parameters", numbers.count(card.metrics["parameters"]), _shape(card)))
    if trained:
        longest = max(trained, key=lambda c: float(c.metrics.get("tokens", 0)))
        speed = longest.metrics.get("tokens_per_second")
        share = longest.metrics.get("share_of_peak")
        remark = f"{numbers.percent(share)} of the machine's matmul peak" if share else ""
        tiles.append(Tile("tokens/s in training", numbers.count(speed), remark))
        seconds = sum(float(c.metrics.get("train_seconds", c.seconds)) for c in trained)
        tokens = sum(int(c.metrics.get("tokens", 0)) for c in trained)
        tiles.append(Tile("of training", numbers.duration(seconds), f"{numbers.count(tokens)} tokens"))
    return tiles


def _shape(card: Card) -> str:
    shape = card.details.get("model_config", {})
    layers, dim = shape.get("n_layers"), shape.get("dim")
    return f"{layers} layer{'s'[: layers > 1]}, {dim} wide" if layers and dim else ""


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


@dataclass
class DataPart:
    """A data folder's card, with its filters in the order of what they removed."""

    name: str
    card: Card

    @property
    def filters(self) -> list[dict[str, Any]]:
        """Filters that did something."""
        return [f for f in self._all() if f.get("documents_removed") or f.get("documents_changed")]

    @property
    def idle_filters(self) -> list[str]:
        """Names of the filters that found nothing."""
        return [f["name"] for f in self._all() if not (f.get("documents_removed") or f.get("documents_changed"))]

    def _all(self) -> list[dict[str, Any]]:
        return list(self.card.details.get("filters") or [])

    @property
    def kept_share(self) -> float | None:
        """Share of the bytes read that were kept."""
        read, kept = self.card.metrics.get("bytes_read"), self.card.metrics.get("bytes_kept")
        return kept / read if read and kept is not None else None


@dataclass
class Training:
    """A training run's card with its curves."""

    name: str
    card: Card
    curves: list[Curve]

    @classmethod
    def of(cls, artifact: Artifact) -> Training:
        """Curves are drawn if the folder is still there."""
        assert artifact.card is not None
        rows = read_metrics(artifact.folder / "metrics.jsonl") if artifact.folder else []
        return cls(artifact.name, artifact.card, draw_curves(rows))


@dataclass
class Stage:
    """One card's exact config and versions."""

    name: str
    card: Card
    evaluation: bool

    @property
    def config(self) -> str:
        """The config as a YAML file that --config takes."""
        return yaml.safe_dump(self.card.config, sort_keys=False, allow_unicode=True)


def lineage_graph(lineage: list[Artifact]) -> Any:
    """The drawing of what was made from what."""
    nodes, edges = [], []
    for artifact in lineage:
        if artifact.card is None:
            nodes.append(Node(artifact.fingerprint, artifact.name, "given", "given"))
            continue
        nodes.append(Node(artifact.fingerprint, artifact.name, artifact.card.verb, artifact.card.kind))
        edges += [(fingerprint, artifact.fingerprint) for _, fingerprint in artifact.inputs]
    return draw_graph(nodes, edges)
