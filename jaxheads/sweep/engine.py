"""The sweep engine: many edits of one batch, each computed only from where it differs.

What lies below an edit's first layer, and before its first slot in a causal model, is that of
the unedited run, which is computed once (`Prefix`). From there the streams of all edits go up
the stack together, layer by layer (`jaxheads.sweep.plan`). Slots that all rows begin with are
computed once for an edit that does the same in every row. The last block is run only at the
slots the metric reads; elsewhere it gives keys and values alone. Nothing is approximated: a
swept value differs from that of a whole forward pass by rounding only.

Axes: N edits, B rows, T slots, W slots of a window (the last of T), L layers, D model width.
A stack of streams is [lanes, rows, B, W, D]; lanes are devices along the edit axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxheads.model.batch import Batch
from jaxheads.model.context import Tap
from jaxheads.model.transformer import Transformer
from jaxheads.sweep.metrics import Metric, read_tokens
from jaxheads.sweep.plan import Shape, Wave, plan, worth_sharing
from jaxheads.sweep.points import Points
from jaxheads.sweep.step import Prefix, Step, Stream

Array = jax.Array
Progress = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    """Shows no progress."""


@partial(jax.jit, static_argnames="windowed")
def run_prefix(model: Transformer, batch: Batch, metric: Metric, *, windowed: bool) -> Prefix:
    """Runs the model once; keys and values are kept if windows will need them."""
    taps = ("resid_pre", "k", "v") if windowed else ("resid_pre",)
    slots = jnp.asarray(metric.slots)
    out = model(batch, taps=taps, logits_at=slots)
    k, v = (out.taps["k"], out.taps["v"]) if windowed else (None, None)
    measured = metric(read_tokens(out.logits, metric))
    return Prefix(jnp.asarray(batch.mask), out.taps["resid_pre"], k, v, measured)


def shape_of(model: Transformer, batch: Batch, metric: Metric) -> Shape:
    """What the cost of a point depends on."""
    rows, slots = np.shape(batch.tokens)
    reads = slots - int(np.min(np.asarray(metric.slots)))
    config = model.config
    tokens = config.vocab_size if metric.tokens is None else np.shape(metric.tokens)[1]
    return Shape(config, rows, slots, reads, np.shape(metric.slots)[1], tokens)


def run_points(
    model: Transformer,
    batch: Batch,
    metric: Metric,
    points: Points,
    *,
    budget: int,
    mesh: jax.sharding.Mesh | None = None,
    on_progress: Progress = silent,
) -> tuple[np.ndarray, np.ndarray]:
    """The metric of every edit, and of the unedited model.

    Args:
      model: the model.
      batch: the prompts.
      metric: what is measured, as `as_metric` checked it.
      points: the edits.
      budget: bytes that the streams and one step may take, weights not counted.
      mesh: devices; the edits are divided over its axis "edits" and rows over "data", where
        it has them.
      on_progress: called as (steps done, steps in all), one step late.

    Returns:
      float32 [N,B] and float32 [B].

    Raises:
      ValueError: a budget too small for one point.
    """
    shape = shape_of(model, batch, metric)
    waves = _waves(model, batch, points, shape, budget, mesh)
    batch, metric, points = _place(mesh, batch, metric, points)
    prefix = run_prefix(model, batch, metric, windowed=_windowed(points, waves))
    values = np.zeros((len(points), shape.rows), np.float32)
    total, done = sum(len(list(wave.steps)) for wave in waves), 0
    found, marks = [], []
    for wave in waves:
        one, streams = _entered(model, wave, points, shape, mesh)
        reads = shape.reads if points.later is None else shape.slots - wave.start
        for layer, below, here in wave.steps:
            last = layer == model.config.n_layers - 1
            counts = np.int32(layer), np.int32(below), np.int32(here)
            if last:
                found.append(
                    _read(model, prefix, one, metric, streams, counts,
                          start=wave.start, chunk=wave.chunk, reads=reads, mesh=mesh)
                )  # fmt: skip
                marks.append(found[-1])
            else:
                streams, mark = _move(model, prefix, one, streams, counts,
                                      start=wave.start, chunk=wave.chunk, mesh=mesh)  # fmt: skip
                marks.append(mark)
            if on_progress is not silent and len(marks) > 1:
                marks.pop(0).block_until_ready()
            done += 1
            on_progress(done, total)
    for wave, result in zip(waves, jax.device_get(found), strict=True):
        values[wave.grid[wave.real]] = result[wave.real]
    return values, np.asarray(prefix.metric)


def record_points(
    model: Transformer,
    batch: Batch,
    metric: Metric,
    points: Points,
    taps: Mapping[int, Mapping[str, Tap]],
    *,
    budget: int,
    mesh: jax.sharding.Mesh | None = None,
    on_progress: Progress = silent,
) -> dict[int, dict[str, np.ndarray]]:
    """What is tapped in some layers, for every edit; nothing above them is run.

    Args:
      model: the model.
      batch: the prompts.
      metric: decides how far the windows reach.
      points: the edits, all from one slot on; those of `points.later` act in the layers tapped.
      taps: for each layer the taps in it, of sites inside the stack.
      budget: as in `run_points`; what is recorded is not counted.
      mesh: as in `run_points`.
      on_progress: as in `run_points`.

    Returns:
      For each layer the values [N,...] of its taps, at the slots of the window. Points that
      begin in that layer or above it have zeros, or values without meaning.

    Raises:
      ValueError: a budget too small for one point.
    """
    shape, top = shape_of(model, batch, metric), max(taps)
    waves = _waves(model, batch, points, shape, budget, mesh)
    batch, metric, points = _place(mesh, batch, metric, points)
    prefix = run_prefix(model, batch, metric, windowed=_windowed(points, waves))
    total, done = sum(sum(step[0] <= top for step in wave.steps) for wave in waves), 0
    kept: dict[int, dict[str, np.ndarray]] = {layer: {} for layer in taps}
    for wave in waves:
        one, streams = _entered(model, wave, points, shape, mesh)
        for layer, below, here in wave.steps:
            if layer > top:
                break
            if layer in taps:
                found = _record(model, prefix, one, taps[layer], streams, np.int32(layer),
                                start=wave.start, chunk=wave.chunk)  # fmt: skip
                for name, value in jax.device_get(found).items():
                    whole = kept[layer].setdefault(
                        name, np.zeros((len(points), *value.shape[2:]), value.dtype)
                    )
                    whole[wave.grid[wave.real]] = value[wave.real]
            if layer < top:
                counts = np.int32(layer), np.int32(below), np.int32(here)
                streams, _ = _move(model, prefix, one, streams, counts,
                                   start=wave.start, chunk=wave.chunk, mesh=mesh)  # fmt: skip
            done += 1
            on_progress(done, total)
    return kept


@partial(jax.jit, static_argnames=("start", "chunk", "mesh"), donate_argnames="streams")
def _move(
    model: Transformer,
    prefix: Prefix,
    points: Points,
    streams: Stream,
    counts: tuple[Array, Array, Array],
    *,
    start: int,
    chunk: int,
    mesh: jax.sharding.Mesh | None,
) -> tuple[Stream, Array]:
    """One layer of a wave: streams from below move through it, and new ones begin.

    Returns:
      The streams, and a scalar that is ready when they are.
    """
    layer, below, here = counts
    step = Step.at(model, prefix, points, layer, start)

    def move(index: Array, streams: Stream) -> Stream:
        x, arguments = _rows((streams, points.arguments), index * chunk, chunk)
        moved = jax.vmap(jax.vmap(step.through))(x, arguments)
        return _put(streams, moved, index * chunk, mesh)

    def begin(index: Array, streams: Stream) -> Stream:
        row = below + index * chunk
        begun = jax.vmap(jax.vmap(step.begin))(_rows(points.arguments, row, chunk))
        return _put(streams, begun, row, mesh)

    streams = lax.fori_loop(0, -(-below // chunk), move, streams)
    streams = lax.fori_loop(0, -(-here // chunk), begin, streams)
    return streams, streams.own[0, 0, 0, 0, 0]


@partial(jax.jit, static_argnames=("start", "chunk", "reads", "mesh"))
def _read(
    model: Transformer,
    prefix: Prefix,
    points: Points,
    metric: Metric,
    streams: Stream,
    counts: tuple[Array, Array, Array],
    *,
    start: int,
    chunk: int,
    reads: int,
    mesh: jax.sharding.Mesh | None,
) -> Array:
    """The last layer of a wave, and the metric of every row: float32 [lanes, rows, B]."""
    layer, below, here = counts
    step = Step.at(model, prefix, points, layer, start)
    found = jnp.zeros(streams.own.shape[:3], jnp.float32)

    def move(index: Array, found: Array) -> Array:
        x, arguments = _rows((streams, points.arguments), index * chunk, chunk)
        value = jax.vmap(jax.vmap(partial(step.finish, metric, reads)))(x, arguments)
        return _put(found, value, index * chunk, mesh)

    def begin(index: Array, found: Array) -> Array:
        row = below + index * chunk
        value = jax.vmap(jax.vmap(partial(step.finish, metric, 0, None)))(
            _rows(points.arguments, row, chunk)
        )
        return _put(found, value, row, mesh)

    found = lax.fori_loop(0, -(-below // chunk), move, found)
    return lax.fori_loop(0, -(-here // chunk), begin, found)


@partial(jax.jit, static_argnames=("start", "chunk"))
def _record(
    model: Transformer,
    prefix: Prefix,
    points: Points,
    taps: Mapping[str, Tap],
    streams: Stream,
    layer: Array,
    *,
    start: int,
    chunk: int,
) -> dict[str, Array]:
    """What is tapped in one layer: [lanes, rows, ...]."""
    step = Step.at(model, prefix, points, layer, start)

    def rows(x: Stream, arguments: Any) -> dict[str, Array]:
        return lax.map(lambda row: step.record(taps, *row), (x, arguments), batch_size=chunk)

    return jax.vmap(rows)(streams, points.arguments)


def _waves(
    model: Transformer,
    batch: Batch,
    points: Points,
    shape: Shape,
    budget: int,
    mesh: jax.sharding.Mesh | None,
) -> list[Wave]:
    lanes = mesh.shape.get("edits", 1) if mesh is not None else 1
    (device, *_) = jax.tree.leaves(model)[0].devices()
    slot = points.slot if model.config.causal else np.zeros_like(points.slot)
    if points.alike and model.config.causal:
        common = common_slots(batch)
        slot = slot + common * worth_sharing(shape.rows, common, device.platform)
    return plan(points.layer, slot, shape, budget=budget, lanes=lanes, platform=device.platform)


def common_slots(batch: Batch) -> int:
    """How many slots from the first hold the same real token in every row."""
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    same = (tokens == tokens[0]).all(axis=0) & mask.all(axis=0)
    return int(same.argmin()) if len(tokens) > 1 and not same.all() else 0


def _windowed(points: Points, waves: list[Wave]) -> bool:
    """Whether edits read the unedited run's keys and values."""
    return not points.alike and any(wave.start for wave in waves)


def _entered(
    model: Transformer, wave: Wave, points: Points, shape: Shape, mesh: jax.sharding.Mesh | None
) -> tuple[Points, Stream]:
    """The points of a wave in its order, on their devices, and room for their streams."""
    arguments = jax.tree.map(lambda leaf: leaf[wave.grid], points.arguments)
    nothing = np.zeros(0, np.int32)
    one = dataclasses.replace(points, layer=nothing, slot=nothing, arguments=arguments)
    return _lanes(mesh, one), _empty(model, wave, points, shape, mesh)


def _rows(tree: Any, row: Array, count: int) -> Any:
    return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, row, count, axis=1), tree)


def _put(whole: Any, part: Any, row: Array, mesh: jax.sharding.Mesh | None) -> Any:
    def put(leaf: Array, new: Array) -> Array:
        leaf = lax.dynamic_update_slice_in_dim(leaf, new.astype(leaf.dtype), row, axis=1)
        if mesh is None:
            return leaf
        return lax.with_sharding_constraint(leaf, _streams_at(mesh, leaf.shape[2]))

    return jax.tree.map(put, whole, part)


def _empty(
    model: Transformer, wave: Wave, points: Points, shape: Shape, mesh: jax.sharding.Mesh | None
) -> Stream:
    def zeros(rows: int, slots: int) -> Array:
        size = (*wave.grid.shape, rows, slots, model.config.d_model)
        sharding = None if mesh is None else _streams_at(mesh, rows)
        return jnp.zeros(size, model.config.compute_dtype, device=sharding)

    own = zeros(shape.rows, shape.slots - wave.start)
    return Stream(own, zeros(1, wave.start) if points.alike and wave.start else None)


def _streams_at(mesh: jax.sharding.Mesh, rows: int) -> jax.sharding.NamedSharding:
    edits, data = (axis if axis in mesh.shape else None for axis in ("edits", "data"))
    return jax.NamedSharding(mesh, jax.P(edits, None, data if rows > 1 else None))


def _lanes(mesh: jax.sharding.Mesh | None, points: Points) -> Points:
    """The points with each lane on its devices."""
    if mesh is None or "edits" not in mesh.shape:
        return points
    sharding = jax.NamedSharding(mesh, jax.P("edits"))
    return dataclasses.replace(points, arguments=jax.device_put(points.arguments, sharding))


def _place(
    mesh: jax.sharding.Mesh | None, batch: Batch, metric: Metric, points: Points
) -> tuple[Batch, Metric, Points]:
    """Batch and metric divided by rows over the mesh, if it has an axis for them."""
    if mesh is None:
        return batch, metric, points
    rows = jax.NamedSharding(mesh, jax.P("data" if "data" in mesh.shape else None))
    return jax.device_put(batch, rows), jax.device_put(metric, rows), points
