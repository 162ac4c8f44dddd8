"""Heads between tokens, read off the weights: what a token makes a head write, or attend to.

The full circuits of Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits":
W_E W_OV W_U from tokens to logits and W_E W_QK W_E^T between tokens, in the conventions of
`jaxheads.circuits.weights`. They are V x V and never formed; what is asked of them is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.circuits.weights import (
    Head,
    Layer,
    check_bilinear,
    check_heads,
    check_linear,
    einsum,
    fold_norm,
    layers,
    ov_factors,
    root,
)
from jaxheads.model.attention import project
from jaxheads.model.embedding import embed_tokens
from jaxheads.model.transformer import Transformer
from jaxheads.names import choose

Array = jax.Array
Tokens = Array | np.ndarray | Sequence[int]

SOURCES = ("embedding", "mlp0")
"""What stands for a token: its embedding, or what the first MLP makes of the embedding."""


def copying_scores(model: Transformer) -> np.ndarray:
    """Whether a head raises the logits of the tokens it attends to, float32 [L,H].

    sum(eigenvalues) / sum(|eigenvalues|) of W_E W_OV W_U (Elhage et al. 2021), with the linear
    part of the last norm folded into W_U: 1 where all eigenvalues are positive (copying), -1
    where all are negative. The V x V matrix has the eigenvalues of a Dh x Dh one, which are
    computed on the host, because not every accelerator has them.

    Args:
      model: a language model that normalises what attention reads.

    Returns:
      Between -1 and 1; 0 for heads whose weights are zero.

    Raises:
      ValueError: a model whose heads are not linear maps, or without an unembedding.
    """
    check_logits(model)
    eigenvalues = np.linalg.eigvals(np.asarray(_copying_cores(model), np.float64))
    size = np.abs(eigenvalues).sum(-1)
    return (eigenvalues.real.sum(-1) / np.where(size > 0, size, 1)).astype(np.float32)


def copying_traces(model: Transformer) -> Array:
    """Trace over nuclear norm of W_E W_OV W_U, float32 [L,H]: copying without eigenvalues.

    The trace is the sum of the eigenvalues. The nuclear norm, the sum of the singular values,
    is at least the sum of their sizes (Weyl 1949), so that this is at most `copying_scores` in
    size, and 1 only for a symmetric circuit that copies. Plain JAX, on any device.

    Args:
      model: a language model that normalises what attention reads.

    Returns:
      Between -1 and 1; 0 for heads whose weights are zero.

    Raises:
      ValueError: a model whose heads are not linear maps, or without an unembedding.
    """
    check_logits(model)
    return _copying_traces(model)


def ov_circuit(
    model: Transformer,
    head: Head,
    tokens_in: Tokens,
    tokens_out: Tokens,
    *,
    source: str = "embedding",
) -> Array:
    """Logits that a head writes if it attends to one token alone, float32 [I,O].

    norm(x) W_V W_O W_U with the head's own norm and value bias and the linear part of the last
    norm: the logits before division by the size of the last residual stream. Softcaps and the
    bias of the logits are left out, and so are positions.

    Args:
      model: a language model that normalises what attention reads.
      head: (layer, head).
      tokens_in: int [I], tokens attended to.
      tokens_out: int [O], tokens whose logits are wanted.
      source: what stands for a token, x: its "embedding", or "mlp0", the output of the first
        MLP on it, as for successor heads (Gould et al. 2024).

    Raises:
      ValueError: a model whose heads are not linear maps, or without an unembedding; a head out
        of range; tokens that are no row of ids of the vocabulary; an unknown source.
    """
    choose("source", source, SOURCES)
    check_logits(model)
    layer, which = check_heads(model.config, [head])[0]
    tokens_in = check_token_row(model, "tokens_in", tokens_in)
    tokens_out = check_token_row(model, "tokens_out", tokens_out)
    return _ov_circuit(model, layer, which, tokens_in, tokens_out, source)


def qk_circuit(model: Transformer, head: Head, queries: Tokens, keys: Tokens) -> Array:
    """Attention logits between embeddings of tokens, float32 [I,J].

    norm(x) W_Q W_K^T norm(y)^T with the head's own norm, biases and factor of the logits, before
    softcap and mask. Positions are left out: with rotary encoding it is the logit of a query
    and a key at one position. In the first layer it is the model's own.

    Args:
      model: a model of tokens that normalises what attention reads.
      head: (layer, head).
      queries: int [I], tokens that attend.
      keys: int [J], tokens attended to.

    Raises:
      ValueError: a model whose logits are not bilinear, or of images; a head out of range;
        tokens that are no row of ids of the vocabulary.
    """
    check_bilinear(model)
    _check_text(model)
    layer, which = check_heads(model.config, [head])[0]
    queries = check_token_row(model, "queries", queries)
    keys = check_token_row(model, "keys", keys)
    return _qk_circuit(model, layer, which, queries, keys)


# Checks.


def check_logits(model: Transformer) -> None:
    """Raises ValueError unless the model has linear heads and an unembedding of tokens."""
    check_linear(model)
    _check_text(model)
    if model.config.head != "lm":
        raise ValueError(
            f"config.head is {model.config.head!r}, expected 'lm': there is no linear map from "
            "the stream to logits of tokens"
        )


def _check_text(model: Transformer) -> None:
    if model.config.image is not None:
        raise ValueError("config.image is set: a vision model has no tokens to make a circuit of")


def check_token_row(model: Transformer, name: str, tokens: Tokens) -> np.ndarray:
    """int32 [N], or ValueError unless these are ids of the vocabulary, at least one."""
    row = np.asarray(tokens)
    if row.ndim != 1 or not row.size or not np.issubdtype(row.dtype, np.integer):
        raise ValueError(
            f"{name} must be one row of token ids, got shape {row.shape} and dtype {row.dtype}"
        )
    for token in row[(row < 0) | (row >= model.config.vocab_size)]:
        raise ValueError(
            f"{name} holds the id {token}, outside of the vocabulary of {model.config.vocab_size}"
        )
    return row.astype(np.int32)


# Arrays.


def _unembedding(model: Transformer) -> Array:
    """The kernel [V,D], as stored."""
    unembed = model.unembed
    assert unembed is not None, "checked before"
    return _table(model) if unembed.kernel is None else unembed.kernel[...]


def _table(model: Transformer) -> Array:
    assert model.embed.tokens is not None, "checked before"
    return model.embed.tokens[...]


def token_stream(model: Transformer, tokens: Array, source: str) -> Array:
    """float32 [N,D]: what stands for tokens [N], without positions."""
    config = model.config.replace(dtype="float32")
    x = embed_tokens(_table(model), tokens[:, None], config)
    x = x if model.embed.norm is None else model.embed.norm(x, config)
    if source == "mlp0":
        block = jax.tree.map(lambda leaf: leaf[0], model.blocks)
        context, _ = model.begin(jnp.ones(x.shape[:2], bool), None, "prefill", {}, {})
        x, _ = block.mlp(block.mlp_norm(x, config), context)
        x = x if block.mlp_scale is None else x * block.mlp_scale[...].astype(x.dtype)
    return x[:, 0]


def _attn_in(model: Transformer, layer: Layer, x: Array) -> Array:
    """What attention of a layer reads of a stream x [N,D], as [1,N,D]."""
    block, index = layer
    normed = block.attn_norm(x, model.config)
    if not model.config.first_attn_norm:
        normed = jnp.where(index == 0, x, normed)
    return normed[None]


def _bias(layer: Layer, name: str) -> Array | None:
    bias = getattr(layer[0].attn, f"{name}_bias")
    return None if bias is None else bias[...]


def ov_logits(model: Transformer, layer: Layer, x: Array, tokens_out: Array) -> Array:
    """Logits [H,I,O] that every head of a layer writes for a stream x [I,D]."""
    config = model.config
    with jax.default_matmul_precision("highest"):
        v = project(_attn_in(model, layer, x), layer[0].attn.v[...], _bias(layer, "v"))[0]
    _, o = ov_factors(layer, config)
    unembed = fold_norm(model.final_norm, _unembedding(model)[tokens_out].T, config)
    z = jnp.repeat(v, config.group_size, axis=1)
    reads = einsum("hed,do->heo", o, unembed * config.logit_scale)
    return einsum("ihe,heo->hio", z, reads)


def _pick(model: Transformer, index: Array) -> Layer:
    return jax.tree.map(lambda leaf: leaf[index], layers(model))


@partial(jax.jit, static_argnames="source")
def _ov_circuit(
    model: Transformer, index: Array, head: Array, tokens_in: Array, tokens_out: Array, source: str
) -> Array:
    x = token_stream(model, tokens_in, source)
    return ov_logits(model, _pick(model, index), x, tokens_out)[head]


@jax.jit
def _qk_circuit(
    model: Transformer, index: Array, head: Array, queries: Array, keys: Array
) -> Array:
    config, layer = model.config, _pick(model, index)

    def heads(name: str, tokens: Array) -> Array:
        x = _attn_in(model, layer, token_stream(model, tokens, "embedding"))
        with jax.default_matmul_precision("highest"):
            return project(x, getattr(layer[0].attn, name)[...], _bias(layer, name))[0]

    q, k = heads("q", queries)[:, head], heads("k", keys)[:, head // config.group_size]
    scale = config.head_dim**-0.5 if config.attn_scale is None else config.attn_scale
    return einsum("ie,je->ij", q, k) * scale


@jax.jit
def _copying_cores(model: Transformer) -> Array:
    """[L,H,Dh,Dh] with the eigenvalues of W_E W_OV W_U: its factors multiplied the other way."""
    gram = einsum("vd,ve->de", _unembedding(model).astype(jnp.float32), _embedding_rows(model))
    gram = fold_norm(model.final_norm, gram, model.config)

    def core(layer: Layer) -> Array:
        left, right = ov_factors(layer, model.config)
        return einsum("hid,hdj->hij", right, einsum("de,hej->hdj", gram, left))

    return jax.lax.map(core, layers(model))


def _embedding_rows(model: Transformer) -> Array:
    """W_E [V,D], float32, normalised where the model does that."""
    rows = _table(model).astype(jnp.float32)
    return rows if model.embed.norm is None else model.embed.norm(rows, model.config)


@jax.jit
def _copying_traces(model: Transformer) -> Array:
    config = model.config
    rows, kernel = _embedding_rows(model), _unembedding(model).astype(jnp.float32)
    reads, writes = einsum("vd,ve->de", rows, rows), einsum("vd,ve->de", kernel, kernel)
    # Folded on both sides: the Gram matrix of W_U with the norm in it.
    writes = fold_norm(model.final_norm, fold_norm(model.final_norm, writes, config).T, config)
    across = fold_norm(model.final_norm, einsum("vd,ve->de", kernel, rows), config)

    def score(layer: Layer) -> Array:
        left, right = ov_factors(layer, config)
        trace = einsum("hid,hdi->h", right, einsum("de,hei->hdi", across, left))
        tall = root(einsum("hdi,hdj->hij", left, einsum("de,hej->hdj", reads, left)))
        wide = root(einsum("hid,hjd->hij", right, einsum("hid,de->hie", right, writes)))
        values = jnp.linalg.svd(einsum("hij,hkj->hik", tall, wide), compute_uv=False)
        size = values.sum(-1)
        return trace / jnp.where(size > 0, size, 1)

    return jax.lax.map(score, layers(model))
