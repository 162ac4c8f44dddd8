"""A circuit as a drawing: its nodes layer above layer, its edges as curves between them."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from jaxheads.names import choose, unknown
from jaxheads.report.drawing import wrap
from jaxheads.report.layered import Layout, lay_out
from jaxheads.report.page import visible_text

Node = tuple[str, int | None, str]
Edge = tuple[str, str, float]

KINDS = ("embed", "head", "mlp", "logits")
MOST_NODES, MOST_EDGES = 40, 80

_FILLS = {
    "embed": ("#3d4752", "#3d4752", "#ffffff"),
    "head": ("#eaf2fb", "#4f7cac", "#12283f"),
    "mlp": ("#fdf1dc", "#c08a2e", "#3f2b08"),
    "logits": ("#3d4752", "#3d4752", "#ffffff"),
}
"""Fill, outline and text of each kind."""
_PARTS = {
    "": ("", ""),
    "q": ("7 3", "into queries"),
    "k": ("1.6 2.6", "into keys"),
    "v": ("", "into values, MLPs, logits"),
}
"""Dashes of a line, and what that means."""
_PALE = {True: (176, 203, 228), False: (238, 178, 166)}
_FULL = {True: (8, 81, 156), False: (165, 15, 21)}
_HEIGHT, _GUTTER, _MARGIN, _PAD, _LEAST = 22.0, 62.0, 14.0, 10.0, 470.0


class _Line(NamedTuple):
    sender: int
    receiver: int
    part: str
    score: float


class _Shown(NamedTuple):
    nodes: list[Node]
    lines: list[_Line]
    note: str


def circuit_drawing(nodes: Sequence[Node], edges: Sequence[Edge], *, title: str) -> str:
    """Draws a circuit: layers from the bottom up, between the embedding and the logits.

    An edge is as wide and as dark as its score is large; blue is positive, red negative. Edges
    into queries and keys are broken lines. Of more than 40 nodes those stay that carry most
    (the sum of their edges' sizes; embedding and logits always stay), of more than 80 edges the
    strongest, and the drawing says what it leaves out. Pointing at an edge tells its score.

    Args:
      nodes: (name, layer, kind), kind one of "embed", "head", "mlp" and "logits"; the layer is
        None for embed and logits. Within a layer MLPs stand above heads.
      edges: (sender, receiver, score): a node's name; the name of a node, or of a head followed
        by ".q", ".k" or ".v" where it enters its queries, keys or values; the score. Where
        heads share keys and values, give an edge to each head that reads them.
      title: the figure's title; errors name it.

    Returns:
      An `<svg>` element.

    Raises:
      ValueError: no nodes, a name given twice, an unknown kind, a layer missing or too many;
        an edge of unknown nodes, that does not lead upward, given twice, or whose score is not
        finite.
    """
    where = f"figure {title!r}"
    _check_nodes(where, nodes)
    shown = _strongest(nodes, _check_edges(where, nodes, edges))
    ranks = [_rank(layer, kind) for _, layer, kind in shown.nodes]
    order = sorted(set(ranks))
    levels = [order.index(rank) for rank in ranks]
    widths = [max(36.0, 6.4 * len(visible_text(name)) + 14) for name, _, _ in shown.nodes]
    pairs = [(line.sender, line.receiver) for line in shown.lines]
    placed = lay_out(levels, widths, pairs, gap=6, lane=4)
    return _Picture(shown, order, levels, widths, placed, title).svg()


# What is drawn.


def _rank(layer: int | None, kind: str) -> float:
    if layer is None:
        return -math.inf if kind == "embed" else math.inf
    return 2 * layer + (kind == "mlp")


def _check_nodes(where: str, nodes: Sequence[Node]) -> None:
    if not nodes:
        raise ValueError(f"{where}: expected at least one node, got none")
    seen = set()
    for name, layer, kind in nodes:
        choose(f"kind of node {name!r}", kind, KINDS)
        inside = kind in ("head", "mlp")
        if inside != (layer is not None) or (layer is not None and layer < 0):
            expected = "a layer of 0 or more" if inside else "no layer"
            raise ValueError(
                f"{where}: node {name!r} is of kind {kind}, expected {expected}: {layer}"
            )
        if name in seen:
            raise ValueError(f"{where}: node {name!r} is given twice")
        seen.add(name)


def _check_edges(where: str, nodes: Sequence[Node], edges: Iterable[Edge]) -> list[_Line]:
    index = {name: place for place, (name, _, _) in enumerate(nodes)}
    lines: dict[tuple[int, int, str], _Line] = {}
    for sender, receiver, score in edges:
        base, _, part = receiver.rpartition(".")
        if receiver in index or part not in ("q", "k", "v"):
            base, part = receiver, ""
        for name in (sender, base):
            if name not in index:
                raise ValueError(f"{where}: {unknown('node', name, index)}")
        ends = [nodes[index[name]] for name in (sender, base)]
        if part and ends[1][2] != "head":
            raise ValueError(f"{where}: {base!r} is no head, it has no {part!r} to enter")
        low, high = (_rank(layer, kind) for _, layer, kind in ends)
        if low >= high:
            raise ValueError(f"{where}: the edge from {sender!r} to {receiver!r} leads not upward")
        if not math.isfinite(score):
            raise ValueError(
                f"{where}: expected a finite score from {sender!r} to {receiver!r}, got {score}"
            )
        key = (index[sender], index[base], part)
        if key in lines:
            raise ValueError(f"{where}: the edge from {sender!r} to {receiver!r} is given twice")
        lines[key] = _Line(*key, float(score))
    return list(lines.values())


def _strongest(nodes: Sequence[Node], lines: list[_Line]) -> _Shown:
    """At most `MOST_NODES` and `MOST_EDGES`, and a line on what is left out."""
    carried = [0.0] * len(nodes)
    for line in lines:
        carried[line.sender] += abs(line.score)
        carried[line.receiver] += abs(line.score)
    first = [place for place, (_, layer, _) in enumerate(nodes) if layer is None]
    rest = sorted(set(range(len(nodes))) - set(first), key=lambda i: (-carried[i], i))
    kept = {*first, *rest[: MOST_NODES - len(first)]}
    inside = [line for line in lines if {line.sender, line.receiver} <= kept]
    drawn = sorted(inside, key=lambda line: -abs(line.score))[:MOST_EDGES]
    # A node all of whose edges are left out would look as if it had none.
    touched = {i for line in drawn for i in (line.sender, line.receiver)}
    had = {i for line in lines for i in (line.sender, line.receiver)}
    kept -= had - touched
    places = sorted(kept)
    new = {old: place for place, old in enumerate(places)}
    note = ""
    if len(drawn) < len(lines) or len(places) < len(nodes):
        strongest = max((abs(s.score) for s in set(lines) - set(drawn)), default=0.0)
        note = (
            f"Shown: {len(places)} of {len(nodes)} nodes, {len(drawn)} of {len(lines)} edges. "
            f"Left out: the weakest, up to {strongest:.3g} in size."
        )
    return _Shown(
        [nodes[i] for i in places],
        [line._replace(sender=new[line.sender], receiver=new[line.receiver]) for line in drawn],
        note,
    )


# How it is drawn.


class _Picture(NamedTuple):
    shown: _Shown
    order: list[float]
    levels: list[int]
    widths: list[float]
    placed: Layout
    title: str

    def svg(self) -> str:
        inner = max(self.placed.width, _LEAST - _GUTTER - 2 * _MARGIN)
        width = inner + _GUTTER + 2 * _MARGIN + _PAD
        heading = wrap(visible_text(self.title), width / 72, 12).split("\n")
        top = _MARGIN + 17 * len(heading) + 4
        body = [*self._bands(width, top), *self._edges(top), *self._boxes(top)]
        legend, bottom = self._legend(self._y(top, 0) + _HEIGHT / 2 + 24, width)
        words = [
            _text(_MARGIN, _MARGIN + 11 + 17 * i, line, size=12, anchor="start", weight="bold")
            for i, line in enumerate(heading)
        ]
        label = html.escape(visible_text(self.title))
        return (
            f'<svg role="img" aria-label="{label}" width="{width:.1f}pt" height="{bottom:.1f}pt" '
            f'viewBox="0 0 {width:.1f} {bottom:.1f}" xmlns="http://www.w3.org/2000/svg" '
            "font-family=\"system-ui, 'DejaVu Sans', sans-serif\">"
            + "\n".join((*words, *body, *legend))
            + "</svg>"
        )

    @property
    def _pitch(self) -> float:
        """Between levels: roomy in a small circuit, close in a tall one."""
        return min(max(620 / max(len(self.order) - 1, 1), 40.0), 74.0)

    def _y(self, top: float, level: int) -> float:
        return top + 8 + _HEIGHT / 2 + (len(self.order) - 1 - level) * self._pitch

    def _x(self, x: float) -> float:
        slack = max(0.0, _LEAST - _GUTTER - 2 * _MARGIN - self.placed.width)
        return _MARGIN + _GUTTER + slack / 2 + x

    def _bands(self, width: float, top: float) -> list[str]:
        """A pale band and a name for each layer."""
        layers: dict[int, list[float]] = {}
        for level, rank in enumerate(self.order):
            if math.isfinite(rank):
                layers.setdefault(int(rank // 2), []).append(self._y(top, level))
        found, reach = [], self._pitch / 2 - 1.5
        for layer, ys in layers.items():
            high, tall = min(ys) - reach, max(ys) - min(ys) + 2 * reach
            found.append(
                f'<rect x="{_MARGIN}" y="{high:.1f}" width="{width - 2 * _MARGIN:.1f}" '
                f'height="{tall:.1f}" rx="5" fill="#f4f6f8"/>'
            )
            middle = high + tall / 2 + 3.5
            found.append(
                _text(_MARGIN + 8, middle, f"layer {layer}", anchor="start", fill="#69737f")
            )
        return found

    def _edges(self, top: float) -> list[str]:
        largest = max((abs(line.score) for line in self.shown.lines), default=0.0) or 1.0
        drawn = zip(self.shown.lines, self.placed.paths, strict=True)
        found = []
        # The strongest last, on top of the others.
        for line, xs in sorted(drawn, key=lambda pair: abs(pair[0].score)):
            first = self.levels[line.sender]
            points = [[self._x(x), self._y(top, first + i)] for i, x in enumerate(xs)]
            port = {"q": -0.3, "v": 0.3}.get(line.part, 0.0) * self.widths[line.receiver]
            points[0][1] -= _HEIGHT / 2
            points[-1] = [points[-1][0] + port, points[-1][1] + _HEIGHT / 2]
            points = _past_boxes(points)
            names = [self.shown.nodes[i][0] for i in (line.sender, line.receiver)]
            to = f"{names[1]}.{line.part}" if line.part else names[1]
            tip = html.escape(f"{visible_text(names[0])} → {visible_text(to)}: {line.score:+.4g}")
            found.append(
                f'<path d="{_curve(points)}" fill="none" stroke-opacity=".9" '
                f"{_pen(line.score / largest, line.part)}><title>{tip}</title></path>"
            )
        return found

    def _boxes(self, top: float) -> list[str]:
        found = []
        for (name, _, kind), level, wide, x in zip(
            self.shown.nodes, self.levels, self.widths, self.placed.x, strict=True
        ):
            at, y = self._x(x), self._y(top, level)
            found.append(_box(at, y, wide, kind))
            found.append(_text(at, y + 3.6, visible_text(name), fill=_FILLS[kind][2]))
        return found

    def _legend(self, y: float, width: float) -> tuple[list[str], float]:
        """What lines and boxes mean, from `y` down, and where it ends."""
        lines, entries = self.shown.lines, []
        scores = [line.score for line in lines]
        largest = max(map(abs, scores), default=0.0) or 1.0
        for score in sorted({max(scores), min(scores)}, reverse=True) if scores else ():
            number = f"{score:+.3g}".replace("-", "−")
            entries.append((_pen(score / largest, ""), "", number))
        parts = {line.part for line in lines}
        for part in ("q", "k", "v") if parts & {"q", "k"} else ():
            if part in parts or part == "v":
                entries.append((_pen(0.25, part, "#49525c"), "", _PARTS[part][1]))
        for kind, name in (("head", "attention head"), ("mlp", "MLP")):
            if any(node[2] == kind for node in self.shown.nodes):
                entries.append(("", kind, name))
        found, x = [], _MARGIN
        for pen, kind, name in entries:
            taken = 44 + 5.6 * len(name) + 16
            if x + taken > width and x > _MARGIN:
                x, y = _MARGIN, y + 18
            if kind:
                found.append(_box(x + 17, y, 30, kind, 13))
            else:
                found.append(f'<path d="M{x:.1f} {y:.1f}h34" fill="none" {pen}/>')
            found.append(_text(x + 41, y + 3.4, name, anchor="start", fill="#39414a"))
            x += taken
        for row in wrap(self.shown.note, width / 72, 9).split("\n") if self.shown.note else ():
            y += 18
            found.append(_text(_MARGIN, y + 3.4, row, anchor="start", size=9, fill="#39414a"))
        return found, y + 18


def _past_boxes(points: list[list[float]]) -> list[list[float]]:
    """The points of a line, upright as far as boxes reach where it comes or leaves flat."""
    found, reach = points[:1], 0.36 * _HEIGHT
    for before, point, after in zip(points, points[1:], points[2:], strict=False):
        (x0, y0), (x, y), (x2, y2) = before, point, after
        low = [[x, y + reach]] if abs(x - x0) > 0.9 * (y0 - y) else []
        high = [[x, y - reach]] if abs(x2 - x) > 0.9 * (y - y2) else []
        found += low + ([point] if not (low and high) else []) + high
    return [*found, points[-1]]


def _curve(points: list[list[float]]) -> str:
    """A smooth curve upward through points, upright at both ends, that never overshoots."""
    slopes = [0.0]
    for (x0, y0), (x1, y1), (x2, y2) in zip(points, points[1:], points[2:], strict=False):
        before, after = (x1 - x0) / (y1 - y0), (x2 - x1) / (y2 - y1)
        # The harmonic mean of the slopes (Fritsch and Butland 1984).
        both = 0.0 if before * after <= 0 else 2 * before * after / (before + after)
        slopes.append(both)
    slopes.append(0.0)
    path = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    for i, ((x0, y0), (x1, y1)) in enumerate(pairwise(points)):
        reach = 0.42 * (y1 - y0)
        path.append(
            f"C{x0 + slopes[i] * reach:.1f} {y0 + reach:.1f} "
            f"{x1 - slopes[i + 1] * reach:.1f} {y1 - reach:.1f} {x1:.1f} {y1:.1f}"
        )
    return "".join(path)


def _pen(strength: float, part: str, colour: str = "") -> str:
    """Attributes of a line for a score in [-1,1] of the largest."""
    positive, size = strength >= 0, abs(strength)
    pale, full = _PALE[positive], _FULL[positive]
    mixed = (round(p + (f - p) * size**0.7) for p, f in zip(pale, full, strict=True))
    colour = colour or "#" + "".join(f"{c:02x}" for c in mixed)
    dashes = _PARTS[part][0]
    broken = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'stroke="{colour}" stroke-width="{0.9 + 4.1 * size:.2f}"{broken}'


def _box(x: float, y: float, wide: float, kind: str, tall: float = _HEIGHT) -> str:
    fill, line, _ = _FILLS[kind]
    corner = {"mlp": 2.0, "head": tall / 3.4}.get(kind, tall / 2)
    return (
        f'<rect x="{x - wide / 2:.1f}" y="{y - tall / 2:.1f}" width="{wide:.1f}" '
        f'height="{tall:.1f}" rx="{corner:.1f}" fill="{fill}" stroke="{line}"/>'
    )


def _text(
    x: float,
    y: float,
    words: str,
    *,
    size: float = 10,
    anchor: str = "middle",
    weight: str = "normal",
    fill: str = "#16191d",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" text-anchor="{anchor}" '
        f'font-weight="{weight}" fill="{fill}">{html.escape(words)}</text>'
    )
