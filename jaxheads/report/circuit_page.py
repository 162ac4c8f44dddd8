"""The page of a circuit: its drawing, the scores of nodes, and how much of the behaviour it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxheads.report.circuit import Edge, Node, circuit_drawing
from jaxheads.report.figures import curves
from jaxheads.report.heatmaps import heatmap
from jaxheads.report.page import Report
from jaxheads.report.sweep import prompts_section, unit

if TYPE_CHECKING:
    from jaxheads.circuits import Circuit, Graph
    from jaxheads.sweep.named import NamedArray
    from jaxheads.tasks import Example

KEYS = "keys and values are named by key/value head"
METHODS = {"eap": "EAP", "eap-ig": "EAP-IG", "acdc": "EAP-IG, then ACDC"}


def readable(name: str) -> str:
    """A graph's name of a node or receiver as people write it: "a18.6.q" is 18.6.q."""
    return name.removeprefix("a")


def drawn_edges(circuit: Circuit) -> tuple[list[Node], list[Edge]]:
    """Nodes and edges for `circuit_drawing`.

    An edge into a key or value is drawn to each head of the circuit that reads it: with grouped
    queries one edge of the graph may be several lines.
    """
    senders = circuit.nodes
    nodes: list[Node] = [(readable(name), *_place(name)) for name in senders]
    edges: list[Edge] = []
    for (sender, receiver), score in circuit.scores.items():
        heads = [one for one in _readers(circuit.graph, receiver) if one in senders]
        ends = [f"{head}.{receiver[-1]}" for head in heads] or [receiver]
        edges += [(readable(sender), readable(end), score) for end in ends]
    return [*nodes, ("logits", None, "logits")], edges


def curve_rows(curve: NamedArray) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """The faithfulness curve as a table: columns and rows."""
    found, random = curve.values[0], curve.values[1:]
    columns = ("edges", "on a path", "faithfulness", "random, mean", "random, highest")
    rows = zip(
        curve.labels[1],
        curve.info["remaining"],
        *(_rounded(values) for values in (found, random.mean(axis=0), random.max(axis=0))),
        strict=True,
    )
    return columns, list(rows)


def _rounded(values: np.ndarray) -> list[float]:
    """To four digits, so that zero does not show the rounding of sums; no negative zero."""
    return (values.round(4) + 0.0).tolist()


def circuit_page(
    circuit: Circuit,
    nodes: NamedArray,
    curve: NamedArray,
    facts: Mapping[str, Any],
    examples: Sequence[Example],
    top: int,
) -> Report:
    """The page of a circuit.

    Args:
      circuit: what was found.
      nodes: scores of all senders, of `node_scores`.
      curve: of `faithfulness_curve`.
      facts: what `jaxheads circuit` was asked and found: among them "model", "method",
        "metric" and "faithfulness".
      examples: the prompts.
      top: how many edges the table lists.
    """
    title = f"Circuit of {facts['model']}"
    page = Report(title, f"{len(circuit)} edges among {len(circuit.nodes)} nodes")
    page = page.facts({name: value for name, value in facts.items() if name != "model"})
    drawing = circuit_drawing(*drawn_edges(circuit), title=f"{title}, {len(circuit)} edges")
    pruned = facts["method"] == METHODS["acdc"]
    page = page.section("Circuit", _explained(facts, pruned)).figure(
        drawing,
        "Layers from the bottom up. Blue is a positive score, red a negative one; wide and dark "
        "is large. An edge into a key or value that heads share is drawn to each that reads it.",
    )
    rows = [
        (readable(sender), readable(receiver), score)
        for (sender, receiver), score in list(circuit.scores.items())[:top]
    ]
    caption = f"The {len(rows)} edges of greatest magnitude; {KEYS}"
    page = page.table(("from", "to", "score"), rows, caption)
    page = _faithfulness(page, curve, pruned)
    page = _node_section(page, circuit.graph, nodes)
    return prompts_section(page, examples)


def _explained(facts: Mapping[str, Any], pruned: bool) -> str:
    if pruned:
        score = "by how far the metric moves from the model's when the edge goes as well"
    else:
        score = f"the estimated change of {facts['metric']} when the edge alone is corrupted"
    return (
        "An edge is what one node writes and another reads; its score is "
        f"{score}. Along all edges that are not in the circuit, readers get what was written on "
        "the corrupted prompts."
    )


def _faithfulness(page: Report, curve: NamedArray, pruned: bool) -> Report:
    draws = len(curve.labels[0]) - 1
    columns, rows = curve_rows(curve)
    counts = np.asarray(curve.labels[1], float)
    low, high = (_signed(curve.info[end]) for end in ("corrupted", "clean"))
    text = (
        "(m(circuit) − m(corrupted)) / (m(model) − m(corrupted)), where m is the metric: "
        f"{low} on the corrupted prompts, {high} of the model. 0 is as if all edges were "
        "corrupted, 1 as the model; neither is a bound.\n\n"
        "Of the best edges those count that lie on a path from the embedding to the logits. "
        f"Random circuits, {draws} of each size, have as many edges as remain. It is measured on "
        "the prompts on which the circuit was found."
    )
    if pruned:
        text += "\n\nThe curve is that of the scores before pruning."
    lines = {
        "best edges": (counts, curve.values[0]),
        f"random circuits, mean of {draws}": (counts, curve.values[1:].mean(axis=0)),
        f"random circuits, highest of {draws}": (counts, curve.values[1:].max(axis=0)),
    }
    figure = curves(
        lines, title="Faithfulness by number of edges", xlabel="edges", ylabel="faithfulness"
    )
    caption = "The share of the metric's difference that circuits of each size keep."
    page = page.section("Faithfulness", text).figure(figure, caption)
    return page.table(columns, rows, "Best edges against random circuits of as many edges")


def _node_section(page: Report, graph: Graph, nodes: NamedArray) -> Report:
    values = nodes.values[1:].reshape(graph.n_layers, graph.sends)
    figure = heatmap(
        values,
        title="Scores of heads and MLPs",
        label=f"score ({unit(nodes)})",
        axes=("layer", "head"),
        labels=(range(graph.n_layers), [*map(str, range(graph.n_heads)), "MLP"]),
    )
    text = (
        "The sum of the scores of all edges that start from a node, those outside the circuit "
        f"too. That of the embedding is {_signed(nodes.values[0])}."
    )
    return page.section("Nodes", text).figure(figure, "Layers from the top, heads across.")


def _signed(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")


def _place(name: str) -> tuple[int | None, str]:
    """Layer and kind of a sender."""
    if name == "embed":
        return None, "embed"
    layer = int(name[1:].partition(".")[0])
    return layer, "head" if name[0] == "a" else "mlp"


def _readers(graph: Graph, receiver: str) -> list[str]:
    """The heads that read a key or value; nothing for other receivers."""
    if receiver[-1] not in "kv":
        return []
    fed = graph.feeds[graph.receivers.index(receiver)]
    return [graph.senders[i] for i in np.flatnonzero(fed)]
