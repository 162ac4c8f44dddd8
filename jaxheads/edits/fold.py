"""`fold`: bakes edits into the weights wherever that is exact.

An edit folds if it is an affine map of the value, x -> x A + c, the same for every token.
Then it is absorbed by the weights that write the site (rows W A, bias b A + c) or by
those that read it (A W, bias b + c W). A and c are read off by applying the edit itself to
basis vectors, so that no kind of edit is described twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp

from jaxheads.edits.kinds import Affine, Chain, Mix, Project
from jaxheads.model.config import ModelConfig
from jaxheads.model.context import Edit, layer_slices
from jaxheads.model.parameters import flatten, nest, parameter_table
from jaxheads.model.transformer import Transformer
from jaxheads.sites import SITES, find_site

Array = jax.Array
Weights = dict[str, Array]
Map = Callable[[Array], Array]
"""The edit of one layer, as a function of a value of the site."""

FOLDABLE = (Affine, Mix, Project)


def fold(model: Transformer, edits: Mapping[str, Edit]) -> Transformer:
    """A model without edits that computes what `model` computes with them.

    A scale at `z` goes into the output projection; an offset at `z` into its bias, through
    W_O; a projection at `head_out` or `attn_out` into the writers. Biases the model lacks
    are added to it (and to its config). Tied embeddings are untied by an edit of `embed` or
    `final`. Computed in float32 and stored in the dtype of the model.

    Args:
      model: the model.
      edits: what to bake in.

    Returns:
      A new model; leaves that no edit touches are shared with `model`.

    Raises:
      ValueError: something that cannot be folded exactly; the message names the site, the
        kind of edit and why. Nothing is folded then.
    """
    for site, edit in edits.items():
        _check(site, edit)
    config, params = model.config, dict(flatten(model.params))
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
    leaves = {path: _leaf(config, params, path) for path in parameter_table(config)}
    return Transformer(config, nest(leaves))


BIASES = {
    "qkv_bias": ("attn/q_bias", "attn/k_bias", "attn/v_bias"),
    "o_bias": ("attn/o_bias",),
    "mlp_bias": ("mlp/gate_bias", "mlp/up_bias", "mlp/down_bias"),
}
"""Config flags and the leaves of a block that they declare."""

_ROTARY = (
    "after the rotary encoding only one factor per head commutes with it; "
    "edit 'q_pre' or 'k_pre' instead"
)
_STREAM = "only an offset of the residual stream can be baked into the branch before it"
INEXACT = {"q": _ROTARY, "k": _ROTARY, "resid_mid": _STREAM, "resid_post": _STREAM}
"""Why a map that is affine still does not fold at these sites."""


def _order(site: str) -> tuple[bool, int]:
    """Weights that write take up their edits in the order of computation, then readers.

    A reader multiplies from the other side, and its constant must pass through what the
    writers made of the weight.
    """
    return site in READERS, list(SITES).index(site)


def unfoldable(edits: Mapping[str, Edit]) -> dict[str, str]:
    """Sites whose edit cannot be folded, with the reason; empty when all can.

    Whether a scale after the rotary encoding is one number per head, as folding it
    requires, is only seen by `fold` itself.
    """
    reasons = {}
    for site, edit in edits.items():
        try:
            _check(site, edit)
        except ValueError as error:
            reasons[site] = str(error)
    return reasons


def _check(site: str, edit: Edit) -> None:
    def refuse(why: str) -> None:
        raise ValueError(f"edit at {site!r} ({type(edit).__name__}) cannot be folded: {why}")

    if site not in FOLDS and site not in ("embed", "final"):
        refuse("no weight writes or reads this site alone")
    for part in edit.edits if isinstance(edit, Chain) else (edit,):
        if not isinstance(part, FOLDABLE):
            refuse(f"{type(part).__name__} is not a fixed affine map of the value")
        stacked = find_site(site).stacked
        for path, leaf in jax.tree_util.tree_leaves_with_path(part):
            tokens = jnp.shape(leaf)[stacked : stacked + 2]
            if tokens != (1, 1):
                name = jax.tree_util.keystr(path).lstrip(".")
                refuse(f"its {name} of shape {jnp.shape(leaf)} differs between rows or positions")


def _fold_stacked(
    config: ModelConfig, params: Weights, site: str, edit: Edit
) -> tuple[Weights, ModelConfig]:
    names, rule = FOLDS[site]
    paths = {name: f"blocks/{name}" for name in names}
    old = {name: _leaf(config, params, path) for name, path in paths.items()}
    sliced = layer_slices({site: edit}, config.n_layers)[site]

    def one_layer(layer: tuple[Weights, Edit]) -> Weights:
        weights, edit = layer
        wide = {name: leaf.astype(jnp.float32) for name, leaf in weights.items()}
        # The kinds that fold do not read the context.
        return rule(wide, lambda value: edit(value, None))  # type: ignore[arg-type]

    new = jax.jit(partial(jax.lax.map, one_layer))((old, sliced))
    if not bool(jnp.all(new.pop("exact", jnp.array(True)))):
        raise ValueError(INEXACT[site])
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
        if bool(jnp.any(constant)):
            raise ValueError("the unembedding has no bias")
        unembed = (unembed.astype(jnp.float32) @ matrix[0].T).astype(unembed.dtype)
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
    size = weights[next(iter(pairs))].shape[0]
    matrix, constant = _affine(apply, jnp.eye(size)[None])
    new = {}
    for weight, bias in pairs.items():
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

READERS = ("attn_in", "z", "mlp_in", "neurons", "final")
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
    "resid_mid": (("attn/o_bias",), partial(_shift, "attn/o_bias")),
    "mlp_in": ((*_GATE_UP, *_GATE_UP.values()), partial(_read, _GATE_UP)),
    "neurons": (_DOWN, partial(_read, {"mlp/down": "mlp/down_bias"})),
    "mlp_out": (_DOWN, partial(_write, "mlp/down", "mlp/down_bias")),
    "resid_post": (("mlp/down_bias",), partial(_shift, "mlp/down_bias")),
}
"""For each site that folds: the weights it touches, and how, for one layer."""
