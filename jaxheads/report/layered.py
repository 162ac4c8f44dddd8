"""Layout of a layered graph: which node stands where in its row, and how edges pass the rest.

Source: Sugiyama, Tagawa and Toda (1981), "Methods for Visual Understanding of Hierarchical
System Structures". An edge that crosses levels gets a point of its own in each, so that it
passes beside the boxes there; rows are ordered by the means of their neighbours; places are
those nearest to the neighbours' that leave the gaps asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

ORDERINGS, PLACEMENTS = 16, 60
# Long edges are pulled straight at the cost of the boxes' places (Gansner et al. 1993).
BENDS = {0: 1.0, 1: 2.0, 2: 8.0}


class Segment(NamedTuple):
    """A piece of an edge from one level to the next, between two items."""

    low: int
    high: int
    pull: float


class Layout(NamedTuple):
    """Where things are, in the unit of the widths.

    Attributes:
      x: the middle of each node, the leftmost edge of any at 0.
      paths: for each edge its x at every level from its lower end to its upper.
      width: from the leftmost to the rightmost edge of anything.
    """

    x: list[float]
    paths: list[list[float]]
    width: float


def lay_out(
    levels: Sequence[int],
    widths: Sequence[float],
    edges: Sequence[tuple[int, int]],
    *,
    gap: float,
    lane: float,
) -> Layout:
    """Places nodes in their levels; the same graph always looks the same.

    Args:
      levels: the level of each node, all from 0 up to the highest in use.
      widths: of each node.
      edges: pairs of nodes, from a lower level to a higher.
      gap: between neighbours.
      lane: width of an edge where it passes nodes.
    """
    size, sides = list(widths), list(levels)
    chains: list[list[int]] = []
    for low, high in edges:
        passed = range(levels[low] + 1, levels[high])
        points = range(len(size), len(size) + len(passed))
        size += [lane] * len(passed)
        sides += passed
        chains.append([low, *points, high])
    segments: list[list[Segment]] = [[] for _ in range(max(sides))]
    for chain in chains:
        for low, high in pairwise(chain):
            pull = BENDS[(low >= len(levels)) + (high >= len(levels))]
            segments[sides[low]].append(Segment(low, high, pull))
    rows = _order(_spread_out(sides, chains), segments, size, gap)
    x = _place(rows, segments, size, gap)
    left = min(at - wide / 2 for at, wide in zip(x, size, strict=True))
    right = max(at + wide / 2 for at, wide in zip(x, size, strict=True))
    x = [at - left for at in x]
    return Layout(x[: len(levels)], [[x[i] for i in chain] for chain in chains], right - left)


def _spread_out(sides: list[int], chains: list[list[int]]) -> list[list[int]]:
    """Rows to begin with: items that hang together begin beside each other."""
    rank = dict.fromkeys(i for chain in chains for i in chain)
    rank |= dict.fromkeys(range(len(sides)))
    rows: list[list[int]] = [[] for _ in range(max(sides) + 1)]
    for item in rank:
        rows[sides[item]].append(item)
    return rows


def _order(
    rows: list[list[int]], segments: list[list[Segment]], size: list[float], gap: float
) -> list[list[int]]:
    """Rows sorted by the mean place of their neighbours below and above in turn."""
    best, fewest = rows, _crossings(rows, segments)
    for turn in range(ORDERINGS):
        upward = turn % 2 == 0
        rows = [list(row) for row in rows]
        for level in range(1, len(rows)) if upward else range(len(rows) - 2, -1, -1):
            between = segments[level - 1] if upward else segments[level]
            other = _packed(rows[level - 1] if upward else rows[level + 1], size, gap)
            here = _packed(rows[level], size, gap)
            found: dict[int, list[float]] = {}
            for low, high, _ in between:
                item, neighbour = (high, low) if upward else (low, high)
                found.setdefault(item, []).append(other[neighbour])
            mean = {i: float(np.mean(found[i])) if i in found else here[i] for i in rows[level]}
            rows[level].sort(key=mean.__getitem__)
        crossings = _crossings(rows, segments)
        if crossings < fewest:
            best, fewest = rows, crossings
    return best


def _packed(row: list[int], size: list[float], gap: float) -> dict[int, float]:
    """Places of a row's items side by side about 0."""
    ends = np.cumsum([size[i] + gap for i in row])
    middles = ends - np.array([size[i] + gap for i in row]) / 2 - ends[-1] / 2
    return dict(zip(row, middles.tolist(), strict=True))


def _crossings(rows: list[list[int]], segments: list[list[Segment]]) -> int:
    total = 0
    for level, between in enumerate(segments):
        below = {item: place for place, item in enumerate(rows[level])}
        above = {item: place for place, item in enumerate(rows[level + 1])}
        low = np.array([below[s.low] for s in between])
        high = np.array([above[s.high] for s in between])
        total += int(((low[:, None] < low) & (high[:, None] > high)).sum())
    return total


def _place(
    rows: list[list[int]], segments: list[list[Segment]], size: list[float], gap: float
) -> list[float]:
    x = [0.0] * len(size)
    pulls: list[list[tuple[int, float]]] = [[] for _ in size]
    for low, high, pull in (s for between in segments for s in between):
        pulls[low].append((high, pull))
        pulls[high].append((low, pull))
    for row in rows:
        for item, place in _packed(row, size, gap).items():
            x[item] = place
    for turn in range(PLACEMENTS):
        for row in rows if turn % 2 else reversed(rows):
            wanted, weights = [], []
            for item in row:
                weight = sum(pull for _, pull in pulls[item])
                to = sum(x[i] * pull for i, pull in pulls[item])
                wanted.append(to / weight if weight else x[item])
                weights.append(weight or 0.1)
            apart = [(size[a] + size[b]) / 2 + gap for a, b in pairwise(row)]
            for item, place in zip(row, _nearest(wanted, weights, apart), strict=True):
                x[item] = place
    return x


def _nearest(wanted: list[float], weights: list[float], apart: list[float]) -> list[float]:
    """The places of least weighted squared distance from those wanted, `apart` at least.

    Pooling of adjacent violators, on the places less the room that the gaps take.
    """
    room = np.concatenate([[0.0], np.cumsum(apart)])
    blocks: list[tuple[float, float, int]] = []  # place, weight, items
    for want, weight, taken in zip(wanted, weights, room.tolist(), strict=True):
        block = (want - taken, weight, 1)
        while blocks and blocks[-1][0] >= block[0]:
            place, mass, items = blocks.pop()
            both = mass + block[1]
            block = ((place * mass + block[0] * block[1]) / both, both, items + block[2])
        blocks.append(block)
    places = [place for place, _, items in blocks for _ in range(items)]
    return [place + taken for place, taken in zip(places, room.tolist(), strict=True)]
