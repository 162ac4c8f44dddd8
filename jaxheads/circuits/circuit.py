"""`Circuit`: edges of a model's graph with their scores, and how much of a behaviour they carry."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from jaxheads.circuits.edge_forward import Runner
from jaxheads.circuits.graph import Edge, Graph
from jaxheads.files import write_json
from jaxheads.model.batch import Batch
from jaxheads.model.transformer import Transformer
from jaxheads.sweep.metrics import Metric
from jaxheads.sweep.named import NamedArray


@dataclass(frozen=True)
class Circuit:
    """A set of edges.

    Attributes:
      graph: the graph that they are edges of.
      scores: by edge, e.g. {("a23.3", "logits"): -2.27}, largest magnitude first; whatever
        their finder gave them.
    """

    graph: Graph
    scores: Mapping[Edge, float]

    def __post_init__(self) -> None:
        self.graph.index(self.scores)
        ordered = sorted(self.scores.items(), key=lambda item: -abs(item[1]))
        wrong = [edge for edge, score in ordered if not np.isfinite(score)]
        if wrong:
            raise ValueError(f"the score of edge {' -> '.join(wrong[0])} is not a finite number")
        object.__setattr__(self, "scores", dict(ordered))

    @classmethod
    def of(cls, model: Transformer, edges: Iterable[Edge] | Mapping[Edge, float]) -> Circuit:
        """A circuit of edges of a model, of score 1 where none is given.

        Raises:
          ValueError: an edge that does not exist, the same edge twice, a score that is not a
            finite number; a model without a graph.
        """
        graph = Graph.of(model.config)
        if not isinstance(edges, Mapping):
            edges = list(edges)
            graph.index(edges)
            edges = dict.fromkeys(edges, 1.0)
        return cls(graph, edges)

    @classmethod
    def of_scores(cls, model: Transformer, scores: NamedArray) -> Circuit:
        """All edges with the scores of `edge_attribution`.

        Raises:
          ValueError: scores of another graph.
        """
        graph = Graph.of(model.config)
        if scores.labels != (graph.senders, graph.receivers):
            raise ValueError(
                f"scores have axes {scores.axes} of shape {scores.shape}, expected the senders "
                f"and receivers of this model, {graph.shape}"
            )
        index = np.argwhere(graph.allowed)
        values = scores.values[tuple(index.T)].tolist()
        return cls(graph, dict(zip(graph.names(index), values, strict=True)))

    @property
    def edges(self) -> tuple[Edge, ...]:
        """The edges, largest magnitude of the score first."""
        return tuple(self.scores)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Senders that an edge starts from or leads to, in the order of computation.

        A key or value of a key/value head leads to the heads of the group that have an edge
        further on.
        """
        mask = self.mask() != 0
        sends = mask.any(axis=1)
        read = self.graph.feeds[mask.any(axis=0)]
        # Of a group that shares a key, only heads that go on are meant, if any does.
        goes_on = (read & sends).any(axis=1, keepdims=True)
        found = sends | np.where(goes_on, read & sends, read).any(axis=0)
        return tuple(name for name, there in zip(self.graph.senders, found, strict=True) if there)

    def __len__(self) -> int:
        return len(self.scores)

    def mask(self) -> np.ndarray:
        """Float32 [U,V], 1 at its edges."""
        return self.graph.mask(self.scores)

    def keep(self, count: int) -> Circuit:
        """The `count` edges with scores of largest magnitude.

        Raises:
          ValueError: not between 1 and the number of edges.
        """
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= len(self):
            raise ValueError(f"count must be an integer from 1 to {len(self)}, got {count!r}")
        return Circuit(self.graph, dict(list(self.scores.items())[:count]))

    def connected(self) -> Circuit:
        """The edges that lie on a path from "embed" to "logits"; perhaps none."""
        mask = self.graph.connected(self.mask())
        there = set(self.graph.names(np.argwhere(mask)))
        return Circuit(self.graph, {e: s for e, s in self.scores.items() if e in there})

    def faithfulness(
        self, model: Transformer, clean: Batch, corrupted: Batch, metric: Metric | Callable
    ) -> float:
        """The share of an effect that the circuit has alone, all other edges corrupted.

        (m(circuit) - m(corrupted)) / (m(model) - m(corrupted)), the metric m averaged over rows
        (Marks et al. 2024, "Sparse Feature Circuits", section 3.2; Hanna et al. 2024): 0 of
        what the corrupted run has, 1 of what the model has; neither is a bound.

        Args:
          model: the model of the circuit's graph.
          clean: the prompts.
          corrupted: their counterparts, of the same shape and padding.
          metric: what is measured; a `Metric` or a function of logits [B,V].

        Raises:
          ValueError: a circuit without edges or of another model; prompts or a metric that do
            not fit (see `edge_forward.check_pair`), that are NaN, or without an effect.
        """
        self.check(model)
        run = Runner.of(model, clean, corrupted, metric)
        low, high = run.ends()
        return float((run([self.mask()])[0] - low) / (high - low))

    def check(self, model: Transformer) -> None:
        """Raises ValueError if it has no edges or is not a circuit of this model."""
        if not self.scores:
            raise ValueError("the circuit has no edges: there is nothing to run")
        expected = Graph.of(model.config)
        if self.graph != expected:
            raise ValueError(f"the circuit is of {self.graph}, but the model is {expected}")

    def save(self, path: str | Path) -> None:
        """Writes JSON: the graph's sizes, and each edge with its score."""
        edges = [[*edge, float(score)] for edge, score in self.scores.items()]
        write_json(Path(path), {"graph": asdict(self.graph), "edges": edges})

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Reads what `save` wrote.

        Raises:
          ValueError: it is no such file, or names edges that do not exist.
        """
        try:
            found = json.loads(Path(path).read_text())
            graph = Graph(**found["graph"])
            edges = [((sender, receiver), score) for sender, receiver, score in found["edges"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no circuit: {error}") from error
        graph.index([edge for edge, _ in edges])
        return cls(graph, dict(edges))

    def __repr__(self) -> str:
        return f"Circuit({len(self.nodes)} nodes, {len(self)} edges)"
