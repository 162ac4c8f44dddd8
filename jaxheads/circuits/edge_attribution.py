"""Edge attribution patching: the effect of corrupting every edge, to first order.

score[u,v] = sum over positions of (corrupted out_u - clean out_u) . d metric / d read_v, averaged
over rows, where read_v is the stream that receiver v normalises and reads. It estimates by how
much the metric changes when edge u -> v is corrupted: an edge that the metric needs has a
negative score.

Sources: Syed et al. (2023), "Attribution Patching Outperforms Automated Circuit Discovery" (EAP);
Hanna et al. (2024), "Have Faith in Faithfulness", eq. 3 (EAP-IG): the gradient is averaged over
runs from embeddings corrupted + (k/m) (clean - corrupted), k = 1..m. One step is EAP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxheads.circuits.edge_forward import (
    WRITES,
    Runner,
    Writes,
    check_finite,
    check_pair,
    receivers_input,
    run_writes,
    writes_of,
)
from jaxheads.circuits.graph import Edge, Graph
from jaxheads.model.batch import Batch
from jaxheads.model.config import ModelConfig
from jaxheads.model.context import Context
from jaxheads.model.norms import Norm
from jaxheads.model.transformer import Transformer
from jaxheads.sweep.metrics import Metric, name_of
from jaxheads.sweep.named import NamedArray

Array = jax.Array


@struct.dataclass
class _Add:
    offset: Array

    def __call__(self, value: Array, context: Context) -> Array:
        """Returns value + offset."""
        return value + self.offset


@struct.dataclass
class _Set:
    new: Array

    def __call__(self, value: Array, context: Context) -> Array:
        """Returns the new value."""
        return self.new


def edge_attribution(
    model: Transformer,
    clean: Batch,
    corrupted: Batch,
    metric: Metric | Callable,
    *,
    steps: int = 5,
) -> NamedArray:
    """Scores of all edges, EAP-IG with `steps` gradients.

    Costs two forward passes and `steps` forward and backward passes; with one step, which is
    EAP, one forward and backward pass more than the corrupted run. Memory: U [B,T,D] arrays.

    Args:
      model: a model whose branches are added to the stream.
      clean: the prompts.
      corrupted: their counterparts, of the same shape and padding.
      metric: what is measured, differentiable; a `Metric` or a function of logits [B,V].
      steps: m, runs between the corrupted and the clean embeddings.

    Returns:
      Float32 (sender, receiver), the estimated change of the metric when the edge alone is
      corrupted, in the metric's unit; NaN where no edge may exist.

    Raises:
      ValueError: as `check_pair`; `steps` below 1; a score that is NaN.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}")
    made = check_pair(model, clean, corrupted, metric)
    graph = Graph.of(model.config)
    fractions = np.arange(1, steps + 1, dtype=np.float32) / steps
    scores, value = _scores(model, clean, corrupted, made, fractions)
    check_finite(made, np.asarray(value))
    values = np.where(graph.allowed, check_finite(made, np.asarray(scores)), np.nan)
    method = "EAP" if steps == 1 else f"EAP-IG, {steps} steps"
    return NamedArray(
        f"estimated change of {name_of(made)} ({made.unit}), {method}",
        values,
        ("sender", "receiver"),
        (graph.senders, graph.receivers),
        {"metric": name_of(made), "clean": float(value), "steps": steps},
    )


@jax.jit
def _scores(
    model: Transformer, clean: Batch, corrupted: Batch, metric: Metric, fractions: Array
) -> tuple[Array, Array]:
    """Scores [U,V] and the metric of the clean run, averaged over rows."""
    tokens, mask = (jnp.concatenate(x) for x in zip(_ids(clean), _ids(corrupted), strict=True))
    both = run_writes(model, Batch(tokens, mask))
    here, there = jnp.split(both.embed, 2)
    written, instead = jnp.split(both.senders(), 2, axis=1)
    changes = instead - written

    def add(total: Array, fraction: Array) -> tuple[Array, Array]:
        embed = there + fraction * (here - there)
        scores, value = _scores_at(model, clean, metric, embed, changes)
        return total + scores, value

    start = jnp.zeros(Graph.of(model.config).shape, jnp.float32)
    total, values = jax.lax.scan(add, start, fractions)
    return total / len(fractions), values[-1]


def _ids(batch: Batch) -> tuple[Any, Any]:
    return batch.tokens, batch.mask


def _scores_at(
    model: Transformer, batch: Batch, metric: Metric, embed: Array, changes: Array
) -> tuple[Array, Array]:
    """Scores [U,V] by the gradients of the run from one embedding, and its metric.

    The model is differentiated by queries, keys, values and the MLPs' inputs, which are small.
    What each of them read, a norm of the stream, is differentiated layer by layer after that,
    so that no array has the axes V, B, T and D together.
    """
    config, slots = model.config, jnp.asarray(metric.slots)

    def run(offsets: dict[str, Array]) -> tuple[Array, tuple[Writes, Array]]:
        edits: dict[str, Any] = {site: _Add(offset) for site, offset in offsets.items()}
        edits["embed"] = _Set(embed)
        taps = model(batch, edits=edits, taps=(*WRITES, "final"), logits_at=slots).taps
        value = jnp.mean(metric(model.logits_of(taps["final"], metric.tokens)))
        return value, (writes_of(model, taps), value)

    b, t, n = *np.shape(batch.tokens), slots.shape[1]
    rows, heads, keys = (config.n_layers, b, t), config.n_heads, config.n_kv_heads
    shapes = {
        "q_pre": (*rows, heads, config.head_dim),
        "k_pre": (*rows, keys, config.head_dim),
        "v": (*rows, keys, config.head_dim),
        "mlp_in": (*rows, config.d_model),
        "final": (b, n, config.d_model),
    }
    zeros = {site: jnp.zeros(shape, embed.dtype) for site, shape in shapes.items()}
    gradients, (writes, value) = jax.grad(run, has_aux=True)(zeros)

    def layer_scores(sliced: tuple) -> Array:
        block, index, pre, mid, q, k, v, mlp = sliced
        attn = block.attn
        pulled = [
            jnp.einsum("bthe,dhe->hbtd", gradient, weight[...].astype(gradient.dtype))
            for gradient, weight in ((q, attn.q), (k, attn.k), (v, attn.v))
        ]
        _, pull = jax.vjp(lambda x: receivers_input(block, config, index, x), pre)
        read = jax.vmap(lambda gradient: pull(gradient)[0])(jnp.concatenate(pulled))
        return _dot(
            changes, jnp.concatenate([read, _through(block.mlp_norm, config, mid, mlp)[None]])
        )

    layers = model.layers()
    layered = [gradients[site] for site in ("q_pre", "k_pre", "v", "mlp_in")]
    sliced = (layers.block, layers.index, writes.pre, writes.mid, *layered)
    inside = jax.lax.map(layer_scores, sliced)  # [L,U,R]
    inside = jnp.moveaxis(inside, 0, 1).reshape(len(changes), -1)

    last = jnp.take_along_axis(writes.last, slots[..., None], axis=1)
    gradient = gradients["final"]
    if model.final_norm is not None:
        gradient = _through(model.final_norm, config, last, gradient)
    ends = jnp.take_along_axis(changes, slots[None, ..., None], axis=2)
    return jnp.concatenate([inside, _dot(ends, gradient[None])], axis=1), value


def _through(norm: Norm, config: ModelConfig, x: Array, gradient: Array) -> Array:
    """The derivative by x of what has a gradient by norm(x)."""
    return jax.vjp(lambda y: norm(y, config), x)[1](gradient)[0]


def _dot(changes: Array, gradients: Array) -> Array:
    """[U,B,T,D] . [R,B,T,D] -> float32 [U,R]."""
    return jnp.einsum("ubtd,rbtd->ur", changes, gradients, preferred_element_type=jnp.float32)


def node_scores(scores: NamedArray) -> NamedArray:
    """Scores of senders: the sum over their outgoing edges, an estimate of corrupting a node.

    To first order the effect of a node is the sum of those of its edges (Syed et al. 2023).

    Args:
      scores: of `edge_attribution`.

    Returns:
      Float (sender,).
    """
    values = np.nansum(scores.values, axis=1)
    return NamedArray(scores.name, values, ("sender",), scores.labels[:1], scores.info)


def edge_effects(
    model: Transformer,
    clean: Batch,
    corrupted: Batch,
    metric: Metric | Callable,
    edges: Iterable[Edge],
    *,
    at_once: int = 4,
) -> np.ndarray:
    """The exact change of the metric when one edge is corrupted, by one run per edge.

    Args:
      model: as for `edge_attribution`.
      clean: the prompts.
      corrupted: their counterparts.
      metric: what is measured.
      edges: N edges.
      at_once: edges run in one program; each needs memory for U [B,T,D] arrays.

    Returns:
      Float64 [N], averaged over rows.

    Raises:
      ValueError: as `check_pair`; no edge; an edge that does not exist; a metric that is NaN.
    """
    index = Graph.of(model.config).index(edges)
    if not len(index):
        raise ValueError("no edges to corrupt: expected at least one")
    run = Runner.of(model, clean, corrupted, metric, at_once)
    full = np.ones(Graph.of(model.config).shape, np.float32)
    values = run(chain([full], (_without(full, edge) for edge in index)))
    return values[1:] - values[0]


def _without(mask: np.ndarray, edge: np.ndarray) -> np.ndarray:
    mask = mask.copy()
    mask[tuple(edge)] = 0
    return mask
