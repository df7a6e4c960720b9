"""Training curves as small inline SVGs, drawn by matplotlib and coloured by the page.

The colours are CSS variables, so one drawing serves the light and the dark scheme; the text is real text in the page's
font. Each curve is small enough to stand on a phone unscaled.
"""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup

MAX_POINTS = 300
"""A curve of 340 pixels cannot show more; longer logs are averaged over equal stretches."""

_INK = {"#a10001": "var(--muted)", "#a10002": "var(--rule)", "#a10003": "var(--accent)"}
_TEXT, _RULE, _LINE = _INK
_WIDTH, _HEIGHT = 4.6, 2.0  # inches at 72 dots


@dataclass
class Curve:
    """One figure with the words that belong to it; ``note`` is the number to remember."""

    title: str
    note: str
    svg: Markup


def _last(values: Sequence[float]) -> float:
    return values[-1]


PANELS: tuple[tuple[str, str, str, Callable[[Sequence[float]], float]], ...] = (
    ("loss", "Training loss", "last {:.3f} nats per token", _last),
    ("heldout_bits_per_byte", "Held out", "last {:.4f} bits per byte", _last),
    ("lr", "Learning rate", "peak {:.2g}", max),
    ("tokens_per_second", "Throughput", "median {:,.0f} tokens/s", statistics.median),
)
"""(key in metrics.jsonl, title, note, what the note tells) of what is drawn, where the log has it."""


def draw_curves(rows: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Curves over the training steps; a quantity logged fewer than twice has none."""
    curves = []
    end = max((row["step"] for row in rows if _is_number(row.get("step"))), default=0)
    for key, title, note, tell in PANELS:
        points = [(row["step"], row[key]) for row in rows if _is_number(row.get("step")) and _is_number(row.get(key))]
        if len(points) >= 2:
            curves.append(Curve(title, note.format(tell([value for _, value in points])), _line(points, key, end)))
    return curves


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def thin(points: Sequence[tuple[float, float]], most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most ``most`` points, each the mean of an equal stretch; the last point is kept as it is."""
    if len(points) <= most:
        return list(points)
    bounds = [len(points) * i // most for i in range(most + 1)]
    stretches = [points[a:b] for a, b in pairwise(bounds)]
    means = [(sum(x for x, _ in s) / len(s), sum(y for _, y in s) / len(s)) for s in stretches]
    return [*means[:-1], points[-1]]


def _line(points: Sequence[tuple[float, float]], key: str, end: float) -> Markup:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    kept = thin(points)
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": key, "font.size": 9, "axes.unicode_minus": True}
    with rc_context(style):
        figure = Figure(figsize=(_WIDTH, _HEIGHT))
        figure.subplots_adjust(left=0.09, right=0.965, top=0.96, bottom=0.13)
        axes = figure.add_subplot()
        marker = "o" if len(kept) < 25 else ""
        axes.plot(
            [x for x, _ in kept],
            [y for _, y in kept],
            color=_LINE,
            linewidth=1.5,
            marker=marker,
            markersize=3,
            clip_on=False,
        )
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_RULE)
        axes.tick_params(colors=_TEXT, length=0, pad=4)
        axes.grid(axis="y", color=_RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(lambda value, _: short(value))
        axes.yaxis.set_major_formatter(lambda value, _: short(value))
        if key in ("lr", "tokens_per_second"):
            axes.set_ylim(0, 1.15 * max(y for _, y in kept) or 1)
        axes.set_xlim(0, end)
        drawn = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(drawn, format="svg", transparent=True, metadata=nothing)
    return _for_page(drawn.getvalue(), f"{key} over steps")


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
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return Markup(re.sub(r">\s+<", "><", svg).strip())
