"""`patch`: activation patching over layers, heads, positions and groups of neurons."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.edits import Mix
from jaxheads.model.batch import Batch
from jaxheads.model.context import Edit
from jaxheads.model.transformer import Transformer
from jaxheads.names import choose
from jaxheads.sites import SITES, axis_sizes, find_site
from jaxheads.sweep.effects import effects
from jaxheads.sweep.engine import Progress, run_prefix, silent
from jaxheads.sweep.metrics import AnyMetric, Metric, as_metric
from jaxheads.sweep.named import Label, NamedArray
from jaxheads.sweep.pairs import check_pair, first_difference, values_at
from jaxheads.sweep.plan import DEFAULT_BUDGET
from jaxheads.sweep.points import Points

Array = jax.Array
Heads = Iterable[tuple[int, int]]
DIRECTIONS = ("denoise", "noise")
AXES = ("layer", "head", "position", "neurons")


def patch(
    model: Transformer,
    clean: Batch,
    corrupted: Batch,
    metric: AnyMetric,
    site: str = "z",
    over: Sequence[str] = ("layer", "head"),
    *,
    direction: str = "denoise",
    normalised: bool = False,
    heads: Heads | None = None,
    layers: Iterable[int] | None = None,
    positions: Iterable[int] | None = None,
    neuron_groups: int = 16,
    rows: bool = False,
    memory_budget: int = DEFAULT_BUDGET,
    mesh: jax.sharding.Mesh | None = None,
    on_progress: Progress = silent,
) -> NamedArray:
    """Activation patching: the change of a metric when a part takes its value of another run.

    A part that is the same in both runs, such as every position before the first token that
    differs, changes nothing and is not computed.

    Args:
      model: a model with logits for every token.
      clean: prompts with the behaviour in question.
      corrupted: prompts without it, of the same shape and padding.
      metric: as in `sweep`.
      site: a site inside the stack.
      over: the axes that are patched apart, of "layer" (always), "head" (query or key/value
        heads, as the site has), "position" and "neurons"; along others all is patched at once.
      direction: "denoise" patches clean values into the corrupted run; "noise" corrupted values
        into the clean run.
      normalised: divide by the difference between the two runs, so that 0 leaves the patched
        run as it is and 1 gives it the other run's metric.
      heads: only these (layer, head) pairs, of the site's heads; others are NaN.
      layers: only these layers, likewise.
      positions: only these slots, likewise.
      neuron_groups: number of groups of neighbouring features along "neurons".
      rows: as in `sweep`.
      memory_budget: as in `sweep`; the values patched in are not counted.
      mesh: as in `sweep`.
      on_progress: as in `sweep`.

    Returns:
      `NamedArray` with the axes of `over` in that order (and "row").

    Raises:
      ValueError: as for `sweep`; an unknown site, axis or direction; an axis that the site does
        not have; clean and corrupted of different shape or padding; nothing to patch; two
        runs whose metrics are equal, if `normalised`.
    """
    config = model.config
    choose("direction", direction, DIRECTIONS)
    spec = find_site(choose("site", site, [name for name, s in SITES.items() if s.stacked]))
    over = tuple(over)
    _check_axes(over, spec.name)
    check_pair(clean, corrupted)
    run, source = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    made = as_metric(model, run, metric)
    length = np.shape(run.tokens)[1]
    sizes = {"layer": config.n_layers, "position": length, "neurons": neuron_groups}
    if spec.head_axis:
        sizes["head"] = axis_sizes(config)[spec.head_axis]
    if "neurons" in over:
        _check_groups(neuron_groups, axis_sizes(config)[spec.axes[-1]])
    chosen = np.ones([sizes[axis] for axis in AXES if axis in over], bool)
    allowed = {"layer": layers, "position": positions}
    for axis, only in allowed.items():
        if only is not None:
            chosen &= _only(axis, only, sizes, over)
    if heads is not None:
        chosen &= _only_heads(heads, sizes, over)
    if not chosen.any():
        raise ValueError("nothing to patch: every layer, head or position is left out")
    index = dict(zip([axis for axis in AXES if axis in over], np.nonzero(chosen), strict=True))
    first = first_difference(run, source, config.causal)
    slot = np.maximum(index.get("position", np.zeros_like(index["layer"])), first)
    same = index["position"] < first if "position" in over else slot >= length
    build = _Patch(spec.name, tuple(axis for axis in AXES[1:] if axis in over), neuron_groups)
    points = Points(
        index["layer"][~same].astype(np.int32),
        slot[~same].astype(np.int32),
        {axis: at[~same].astype(np.int32) for axis, at in index.items()},
        values_at(model, source, spec.name),
        entering=build,
    )
    names: dict[str, tuple[Label, ...]] = {axis: tuple(range(sizes[axis])) for axis in over}
    if "neurons" in over:
        names["neurons"] = _group_names(neuron_groups, axis_sizes(config)[spec.axes[-1]])
    present = [axis for axis in AXES if axis in over]
    flat = np.flatnonzero(chosen)
    found = effects(
        model, run, made, points, tuple(present), tuple(names[axis] for axis in present),
        chosen.shape, flat[~same], rows, memory_budget, mesh, on_progress,
        unchanged=flat[same], site=spec.name, direction=direction,
    )  # fmt: skip
    if normalised:
        found = _normalised(found, model, source, made)
    order = [present.index(axis) for axis in over] + list(range(len(over), found.values.ndim))
    return replace(
        found,
        values=found.values.transpose(order),
        axes=tuple(found.axes[i] for i in order),
        labels=tuple(found.labels[i] for i in order),
    )


def _check_axes(over: Sequence[str], site: str) -> None:
    """Raises ValueError for axes that a sweep of this site does not have."""
    spec = find_site(site)
    for axis in over:
        choose("axis", axis, AXES)
    if len(set(over)) != len(over) or "layer" not in over:
        raise ValueError(f"over must name each axis once and 'layer' among them, got {over}")
    if "head" in over and spec.head_axis is None:
        raise ValueError(f"site {site!r} {spec.signature} has no axis 'head'")
    if "neurons" in over and spec.axes[-1] not in ("F", "D"):
        raise ValueError(f"site {site!r} {spec.signature} has no axis 'neurons'")


@dataclass(frozen=True)
class _Patch:
    """Mixes the source's value in at one head, slot or group of features of a site."""

    site: str
    axes: tuple[str, ...]
    groups: int

    def __call__(
        self, arguments: Any, shared: Array, layer: Array, start: int
    ) -> Mapping[str, Edit]:
        axes = find_site(self.site).axes
        value = jax.lax.slice_in_dim(shared, start, None, axis=axes.index("T"))
        weight = jnp.ones((1,) * value.ndim, value.dtype)
        for axis in self.axes:
            if axis == "head":
                place, at = next(i for i, a in enumerate(axes) if a in "HK"), arguments["head"]
            elif axis == "position":
                place, at = axes.index("T"), arguments["position"] - start
            else:
                place, at = len(axes) - 1, arguments["neurons"]
            index = jnp.arange(value.shape[place])
            if axis == "neurons":
                index = index * self.groups // value.shape[place]
            shape = [1] * value.ndim
            shape[place] = -1
            weight = weight * (index == at).reshape(shape)
        return {self.site: Mix(value, weight)}


def _normalised(found: NamedArray, model: Transformer, source: Batch, metric: Metric) -> NamedArray:
    other = np.asarray(run_prefix(model, source, metric, windowed=False).metric)
    whole = float(other.mean()) - found.info["unedited"]
    if not abs(whole) > 1e-6:
        raise ValueError(
            f"cannot normalise: the metric is {found.info['unedited']:.6g} in both runs"
        )
    info = {**found.info, "source": float(other.mean())}
    name = f"share of the difference in {found.info['metric']} between the runs"
    return replace(found, name=name, values=found.values / whole, info=info)


def _only(
    axis: str, only: Iterable[int], sizes: Mapping[str, int], over: Sequence[str]
) -> np.ndarray:
    """bool, broadcasting over the axes in use: True at the indices named."""
    if axis not in over:
        raise ValueError(f"{axis}s can be chosen only if {axis!r} is one of over={tuple(over)}")
    mask = np.zeros(sizes[axis], bool)
    for index in only:
        if not 0 <= index < sizes[axis]:
            raise ValueError(f"{axis} {index} is out of range 0..{sizes[axis] - 1}")
        if mask[index]:
            raise ValueError(f"{axis} {index} is named twice")
        mask[index] = True
    present = [name for name in AXES if name in over]
    return mask.reshape([-1 if name == axis else 1 for name in present])


def _only_heads(heads: Heads, sizes: Mapping[str, int], over: Sequence[str]) -> np.ndarray:
    if "head" not in over:
        raise ValueError(f"heads can be chosen only if 'head' is one of over={tuple(over)}")
    mask = np.zeros((sizes["layer"], sizes["head"]), bool)
    for layer, head in heads:
        if not (0 <= layer < mask.shape[0] and 0 <= head < mask.shape[1]):
            raise ValueError(
                f"head {layer}.{head} is out of range: the site has layers 0..{mask.shape[0] - 1} "
                f"and heads 0..{mask.shape[1] - 1}"
            )
        if mask[layer, head]:
            raise ValueError(f"head {layer}.{head} is named twice")
        mask[layer, head] = True
    return mask.reshape(*mask.shape, *(1 for axis in AXES[2:] if axis in over))


def _check_groups(groups: int, features: int) -> None:
    if not 1 <= groups <= features:
        raise ValueError(f"neuron_groups must lie in 1..{features}, got {groups}")


def _group_names(groups: int, features: int) -> tuple[str, ...]:
    member = np.arange(features) * groups // features
    edges = [np.flatnonzero(member == group)[[0, -1]] for group in range(groups)]
    return tuple(f"{low}-{high}" for low, high in edges)
