"""Search for circuits: pruning edges one by one (ACDC), and growing heads level by level (CD-T)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jaxheads.circuits.cdt import cdt_relevance, cdt_relevance_to
from jaxheads.circuits.cdt_nodes import Node, head_nodes
from jaxheads.circuits.circuit import Circuit
from jaxheads.circuits.edge_forward import MASKS_AT_ONCE, Runner
from jaxheads.circuits.graph import Graph
from jaxheads.model.batch import Batch
from jaxheads.model.transformer import Transformer
from jaxheads.sweep.metrics import Divergence, Metric

Array = jax.Array
Head = tuple[int, int]


def acdc(
    model: Transformer,
    clean: Batch,
    corrupted: Batch,
    tau: float,
    *,
    metric: Metric | Callable | None = None,
    start: Circuit | None = None,
    at_once: int = MASKS_AT_ONCE,
) -> Circuit:
    """Removes every edge whose removal moves the metric away from the model's by less than tau.

    Algorithm 1 of Conmy et al. (2023), "Towards Automated Circuit Discovery": receivers from
    the last to the first, of each the senders from the last to the first; an edge is corrupted
    for good if |m(rest) - m(model)| grows by less than tau. With the divergence from the
    model's own predictions, the default, this is the paper's criterion.

    The result is that of the sequential algorithm, though many edges are run at once: a batch
    supposes that each edge before it in the batch is removed, as most are, and what follows the
    first edge that is kept is run again. Edges into heads and MLPs that nothing reads any more
    are removed without a run, since they change nothing.

    Args:
      model: the model.
      clean: the prompts.
      corrupted: their counterparts, of the same shape and padding.
      tau: threshold, positive, in the metric's unit.
      metric: default `Divergence.of(model, clean)`.
      start: the edges to begin with; default all. All other edges are corrupted throughout.
      at_once: edges run in one program.

    Returns:
      The circuit; the score of an edge is by how much its removal moved the metric away.

    Raises:
      ValueError: tau that is not positive; as `edge_forward.check_pair`; a metric that is NaN;
        a start without edges or of another model.
    """
    if not tau > 0 or not np.isfinite(tau):
        raise ValueError(f"tau must be a positive number, got {tau}")
    if start is not None:
        start.check(model)
    graph = Graph.of(model.config)
    run = Runner.of(model, clean, corrupted, metric or Divergence.of(model, clean), at_once)
    full = np.ones(graph.shape, np.float32)
    mask = graph.allowed.astype(np.float32) if start is None else start.mask()
    goal, value = run([full, mask])
    distance = abs(value - goal)

    candidates = np.argwhere(mask)
    # Latest receiver first, and of each its latest sender first.
    candidates = candidates[np.lexsort((-candidates[:, 0], -candidates[:, 1]))]
    scores: dict[tuple[str, str], float] = {}
    position = 0
    while position < len(candidates):
        group: list[tuple[int, np.ndarray]] = []
        after, live = position, mask.copy()
        while after < len(candidates) and len(group) < at_once:
            u, v = candidates[after]
            live[u, v] = 0
            if _is_read(graph, live, v):
                group.append((after, live.copy()))
            after += 1
        distances = np.abs(run([m for _, m in group]) - goal) if group else np.zeros(0)
        for (place, without), found in zip(group, distances, strict=True):
            if found - distance >= tau:
                u, v = candidates[place]
                scores[graph.senders[u], graph.receivers[v]] = float(found - distance)
                without[u, v] = 1
                mask, position = without, place + 1
                break
            distance = found
        else:
            mask, position = live, after
    return Circuit(graph, scores)


def _is_read(graph: Graph, mask: np.ndarray, receiver: int) -> bool:
    """Whether anything reads what a receiver feeds."""
    fed = graph.feeds[receiver]
    return not fed.any() or bool(mask[fed].any())


@dataclass(frozen=True)
class Search:
    """What `cdt_search` found.

    Attributes:
      heads: the circuit's heads, in the order in which they were picked.
      levels: heads picked at each level, the first by relevance to the logits.
      removed: picks that were removed at the end.
      value: the measure of the circuit's heads alone.
    """

    heads: tuple[Head, ...]
    levels: tuple[tuple[Head, ...], ...]
    removed: tuple[Head, ...]
    value: float


def cdt_search(
    relevance: Callable[[tuple[Head, ...]], np.ndarray],
    measure: Callable[[Sequence[Sequence[Head]]], np.ndarray],
    *,
    per_level: int = 2,
) -> Search:
    """Grows a circuit of heads from the logits downwards, then removes what it can do without.

    After Hsu et al. (2024), "Efficient Automated Circuit Discovery in Transformers using
    Contextual Decomposition": level 0 picks the heads most relevant to the logits; every further
    level the heads most relevant to the last picks, relevances divided by the mean of their
    layer so that layers are comparable; until the picks are all in layer 0 or none is left.
    In the end the head whose removal raises the measure most is removed, while there is one.

    Args:
      relevance: maps targets to the relevance of every head, float [L,H]; targets are heads,
        () for the logits; see `heads_by_cdt`. Heads that cannot reach a target count 0.
      measure: maps N sets of heads to how well each does alone, float [N], larger is better;
        see `heads_alone`.
      per_level: heads picked at each level.

    Raises:
      ValueError: `per_level` below 1; relevances that are no finite [L,H] numbers; a measure
        that is not finite.
    """
    if per_level < 1:
        raise ValueError(f"per_level must be at least 1, got {per_level}")
    levels: list[tuple[Head, ...]] = []
    picked: list[Head] = []
    targets: tuple[Head, ...] = ()
    while not levels or any(layer for layer, _ in targets):
        found = np.abs(np.asarray(relevance(targets), np.float64))
        if found.ndim != 2 or not np.isfinite(found).all():
            raise ValueError(f"relevance must be finite numbers [L,H], got shape {found.shape}")
        if targets:
            means = found.mean(axis=1, keepdims=True)
            found = found / np.where(means > 0, means, 1)
            found[max(layer for layer, _ in targets) :] = 0
        for head in picked:
            found[head] = 0
        order = np.argsort(-found, axis=None, kind="stable")[:per_level]
        places = [divmod(int(i), found.shape[1]) for i in order]
        targets = tuple(place for place in places if found[place] > 0)
        if not targets:
            break
        levels.append(targets)
        picked += targets
    if not picked:
        raise ValueError("no head is relevant to the logits: every relevance is 0")
    return _without_useless(picked, tuple(levels), measure)


def _without_useless(
    heads: list[Head],
    levels: tuple[tuple[Head, ...], ...],
    measure: Callable[[Sequence[Sequence[Head]]], np.ndarray],
) -> Search:
    removed: list[Head] = []
    value = _finite(measure([heads]))[0]
    while len(heads) > 1:
        without = [[other for other in heads if other != head] for head in heads]
        values = _finite(measure(without))
        best = int(np.argmax(values))
        if values[best] <= value:
            break
        removed.append(heads[best])
        heads, value = without[best], values[best]
    return Search(tuple(heads), levels, tuple(removed), float(value))


def _finite(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"the measure must be finite, got {values.tolist()}")
    return values


def heads_alone(
    model: Transformer,
    clean: Batch,
    corrupted: Batch,
    metric: Metric | Callable,
    *,
    at_once: int = MASKS_AT_ONCE,
) -> Callable[[Sequence[Sequence[Head]]], np.ndarray]:
    """The metric when all heads but some write what they do on the corrupted prompts.

    The embedding and MLPs stay. A `measure` for `cdt_search`.

    Args:
      model: the model.
      clean: the prompts.
      corrupted: their counterparts.
      metric: what is measured, larger is better.
      at_once: sets run in one program.

    Raises:
      ValueError: as `edge_forward.check_pair`; from the function, a head that does not exist
        or a metric that is NaN.
    """
    run = Runner.of(model, clean, corrupted, metric, at_once)
    graph = Graph.of(model.config)
    others = [name for name in graph.senders if not name.startswith("a")]

    def measure(sets: Sequence[Sequence[Head]]) -> np.ndarray:
        return run([graph.sending([*others, *(f"a{a}.{b}" for a, b in heads)]) for heads in sets])

    return measure


def heads_by_cdt(
    model: Transformer,
    batch: Batch,
    answers: Array | np.ndarray,
    wrong: Array | np.ndarray,
    means: Mapping[str, Array | np.ndarray],
    *,
    attention: str = "pattern",
    chunk: int = 18,
) -> Callable[[tuple[Head, ...]], np.ndarray]:
    """Relevance by contextual decomposition, for `cdt_search`.

    Sources are all heads, each at all positions. To the logits: the mean over rows of the
    relevant part of logit(answer) - logit(wrong). To targets: the sum over targets of the
    source's shares in their queries, keys and values.

    Args are those of `cdt_relevance`, whose errors the function raises.
    """
    sources = head_nodes(model)
    shape = (model.config.n_layers, model.config.n_heads)

    def relevance(targets: tuple[Head, ...]) -> np.ndarray:
        if not targets:
            found = cdt_relevance(
                model, batch, answers, wrong, sources, means, attention=attention, chunk=chunk
            )
        else:
            nodes = [Node(site, layer, head) for layer, head in targets for site in "qkv"]
            found = cdt_relevance_to(
                model, batch, sources, nodes, means, attention=attention, chunk=chunk
            ).sum(axis=1, keepdims=True)
        return found.mean(axis=1).reshape(shape)

    return relevance
