"""The lineage as a drawing: boxes in layers, inputs above what was made from them.

A small version of the usual layered method (Sugiyama 1981): the layer of a node is its longest path from a source, an
edge that skips layers is given a waypoint in each of them, and waypoints and nodes are ordered by the mean place of
their neighbours above.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y, WAYPOINT_WIDTH = 150, 50, 18, 34, 10
_MAX_LETTERS = 21  # of 13 px that fit into a box


@dataclass(frozen=True)
class Node:
    """A box: two lines of text, and the class its colour comes from."""

    id: str
    title: str
    subtitle: str
    css: str = ""


def layers_of(nodes: Sequence[str], edges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Longest path from a source, for nodes listed inputs first."""
    layers = dict.fromkeys(nodes, 0)
    for node in nodes:
        layers[node] = 1 + max((layers[above] for above, below in edges if below == node), default=-1)
    return layers


def draw_graph(nodes: Sequence[Node], edges: Sequence[tuple[str, str]]) -> Markup:
    """An inline SVG of a directed acyclic graph.

    Args:
        nodes: inputs before what was made from them.
        edges: (id above, id below).
    """
    by_id = {node.id: node for node in nodes}
    layers = layers_of([node.id for node in nodes], edges)
    rows: list[list[str]] = [[] for _ in range(max(layers.values(), default=0) + 1)]
    for node in nodes:
        rows[layers[node.id]].append(node.id)
    above: dict[str, list[str]] = {}
    paths = []
    for start, end in dict.fromkeys(edges):
        path = [start]
        for layer in range(layers[start] + 1, layers[end]):
            path.append(f"{start} > {end} @ {layer}")
            rows[layer].append(path[-1])
        path.append(end)
        paths.append(path)
        for upper, lower in pairwise(path):
            above.setdefault(lower, []).append(upper)
    for upper_row, row in pairwise(rows):
        place = {name: index / max(1, len(upper_row) - 1) for index, name in enumerate(upper_row)}
        row.sort(key=lambda name: _mean([place[n] for n in above.get(name, []) if n in place]))

    x, width = _columns(rows, by_id)
    y = {name: index * (BOX_HEIGHT + GAP_Y) for index, row in enumerate(rows) for name in row}
    height = len(rows) * (BOX_HEIGHT + GAP_Y) - GAP_Y
    lines = [_edge(path, x, y, by_id) for path in paths]
    boxes = [_box(node, x[node.id], y[node.id]) for node in nodes]
    return Markup(  # numbers, and texts that _box has escaped
        f'<svg role="img" aria-label="lineage" viewBox="-1 -1 {width + 2:.0f} {height + 2}" '
        f'style="width: {width + 2:.0f}px" class="graph">{"".join(lines)}{"".join(boxes)}</svg>'
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.5


def _columns(rows: Sequence[Sequence[str]], boxes: Mapping[str, Node]) -> tuple[dict[str, float], float]:
    """Centre of everything in each row, rows centred over each other; and the width of it all."""
    widths = [[BOX_WIDTH if name in boxes else WAYPOINT_WIDTH for name in row] for row in rows]
    totals = [sum(row) + GAP_X * (len(row) - 1) for row in widths]
    widest = max(totals, default=0)
    x: dict[str, float] = {}
    for row, row_widths, total in zip(rows, widths, totals, strict=True):
        left = (widest - total) / 2
        for name, width in zip(row, row_widths, strict=True):
            x[name] = left + width / 2
            left += width + GAP_X
    return x, widest


def _edge(path: Sequence[str], x: Mapping[str, float], y: Mapping[str, float], boxes: Mapping[str, Node]) -> str:
    """A curve that leaves and enters boxes upright and runs straight through the rows it skips."""
    parts = [f"M{x[path[0]]:.1f} {y[path[0]] + BOX_HEIGHT}"]
    for upper, lower in pairwise(path):
        start, end, middle = y[upper] + BOX_HEIGHT, y[lower], y[upper] + BOX_HEIGHT + GAP_Y / 2
        parts.append(f"L{x[upper]:.1f} {start}C{x[upper]:.1f} {middle} {x[lower]:.1f} {middle} {x[lower]:.1f} {end}")
    return f'<path class="edge" d="{"".join(parts)}"/>'


def _box(node: Node, x: float, y: float) -> str:
    return (
        f'<g class="node {escape(node.css)}"><title>{escape(node.title)}</title>'
        f'<rect x="{x - BOX_WIDTH / 2:.1f}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6"/>'
        f'<text x="{x:.1f}" y="{y + 21}">{escape(_cut(node.title))}</text>'
        f'<text x="{x:.1f}" y="{y + 38}" class="sub">{escape(_cut(node.subtitle))}</text></g>'
    )


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_LETTERS else text[: _MAX_LETTERS - 1] + "…"
