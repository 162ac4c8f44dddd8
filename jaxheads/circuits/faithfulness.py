"""Faithfulness of circuits of many sizes, against random circuits of the same size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jaxheads.circuits.circuit import Circuit
from jaxheads.circuits.edge_forward import MASKS_AT_ONCE, Runner
from jaxheads.circuits.graph import Graph
from jaxheads.model.batch import Batch
from jaxheads.model.transformer import Transformer
from jaxheads.sweep.metrics import Metric, name_of
from jaxheads.sweep.named import NamedArray


def faithfulness_curve(
    model: Transformer,
    circuit: Circuit,
    clean: Batch,
    corrupted: Batch,
    metric: Metric | Callable,
    counts: Sequence[int],
    *,
    draws: int = 5,
    seed: int = 0,
    at_once: int = MASKS_AT_ONCE,
) -> NamedArray:
    """Faithfulness of a circuit's best edges, and of as many random ones.

    For every count n the best n edges are kept, and of these the ones on a path from "embed" to
    "logits". The random circuits have as many edges as remain, all on such paths but perhaps
    for the last; see `random_circuit`.

    Args:
      model: the model.
      circuit: edges with scores; all of them, say, from `Circuit.of_scores`.
      clean: the prompts.
      corrupted: their counterparts.
      metric: what is measured; faithfulness is that of its mean over rows.
      counts: numbers of edges.
      draws: random circuits for each count.
      seed: decides the random circuits.
      at_once: circuits run in one program.

    Returns:
      Float32 (circuit, edges), with circuits "found", "random 0", ...; `info` has the number of
      edges that remain for each count.

    Raises:
      ValueError: as `Circuit.faithfulness`; counts out of range; fewer than 1 draw.
    """
    circuit.check(model)
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    if not len(counts) or len(set(counts)) < len(counts):
        raise ValueError(f"counts must be different numbers of edges, got {list(counts)}")
    kept = [circuit.keep(count).connected() for count in counts]
    rng = np.random.default_rng(seed)
    masks = [one.mask() for one in kept]
    for _ in range(draws):
        masks += [random_circuit(circuit.graph, len(one), rng) for one in kept]
    run = Runner.of(model, clean, corrupted, metric, at_once)
    low, high = run.ends()
    values = (run(masks) - low) / (high - low)
    return NamedArray(
        f"faithfulness ({name_of(metric)})",
        values.reshape(draws + 1, len(counts)).astype(np.float32),
        ("circuit", "edges"),
        (("found", *(f"random {i}" for i in range(draws))), tuple(int(n) for n in counts)),
        {"clean": high, "corrupted": low, "remaining": [len(one) for one in kept], "seed": seed},
    )


def random_circuit(graph: Graph, count: int, rng: np.random.Generator) -> np.ndarray:
    """A mask with `count` edges of random paths from "embed" to "logits", float32 [U,V].

    From each sender a path goes on along any of its edges, all equally likely, and through
    any of the heads that a key or value feeds. The last path is cut where `count` is reached.
    Edges drawn one by one would hardly ever connect, so they would be no control.

    Raises:
      ValueError: not between 0 and the number of edges.
    """
    total = int(graph.allowed.sum())
    if not 0 <= count <= total:
        raise ValueError(f"count must be from 0 to {total}, got {count}")
    if count > total // 2:  # paths would find the rest too slowly, and most edges connect
        index = rng.permutation(np.argwhere(graph.allowed))[:count]
        mask = np.zeros(graph.shape, np.float32)
        mask[tuple(index.T)] = 1
        return mask
    mask, size, sender = np.zeros(graph.shape, np.float32), 0, 0
    while size < count:
        receiver = rng.choice(np.flatnonzero(graph.allowed[sender]))
        size += mask[sender, receiver] == 0
        mask[sender, receiver] = 1
        after = np.flatnonzero(graph.feeds[receiver])
        sender = rng.choice(after) if len(after) else 0
    return mask
