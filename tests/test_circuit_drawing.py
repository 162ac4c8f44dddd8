"""The drawing of a circuit, its layout, and its errors."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from jaxheads.report import circuit_drawing
from jaxheads.report.layered import lay_out

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter(f"{SVG}text")]


INDUCTION = [("embed", None, "embed"), ("a0.1", 0, "head"), ("m0", 0, "mlp"), ("a1.0", 1, "head"),
             ("logits", None, "logits")]  # fmt: skip
EDGES = [("embed", "a0.1.v", 1.0), ("a0.1", "a1.0.k", 0.8), ("embed", "a1.0.q", 0.3),
         ("m0", "a1.0.v", 0.6), ("a0.1", "m0", 0.1), ("a1.0", "logits", -0.4)]  # fmt: skip


def drawn_edges(svg: str) -> dict[str, ElementTree.Element]:
    paths = ElementTree.fromstring(svg).iter(f"{SVG}path")
    return {str(e[0].text): e for e in paths if len(e)}


def test_circuit_stands_in_layers_with_edges_as_strong_as_their_scores() -> None:
    svg = circuit_drawing(INDUCTION, EDGES, title="Induction <&>")
    words = list(ElementTree.fromstring(svg).iter(f"{SVG}text"))
    height = {str(e.text): float(e.get("y", "nan")) for e in words}
    order = ["embed", "a0.1", "m0", "a1.0", "logits"]
    assert sorted(order, key=height.__getitem__, reverse=True) == order
    assert {"layer 0", "layer 1", "Induction <&>", "+1", "−0.4"} <= set(height)
    lines = drawn_edges(svg)
    assert len(lines) == len(EDGES)
    width = {tip: float(e.get("stroke-width", "nan")) for tip, e in lines.items()}
    scores = {tip: abs(float(tip.split(": ")[1])) for tip in lines}
    assert sorted(width, key=width.__getitem__) == sorted(scores, key=scores.__getitem__)
    blue, red = (lines[t].get("stroke", "") for t in ("a0.1 → a1.0.k: +0.8", "a1.0 → logits: -0.4"))
    assert int(blue[5:], 16) > int(blue[1:3], 16) and int(red[5:], 16) < int(red[1:3], 16)
    dashes = [lines[t].get("stroke-dasharray") for t in
              ("a0.1 → a1.0.k: +0.8", "embed → a1.0.q: +0.3", "m0 → a1.0.v: +0.6")]  # fmt: skip
    assert None not in dashes[:2] and dashes[0] != dashes[1] and dashes[2] is None
    assert svg == circuit_drawing(INDUCTION, EDGES, title="Induction <&>")


def big_circuit() -> tuple[list, list]:
    rng = np.random.default_rng(0)
    heads = [(f"a{layer}.{h}", layer, "head") for layer in range(20) for h in range(3)]
    nodes = [("embed", None, "embed"), *heads, ("logits", None, "logits")]
    pairs = [(a, b) for a in heads for b in heads if a[1] < b[1]]
    chosen = rng.choice(len(pairs), 200, replace=False)
    scores = rng.normal(size=200)
    edges = [
        (pairs[i][0][0], f"{pairs[i][1][0]}.k", s) for i, s in zip(chosen, scores, strict=True)
    ]
    return nodes, [*edges, ("embed", "a0.0.v", 5.0), ("a0.0", "logits", 4.0)]


def test_circuit_drops_the_weakest_and_says_so() -> None:
    nodes, edges = big_circuit()
    svg = circuit_drawing(nodes, edges, title="t")
    lines = drawn_edges(svg)
    assert len(lines) == 80
    boxes = {name for name, _, _ in nodes} & set(texts(svg))
    assert {"embed", "logits", "a0.0"} <= boxes and len(boxes) <= 40
    ends = {n.rsplit(".", 1)[0] if n[-1] in "qkv" else n
            for tip in lines for n in tip.split(": ")[0].split(" → ")}  # fmt: skip
    assert ends == boxes
    note = " ".join(texts(svg))
    assert f"{len(boxes)} of 62 nodes, 80 of 202 edges" in note
    assert "Left out" not in " ".join(texts(circuit_drawing(INDUCTION, EDGES, title="t")))
    inside = [abs(s) for a, b, s in edges if {a, b.removesuffix(".k").removesuffix(".v")} <= boxes]
    shown = sorted(abs(float(tip.split(": ")[1])) for tip in lines)
    np.testing.assert_allclose(shown, sorted(inside)[-80:], rtol=1e-3)


def test_layout_keeps_everything_apart_in_its_level() -> None:
    rng = np.random.default_rng(1)
    levels = [0, *sorted(rng.integers(1, 8, 18).tolist()), 8]
    levels = [sorted(set(levels)).index(level) for level in levels]
    edges = [(a, b) for a in range(20) for b in range(20)
             if levels[a] < levels[b] and rng.random() < 0.3]  # fmt: skip
    placed = lay_out(levels, [40.0] * 20, edges, gap=6, lane=4)
    rows: dict[int, list[tuple[float, float]]] = {}
    for level, x in zip(levels, placed.x, strict=True):
        rows.setdefault(level, []).append((x, 40.0))
    for (low, high), path in zip(edges, placed.paths, strict=True):
        assert len(path) == levels[high] - levels[low] + 1
        assert (path[0], path[-1]) == (placed.x[low], placed.x[high])
        for level, x in enumerate(path[1:-1], start=levels[low] + 1):
            rows[level].append((x, 4.0))
    for row in rows.values():
        row.sort()
        for (x0, w0), (x1, w1) in itertools.pairwise(row):
            assert x1 - x0 >= (w0 + w1) / 2 + 6 - 1e-6
        assert row[0][0] - row[0][1] / 2 >= -1e-6
        assert row[-1][0] + row[-1][1] / 2 <= placed.width + 1e-6


def test_layout_of_a_tree_has_no_crossings_and_a_chain_is_straight() -> None:
    straight = lay_out([0, 1, 2, 3], [40.0] * 4, [(0, 1), (1, 2), (2, 3)], gap=6, lane=4)
    np.testing.assert_allclose(straight.x, 20.0)
    # Two parents whose children are named in turns, so that the order given crosses.
    edges = [(0, 2), (1, 3), (0, 4), (1, 5), (0, 6), (1, 7)]
    x = lay_out([0, 0] + [1] * 6, [40.0] * 8, edges, gap=6, lane=4).x
    assert all((x[a] - x[b]) * (x[c] - x[d]) >= 0 for a, c in edges for b, d in edges)


def circuit(nodes: list, edges: list) -> str:
    return circuit_drawing(nodes, edges, title="F")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: circuit([], []), "'F'.*at least one node"),
        (lambda: circuit([("a", 0, "neuron")], []), "unknown kind of node 'a' 'neuron'"),
        (lambda: circuit([("a", None, "head")], []), "'F'.*'a' is of kind head.*a layer"),
        (lambda: circuit([("e", 0, "embed")], []), "'F'.*'e' is of kind embed.*no layer"),
        (lambda: circuit([INDUCTION[0]] * 2, []), "'F'.*'embed' is given twice"),
        (lambda: circuit(INDUCTION, [("a0.1", "a1.1", 1)]), "'F'.*unknown node 'a1.1'"),
        (lambda: circuit(INDUCTION, [("a0.1", "m0.q", 1)]), "'F'.*'m0' is no head"),
        (lambda: circuit(INDUCTION, [("m0", "a0.1.q", 1)]), "'F'.*'m0' to 'a0.1.q' leads not up"),
        (lambda: circuit(INDUCTION, [EDGES[0]] * 2), "'F'.*'embed' to 'a0.1.v' is given twice"),
        (lambda: circuit(INDUCTION, [("a0.1", "m0", np.nan)]), "'F'.*finite score.*got nan"),
    ],
)
def test_bad_circuits_are_refused_by_name(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
