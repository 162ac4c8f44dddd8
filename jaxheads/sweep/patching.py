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
from jaxheads.sweep.axes import AXES, Heads, check_axes, check_groups, group_names, only, only_heads
from jaxheads.sweep.effects import effects, normalised_by
from jaxheads.sweep.engine import Progress, silent
from jaxheads.sweep.metrics import AnyMetric, as_metric
from jaxheads.sweep.named import Label, NamedArray
from jaxheads.sweep.pairs import check_pair, first_difference, values_at
from jaxheads.sweep.plan import DEFAULT_BUDGET
from jaxheads.sweep.points import Points

Array = jax.Array
DIRECTIONS = ("denoise", "noise")


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
    check_axes(over, spec.name)
    check_pair(clean, corrupted)
    run, source = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    made = as_metric(model, run, metric)
    length = np.shape(run.tokens)[1]
    sizes = {"layer": config.n_layers, "position": length, "neurons": neuron_groups}
    if spec.head_axis:
        sizes["head"] = axis_sizes(config)[spec.head_axis]
    if "neurons" in over:
        check_groups(neuron_groups, axis_sizes(config)[spec.axes[-1]])
    chosen = np.ones([sizes[axis] for axis in AXES if axis in over], bool)
    allowed = {"layer": layers, "position": positions}
    for axis, indices in allowed.items():
        if indices is not None:
            chosen &= only(axis, indices, sizes, over)
    if heads is not None:
        chosen &= only_heads(heads, sizes, over)
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
        values_at(model, source, spec.name)[spec.name],
        entering=build,
    )
    names: dict[str, tuple[Label, ...]] = {axis: tuple(range(sizes[axis])) for axis in over}
    if "neurons" in over:
        names["neurons"] = group_names(neuron_groups, axis_sizes(config)[spec.axes[-1]])
    present = [axis for axis in AXES if axis in over]
    flat = np.flatnonzero(chosen)
    found = effects(
        model, run, made, points, tuple(present), tuple(names[axis] for axis in present),
        chosen.shape, flat[~same], rows, memory_budget, mesh, on_progress,
        unchanged=flat[same], site=spec.name, direction=direction,
    )  # fmt: skip
    if normalised:
        found = normalised_by(found, model, source, made)
    order = [present.index(axis) for axis in over] + list(range(len(over), found.values.ndim))
    return replace(
        found,
        values=found.values.transpose(order),
        axes=tuple(found.axes[i] for i in order),
        labels=tuple(found.labels[i] for i in order),
    )


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
