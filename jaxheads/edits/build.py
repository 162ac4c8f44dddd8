"""Constructors of edits: what a user says, with the singleton axes put in.

Heads are named as (layer, head) pairs of query heads. Every constructor checks them, and
takes `when=` as in `Edits.when`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.edits.edits import Edits, When
from jaxheads.edits.kinds import REFERENCES, Affine, AttendTo, Mix, Project
from jaxheads.edits.streaming import StreamingMix
from jaxheads.model.config import ModelConfig
from jaxheads.names import choose
from jaxheads.sites import find_site

Array = jax.Array
Heads = Iterable[tuple[int, int]]
HOW = ("zero", "mean", "uniform")


def head_mask(config: ModelConfig, heads: Heads) -> np.ndarray:
    """bool [L,H], True at the heads.

    Raises:
      ValueError: not a pair of integers, a head or layer out of range, or a head named twice.
    """
    mask = np.zeros((config.n_layers, config.n_heads), bool)
    for pair in heads:
        try:
            layer, head = (operator.index(index) for index in pair)
        except (TypeError, ValueError):
            raise ValueError(
                f"heads must be (layer, head) pairs of integers, got {pair!r}"
            ) from None
        if not (0 <= layer < config.n_layers and 0 <= head < config.n_heads):
            raise ValueError(
                f"head {layer}.{head} is out of range: the model has layers "
                f"0..{config.n_layers - 1} and heads 0..{config.n_heads - 1}"
            )
        if mask[layer, head]:
            raise ValueError(f"head {layer}.{head} is named twice")
        mask[layer, head] = True
    return mask


def mask_heads(
    config: ModelConfig,
    heads: Heads,
    how: str = "zero",
    *,
    means: Array | np.ndarray | None = None,
    when: When = None,
) -> Edits:
    """Removes heads.

    Args:
      config: of the model.
      heads: (layer, head) pairs.
      how: "zero" sets the head's output z to 0; "mean" replaces it by its mean over data;
        "uniform" sets its queries to 0, so that it attends equally to every key it may see
        (the ablation of the retrieval-head and AttentionInfluence papers), and attention
        stays fused. Where logits have a relative position bias, which zero queries do not
        silence, the weights themselves are made uniform.
      means: [L,H,Dh] for "mean", from `jh.mean_activation`.
      when: restriction, as in `Edits.when`.

    Raises:
      ValueError: an unknown `how`, heads out of range, `means` missing or misshapen.
    """
    choose("how", how, HOW)
    mask = head_mask(config, heads)[:, None, None, :, None]
    keep = jnp.asarray(~mask, jnp.float32)
    if how == "mean":
        value = _shaped("means", means, (config.n_layers, config.n_heads, config.head_dim))
        return Edits(z=Mix(value[:, None, None], 1 - keep)).when(when)
    if how == "uniform" and config.relative_buckets:
        return attend_to(config, heads, "uniform", when=when)
    site = {"zero": "z", "uniform": "q"}[how]
    return Edits({site: Affine(scale=keep)}).when(when)


def scale_heads(config: ModelConfig, scale: Array | np.ndarray, *, when: When = None) -> Edits:
    """Multiplies each head's output z by scale [L,H] or [L,H,Dh].

    Raises:
      ValueError: another shape.
    """
    shape = (config.n_layers, config.n_heads, config.head_dim)
    array = jnp.asarray(scale)
    array = array[..., None] if array.ndim == 2 else array
    if array.shape not in (shape, (*shape[:2], 1)):
        raise ValueError(f"scale has shape {jnp.shape(scale)}, expected {shape[:2]} or {shape}")
    return Edits(z=Affine(scale=array[:, None, None])).when(when)


def offset_heads(config: ModelConfig, offset: Array | np.ndarray, *, when: When = None) -> Edits:
    """Adds offset [L,H,Dh] to each head's output z (LoFiT, ITI).

    Raises:
      ValueError: another shape.
    """
    shape = (config.n_layers, config.n_heads, config.head_dim)
    return Edits(z=Affine(offset=_shaped("offset", offset, shape)[:, None, None])).when(when)


def steer(
    config: ModelConfig,
    vectors: Mapping[int, Array | np.ndarray] | Array | np.ndarray,
    *,
    site: str = "resid_post",
    strength: float | Array = 1.0,
    when: When = None,
) -> Edits:
    """Adds a direction to a site of width D.

    Args:
      config: of the model.
      vectors: [L,D], or a mapping from layer to [D]; other layers are left alone.
      site: where, a site of shape [B,T,D] in the stack.
      strength: factor on the vectors.
      when: restriction, as in `Edits.when`.

    Raises:
      ValueError: a layer out of range, a wrong shape, a site of another shape.
    """
    _width_site(site)
    if isinstance(vectors, Mapping):
        full = jnp.zeros((config.n_layers, config.d_model))
        for layer, vector in vectors.items():
            _check_layer(config, layer)
            full = full.at[layer].set(_shaped(f"vectors[{layer}]", vector, (config.d_model,)))
        vectors = full
    array = _shaped("vectors", vectors, (config.n_layers, config.d_model))
    return Edits({site: Affine(offset=strength * array[:, None, None])}).when(when)


def set_activation(
    config: ModelConfig,
    site: str,
    value: Array | np.ndarray,
    *,
    layers: Iterable[int] | None = None,
    heads: Heads | None = None,
    weight: float = 1.0,
    when: When = None,
) -> Edits:
    """Replaces a site's value by a stored one: activation patching.

    Args:
      config: of the model.
      site: where.
      value: as a tap of the site returns it, e.g. [L,B,T,H,Dh] for `z`.
      layers: restrict to these layers.
      heads: restrict to these (layer, head) pairs; for sites with a query head axis.
      weight: 1 replaces, less mixes.
      when: restriction, as in `Edits.when`; a bool [B,T] mask patches chosen positions.

    Raises:
      ValueError: a site without the axis asked for, layers or heads out of range, a value
        of another rank.
    """
    spec = find_site(site)
    axes = ("L",) * spec.stacked + spec.axes
    value = jnp.asarray(value)
    if value.ndim != len(axes):
        raise ValueError(
            f"value for {site!r} has shape {value.shape}, expected axes {spec.signature}"
        )
    chosen = jnp.ones((1,) * len(axes))
    if layers is not None:
        if not spec.stacked:
            raise ValueError(f"site {site!r} is outside the stack: it has no layers to choose")
        rows = np.zeros(config.n_layers, np.float32)
        for layer in layers:
            _check_layer(config, layer)
            rows[layer] = 1
        chosen = chosen * rows.reshape(-1, *(1,) * len(spec.axes))
    if heads is not None:
        if spec.head_axis != "H":
            raise ValueError(f"site {site!r} {spec.signature} has no query head axis")
        shape = [config.n_layers] + [1] * len(spec.axes)
        shape[axes.index("H")] = config.n_heads
        chosen = chosen * head_mask(config, heads).reshape(shape)
    return Edits({site: Mix(value, weight * chosen)}).when(when)


def project_out(
    config: ModelConfig,
    directions: Array | np.ndarray,
    *,
    site: str = "resid_post",
    layers: Iterable[int] | None = None,
    when: When = None,
) -> Edits:
    """Removes directions from a site of width D (refusal ablation, concept erasure).

    Args:
      config: of the model.
      directions: [D] or [r,D], used in every layer; or [L,r,D], its own in each. Need not be
        orthonormal.
      site: where, a site of shape [B,T,D] in the stack.
      layers: restrict to these layers.
      when: restriction, as in `Edits.when`.

    Raises:
      ValueError: a wrong shape, a zero direction, a layer out of range.
    """
    _width_site(site)
    array = jnp.atleast_2d(jnp.asarray(directions, jnp.float32))
    array = array[None] if array.ndim == 2 else array
    if (
        array.ndim != 3
        or array.shape[0] not in (1, config.n_layers)
        or (array.shape[2] != config.d_model)
    ):
        raise ValueError(
            f"directions have shape {jnp.shape(directions)}, expected [D], [r,D] or [L,r,D] "
            f"with L={config.n_layers}, D={config.d_model}"
        )
    if not isinstance(array, jax.core.Tracer) and not np.all(np.linalg.norm(array, axis=-1) > 0):
        raise ValueError("directions contain a zero vector, which spans nothing")
    basis = _orthonormal(jnp.swapaxes(array, 1, 2))[:, None, None]
    weight = np.ones((config.n_layers, 1, 1, 1), np.float32)
    if layers is not None:
        weight[:] = 0
        for layer in layers:
            _check_layer(config, layer)
            weight[layer] = 1
    return Edits({site: Project(basis, jnp.asarray(weight))}).when(when)


def clamp_neurons(
    config: ModelConfig,
    values: Mapping[tuple[int, int], float],
    *,
    when: When = None,
) -> Edits:
    """Fixes MLP neurons, named (layer, neuron), to values.

    Raises:
      ValueError: a neuron or layer out of range.
    """
    shape = (config.n_layers, 1, 1, config.d_mlp)
    value, weight = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for (layer, neuron), target in values.items():
        _check_layer(config, layer)
        if not 0 <= neuron < config.d_mlp:
            raise ValueError(f"neuron {layer}.{neuron} is out of range 0..{config.d_mlp - 1}")
        value[layer, 0, 0, neuron], weight[layer, 0, 0, neuron] = target, 1
    return Edits(neurons=Mix(jnp.asarray(value), jnp.asarray(weight))).when(when)


def attend_to(
    config: ModelConfig,
    heads: Heads,
    reference: str,
    strength: float | Array = 1.0,
    *,
    when: When = None,
) -> Edits:
    """Moves heads' attention to "self" (identity), "uniform" or "first" (the sink).

    Source: SoftPAG's (1 - u) A + u I for "self".

    Raises:
      ValueError: an unknown reference, heads out of range.
    """
    choose("reference", reference, REFERENCES)
    weight = strength * jnp.asarray(head_mask(config, heads), jnp.float32)
    return Edits(pattern=AttendTo(weight[:, None, :, None, None], reference)).when(when)


def _orthonormal(vectors: Array) -> Array:
    """A basis of the span of columns [L,D,r]; columns beyond the rank are zero."""
    basis, sizes, _ = jnp.linalg.svd(vectors, full_matrices=False)
    rank_limit = sizes[:, :1] * max(vectors.shape[1:]) * jnp.finfo(vectors.dtype).eps
    return basis * (sizes > rank_limit)[:, None, :]


def _check_layer(config: ModelConfig, layer: int) -> None:
    if not 0 <= layer < config.n_layers:
        raise ValueError(f"layer {layer} is out of range 0..{config.n_layers - 1}")


def _width_site(name: str) -> None:
    site = find_site(name)
    if site.axes[-1] != "D" or not site.stacked or site.head_axis:
        raise ValueError(f"site {name!r} {site.signature} is not a [L,B,T,D] site of the stack")


def _shaped(name: str, value: object, shape: tuple[int, ...]) -> Array:
    if value is None:
        raise ValueError(f"{name} is required here: expected an array of shape {shape}")
    array = jnp.asarray(value)
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    return array


def streaming_mix(
    config: ModelConfig, alpha: Array | np.ndarray, *, sinks: int = 4, recent: int = 256
) -> Edits:
    """Streams key/value heads as far as their gates say.

    Args:
      config: of the model.
      alpha: [L,K], 1 for heads that see everything and 0 for those that stream; bool, such as
        `HeadKinds.full`, or anything between.
      sinks: first tokens that a streaming head sees.
      recent: last tokens that it sees, the query's own among them.

    Raises:
      ValueError: gates of another shape, a number of tokens below its least, a model that is not
        causal.
    """
    shape = (config.n_layers, config.n_kv_heads)
    if jnp.shape(alpha) != shape:
        raise ValueError(f"alpha has shape {jnp.shape(alpha)}, expected {shape}")
    if not config.causal:
        raise ValueError("streaming heads are for causal models, and this one is not")
    if sinks < 0:
        raise ValueError(f"sinks must be at least 0, got {sinks}")
    if recent < 1:
        raise ValueError(f"recent must be at least 1, got {recent}")
    return Edits(z=StreamingMix(jnp.asarray(alpha, jnp.float32), sinks, recent))
