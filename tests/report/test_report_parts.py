"""The parts of the report: drawings, numbers, and commands that do again what a card says was done."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu import config as configs
from danlu.cli import build_app
from danlu.data.config import DataConfig
from danlu.formats.card import Card
from danlu.report import numbers
from danlu.report.config import ReportConfig
from danlu.report.figures import draw_curves, short, thin
from danlu.report.graph import BOX_HEIGHT, BOX_WIDTH, Node, draw_graph, layers_of
from danlu.report.trainings import TEXT
from danlu.training.config import FinetuneConfig, PretrainConfig
from danlu.verbs import Verb


@st.composite
def dags(draw: st.DrawFn) -> tuple[list[str], list[tuple[str, str]]]:
    names = [f"n{i}" for i in range(draw(st.integers(1, 9)))]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return names, draw(st.lists(st.sampled_from(pairs), max_size=14)) if pairs else []


@given(dags())
def test_graph_runs_downwards_and_boxes_keep_apart(dag: tuple[list[str], list[tuple[str, str]]]) -> None:
    names, edges = dag
    layers = layers_of(names, edges)
    assert all(layers[above] < layers[below] for above, below in edges)
    svg = str(draw_graph([Node(name, name, "made") for name in names], edges))
    boxes = [(float(x), float(y)) for x, y in re.findall(r'<rect x="([-\d.]+)" y="(\d+)"', svg)]
    assert len(boxes) == len(names)
    for i, (x, y) in enumerate(boxes):
        assert all(abs(x - x2) >= BOX_WIDTH or abs(y - y2) >= BOX_HEIGHT for x2, y2 in boxes[:i])
    corners = {name: box for name, box in zip(names, boxes, strict=True)}  # noqa: C416
    drawn = re.findall(r'class="edge" d="M([-\d.]+) (\d+)[^"]* ([-\d.]+) (\d+)"', svg)
    ends = {tuple(map(float, edge)) for edge in drawn}
    assert len(drawn) == len(set(edges))
    for above, below in edges:
        (x1, y1), (x2, y2) = corners[above], corners[below]
        assert any(
            abs(a - x1 - BOX_WIDTH / 2) < 0.2 and b == y1 + BOX_HEIGHT and abs(c - x2 - BOX_WIDTH / 2) < 0.2 and d == y2
            for a, b, c, d in ends
        )


def test_edges_that_skip_layers_go_around_the_boxes_between() -> None:
    svg = str(draw_graph([Node(n, n, "") for n in "abc"], [("a", "b"), ("b", "c"), ("a", "c")]))
    (box,) = [(float(x), float(y)) for x, y in re.findall(r'<rect x="([-\d.]+)" y="(\d+)"', svg)][1:2]
    long_edge = max(re.findall(r'class="edge" d="([^"]+)"', svg), key=len)
    straight = [(float(x), float(y)) for x, y in re.findall(r"L([-\d.]+) (\d+)", long_edge)]
    beside = [x for x, y in straight if box[1] <= y <= box[1] + BOX_HEIGHT]
    assert beside
    assert all(x < box[0] or x > box[0] + BOX_WIDTH for x in beside)


def test_curves_take_their_colours_from_the_page() -> None:
    rows = [{"step": i, "loss": 3 - i / 100, "lr": 1e-4 * i, "tokens_per_second": 9000.0} for i in range(1, 80)]
    rows[10]["loss"] = float("nan")
    curves = draw_curves([*rows, {"seconds": 3.0}], TEXT)
    assert [curve.title for curve in curves] == ["Training loss", "Learning rate", "Throughput"]
    assert curves[0].notes == ["last 2.210 nats per token"]
    for curve in curves:
        svg = str(curve.svg)
        assert "var(--accent)" in svg
        assert not re.search(r"#[0-9a-f]{6}\b", svg), "no fixed colour"
        assert not re.search(r"<style|<script|<metadata|xmlns|DOCTYPE|font-family|nan", svg)
        assert len(svg) < 30_000
    assert draw_curves([], TEXT) == []


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), min_size=1, max_size=400), st.integers(2, 50))
def test_thinning_keeps_the_end_and_the_range(points: list[tuple[float, float]], most: int) -> None:
    kept = thin(points, most)
    assert len(kept) == min(most, len(points))
    assert kept[-1] == points[-1]
    low, high = min(y for _, y in points), max(y for _, y in points)
    assert all(low - 1e-6 <= y <= high + 1e-6 for _, y in kept)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (numbers.count(12345), "12,345"), (numbers.count(12_345_678), "12.3 M"), (numbers.count(None), "–"),
        (numbers.decimal(1.18342), "1.183"), (numbers.decimal("x"), "–"), (numbers.decimal(float("nan")), "–"),
        (numbers.percent(0.456), "46 %"), (numbers.percent(True), "–"),
        (numbers.size(310), "310 bytes"), (numbers.size(11_800_000), "11.8 MB"),
        (numbers.duration(9.04), "9.0 s"), (numbers.duration(182.4), "3 min 02 s"),
        (numbers.duration(3_725), "1 h 02 min"),
        (numbers.flops(5.16e11), "516 GFLOP/s"), (numbers.flops(2.4e12), "2.4 TFLOP/s"),
        (numbers.words("bytes_per_token_heldout"), "bytes per token, held out"),
        (numbers.words("heldout_documents"), "held-out documents"),
        (numbers.visible("\n  x"), "⏎··x"), (numbers.visible(" " * 32 + "x"), "␣×32x"),
        (short(9800), "9.8k"), (short(0.02), "0.02"), (short(0.0003), "3e-4"), (short(0), "0"),
    ],
)  # fmt: skip
def test_spelling_of_numbers(shown: str, expected: str) -> None:
    assert shown == expected


@pytest.mark.parametrize(
    ("verb", "config"),
    [
        (
            "pretrain",
            PretrainConfig(data=Path("d a"), tokenizer=Path("tok"), out=Path("m"), minutes=3.0, tie_embeddings=False),
        ),
        (
            "pretrain",
            PretrainConfig(data=Path("d"), tokenizer=Path("t"), out=Path("m"), log_to=("tensorboard", "wandb"), seed=7),
        ),
        (
            "finetune",
            FinetuneConfig(model=Path("m"), data=Path("it's.jsonl"), out=Path("c"), epochs=2.5, train_on="all"),
        ),
        (
            "data build",
            DataConfig(corpus=("stdlib", "my texts::2"), out=Path("d"), languages=("en", "zh"), heldout=0.1),
        ),
        ("report", ReportConfig(model=Path("m"), title="a 'title' with $HOME")),
    ],
)
def test_commands_do_again_what_the_card_says(verb: str, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    line = numbers.command(Card("model", verb, "f", configs.to_dict(config)))
    taken: list[object] = []
    monkeypatch.setattr(Verb, "function", lambda self: taken.append)
    program, *words = shlex.split(line)
    assert program == "danlu"
    build_app(words)(words, standalone_mode=False)
    assert taken == [config]


def test_a_verb_of_another_version_is_a_comment() -> None:
    assert numbers.command(Card("model", "transmute", "f", {})).startswith("#")
