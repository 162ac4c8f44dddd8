"""Edits carried out to a part, and the derivative of a metric with respect to how far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxheads.edits import Edits
from jaxheads.edits.kinds import fitting
from jaxheads.model.batch import Batch
from jaxheads.model.config import ModelConfig
from jaxheads.model.context import Context
from jaxheads.model.transformer import Transformer
from jaxheads.names import choose
from jaxheads.sites import axis_sizes, find_site
from jaxheads.sweep.axes import check_axes, check_groups, group_names
from jaxheads.sweep.metrics import Metric, name_of, read_tokens
from jaxheads.sweep.named import Label, NamedArray
from jaxheads.sweep.nans import refuse_nans
from jaxheads.sweep.points import Points

Array = jax.Array
Path = tuple[np.ndarray, np.ndarray]
"""Strengths at the points of a path, float32 [N,L], and the points' weights [N,L]."""
_NAMES = {"B": "row", "T": "position", "H": "head", "K": "head", "D": "neurons", "F": "neurons"}


@struct.dataclass
class Partly:
    """Any edit, carried out to a part: x + strength * (edit(x) - x).

    Attributes:
      edit: what is carried out.
      strength: broadcasts against the site; 0 nothing, 1 all of it.
      groups: if not 0, the last axis of `strength` has this many groups of neighbouring
        features, or is 1. Static.
    """

    edit: Any
    strength: Array
    groups: int = struct.field(pytree_node=False, default=0)

    @property
    def needs(self) -> tuple[str, ...]:
        """Sites that the inner edit reads."""
        return getattr(self.edit, "needs", ())

    def __call__(self, value: Array, context: Context) -> Array:
        """Returns the value on its way to the edited one."""
        strength = self.strength
        if self.groups:
            features = value.shape[-1]
            strength = strength[..., jnp.arange(features) * self.groups // features]
        change = self.edit(value, context) - value
        return value + fitting("strength", strength, value) * change


@dataclass(frozen=True)
class Parts:
    """What is told apart at a site.

    Attributes:
      site: its name.
      over: axes of "layer", "head", "position" and "neurons", in the order of the result.
      groups: number of groups of neighbouring features along "neurons".
    """

    site: str
    over: tuple[str, ...]
    groups: int = 0

    @property
    def names(self) -> list[str]:
        """What the axes of the site's value are called in results."""
        return [_NAMES.get(axis, "") for axis in find_site(self.site).axes]

    @property
    def grouped(self) -> int:
        """The number of groups, 0 if features are not told apart."""
        return self.groups if "neurons" in self.over else 0

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError for axes that the site does not have."""
        if self.site == "embed":
            for axis in self.over:
                choose("axis of embed", axis, ("position", "neurons"))
        else:
            check_axes(self.over, self.site)
        if self.grouped:
            check_groups(self.groups, axis_sizes(config)[find_site(self.site).axes[-1]])

    def shape(self, lengths: Sequence[int]) -> list[int]:
        """Of the strengths for a value of these lengths; axes not told apart have length 1."""
        kept = zip(self.names, (*lengths[:-1], self.grouped or lengths[-1]), strict=True)
        return [length if name in ("row", *self.over) else 1 for name, length in kept]

    def along(self, per_layer: Array) -> Array:
        """Numbers [L], to broadcast against strengths; `embed` has that of the first layer."""
        spec = find_site(self.site)
        return per_layer.reshape(-1, *[1] * len(spec.axes)) if spec.stacked else per_layer[0]

    def named(
        self, name: str, values: np.ndarray, config: ModelConfig, rows: bool, info: Mapping
    ) -> NamedArray:
        """Strengths ([L,]B,...) as a result, with rows last or their mean."""
        names, kept = ["layer", *self.names][-values.ndim :], (*self.over, "row")
        values = values.squeeze(tuple(i for i, axis in enumerate(names) if axis not in kept))
        left = [axis for axis in names if axis in kept]
        values = values.transpose([left.index(axis) for axis in kept])
        axes, values = (kept, values) if rows else (self.over, values.mean(axis=-1))
        labels: list[tuple[Label, ...]] = [tuple(range(length)) for length in values.shape]
        if self.grouped:
            features = axis_sizes(config)[find_site(self.site).axes[-1]]
            labels[axes.index("neurons")] = group_names(self.groups, features)
        return NamedArray(name, values, axes, tuple(labels), info)


def attribute(
    model: Transformer,
    batch: Batch,
    metric: Metric,
    edits: Edits,
    parts: Sequence[Parts],
    path: Path,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Sums over the points of a path of weight times d metric / d strength.

    Returns:
      For each site float32 [L,B,...] as `Parts.shape` says (without L at `embed`), and the
      metric at each point [N,B].

    Raises:
      ValueError: NaN.
    """
    sums, metrics = jax.device_get(_sums(model, batch, metric, edits, *path, parts=tuple(parts)))
    if np.isnan(metrics).any():
        none = np.zeros(0, np.int32)
        unchanged = Points(none, none, None, entering=lambda *_: {})
        unedited = np.asarray(measure(model, batch, metric, Edits()))
        refuse_nans(model, batch, metric, unchanged, np.zeros((0, len(unedited))), unedited)
        raise ValueError(f"{name_of(metric)} is NaN on the way from no edit to the edit")
    for site, values in sums.items():
        if np.isnan(values).any():
            layer = f", first in layer {np.argwhere(np.isnan(values))[0][0]}" * (site != "embed")
            raise ValueError(f"the derivative of {name_of(metric)} is NaN at {site}{layer}")
    return sums, metrics


@partial(jax.jit, static_argnames="parts")
def _sums(
    model: Transformer,
    batch: Batch,
    metric: Metric,
    edits: Edits,
    strengths: Array,
    weights: Array,
    *,
    parts: tuple[Parts, ...],
) -> tuple[dict[str, Array], Array]:
    rows, slots = batch.tokens.shape
    sizes = {**axis_sizes(model.config), "B": rows, "T": slots, "S": slots}

    def zeros(part: Parts) -> Array:
        spec = find_site(part.site)
        shape = part.shape([sizes[axis] for axis in spec.axes])
        return jnp.zeros([*[sizes["L"]] * spec.stacked, *shape])

    none = {part.site: zeros(part) for part in parts}

    def total(moved: dict[str, Array], here: Array) -> tuple[Array, Array]:
        partly = {
            p.site: Partly(edits[p.site], moved[p.site] + p.along(here), p.grouped) for p in parts
        }
        measured = measure(model, batch, metric, Edits(partly))
        return measured.sum(), measured

    def add(sums: dict[str, Array], point: tuple[Array, Array]) -> tuple[dict[str, Array], Array]:
        here, weight = point
        found, measured = jax.grad(total, has_aux=True)(none, here)
        sums = {p.site: sums[p.site] + p.along(weight) * found[p.site] for p in parts}
        return sums, measured

    return jax.lax.scan(add, none, (strengths, weights))


@jax.jit
def measure(model: Transformer, batch: Batch, metric: Metric, edits: Edits) -> Array:
    """The metric of an edited run: float32 [B]."""
    logits = model(batch, edits=edits, logits_at=jnp.asarray(metric.slots)).logits
    return metric(read_tokens(logits, metric))


def at_start(config: ModelConfig) -> Path:
    """The run as it is."""
    return np.zeros((1, config.n_layers), np.float32), np.ones((1, config.n_layers), np.float32)


def all_at_once(config: ModelConfig, steps: int) -> Path:
    """All layers move at once: N = steps."""
    strengths, weights = _quadrature(steps)
    every = np.ones(config.n_layers, np.float32)
    return strengths[:, None] * every, weights[:, None] * every


def one_by_one(chosen: np.ndarray, steps: int) -> Path:
    """One layer moves while the others stay: N = steps * chosen layers."""
    strengths, weights = _quadrature(steps)
    each = np.eye(len(chosen), dtype=np.float32)[chosen]
    return np.kron(each, strengths[:, None]), np.kron(each, weights[:, None])


def _quadrature(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre on 0 to 1: exact for polynomials up to degree 2 * steps - 1."""
    places, weights = np.polynomial.legendre.leggauss(steps)
    return ((places + 1) / 2).astype(np.float32), (weights / 2).astype(np.float32)
