"""`fold`: bakes edits into the weights wherever that is exact.

An edit folds if it is an affine map of the value, x -> x A + c, the same for every token.
Then it is absorbed by the weights that write the site (rows W A, bias b A + c) or by
those that read it (A W, bias b + c W). A and c are read off by applying the edit itself to
basis vectors, so that no kind of edit is described twice. A `LowRank` edit adds its product to
the weight between its source and the site.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp

from jaxheads.edits.kinds import Affine, Chain, LowRank, Mix, Project
from jaxheads.model.config import ModelConfig
from jaxheads.model.context import Edit, layer_slices
from jaxheads.model.encoder_decoder import EncoderDecoder, EncoderDecoderConfig, split_sides
from jaxheads.model.models import Config
from jaxheads.model.parameters import flatten, nest, parameter_table
from jaxheads.model.transformer import Transformer
from jaxheads.sites import CROSS_SITES, ENCODER, SITES, find_site

M = TypeVar("M", Transformer, EncoderDecoder)
Array = jax.Array
Weights = dict[str, Array]
Map = Callable[[Array], Array]
"""The edit of one layer, as a function of a value of the site."""

FOLDABLE = (Affine, Mix, Project)


def fold(model: M, edits: Mapping[str, Edit]) -> M:
    """A model without edits that computes what `model` computes with them.

    A scale at `z` goes into the output projection; an offset at `z` into its bias, through
    W_O; a projection at `head_out` or `attn_out` into the writers. Biases the model lacks
    are added to it (and to its config). Tied embeddings are untied by an edit of `embed` or
    `final`. Computed in float32 and stored in the dtype of the model.

    Args:
      model: a `Transformer` or an `EncoderDecoder`; the towers of a `Clip` are folded one
        by one.
      edits: what to bake in.

    Returns:
      A new model; leaves that no edit touches are shared with `model`.

    Raises:
      ValueError: something that cannot be folded exactly; the message names the site, the
        kind of edit and why. Nothing is folded then.
    """
    params = dict(flatten(model.params))
    if isinstance(model, Transformer):
        config, params = _fold_stack(model.config, params, edits)
        return type(model)(config, nest(params))
    if not isinstance(model, EncoderDecoder):
        raise ValueError(f"fold takes a Transformer or an EncoderDecoder, got {type(model)}")
    sides: dict[str, ModelConfig] = {}
    for name, chosen in zip(("encoder", "decoder"), split_sides(edits), strict=True):
        for site in ("embed", "final"):
            if site in chosen:
                raise ValueError(f"edit at {site!r} cannot be folded: both stacks share the ends")
        prefix = f"{name}/"
        own = {p.removeprefix(prefix): leaf for p, leaf in params.items() if p.startswith(prefix)}
        sides[name], new = _fold_stack(getattr(model.config, name), own, chosen)
        params |= {prefix + path: leaf for path, leaf in new.items()}
    return type(model)(EncoderDecoderConfig(**sides), nest(params))


def _fold_stack(
    config: ModelConfig, params: Weights, edits: Mapping[str, Edit]
) -> tuple[ModelConfig, Weights]:
    """Config and parameters (those of the stack) with the edits baked in."""
    for site, edit in edits.items():
        _check(site, edit, config)
    for site in sorted(edits, key=_order):
        fold_site = _fold_stacked if find_site(site).stacked else _fold_outside
        try:
            params, config = fold_site(config, params, site, edits[site])
        except (TypeError, ValueError) as error:
            raise ValueError(f"edit at {site!r} cannot be folded: {error}") from error
    for flag, names in BIASES.items():
        biases = [params[f"blocks/{name}"] for name in names if f"blocks/{name}" in params]
        if any(bool(jnp.any(bias)) for bias in biases):
            config = config.replace(**{flag: True})
    # A stack of two holds no ends; a bias that a flag now declares is zero where not folded.
    kept = [path for path in parameter_table(config) if path in params or path.startswith("blocks")]
    return config, {path: _leaf(config, params, path) for path in kept}


BIASES = {
    "qkv_bias": tuple(f"{a}/{name}_bias" for a in ("attn", "cross") for name in "qkv"),
    "o_bias": ("attn/o_bias", "cross/o_bias"),
    "mlp_bias": ("mlp/gate_bias", "mlp/up_bias", "mlp/down_bias"),
}
"""Config flags and the leaves of a block that they declare."""

_ROTARY = (
    "after the rotary encoding only one factor per head commutes with it; "
    "edit 'q_pre' or 'k_pre' instead"
)
_STREAM = "only an offset of the residual stream can be baked into the branch before it"
_INEXACT = {
    **dict.fromkeys(("q", "k"), _ROTARY),
    **dict.fromkeys(("resid_mid", "resid_post", "cross.resid_pre"), _STREAM),
}
"""Why a map that is affine still does not fold at these sites."""


def _in_the_way(site: str, config: ModelConfig) -> str | None:
    """What a model of this config has between a site and the weights it would fold into."""
    if site in ("q", "k") and config.qk_norm != "none":
        return "between the projection and this site stands the norm of queries and keys"
    written = site.endswith(("attn_out", "mlp_out"))
    if written or site in ("resid_mid", "resid_post", "cross.resid_pre"):
        if config.norm_place in ("branch", "sandwich"):
            return "between the weights and this site stands a norm"
        if config.norm_place == "post" and not written:
            return "between the weights and this site stands a norm"
        if config.branch_scale:
            return "between the weights and this site stands a layer scale"
    if site == "embed":
        if config.image is not None:
            return "patches are embedded by a convolution"
        if config.n_positions or config.n_token_types or config.embed_norm:
            return "positions, token types or a norm act between the table and this site"
        if config.embed_scale != 1:
            return "a factor acts between the table and this site"
    if site == "final" and (config.head != "lm" or config.pooler or config.projection):
        return "not only an unembedding reads this site"
    return None


_BEFORE_CROSS = [*SITES].index("resid_mid")
_ORDER = [*[*SITES][:_BEFORE_CROSS], *CROSS_SITES, *[*SITES][_BEFORE_CROSS:]]


def _order(site: str) -> tuple[bool, int]:
    """Weights that write take up their edits in the order of computation, then readers.

    A reader multiplies from the other side, and its constant must pass through what the
    writers made of the weight.
    """
    return site in READERS, _ORDER.index(site)


def unfoldable(edits: Mapping[str, Edit], config: Config) -> dict[str, str]:
    """Sites whose edit cannot be folded into a model of this config, with the reason.

    Empty when all can. Whether a scale after the rotary encoding is one number per head, as
    folding it requires, is only seen by `fold` itself.
    """
    reasons = {}
    for site, edit in edits.items():
        try:
            _check(site, edit, _side(site, config))
        except ValueError as error:
            reasons[site] = str(error)
    return reasons


def _side(site: str, config: Config) -> ModelConfig:
    if isinstance(config, ModelConfig):
        return config
    if not isinstance(config, EncoderDecoderConfig):
        raise ValueError("the towers of a Clip are folded one by one")
    return config.encoder if site.startswith(ENCODER) else config.decoder


def _check(site: str, edit: Edit, config: ModelConfig) -> None:
    def refuse(why: str) -> None:
        raise ValueError(f"edit at {site!r} ({type(edit).__name__}) cannot be folded: {why}")

    inner = site.removeprefix(ENCODER)
    if inner not in FOLDS and inner not in ("embed", "final"):
        refuse("no weight writes or reads this site alone")
    obstacle = _in_the_way(inner, config)
    if obstacle is not None:
        refuse(obstacle)
    for part in _parts(edit):
        if isinstance(part, LowRank):
            _, source = BETWEEN.get(inner, ("", ""))
            if part.source != source:
                refuse(f"no weight maps its source {part.source!r} to this site")
            continue
        if not isinstance(part, FOLDABLE):
            refuse(f"{type(part).__name__} is not a fixed affine map of the value")
        stacked = find_site(site).stacked
        for path, leaf in jax.tree_util.tree_leaves_with_path(part):
            tokens = jnp.shape(leaf)[stacked : stacked + 2]
            if tokens != (1, 1):
                name = jax.tree_util.keystr(path).lstrip(".")
                refuse(f"its {name} of shape {jnp.shape(leaf)} differs between rows or positions")


def _parts(edit: Edit) -> tuple[Edit, ...]:
    return edit.edits if isinstance(edit, Chain) else (edit,)


def _fold_stacked(
    config: ModelConfig, params: Weights, site: str, edit: Edit
) -> tuple[Weights, ModelConfig]:
    names, rule = FOLDS[site]
    names = tuple(name for name in names if config.gated or not name.startswith("mlp/gate"))
    # The rules speak of self-attention; those of cross-attention's own weights are the same.
    # What stands before `resid_mid` is the last of the two.
    crossed = site.startswith("cross.") and site != "cross.resid_pre"
    branch = "cross/" if crossed or (site == "resid_mid" and config.cross) else "attn/"
    paths = {name: f"blocks/{name.replace('attn/', branch)}" for name in names}
    old = {name: _leaf(config, params, path) for name, path in paths.items()}
    sliced = layer_slices({site: edit}, config.n_layers)[site]

    def one_layer(layer: tuple[Weights, Edit]) -> Weights:
        weights, edit = layer
        wide = {name: leaf.astype(jnp.float32) for name, leaf in weights.items()}
        # A weight that writes the site takes up the parts of a chain one after the other.
        for part in _parts(edit) if site in BETWEEN else (edit,):
            wide = wide | take_up(wide, part)
        return wide

    def take_up(wide: Weights, part: Edit) -> Weights:
        if isinstance(part, LowRank):
            name, _ = BETWEEN[site]
            down, up = part.down.astype(jnp.float32), part.up.astype(jnp.float32)
            return {name: wide[name] + part.scale * jnp.tensordot(down, up, 1)}
        # The other kinds that fold do not read the context.
        return rule(wide, lambda value: part(value, None))  # type: ignore[arg-type]

    new = jax.jit(partial(jax.lax.map, one_layer))((old, sliced))
    if not bool(jnp.all(new.pop("exact", jnp.array(True)))):
        raise ValueError(_INEXACT[site])
    return params | {paths[n]: leaf.astype(old[n].dtype) for n, leaf in new.items()}, config


def _fold_outside(
    config: ModelConfig, params: Weights, site: str, edit: Edit
) -> tuple[Weights, ModelConfig]:
    table = params["embed/tokens"]
    unembed = table if config.tied else params["unembed/kernel"]
    apply = lambda value: edit(value, None)  # type: ignore[arg-type]  # noqa: E731
    if site == "embed":
        table = apply(table.astype(jnp.float32)[None])[0].astype(table.dtype)
    else:
        matrix, constant = _affine(apply, jnp.eye(config.d_model)[None])
        if bool(jnp.any(constant)) and not config.unembed_bias:
            raise ValueError("the unembedding has no bias")
        wide = unembed.astype(jnp.float32)
        if config.unembed_bias:
            bias = params["unembed/bias"]
            shift = config.logit_scale * (wide @ constant[0, 0])
            params = params | {"unembed/bias": bias + shift.astype(bias.dtype)}
        unembed = (wide @ matrix[0].T).astype(unembed.dtype)
    params = params | {"embed/tokens": table, "unembed/kernel": unembed}
    return params, config.replace(tied=False)


def _leaf(config: ModelConfig, params: Weights, path: str) -> Array:
    """A parameter, or the zeros of a bias that the model does not have."""
    if path in params:
        return params[path]
    full = parameter_table(config.replace(qkv_bias=True, o_bias=True, mlp_bias=True))
    return jnp.zeros(full[path].shape, params["blocks/attn/o"].dtype)


def _linear(apply: Map, vectors: Array) -> Array:
    """vectors A: the linear part of the edit, exact however large its constant is."""
    return jax.jvp(apply, (jnp.zeros_like(vectors),), (vectors,))[1]


def _constant(apply: Map, vectors: Array) -> Array:
    """c, with a token axis of one."""
    return apply(jnp.zeros_like(vectors[:, :1]))


def _affine(apply: Map, basis: Array) -> tuple[Array, Array]:
    """A and c of apply(x) = x A + c, from basis vectors along the token axis."""
    return _linear(apply, basis), _constant(apply, basis)


def _write(weight: str, bias: str, weights: Weights, apply: Map) -> Weights:
    """weight [n,...] and bias [...] of a map whose output is the site."""
    moved = _linear(apply, weights[weight][None])
    return {weight: moved[0], bias: apply(weights[bias][None, None])[0, 0]}


def _write_attn_out(weights: Weights, apply: Map) -> Weights:
    o = weights["attn/o"]
    flat = weights | {"attn/o": o.reshape(-1, o.shape[-1])}
    new = _write("attn/o", "attn/o_bias", flat, apply)
    return new | {"attn/o": new["attn/o"].reshape(o.shape)}


def _write_head_out(weights: Weights, apply: Map) -> Weights:
    rows = jnp.swapaxes(weights["attn/o"], 0, 1)[None]
    moved = jnp.swapaxes(_linear(apply, rows)[0], 0, 1)
    constant = _constant(apply, rows)[0, 0].sum(axis=0)
    return {"attn/o": moved, "attn/o_bias": weights["attn/o_bias"] + constant}


def _write_rotated(weight: str, bias: str, weights: Weights, apply: Map) -> Weights:
    _, heads, size = weights[weight].shape
    basis = jnp.broadcast_to(jnp.eye(size)[:, None], (size, heads, size))[None]
    matrix, constant = _affine(apply, basis)
    factor = matrix[0, 0, :, 0]
    exact = jnp.all(matrix == factor[:, None] * basis) & jnp.all(constant == 0)
    return {
        weight: weights[weight] * factor[:, None],
        bias: weights[bias] * factor[:, None],
        "exact": exact,
    }


def _read_z(weights: Weights, apply: Map) -> Weights:
    heads, size, _ = weights["attn/o"].shape
    basis = jnp.broadcast_to(jnp.eye(size)[:, None], (size, heads, size))[None]
    matrix, constant = _affine(apply, basis)
    o = weights["attn/o"]
    return {
        "attn/o": jnp.einsum("ihe,hed->hid", matrix[0], o),
        "attn/o_bias": weights["attn/o_bias"] + jnp.einsum("he,hed->d", constant[0, 0], o),
    }


def _read(pairs: Mapping[str, str], weights: Weights, apply: Map) -> Weights:
    """Weights [n,...] and biases [...] of maps whose input is the site."""
    size = next(weights[name] for name in pairs if name in weights).shape[0]
    matrix, constant = _affine(apply, jnp.eye(size)[None])
    new = {}
    for weight, bias in pairs.items():
        if weight not in weights:
            continue
        new[weight] = jnp.tensordot(matrix[0], weights[weight], 1)
        new[bias] = weights[bias] + jnp.tensordot(constant[0, 0], weights[weight], 1)
    return new


def _shift(bias: str, weights: Weights, apply: Map) -> Weights:
    """A constant added to the residual stream moves the bias of the branch before it."""
    size = weights[bias].shape[0]
    matrix, constant = _affine(apply, jnp.eye(size)[None])
    exact = jnp.all(matrix[0] == jnp.eye(size))
    return {bias: weights[bias] + constant[0, 0], "exact": exact}


Rule = Callable[[Weights, Map], Weights]
_QKV = {"attn/q": "attn/q_bias", "attn/k": "attn/k_bias", "attn/v": "attn/v_bias"}
_GATE_UP = {"mlp/gate": "mlp/gate_bias", "mlp/up": "mlp/up_bias"}
_OUT = ("attn/o", "attn/o_bias")
_DOWN = ("mlp/down", "mlp/down_bias")

READERS = ("attn_in", "z", "cross.attn_in", "cross.z", "mlp_in", "neurons", "final")
"""Sites that fold into the weights that read them; the others fold into their writers."""

FOLDS: dict[str, tuple[tuple[str, ...], Rule]] = {
    "attn_in": ((*_QKV, *_QKV.values()), partial(_read, _QKV)),
    "q_pre": (("attn/q", "attn/q_bias"), partial(_write, "attn/q", "attn/q_bias")),
    "k_pre": (("attn/k", "attn/k_bias"), partial(_write, "attn/k", "attn/k_bias")),
    "q": (("attn/q", "attn/q_bias"), partial(_write_rotated, "attn/q", "attn/q_bias")),
    "k": (("attn/k", "attn/k_bias"), partial(_write_rotated, "attn/k", "attn/k_bias")),
    "v": (("attn/v", "attn/v_bias"), partial(_write, "attn/v", "attn/v_bias")),
    "z": (_OUT, _read_z),
    "head_out": (_OUT, _write_head_out),
    "attn_out": (_OUT, _write_attn_out),
    "cross.resid_pre": (("attn/o_bias",), partial(_shift, "attn/o_bias")),
    "cross.attn_in": (("attn/q", "attn/q_bias"), partial(_read, {"attn/q": "attn/q_bias"})),
    "cross.q": (("attn/q", "attn/q_bias"), partial(_write, "attn/q", "attn/q_bias")),
    "cross.k": (("attn/k", "attn/k_bias"), partial(_write, "attn/k", "attn/k_bias")),
    "cross.v": (("attn/v", "attn/v_bias"), partial(_write, "attn/v", "attn/v_bias")),
    "cross.z": (_OUT, _read_z),
    "cross.head_out": (_OUT, _write_head_out),
    "cross.attn_out": (_OUT, _write_attn_out),
    "resid_mid": (("attn/o_bias",), partial(_shift, "attn/o_bias")),
    "mlp_in": ((*_GATE_UP, *_GATE_UP.values()), partial(_read, _GATE_UP)),
    "neurons": (_DOWN, partial(_read, {"mlp/down": "mlp/down_bias"})),
    "mlp_out": (_DOWN, partial(_write, "mlp/down", "mlp/down_bias")),
    "resid_post": (("mlp/down_bias",), partial(_shift, "mlp/down_bias")),
}
"""For each site that folds: the weights it touches, and how, for one layer."""

BETWEEN: dict[str, tuple[str, str]] = {
    "q_pre": ("attn/q", "attn_in"),
    "k_pre": ("attn/k", "attn_in"),
    "v": ("attn/v", "attn_in"),
    "attn_out": ("attn/o", "z"),
    "cross.q": ("attn/q", "cross.attn_in"),
    "cross.attn_out": ("attn/o", "cross.z"),
    "mlp_out": ("mlp/down", "neurons"),
}
"""For each site that one weight writes: that weight, and the site which it reads."""
