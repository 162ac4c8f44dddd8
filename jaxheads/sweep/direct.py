"""Direct effects: what each part writes towards the answer, and what of its effect that is.

`direct_effects` is direct logit attribution (Elhage et al. 2021, "A Mathematical Framework for
Transformer Circuits"; with the last norm frozen as in nostalgebraist 2020 and Wang et al. 2022):
the last residual stream is a sum of writes, and so is a logit difference once the last norm
divides by what it divided by in this run. `effect_split` asks instead what a change of a head
does directly and through later layers (Lieberum et al. 2023; Pearl 2001).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.edits import head_mask
from jaxheads.model.attention import mix_values
from jaxheads.model.batch import Batch
from jaxheads.model.config import ModelConfig
from jaxheads.model.context import Context, Tap
from jaxheads.model.transformer import Transformer
from jaxheads.sweep.effects import effects
from jaxheads.sweep.engine import Progress, shape_of, silent
from jaxheads.sweep.metrics import AnyMetric, LogitDifference, as_metric, name_of
from jaxheads.sweep.named import Label, NamedArray
from jaxheads.sweep.pairs import values_at
from jaxheads.sweep.paths import sender_points
from jaxheads.sweep.plan import DEFAULT_BUDGET
from jaxheads.sweep.sweep import ablate_heads
from jaxheads.taps import mean_activation

Array = jax.Array
EFFECTS = ("total", "direct", "indirect")


@dataclass(frozen=True)
class DirectEffects:
    """A logit difference as a sum over what writes to the last residual stream.

    Attributes:
      heads: axes "layer" and "head".
      mlps: axis "layer"; biases of MLPs are in it.
      rest: axis "part": "embed", and where the model has them the biases "blocks/attn/o_bias"
        (of all layers), "final_norm/bias" and "unembed/bias".
      metric: the logit difference as the model computes it, float32 [] or [B].

    With `rows=True` each array has a last axis "row".
    """

    heads: NamedArray
    mlps: NamedArray
    rest: NamedArray
    metric: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """The sum of all parts, [] or [B]; equals `metric` but for rounding."""
        parts = [part.values for part in (self.heads, self.mlps, self.rest)]
        return np.sum([x.reshape(-1, *self.metric.shape).sum(axis=0) for x in parts], axis=0)


def direct_effects(
    model: Transformer, batch: Batch, metric: LogitDifference, *, rows: bool = False
) -> DirectEffects:
    """Direct logit attribution: a logit difference as a sum over heads, MLPs and the rest.

    A write w contributes w g / s, where s is what the last norm divides by in this run, and g
    the difference of unembeddings times the norm's scale; for layer norms the mean over
    features is taken off first.

    Args:
      model: a language model whose branches are added to the stream as they are.
      batch: the prompts.
      metric: the logit difference.
      rows: as in `sweep`.

    Returns:
      `DirectEffects`, in logits, mean over rows.

    Raises:
      ValueError: a metric that is not a `LogitDifference` or does not fit the batch; a config
        whose logits are not such a sum, by the name of the field.
    """
    if not isinstance(metric, LogitDifference):
        raise ValueError(
            f"direct effects need a LogitDifference, which is linear in the logits, got "
            f"{name_of(metric)}"
        )
    _check_additive(model.config)
    as_metric(model, batch, metric)
    found = jax.device_get(_contributions(model, batch, metric))
    n_layers, n_heads = model.config.n_layers, model.config.n_heads
    info = {"metric": name_of(metric), "unedited": float(found["metric"].mean())}

    def named(values: np.ndarray, axes: tuple[str, ...], *labels: Iterable[Label]) -> NamedArray:
        each = tuple(tuple(part) for part in labels)
        if rows:
            axes, each = (*axes, "row"), (*each, tuple(range(values.shape[-1])))
        else:
            values = values.mean(axis=-1)
        title = f"direct contribution to {info['metric']} ({metric.unit})"
        return NamedArray(title, values, axes, each, info)

    parts = list(found["rest"])
    return DirectEffects(
        named(found["heads"], ("layer", "head"), range(n_layers), range(n_heads)),
        named(found["mlps"], ("layer",), range(n_layers)),
        named(np.stack([found["rest"][name] for name in parts]), ("part",), parts),
        found["metric"] if rows else found["metric"].mean(),
    )


@jax.jit
def _contributions(model: Transformer, batch: Batch, metric: LogitDifference) -> dict[str, Any]:
    """Of every part, [...,B] float32."""
    config = model.config
    slots = jnp.asarray(metric.slots)[:, :1]
    pick = jax.tree_util.Partial(_at_slots, slots)
    sites = ("embed", "z", "mlp_out", "resid_post")
    out = model(batch, taps={site: Tap(site, pick) for site in sites}, logits_at=slots)
    taps = {site: value[..., 0, :] for site, value in out.taps.items() if site != "z"}
    tokens = jnp.asarray(metric.tokens)
    logits = jnp.take_along_axis(out.logits, tokens[:, None], axis=2)

    assert model.unembed is not None, "as_metric takes models with logits only"
    table = model.embed.tokens if model.unembed.kernel is None else model.unembed.kernel
    assert table is not None, "tied to an embedding that is not there"
    weights = jnp.asarray(metric.weights, jnp.float32)
    direction = jnp.einsum("bm,bmd->bd", weights, table[...][tokens].astype(jnp.float32))
    direction = direction * config.logit_scale
    rest = {}
    if model.final_norm is not None:
        norm = model.final_norm
        if norm.bias is not None:
            rest["final_norm/bias"] = direction @ norm.bias[...].astype(jnp.float32)
        direction = direction * (norm.scale[...].astype(jnp.float32) + config.norm_plus_one)
        last = taps["resid_post"][-1].astype(jnp.float32)
        if config.norm == "layer":
            # Taking the mean off a write is taking it off what the write is multiplied with.
            direction = direction - direction.mean(axis=-1, keepdims=True)
            last = last - last.mean(axis=-1, keepdims=True)
        direction = direction * jax.lax.rsqrt(
            jnp.mean(last**2, axis=-1, keepdims=True) + config.norm_eps
        )
    if model.unembed.bias is not None:
        bias = model.unembed.bias[...].astype(jnp.float32)[tokens]
        rest["unembed/bias"] = jnp.sum(weights * bias, axis=-1)

    attn = model.blocks.attn
    scale = jnp.ones((config.n_layers, 1))
    if model.blocks.attn_scale is not None:
        scale = model.blocks.attn_scale[...].astype(jnp.float32)
    towards = scale[:, None] * direction  # [L,B,D]
    output = attn.o[...].astype(jnp.float32)
    heads = jnp.einsum("lbhe,lhed,lbd->lhb", out.taps["z"][:, :, 0], output, towards)
    if attn.o_bias is not None:
        rest["blocks/attn/o_bias"] = jnp.einsum("ld,lbd->b", attn.o_bias[...], towards)
    rest["embed"] = jnp.einsum("bd,bd->b", taps["embed"], direction)
    mlps = jnp.einsum("lbd,bd->lb", taps["mlp_out"], direction)
    return {"heads": heads, "mlps": mlps, "rest": rest, "metric": metric(logits)}


def effect_split(
    model: Transformer,
    batch: Batch,
    metric: AnyMetric,
    how: str = "zero",
    *,
    heads: Iterable[tuple[int, int]] | None = None,
    means: Array | np.ndarray | None = None,
    source: Batch | None = None,
    rows: bool = False,
    memory_budget: int = DEFAULT_BUDGET,
    mesh: jax.sharding.Mesh | None = None,
    on_progress: Progress = silent,
) -> NamedArray:
    """The effect of removing each head, split into what is direct and what later layers do.

    The direct effect is that of the head's changed write on the last residual stream, all later
    heads and MLPs being frozen to what they are in the unedited run; the last norm is
    recomputed. The indirect effect is the rest: total - direct.

    Args:
      model: as in `ablate_heads`.
      batch: as in `ablate_heads`.
      metric: as in `sweep`.
      how: as in `ablate_heads`; "resample" gives the split of patching in corrupted values.
      heads: as in `ablate_heads`.
      means: as in `ablate_heads`.
      source: as in `ablate_heads`.
      rows: as in `sweep`.
      memory_budget: as in `sweep`.
      mesh: as in `sweep`.
      on_progress: as in `sweep`; the two runs are counted one after the other.

    Returns:
      `NamedArray` with axes "effect" ("total", "direct", "indirect"), "layer" and "head" (and
      "row").

    Raises:
      ValueError: as for `ablate_heads`.
    """
    config = model.config
    pairs = None if heads is None else list(heads)
    made = as_metric(model, batch, metric)
    if how == "mean" and means is None:
        means = mean_activation(model, [batch])
    total = ablate_heads(
        model, batch, metric, how, heads=pairs, means=means, source=source, rows=rows,
        memory_budget=memory_budget, mesh=mesh, on_progress=on_progress,
    )  # fmt: skip
    size = (config.n_layers, config.n_heads)
    chosen = np.ones(size, bool) if pairs is None else head_mask(config, pairs)
    layer, head = (index.astype(np.int32) for index in np.nonzero(chosen))
    shape = shape_of(model, batch, made)
    points = sender_points(
        model, batch, layer, head, shape.slots - shape.reads,
        {"z": _removed(model, batch, how, means, source)}, frozen=True,
    )  # fmt: skip
    direct = effects(
        model, batch, made, points, ("layer", "head"), total.labels[:2], size,
        np.flatnonzero(chosen), rows, memory_budget, mesh, on_progress,
    )  # fmt: skip
    return replace(
        total,
        values=np.stack([total.values, direct.values, total.values - direct.values]),
        axes=("effect", *total.axes),
        labels=(EFFECTS, *total.labels),
    )


def _removed(
    model: Transformer,
    batch: Batch,
    how: str,
    means: Array | np.ndarray | None,
    source: Batch | None,
) -> Array:
    """What heads give when removed, broadcasting against z [L,B,T,H,Dh]."""
    config = model.config
    if how == "zero":
        return jnp.zeros((config.n_layers, 1, 1, config.n_heads, config.head_dim))
    if how == "mean":
        return jnp.asarray(means)[:, None, None]
    if source is not None:
        return values_at(model, source, "z")["z"]
    nothing = jnp.zeros((np.shape(batch.tokens)[0], 0), jnp.int32)
    return model(batch, taps={"v": Tap("v", _uniform_z)}, logits_at=nothing).taps["v"]


def _uniform_z(v: Array, context: Context) -> Array:
    """z [B,T,H,Dh] with equal attention to every visible key."""
    seen = context.visible.astype(v.dtype)
    pattern = seen / jnp.maximum(seen.sum(axis=-1, keepdims=True), 1)
    heads = context.config.n_heads
    return mix_values(jnp.broadcast_to(pattern, (v.shape[0], heads, *pattern.shape[2:])), v)


def _at_slots(slots: Array, value: Array, context: Context) -> Array:
    """[B,T,...] -> [B,N,...]."""
    return jnp.take_along_axis(value, slots.reshape(*slots.shape, *(1,) * (value.ndim - 2)), axis=1)


def _check_additive(config: ModelConfig) -> None:
    """Raises ValueError, by the field, where logits are not a sum over writes."""
    reasons = {
        "logit_softcap": (config.logit_softcap is not None, "bends the logits"),
        "head": (config.head != "lm", "puts a nonlinear layer before the unembedding"),
        "norm_place": (config.norm_place != "pre", "normalises what is written to the stream"),
        "cross": (config.cross, "attends to an encoder"),
    }
    for field, (fails, why) in reasons.items():
        if fails:
            raise ValueError(
                f"direct effects need logits that are a sum over writes, but config.{field}="
                f"{getattr(config, field)!r} {why}"
            )
