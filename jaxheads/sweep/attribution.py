"""First-order attribution: what every part does to a metric, from a few gradients.

All of it is the derivative with respect to how far an edit is carried out. An edit e at
strength s turns a value x into x + s (e(x) - x), with one strength for every row and part
(layer, head, position, group of features). So the derivative with respect to s is the sum over
the part's features of (e(x) - x) . d metric / d x, taken inside the layer scan: what leaves it
has one number for each part, and no gradient of the site's size is ever stacked.

* Head importance: e sets z to zero, s = 0.
* Attribution patching: e sets the value of another run, s = 0.
* Integrated gradients: the mean over strengths from 0 to 1, by Gauss-Legendre quadrature.

No parameter is differentiated, so a backward pass costs about as much as a forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.edits import Affine, Edits, Mix
from jaxheads.model.batch import Batch
from jaxheads.model.context import Context, Edit, layer_slices
from jaxheads.model.transformer import Transformer
from jaxheads.names import choose
from jaxheads.sites import SITES, find_site
from jaxheads.sweep.agreement import agreement
from jaxheads.sweep.axes import only
from jaxheads.sweep.effects import effects
from jaxheads.sweep.engine import silent
from jaxheads.sweep.metrics import AnyMetric, Metric, Rank, as_metric, name_of, read_tokens
from jaxheads.sweep.named import NamedArray
from jaxheads.sweep.pairs import check_pair
from jaxheads.sweep.patching import DIRECTIONS, patch
from jaxheads.sweep.plan import DEFAULT_BUDGET
from jaxheads.sweep.points import Points
from jaxheads.sweep.strength import (
    Partly,
    Parts,
    all_at_once,
    at_start,
    attribute,
    measure,
    one_by_one,
)
from jaxheads.sweep.sweep import ablate_heads

Array = jax.Array
STACKED = tuple(name for name, site in SITES.items() if site.stacked)


def head_importance(
    model: Transformer,
    batch: Batch,
    metric: AnyMetric,
    *,
    normalised: bool = False,
    exact: bool = False,
) -> NamedArray:
    """Importance of every head: the mean over rows of |d metric / d xi_h|, xi scaling z.

    Michel et al. (2019), "Are Sixteen Heads Really Better than One?", eq. 2: the expected
    sensitivity of the loss to a head's mask, E|z_h . d metric / d z_h|. One forward and one
    backward pass; rows are told apart because each has its own xi.

    Args:
      model: a model with logits for every token.
      batch: the prompts.
      metric: as in `sweep`, differentiable; the paper takes the loss (`TokenLoss`).
      normalised: divide each layer by its L2 norm over heads, as the paper does.
      exact: compare with the absolute change in each row when a head is removed
        (`ablate_heads`), and note it in `info["agreement"]`.

    Returns:
      `NamedArray` with axes "layer" and "head", nowhere negative.

    Raises:
      ValueError: a metric that does not fit the batch or has no derivative, or NaN.
    """
    made, parts = _differentiable(model, batch, metric), Parts("z", ("layer", "head"))
    removed = Edits(z=Affine(scale=jnp.zeros((1, 1, 1, 1, 1))))
    found, unedited = attribute(model, batch, made, removed, [parts], at_start(model.config))
    info = {"metric": name_of(made), "unedited": float(unedited.mean())}
    name = f"importance for {name_of(made)} ({made.unit})"
    importance = parts.named(name, np.abs(found["z"]), model.config, False, info)
    importance = _per_layer(importance) if normalised else importance
    if not exact:
        return importance
    swept = ablate_heads(model, batch, made, "zero", rows=True)
    swept = replace(swept.mean("row"), values=np.abs(swept.values).mean(axis=-1))
    return _compared(importance, _per_layer(swept) if normalised else swept)


def attribution_patching(
    model: Transformer,
    clean: Batch,
    corrupted: Batch,
    metric: AnyMetric,
    site: str = "z",
    over: Sequence[str] = ("layer", "head"),
    *,
    direction: str = "denoise",
    normalised: bool = False,
    layers: Iterable[int] | None = None,
    neuron_groups: int = 16,
    steps: int = 0,
    rows: bool = False,
    exact: bool = False,
) -> NamedArray:
    """Estimates what `patch` measures: (value of the other run - own value) . d metric / d value.

    Nanda (2023), "Attribution Patching": two forward passes and one backward pass give every
    part at once. Exact where the metric is linear in the value patched, otherwise a first-order
    estimate; it is worst where a norm or a softmax is saturated. A metric that is at its
    minimum in the run patched, as `Divergence` is, has no first order.

    With `steps`, integrated gradients (Marks et al. 2024, "Sparse Feature Circuits", their
    second estimate): the gradient is averaged while one layer's values move from one run to
    the other, each layer by itself. So the parts of a layer sum up to the exact effect of
    patching the whole layer. Costs `steps` forward and backward passes for each of `layers`.

    Args:
      model: as in `patch`.
      clean: as in `patch`.
      corrupted: as in `patch`.
      metric: as in `patch`, differentiable.
      site: as in `patch`.
      over: as in `patch`; all axes cost the same.
      direction: as in `patch`.
      normalised: as in `patch`.
      layers: as in `patch`; fewer save time only with `steps`.
      neuron_groups: as in `patch`.
      steps: points of the quadrature in each layer; 0 for the gradient in the run patched.
      rows: as in `patch`.
      exact: compare with `patch`, and note it in `info["agreement"]`. To watch or restrict that
        sweep, call `patch` and `agreement`.

    Returns:
      `NamedArray` with the axes of `over` in that order (and "row").

    Raises:
      ValueError: as for `patch`; a metric without a derivative; steps below 0.
    """
    config, parts = model.config, Parts(site, tuple(over), neuron_groups)
    choose("direction", direction, DIRECTIONS)
    choose("site", site, STACKED)
    parts.check(config)
    check_pair(clean, corrupted)
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    all_layers = range(config.n_layers)
    chosen = only("layer", all_layers if layers is None else layers, {"layer": len(all_layers)},
                   ("layer",))  # fmt: skip
    if not chosen.any():
        raise ValueError("nothing to patch: every layer is left out")
    run, source = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    made = _differentiable(model, run, metric)
    values, other = _lend(model, source, made, site=site)
    edit = Mix(values, jnp.ones((1,) * values.ndim, values.dtype))
    edits = Edits({site: edit}).when(_changed(run, source, config.causal))
    path = one_by_one(chosen, steps) if steps else at_start(config)
    found, metrics = attribute(model, run, made, edits, [parts], path)
    unedited = float((measure(model, run, made, Edits()) if steps else metrics[0]).mean())
    scale, name = 1.0, f"attributed change of {name_of(made)} ({made.unit})"
    if normalised:
        scale, name = float(other.mean()) - unedited, f"attributed share of {name_of(made)}"
        if not abs(scale) > 1e-6:
            raise ValueError(f"cannot normalise: the metric is {unedited:.6g} in both runs")
    info = {"metric": name_of(made), "unedited": unedited, "source": float(other.mean()),
            "site": site, "direction": direction, "steps": steps}  # fmt: skip
    result = parts.named(name, found[site] / scale, config, rows, info)
    np.moveaxis(result.values, parts.over.index("layer"), 0)[~chosen] = np.nan
    if not exact:
        return result
    swept = patch(
        model, clean, corrupted, made, site, parts.over, direction=direction, rows=rows,
        normalised=normalised, layers=np.flatnonzero(chosen), neuron_groups=neuron_groups,
    )  # fmt: skip
    return _compared(result, swept)


def integrated_gradients(
    model: Transformer,
    batch: Batch,
    metric: AnyMetric,
    edits: Edits,
    over: Sequence[str] | None = None,
    *,
    neuron_groups: int = 16,
    steps: int = 16,
    rows: bool = False,
    exact: bool = False,
) -> dict[str, NamedArray]:
    """Divides the change of a metric by an edit among the parts that the edit changes.

    Sundararajan et al. (2017), "Axiomatic Attribution for Deep Networks", eq. 1, over the
    strength s of the whole edit, from none (0) to full (1): each part gets the integral of
    d metric / d s_part. The parts of all sites sum up to metric(edit) - metric(no edit), but for
    the error of the quadrature, which is `info["gap"]` and falls fast with `steps` wherever the
    metric is smooth along the path. It shares out the joint effect; for the effect of each part
    alone see `attribution_patching`.

    Costs `steps` forward and backward passes and two forward passes.

    Args:
      model: a model with logits for every token.
      batch: the prompts.
      metric: as in `sweep`, differentiable.
      edits: any edits, at sites inside the stack or at `embed`, e.g. an ablation of many heads,
        or `Edits(embed=Affine(scale=jnp.zeros((1, 1, 1))))` to attribute to tokens.
      over: the axes that are told apart, as in `patch` ("layer" always, but at `embed`); along
        others they are summed. Default layer and head, as far as the site has them; position
        at `embed`.
      neuron_groups: as in `patch`.
      steps: points of the quadrature.
      rows: as in `sweep`.
      exact: compare each site with the effect of its edit on one part alone, and note it in
        `info["agreement"]`; not for `embed`.

    Returns:
      For each site a `NamedArray` with the axes of `over` (and "row"); `info` has "unedited",
      "edited" and "gap".

    Raises:
      ValueError: no edits, a site that cannot be attributed, an axis that a site does not
        have, a metric that does not fit the batch or has no derivative, steps below 1, or NaN.
    """
    if not edits:
        raise ValueError("no edits to attribute: expected an edit of at least one site")
    config, sites = model.config, STACKED if exact else ("embed", *STACKED)
    chosen = [
        Parts(site, _axes_of(site) if over is None else tuple(over), neuron_groups)
        for site in edits
    ]
    for parts in chosen:
        choose("site", parts.site, sites)
        parts.check(config)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    made = _differentiable(model, batch, metric)
    unedited, edited = (measure(model, batch, made, e) for e in (Edits(), edits))
    found, _ = attribute(model, batch, made, edits, chosen, all_at_once(config, steps))
    attributed = sum(float(values.sum()) for values in found.values()) / len(unedited)
    info = {
        "metric": name_of(made),
        "unedited": float(unedited.mean()),
        "edited": float(edited.mean()),
        "steps": steps,
        "gap": float((edited - unedited).mean()) - attributed,
    }
    name = f"attributed change of {name_of(made)} ({made.unit})"
    results = {}
    for parts in chosen:
        result = parts.named(name, found[parts.site], config, rows, {**info, "site": parts.site})
        if exact:
            result = _compared(result, _alone(model, batch, made, edits, parts, result))
        results[parts.site] = result
    return results


@partial(jax.jit, static_argnames="site")
def _lend(model: Transformer, source: Batch, metric: Metric, *, site: str) -> tuple[Array, Array]:
    """The values of a site [L,B,T,...] in a run, and its metric [B]."""
    out = model(source, taps=site, logits_at=jnp.asarray(metric.slots))
    return out.taps[site], metric(read_tokens(out.logits, metric))


def _differentiable(model: Transformer, batch: Batch, metric: AnyMetric) -> Metric:
    made = as_metric(model, batch, metric)
    if isinstance(made, Rank):
        raise ValueError("Rank has no derivative: take Probability or LogitDifference")
    return made


def _axes_of(site: str) -> tuple[str, ...]:
    if site == "embed":
        return ("position",)
    return ("layer", "head") if find_site(site).head_axis else ("layer",)


def _changed(run: Batch, source: Batch, causal: bool) -> np.ndarray:
    """bool [B,T], real slots that can have another value in the source."""
    mask = np.asarray(run.mask)
    differ = (np.asarray(run.tokens) != np.asarray(source.tokens)) & mask
    reached = np.logical_or.accumulate(differ, 1) if causal else differ.any(1, keepdims=True)
    return reached & mask


def _per_layer(found: NamedArray) -> NamedArray:
    """Each layer divided by its L2 norm over heads; a layer of zeros stays."""
    norms = np.linalg.norm(found.values, axis=1, keepdims=True)
    values = np.divide(found.values, norms, out=np.zeros_like(found.values), where=norms > 0)
    return replace(found, name=f"{found.name}, L2-normalised per layer", values=values)


def _compared(found: NamedArray, swept: NamedArray) -> NamedArray:
    return replace(found, info={**found.info, "agreement": agreement(found, swept).as_dict()})


def _alone(
    model: Transformer,
    batch: Batch,
    metric: Metric,
    edits: Edits,
    parts: Parts,
    like: NamedArray,
) -> NamedArray:
    """What a site's edit changes on each part alone, exactly, with the axes of `like`."""
    axes, shape = parts.over, like.shape[: len(parts.over)]
    index = np.indices(shape, np.int32).reshape(len(axes), -1)
    at = dict(zip(axes, index, strict=True))
    shared = layer_slices({parts.site: edits[parts.site]}, model.config.n_layers)[parts.site]
    points = Points(
        at["layer"], np.zeros_like(index[0]), at, shared, entering=_OnePart(parts)
    )  # fmt: skip
    return effects(
        model, batch, metric, points, axes, like.labels[: len(axes)], shape, np.arange(len(points)),
        "row" in like.axes, DEFAULT_BUDGET, None, silent,
    )  # fmt: skip


@dataclass(frozen=True)
class _OnePart:
    """Carries an edit out on one head, slot or group of features of a layer."""

    parts: Parts

    def __call__(self, at: Any, edit: Edit, layer: Array, start: int) -> Mapping[str, Edit]:
        def alone(value: Array, context: Context) -> Array:
            one = jnp.zeros((1, *self.parts.shape(value.shape)[1:]))
            place = tuple(at.get(name, 0) for name in self.parts.names[1:])
            return Partly(edit, one.at[0, *place].set(1), self.parts.grouped)(value, context)

        return {self.parts.site: alone}
