"""`danlu report`: one self-contained HTML page about a model and everything it was made from.

A report is nothing but the reading of cards: it runs no model and measures nothing, so every figure in it is one that a
verb wrote down when it did the work. The page asks nothing of the network and runs no script; a content security policy
says so to the browser.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from danlu import __version__, console, files
from danlu import config as configs
from danlu.formats.card import Card
from danlu.report import numbers
from danlu.report.config import ReportConfig
from danlu.report.graph import Node, draw_graph
from danlu.report.lineage import Artifact, Evaluation, find_evaluations, read_lineage
from danlu.report.scores import score_bars, score_rows, side_by_side
from danlu.report.trainings import Training, is_policy, way_of_learning

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
    lineage = read_lineage(config.model, *config.beside)
    evaluations = find_evaluations([config.model, *config.beside], lineage, config.evaluations)
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
        what=what_it_is(model.card),
        scores=score_bars(evaluations),
        score_rows=score_rows(evaluations),
        comparable=len({i.fingerprint for e in evaluations for i in e.card.inputs if i.role == "data"}) <= 1,
        evaluations=evaluations,
        functions=side_by_side(evaluations, config.samples),
        datasets=[DataPart(a.name, a.card) for a in lineage if a.card and a.card.kind == "data"],
        tokenizers=[a for a in lineage if a.card and a.card.kind == "tokenizer"],
        trainings=[
            Training.of(a, config.samples)
            for a in lineage
            if a.card and a.card.kind in ("model", "adapter") and "steps" in a.card.metrics
        ],
        graph=lineage_graph(lineage),
        stages=[Stage(a.name, a.card, evaluation=False) for a in lineage if a.card]
        + [Stage(f"evaluation, {e.label}", e.card, evaluation=True) for e in evaluations],
    )


def cut(text: object, letters: int = MAX_TEXT) -> str:
    """A text, shortened where it is long."""
    whole = str(text)
    return whole if len(whole) <= letters else whole[:letters] + " …"


def what_it_is(card: Card) -> str:
    """What a reader calls the folder."""
    if card.kind == "adapter":
        return "An adapter"
    if card.verb == "reward":
        return "A reward model"
    tasks = {"classify": "A classifier", "tag": "A tagger", "seq2seq": "An encoder-decoder"}
    return tasks.get(str(card.config.get("task")), "A language model")


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
    tiles += _learned(card)
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


def _learned(card: Card) -> list[Tile]:
    """What came of post-training, in a figure or two."""
    metrics, tiles = card.metrics, []
    if is_policy(card) and metrics.get("heldout_reward") is not None:
        before = numbers.decimal(metrics.get("heldout_reward_before"))
        remark = f"{before} before {way_of_learning(card)}"
        tiles.append(Tile("held-out reward", numbers.decimal(metrics["heldout_reward"]), remark))
    if metrics.get("heldout_accuracy") is not None:
        judged = card.verb in ("align", "reward")
        label = "of held-out comparisons right" if judged else "of held-out rows right"
        tiles.append(Tile(label, numbers.percent(metrics["heldout_accuracy"], 1)))
    if metrics.get("smaller_by") is not None:
        keeps = numbers.percent(metrics.get("share_of_teacher"))
        remark = "" if keeps == numbers.MISSING else f"and keeps {keeps} of its lead over chance"
        tiles.append(Tile("smaller than its teacher", numbers.percent(metrics["smaller_by"]), remark))
    if isinstance(adapter := card.details.get("adapter"), dict):
        tiles.append(Tile("of the weights trained", numbers.percent(adapter.get("trained_share"), 2)))
    return tiles


def _shape(card: Card) -> str:
    shape = card.details.get("model_config", {})
    layers, dim = shape.get("n_layers"), shape.get("dim")
    return f"{layers} layer{'s'[: layers > 1]}, {dim} wide" if layers and dim else ""


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
        nodes.append(Node(artifact.fingerprint, artifact.name, _how(artifact.card), artifact.card.kind))
        edges += [(fingerprint, artifact.fingerprint) for _, fingerprint in artifact.inputs]
    return draw_graph(nodes, edges)


def _how(card: Card) -> str:
    """The verb, and of several methods which."""
    return f"{card.verb}, {way_of_learning(card)}" if card.verb == "align" else card.verb
