"""`sweep`: any stack of edits; `ablate_heads`: every head.

Both give the change of a metric for every edit, exactly, from one run of
`jaxheads.sweep.engine`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.edits import Affine, AttendTo, Edits, Mix, head_mask
from jaxheads.edits.active import active_layers
from jaxheads.model.batch import Batch
from jaxheads.model.context import Edit
from jaxheads.model.transformer import Transformer
from jaxheads.names import choose
from jaxheads.sites import find_site
from jaxheads.sweep.effects import effects
from jaxheads.sweep.engine import Progress, silent
from jaxheads.sweep.metrics import AnyMetric, as_metric
from jaxheads.sweep.named import Label, NamedArray
from jaxheads.sweep.pairs import check_pair, first_difference, values_at
from jaxheads.sweep.plan import DEFAULT_BUDGET
from jaxheads.sweep.points import Points
from jaxheads.taps import mean_activation

Array = jax.Array
Heads = Iterable[tuple[int, int]]
ABLATIONS = ("zero", "mean", "resample", "uniform")


def sweep(
    model: Transformer,
    batch: Batch,
    metric: AnyMetric,
    edits: Edits | Sequence[Edits],
    *,
    labels: Sequence[Label] | None = None,
    rows: bool = False,
    memory_budget: int = DEFAULT_BUDGET,
    mesh: jax.sharding.Mesh | None = None,
    on_progress: Progress = silent,
) -> NamedArray:
    """The change of a metric by each of many edits.

    An edit is computed from the first layer it changes on; what lies below is shared with the
    unedited run. So a stack over layers costs half of as many forward passes, and strengths or
    directions at one layer cost only the layers above it.

    Args:
      model: a model with logits for every token.
      batch: the prompts.
      metric: a `Metric`, or a function from the logits [B,V] after each row's last token to [B].
      edits: N edits of one structure: stacked on a leading axis (`Edits.stack`, or the result
        of `jax.vmap` over a constructor), or a sequence of them.
      labels: N names of the edits; default 0 to N-1.
      rows: give every row of the batch an entry, on a last axis "row", instead of their mean.
      memory_budget: bytes for residual streams and the arrays of one step; weights, the
        unedited run and the edits themselves are not counted.
      mesh: devices to divide the work over: edits over its axis "edits", rows over "data".
      on_progress: called as (steps done, steps in all).

    Returns:
      `NamedArray` with axis "edit" (and "row").

    Raises:
      ValueError: no edits, leaves of different lengths, edits that do not fit the model, a
        metric that does not fit the batch, a budget too small for one edit, or NaN.
    """
    made = as_metric(model, batch, metric)
    stacked = edits if isinstance(edits, Edits) else Edits.stack(edits)
    count = _stack_size(stacked)
    names = tuple(range(count)) if labels is None else tuple(labels)
    if len(names) != count:
        raise ValueError(f"{len(names)} labels were given for {count} edits")
    one = jax.tree.map(lambda leaf: leaf[0], stacked)
    try:
        jax.eval_shape(lambda m, e: m(batch, edits=e, logits_at=made.slots).logits, model, one)
    except ValueError as error:
        raise ValueError(
            f"an edit without the leading axis of {count} does not fit the model: {error}"
        ) from error
    n_layers = model.config.n_layers
    inside = {site: edit for site, edit in stacked.items() if find_site(site).stacked}
    active = np.zeros((count, n_layers), bool)
    for edit in inside.values():
        active |= active_layers(edit, n_layers)
    if "embed" in stacked:
        active[:, 0] = True
    # An edit that changes nothing in the stack still has to be read out: it begins last.
    first = np.where(active.any(axis=1), active.argmax(axis=1), n_layers - 1).astype(np.int32)
    points = Points(
        first,
        np.zeros(count, np.int32),
        (inside, {site: edit for site, edit in stacked.items() if site not in inside}),
        entering=_slices,
        later=_slices,
        outside=_outside if len(inside) < len(stacked) else None,
    )
    return effects(
        model, batch, made, points, ("edit",), (names,), (count,), np.arange(count), rows,
        memory_budget, mesh, on_progress,
    )  # fmt: skip


def ablate_heads(
    model: Transformer,
    batch: Batch,
    metric: AnyMetric,
    how: str = "zero",
    *,
    heads: Heads | None = None,
    means: Array | np.ndarray | None = None,
    source: Batch | None = None,
    rows: bool = False,
    memory_budget: int = DEFAULT_BUDGET,
    mesh: jax.sharding.Mesh | None = None,
    on_progress: Progress = silent,
) -> NamedArray:
    """The change of a metric when each head is removed, one at a time.

    Args:
      model: a model with logits for every token.
      batch: the prompts.
      metric: as in `sweep`.
      how: what becomes of the head's output z: "zero"; "mean", its mean over data; "resample",
        its value on other prompts; "uniform", what it is with equal attention to every
        visible key.
      heads: (layer, head) pairs; default all. Others are NaN in the result.
      means: [L,H,Dh] for "mean"; default `mean_activation` of the batch itself.
      source: for "resample", prompts of the batch's shape and padding; row b takes the value
        of row b there.
      rows: as in `sweep`.
      memory_budget: as in `sweep`.
      mesh: as in `sweep`.
      on_progress: as in `sweep`.

    Returns:
      `NamedArray` with axes "layer" and "head" (and "row"): metric with the head removed minus
      metric without any edit, mean over rows.

    Raises:
      ValueError: as for `sweep`; an unknown `how`; heads out of range, named twice or none;
        `means` misshapen; a `source` that is missing, not wanted, or of another shape.
    """
    config, size = model.config, (model.config.n_layers, model.config.n_heads)
    choose("how", how, ABLATIONS)
    made = as_metric(model, batch, metric)
    chosen = np.ones(size, bool) if heads is None else head_mask(config, heads)
    if not chosen.any():
        raise ValueError("no heads to ablate: expected at least one (layer, head) pair")
    if (source is None) == (how == "resample"):
        raise ValueError(f"source is needed for how='resample' and for nothing else, got {how!r}")
    first = 0
    if how == "mean":
        value = mean_activation(model, [batch]) if means is None else jnp.asarray(means)
        if value.shape != (*size, config.head_dim):
            raise ValueError(
                f"means has shape {value.shape}, expected {(*size, config.head_dim)} [L,H,Dh]"
            )
        shared: Any = value[:, None, None]
    elif source is not None:
        check_pair(batch, source)
        first = first_difference(batch, source, config.causal)
        shared = values_at(model, source, "z")["z"]
    else:
        shared = None
    build: Any = {
        "zero": _zero,
        "mean": _replace,
        "resample": _replace,
        "uniform": _uniform_pattern if config.relative_buckets else _uniform,
    }[how]
    layer, head = np.nonzero(chosen)
    points = Points(
        layer.astype(np.int32),
        np.full(len(layer), first, np.int32),
        head.astype(np.int32),
        shared,
        entering=build,
        alike=how != "resample",
    )
    labels = tuple(tuple(range(n)) for n in size)
    return effects(
        model, batch, made, points, ("layer", "head"), labels, size, np.flatnonzero(chosen), rows,
        memory_budget, mesh, on_progress, how=how,
    )  # fmt: skip


# Builders of edits: (arguments of a point, values shared in the layer, layer, first slot of the
# window) -> edits of the block.


def _slices(arguments: Any, shared: Any, layer: Array, start: int) -> Mapping[str, Edit]:
    inside, _ = arguments
    return jax.tree.map(lambda leaf: leaf[jnp.minimum(layer, leaf.shape[0] - 1)], inside)


def _outside(arguments: Any) -> Mapping[str, Edit]:
    return arguments[1]


def _zero(head: Array, shared: None, layer: Array, start: int) -> Mapping[str, Edit]:
    return {"z": _Without(head)}


def _uniform(head: Array, shared: None, layer: Array, start: int) -> Mapping[str, Edit]:
    return {"q": _Without(head)}


def _uniform_pattern(head: Array, shared: None, layer: Array, start: int) -> Mapping[str, Edit]:
    return {"pattern": _UniformHead(head)}


def _replace(head: Array, shared: Array, layer: Array, start: int) -> Mapping[str, Edit]:
    value = shared if shared.shape[1] == 1 else shared[:, start:]
    here = jnp.arange(value.shape[2]) == head
    return {"z": Mix(value, here[None, None, :, None].astype(value.dtype))}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Without:
    """One head set to zero."""

    head: Array

    def __call__(self, value: Array, context: Any) -> Array:
        keep = jnp.arange(value.shape[2]) != self.head
        return Affine(scale=keep[None, None, :, None].astype(value.dtype))(value, context)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _UniformHead:
    """One head made to attend equally to every visible key."""

    head: Array

    def __call__(self, value: Array, context: Any) -> Array:
        weight = (jnp.arange(value.shape[1]) == self.head).astype(value.dtype)
        return AttendTo(weight[None, :, None, None], "uniform")(value, context)


def _stack_size(edits: Edits) -> int:
    leaves = jax.tree.leaves(edits)
    if not leaves or any(jnp.ndim(leaf) == 0 for leaf in leaves):
        raise ValueError(
            "the edits are empty or not stacked: expected arrays with a leading axis of edits"
        )
    sizes = {leaf.shape[0] for leaf in leaves}
    if len(sizes) > 1 or 0 in sizes:
        raise ValueError(
            f"the leaves of stacked edits have leading axes of {sorted(sizes)}, expected one "
            "number of edits, at least 1"
        )
    return sizes.pop()
