"""Which tokens of a prompt each key/value head keeps, by the attention that they received.

Every function maps attention to bool [L,B,K,S], to be handed to `jaxheads.decode.kept.compress`.
Attention is the weight that a token got from query heads, summed over queries: of the last ones,
or of all (`jaxheads.decode.reading`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def of_groups(attention: Array, n_kv_heads: int) -> Array:
    """Means over the query heads of each key/value head: [L,B,H,S] -> [L,B,K,S]."""
    layers, rows, heads, size = attention.shape
    return attention.reshape(layers, rows, n_kv_heads, heads // n_kv_heads, size).mean(axis=3)


def smoothed(scores: Array, width: int) -> Array:
    """Means over `width` neighbouring tokens of [...,S]; zeros beyond the ends.

    Raises:
      ValueError: a width that is not odd.
    """
    if width < 1 or width % 2 == 0:
        raise ValueError(f"the width of smoothing must be odd and positive, got {width}")
    edges = [(0, 0)] * (scores.ndim - 1) + [(width // 2, width // 2)]
    padded = jnp.pad(scores, edges)
    return sum(padded[..., i : i + scores.shape[-1]] for i in range(width)) / width  # type: ignore[return-value]


def snapkv(
    attention: Array, mask: Array, kept: Array, *, window: int = 32, kernel: int = 5
) -> Array:
    """The last tokens, and those with the most attention from them.

    Source: Li et al. (2024), "SnapKV"; its code: window 32, means over 5 neighbours, here of the
    mean over a group of query heads, as in kvpress.

    Args:
      attention: [L,B,K,S] from the last `window` tokens.
      mask: bool [B,S], real tokens.
      kept: int [B], tokens that each head keeps.
      window: last tokens that all heads keep.
      kernel: neighbours that are averaged.
    """
    last = _last(mask, window)
    scores = jnp.where(last[None, :, None], jnp.inf, smoothed(attention, kernel))
    return _top(scores, mask, kept[None, :, None])


def h2o(attention: Array, mask: Array, kept: Array, *, recent: float = 0.5) -> Array:
    """Half of what is kept the last tokens, half those with the most attention from all.

    Source: Zhang et al. (2023), "H2O: Heavy-Hitter Oracle"; there eviction goes on while decoding,
    here it happens once, after the prompt.

    Args:
      attention: [L,B,K,S] from all tokens.
      mask: bool [B,S], real tokens.
      kept: int [B], tokens that each head keeps.
      recent: share of them that are the last tokens.
    """
    count = jnp.sum(mask, axis=1, keepdims=True)
    order = jnp.cumsum(mask, axis=1) - 1
    last = mask & (order >= count - jnp.floor(kept[:, None] * recent).astype(jnp.int32))
    scores = jnp.where(last[None, :, None], jnp.inf, attention)
    return _top(scores, mask, kept[None, :, None])


def adakv(
    attention: Array, mask: Array, kept: Array, *, window: int = 32, kernel: int = 5,
    safeguard: float = 0.2,
) -> Array:  # fmt: skip
    """SnapKV with the tokens of a layer divided among its heads by their attention.

    Source: Feng et al. (2024), "Ada-KV", algorithm 1: each head keeps a share of what it would
    keep alone, the safeguard; the rest goes to the highest scores of all heads of the layer.

    Args:
      attention: [L,B,K,S] from the last `window` tokens.
      mask: bool [B,S], real tokens.
      kept: int [B], tokens that heads keep on average.
      window: last tokens that all heads keep.
      kernel: neighbours that are averaged.
      safeguard: the share.
    """
    layers, rows, heads, size = attention.shape
    last = _last(mask, window)
    scores = jnp.where(last[None, :, None], jnp.inf, smoothed(attention, kernel))
    own = jnp.floor(kept * safeguard).astype(jnp.int32)
    sure = _top(scores, mask, own[None, :, None])
    scores = jnp.where(sure, jnp.inf, scores).reshape(layers, rows, 1, heads * size)
    every = jnp.tile(mask, (1, heads))
    chosen = _top(scores, every, (kept * heads)[None, :, None])
    return chosen.reshape(layers, rows, heads, size)


def task_kv(
    attention: Array, values: Array, mask: Array, kept: Array, *, beta: float = 0.3, least: int = 1,
    sinks: int = 16, recent: int = 256, top: int = 256, kernel: int = 7,
) -> Array:  # fmt: skip
    """All tokens for the heads that differ most from their layer; for the others a part.

    Source: Task-KV (He et al. 2025), known from its text. A head's vector is the sum of the values
    of its `top` tokens weighted by their attention; the layer's centre is the mean over heads. The
    heads farthest from it and the single nearest keep everything, in all round(n beta - (n beta -
    m) r / (L - 1)) of the n heads of layer r. The others keep sinks, recent tokens, and of those
    between the ones with the most attention, as many as the layer's budget allows.

    Uncertain there, and decided here: the distance is Euclidean, n counts key/value heads, a
    layer with one full head keeps the farthest, and attention is the mean over the query heads of
    a group.

    Args:
      attention: [L,B,K,S] from the last tokens (the paper: 32).
      values: [L,B,K,S,Dh], as cached.
      mask: bool [B,S], real tokens.
      kept: int [B], tokens that heads keep on average; where full heads take more than all, the
        others keep sinks and recent tokens only, and the budget is exceeded.
      beta: share of full heads in the lowest layer.
      least: m, full heads in the highest.
      sinks: first tokens that all keep.
      recent: last tokens that all keep.
      top: tokens that make a head's vector.
      kernel: neighbours over which attention is averaged before tokens are chosen.
    """
    layers, _, heads, size = attention.shape
    strong = _top(attention, mask, jnp.asarray(min(top, size)))
    weights = jnp.where(strong, attention, 0.0)
    vectors = jnp.einsum("lbks,lbkse->lbke", weights, values.astype(jnp.float32))
    distance = jnp.linalg.norm(vectors - vectors.mean(axis=2, keepdims=True), axis=-1)
    full = jnp.asarray(task_kv_heads(layers, heads, beta, least))
    rank = jnp.argsort(jnp.argsort(-distance, axis=-1), axis=-1)
    # The farthest, and the nearest in the place of the last of them.
    several = (full > 1)[:, None, None]
    whole = (rank < full[:, None, None] - several) | (several & (rank == heads - 1))
    real = jnp.sum(mask, axis=1)
    order = jnp.cumsum(mask, axis=1) - 1
    always = mask & ((order < sinks) | (order >= (real - recent)[:, None]))
    left = (kept * heads)[None] - full[:, None] * real[None]
    share = jnp.maximum(left // jnp.maximum(heads - full, 1)[:, None], 0)
    share = jnp.maximum(share, always.sum(axis=1)[None])
    scores = jnp.where(always[None, :, None], jnp.inf, smoothed(attention, kernel))
    part = _top(scores, mask, share[:, :, None])
    return jnp.where(whole[..., None], mask[None, :, None], part)


def task_kv_heads(layers: int, heads: int, beta: float, least: int) -> np.ndarray:
    """int [L], full heads of each layer, at least one.

    Raises:
      ValueError: a share outside (0, 1], or more heads than there are.
    """
    if not 0 < beta <= 1:
        raise ValueError(f"beta must lie in (0, 1], got {beta}")
    if not 1 <= least <= heads:
        raise ValueError(f"least must lie in 1..{heads}, got {least}")
    steps = np.arange(layers) / max(layers - 1, 1)
    counts = heads * beta - (heads * beta - least) * steps
    return np.clip(np.floor(counts + 0.5), 1, heads).astype(np.int32)


def _last(mask: Array, count: int) -> Array:
    """bool [B,S], the last real tokens."""
    order = jnp.cumsum(mask, axis=1)
    return mask & (order > order[:, -1:] - count)


def _top(scores: Array, mask: Array, count: Array) -> Array:
    """bool [L,B,K,S], the `count` [1 or L,B,1 or K] highest real tokens; ties to the later one."""
    scores = jnp.where(mask[None, :, None], scores, -jnp.inf)
    order = jnp.argsort(scores[..., ::-1], axis=-1, stable=True, descending=True)
    place = jnp.argsort(order, axis=-1)[..., ::-1]
    return (place < jnp.expand_dims(count, -1)) & mask[None, :, None]
