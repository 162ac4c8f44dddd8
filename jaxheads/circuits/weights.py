"""Heads read off the weights alone: W_OV and W_QK, their SVD, composition between layers.

Conventions. A residual stream is a row vector x [D]. With the linear part N of the norm
before attention (its scale, and the centring of a layer norm) folded into what reads,

    W_OV = N W_V W_O            [D,D]   x W_OV is what the head writes for a key x
    W_QK = N W_Q (N W_K)^T      [D,D]   x W_QK y^T is the logit of query x and key y

Both have rank Dh. No D x D matrix is ever formed: a head is a pair of factors, left [D,Dh] and
right [Dh,D]. Query head h reads key/value head h // G. Left out are what is not bilinear or
differs between tokens: the division by the norm, biases, the factor of the logits, and
position encoding. With rotary encoding W_QK is that of a query and a key at one position.

Sources: Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits"; Merullo et
al. (2024), "Talking Heads: Understanding Inter-layer Communication in Transformer Language
Models".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxheads.edits.build import head_mask
from jaxheads.model.block import Block
from jaxheads.model.config import ModelConfig
from jaxheads.model.norms import Norm
from jaxheads.model.transformer import Transformer
from jaxheads.names import choose

Array = jax.Array
Head = tuple[int, int]
Layer = tuple[Block, Array]
"""A block, its leaves without a layer axis, and its index."""

KINDS = ("q", "k", "v")
"""What of a later head reads an earlier one: its queries, keys or values."""

# Accelerators would round the factors to fewer bits.
einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@struct.dataclass
class HeadSVD:
    """W = sum_i s_i u_i v_i^T of heads, without their null spaces.

    Attributes:
      values: float32 [L,H,Dh], singular values s of all heads, largest first.
      left: float32 [N,D,Dh], columns u_i of the chosen heads: what is read of the stream.
      right: float32 [N,Dh,D], rows v_i of the chosen heads: what is written, or of W_QK what
        is read on the side of the key.
      heads: the N chosen heads, (layer, head).
    """

    values: Array
    left: Array
    right: Array
    heads: tuple[Head, ...] = struct.field(pytree_node=False)


def ov_svd(model: Transformer, heads: Iterable[Head] = ()) -> HeadSVD:
    """Singular values of every head's W_OV, and the vectors of chosen heads.

    Component i is C_i = s_i u_i v_i^T (Merullo et al. 2024); the components sum to W_OV. The
    signs of u_i and v_i are arbitrary, their product's is not. Computed by QR of both factors
    and the SVD of a Dh x Dh matrix.

    Args:
      model: a decoder or encoder that normalises what attention reads.
      heads: (layer, head) pairs whose vectors are wanted.

    Raises:
      ValueError: a model whose heads are not linear maps, as `check_linear` says; heads
        out of range or named twice.
    """
    return _svd(model, heads, ov_factors)


def qk_svd(model: Transformer, heads: Iterable[Head] = ()) -> HeadSVD:
    """Singular values of every head's W_QK, and the vectors of chosen heads.

    `left` reads the query's token, `right` the key's. Otherwise as `ov_svd`.

    Raises:
      ValueError: as `ov_svd`; a model that normalises queries and keys.
    """
    check_bilinear(model)
    return _svd(model, heads, qk_factors)


def composition_scores(model: Transformer, kind: str) -> Array:
    """How much each head reads of what each earlier head writes, float32 [L,H,L,H].

    CS(W1, W2) = ||W1 W2||_F / (||W1||_F ||W2||_F) (Elhage et al. 2021), where W1 is the
    writer's W_OV and W2 is W_QK of the reader for its queries, W_QK^T for its keys, W_OV for
    its values. Between 0 and 1. Matrices that are turned at random against each other have a
    mean square of exactly 1/D, so scores near D ** -0.5 mean nothing. Compare with other pairs
    too: a few wide directions of a trained stream raise all scores.

    Args:
      model: a decoder or encoder that normalises what attention reads.
      kind: "q", "k" or "v".

    Returns:
      Axes are the writer's layer and head, then the reader's. NaN where the reader's layer
      is not above the writer's: there is no path. Heads whose weights are zero score 0.

    Raises:
      ValueError: an unknown kind; a model whose heads are not linear maps; for "q" and "k", one
        that normalises queries and keys.
    """
    _check_kind(model, kind)
    return _composition(model, kind)


def component_composition_scores(model: Transformer, heads: Iterable[Head], kind: str) -> Array:
    """Composition scores of single components of chosen writers, float32 [N,Dh,L,H].

    CS(C_i, W2) with C_i = s_i u_i v_i^T from the writer's `ov_svd`. It equals
    ||v_i^T W2||_F / ||W2||_F and does not depend on s_i. One or two components can carry a
    signal that the score of the whole head hides (Merullo et al. 2024). A random direction
    has mean square 1/D.

    Args:
      model: a decoder or encoder that normalises what attention reads.
      heads: N writers, (layer, head) pairs.
      kind: "q", "k" or "v", what of the reader.

    Returns:
      Axes are the writer, its component (largest singular value first), the reader's layer and
      head. NaN where the reader's layer is not above the writer's.

    Raises:
      ValueError: as `composition_scores`; heads out of range, named twice, or none.
    """
    _check_kind(model, kind)
    chosen = check_heads(model.config, heads)
    if not len(chosen):
        raise ValueError("no writers to score: expected at least one (layer, head) pair")
    return _component_composition(model, chosen[:, 0], chosen[:, 1], kind)


# Checks.


def check_linear(model: Transformer) -> None:
    """Raises ValueError unless what a head writes is linear in the normalised stream."""
    if not isinstance(model, Transformer):
        raise ValueError(
            f"circuits are read off the weights of a Transformer, got {type(model).__name__}"
        )
    config = model.config
    if config.norm_place != "pre":
        raise ValueError(
            f"config.norm_place is {config.norm_place!r}, expected 'pre': another norm than "
            "the one before attention stands between a head and the stream, so that the head "
            "is no linear map"
        )
    if config.cross:
        raise ValueError("config.cross is True: heads that read an encoder have no such circuit")


def check_bilinear(model: Transformer) -> None:
    """Raises ValueError unless attention logits are bilinear in the normalised stream."""
    check_linear(model)
    if model.config.qk_norm != "none":
        raise ValueError(
            f"config.qk_norm is {model.config.qk_norm!r}, expected 'none': normalised queries "
            "and keys have no bilinear W_QK"
        )


def check_heads(config: ModelConfig, heads: Iterable[Head]) -> np.ndarray:
    """int32 [N,2], heads in the given order; ValueError if out of range or named twice."""
    heads = list(heads)
    head_mask(config, heads)
    return np.array(heads, np.int32).reshape(-1, 2)


def _check_kind(model: Transformer, kind: str) -> None:
    choose("kind of composition", kind, KINDS)
    (check_linear if kind == "v" else check_bilinear)(model)


# Factors of one layer.


def fold_norm(norm: Norm | None, weight: Array, config: ModelConfig) -> Array:
    """N W, float32: the linear part of a norm folded into what reads it, weight [D,...]."""
    weight = weight.astype(jnp.float32)
    if norm is None:
        return weight
    scale = norm.scale[...].astype(jnp.float32) + config.norm_plus_one
    folded = scale.reshape(-1, *[1] * (weight.ndim - 1)) * weight
    return folded - folded.mean(0) if config.norm == "layer" else folded


def _read(layer: Layer, config: ModelConfig, name: str) -> Array:
    """The query, key or value map of each query head, norm folded in, [H,D,Dh]."""
    block, index = layer
    weight = getattr(block.attn, name)[...]
    folded = fold_norm(block.attn_norm, weight, config)
    if not config.first_attn_norm:
        folded = jnp.where(index == 0, weight, folded)
    return jnp.repeat(folded.swapaxes(0, 1), config.n_heads // weight.shape[1], axis=0)


def ov_factors(layer: Layer, config: ModelConfig) -> tuple[Array, Array]:
    """W_OV of every head of a layer: left [H,D,Dh] and right [H,Dh,D]."""
    block, _ = layer
    right = block.attn.o[...].astype(jnp.float32)
    if block.attn_scale is not None:
        right = right * block.attn_scale[...].astype(jnp.float32)
    return _read(layer, config, "v"), right


def qk_factors(layer: Layer, config: ModelConfig) -> tuple[Array, Array]:
    """W_QK of every head of a layer: left [H,D,Dh] and right [H,Dh,D]."""
    return _read(layer, config, "q"), _read(layer, config, "k").swapaxes(1, 2)


Factors = Callable[[Layer, ModelConfig], tuple[Array, Array]]


def layers(model: Transformer) -> Layer:
    """The stack as it is scanned: each leaf, and the index, with a leading layer axis."""
    return model.blocks, jnp.arange(model.config.n_layers)


# Singular value decomposition.


def _svd(model: Transformer, heads: Iterable[Head], factors: Factors) -> HeadSVD:
    check_linear(model)
    chosen = check_heads(model.config, heads)
    values = _singular_values(model, factors)
    left, right = _singular_vectors(model, chosen[:, 0], chosen[:, 1], factors)
    return HeadSVD(values, left, right, tuple((int(i), int(h)) for i, h in chosen))


def _core(left: Array, right: Array) -> tuple[Array, Array, Array]:
    """Orthonormal [...,D,Dh] and [...,D,Dh], and the Dh x Dh matrix that joins them."""
    out, upper = jnp.linalg.qr(left)
    into, lower = jnp.linalg.qr(right.swapaxes(-1, -2))
    return out, einsum("...ij,...kj->...ik", upper, lower), into


@partial(jax.jit, static_argnames="factors")
def _singular_values(model: Transformer, factors: Factors) -> Array:
    def of_layer(layer: Layer) -> Array:
        _, core, _ = _core(*factors(layer, model.config))
        return jnp.linalg.svd(core, compute_uv=False)

    return jax.lax.map(of_layer, layers(model))


@partial(jax.jit, static_argnames="factors")
def _singular_vectors(
    model: Transformer, index: Array, head: Array, factors: Factors
) -> tuple[Array, Array]:
    """Left [N,D,Dh] and right [N,Dh,D] of heads given by layers [N] and heads [N]."""

    def of_head(chosen: tuple[Array, Array]) -> tuple[Array, Array]:
        layer, which = jax.tree.map(lambda leaf: leaf[chosen[0]], layers(model)), chosen[1]
        left, right = factors(layer, model.config)
        out, core, into = _core(left[which], right[which])
        u, _, v = jnp.linalg.svd(core)
        return einsum("di,ij->dj", out, u), einsum("ij,dj->id", v, into)

    return jax.lax.map(of_head, (index, head))


# Composition.


def root(gram: Array) -> Array:
    """R [...,Dh,Dh] with R^T R = gram, so that ||R x|| = ||A x|| for gram = A^T A.

    Stands for A without the cost of a QR, also where A is not of full rank.
    """
    values, vectors = jnp.linalg.eigh(gram)
    return (vectors * jnp.sqrt(jnp.maximum(values, 0))[..., None, :]).swapaxes(-1, -2)


def _unit(x: Array) -> Array:
    """Each of [H,...] divided by its Frobenius norm; zeros stay zero."""
    norm = jnp.sqrt(jnp.sum(x * x, axis=(1, 2), keepdims=True))
    return x / jnp.where(norm > 0, norm, 1)


def _writer(layer: Layer, config: ModelConfig) -> Array:
    """[H,Dh,D] with ||writer X|| = ||W_OV X|| / ||W_OV|| for every X."""
    left, right = ov_factors(layer, config)
    gram = einsum("hdi,hdj->hij", left, left)
    return _unit(einsum("hij,hjd->hid", root(gram), right))


def _reader(layer: Layer, config: ModelConfig, kind: str) -> Array:
    """[H,D,Dh] with ||X reader|| = ||X W2|| / ||W2|| for every X."""
    left, right = (ov_factors if kind == "v" else qk_factors)(layer, config)
    if kind == "k":
        left, right = right.swapaxes(1, 2), left.swapaxes(1, 2)
    gram = einsum("hid,hjd->hij", right, right)
    return _unit(einsum("hdj,hij->hdi", left, root(gram)))


@partial(jax.jit, static_argnames="kind")
def _composition(model: Transformer, kind: str) -> Array:
    config = model.config
    writers, readers = jax.lax.map(
        lambda layer: (_writer(layer, config), _reader(layer, config, kind)), layers(model)
    )

    def score(pair: tuple[Array, Array]) -> Array:
        product = einsum("hid,gdj->higj", writers[pair[0]], readers[pair[1]])
        return jnp.sqrt(jnp.sum(product * product, axis=(1, 3)))

    # One pair of layers after the other: memory stays flat, and half the products are saved.
    writing, reading = np.triu_indices(config.n_layers, 1)
    scores = jax.lax.map(score, (jnp.asarray(writing), jnp.asarray(reading)))
    shape = (config.n_layers, config.n_heads) * 2
    return jnp.full(shape, jnp.nan).at[writing, :, reading].set(scores)


@partial(jax.jit, static_argnames="kind")
def _component_composition(model: Transformer, index: Array, head: Array, kind: str) -> Array:
    _, rows = _singular_vectors(model, index, head, ov_factors)

    def score(layer: Layer) -> Array:
        product = einsum("nid,hdj->nihj", rows, _reader(layer, model.config, kind))
        norm = jnp.sqrt(jnp.sum(product * product, axis=-1))
        return jnp.where((index < layer[1])[:, None, None], norm, jnp.nan)

    return jnp.moveaxis(jax.lax.map(score, layers(model)), 0, 2)
