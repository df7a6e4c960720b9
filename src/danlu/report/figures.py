"""Training curves as small inline SVGs, drawn by matplotlib and coloured by the page.

The colours are CSS variables, so one drawing serves the light and the dark scheme; the text is real text in the page's
font. Each curve is small enough to stand on a phone unscaled.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup, escape

MAX_POINTS = 300
"""A curve of 340 pixels cannot show more; longer logs are averaged over equal stretches."""

_INK = {"#a10001": "var(--muted)", "#a10002": "var(--rule)", "#a10003": "var(--accent)"}
_TEXT, _RULE, _LINE = _INK
_WIDTH, _HEIGHT = 4.6, 2.0  # inches at 72 dots


@dataclass
class Curve:
    """One figure with the words that belong to it; ``notes`` are the numbers to remember, one for each line."""

    title: str
    notes: list[str]
    svg: Markup


def last(values: Sequence[float]) -> float:
    """The last of some values."""
    return values[-1]


@dataclass(frozen=True)
class Panel:
    """What is drawn into one figure.

    Attributes:
        lines: key in metrics.jsonl -> its note, a format of what ``tell`` makes of the line's values. The first line is
            the one that matters; a second is drawn beside it, quietly.
        from_zero: whether the axis begins at 0, for rates and shares that are compared by their height.
    """

    title: str
    lines: Mapping[str, str]
    tell: Callable[[Sequence[float]], float] = last
    from_zero: bool = False


def draw_curves(rows: Sequence[Mapping[str, Any]], panels: Sequence[Panel]) -> list[Curve]:
    """Curves over the training steps; a quantity logged fewer than twice has none."""
    curves = []
    end = max((row["step"] for row in rows if is_number(row.get("step"))), default=0)
    for panel in panels:
        lines = {}
        for key in panel.lines:
            points = [(row["step"], row[key]) for row in rows if is_number(row.get("step")) and is_number(row.get(key))]
            if len(points) >= 2:
                lines[key] = points
        if lines:
            notes = [panel.lines[key].format(panel.tell([y for _, y in points])) for key, points in lines.items()]
            notes = [note.replace("%", " %") for note in notes]  # as numbers.percent has it
            svg = _lines(list(lines.values()), panel.title, end, panel.from_zero)
            curves.append(Curve(panel.title, notes, svg))
    return curves


def draw_reliability(table: Sequence[Mapping[str, Any]], note: str) -> Curve | None:
    """How often what was given a probability did happen, beside the diagonal on which it should lie."""
    points = [
        (row["probability"], row["share"])
        for row in table
        if is_number(row.get("probability")) and is_number(row.get("share"))
    ]
    if not points:
        return None
    with _figure("calibration") as (figure, axes):
        low = min(0.5, *(x for x, _ in points))
        axes.plot([low, 1], [low, 1], color=_TEXT, linewidth=1)
        axes.plot(*zip(*points, strict=True), color=_LINE, linewidth=1.5, marker="o", markersize=3, clip_on=False)
        axes.set_xlim(low, 1)
        axes.set_ylim(0, 1.05)
        svg = _svg(figure, "share that was right over the probability given")
    return Curve("Calibration", [note, "as it should be"], svg)


def is_number(value: object) -> bool:
    """A finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def thin(points: Sequence[tuple[float, float]], most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most ``most`` points, each the mean of an equal stretch; the last point is kept as it is."""
    if len(points) <= most:
        return list(points)
    bounds = [len(points) * i // most for i in range(most + 1)]
    stretches = [points[a:b] for a, b in pairwise(bounds)]
    means = [(sum(x for x, _ in s) / len(s), sum(y for _, y in s) / len(s)) for s in stretches]
    return [*means[:-1], points[-1]]


def _lines(lines: Sequence[Sequence[tuple[float, float]]], title: str, end: float, from_zero: bool) -> Markup:
    with _figure(title) as (figure, axes):
        kept = [thin(points) for points in lines]
        for number, points in reversed(list(enumerate(kept))):
            xs, ys = zip(*points, strict=True)
            marker = "o" if len(points) < 25 and number == 0 else ""
            ink, width = (_LINE, 1.5) if number == 0 else (_TEXT, 1.0)
            axes.plot(xs, ys, color=ink, linewidth=width, marker=marker, markersize=3, clip_on=False)
        axes.xaxis.set_major_locator(_ticks(integer=True))
        if from_zero:
            axes.set_ylim(0, 1.15 * max(y for points in kept for _, y in points) or 1)
        axes.set_xlim(0, end)
        return _svg(figure, f"{title} over steps")


@contextmanager
def _figure(salt: str) -> Iterator[tuple[Any, Any]]:
    """A small figure and its axes, with nothing but light rules."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9, "axes.unicode_minus": True}
    with rc_context(style):
        figure = Figure(figsize=(_WIDTH, _HEIGHT))
        figure.subplots_adjust(left=0.09, right=0.965, top=0.96, bottom=0.13)
        axes = figure.add_subplot()
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_RULE)
        axes.tick_params(colors=_TEXT, length=0, pad=4)
        axes.grid(axis="y", color=_RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.yaxis.set_major_locator(_ticks())
        axes.xaxis.set_major_formatter(lambda value, _: short(value))
        axes.yaxis.set_major_formatter(lambda value, _: short(value))
        yield figure, axes


def _ticks(**options: Any) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4, **options)


def _svg(figure: Any, label: str) -> Markup:
    drawn = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(drawn, format="svg", transparent=True, metadata=nothing)
    return _for_page(drawn.getvalue(), label)


def short(value: float) -> str:
    """A tick label: 9800 -> '9.8k', 0.02 -> '0.02', 0.0003 -> '3e-4'."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    if value and abs(value) < 0.001:
        mantissa, exponent = f"{value:.2g}".split("e") if "e" in f"{value:.2g}" else f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.3g}"


def _for_page(svg: str, label: str) -> Markup:
    """Matplotlib's file as an inline element: no prolog, no page-wide style rule, no clashing ids, CSS colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r"<metadata.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r"font-family: [^;\"]*(;|(?=\"))", "", svg)
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg)
    for placeholder, variable in _INK.items():
        svg = svg.replace(placeholder, variable)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    return Markup(re.sub(r">\s+<", "><", svg).strip())
