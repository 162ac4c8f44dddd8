"""Reading a prompt while watching which tokens are attended to."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxheads.model.batch import Batch
from jaxheads.model.cache import Cache, empty_cache
from jaxheads.model.context import Context, Edit, Tap
from jaxheads.model.transformer import Transformer

Array = jax.Array


@struct.dataclass
class Read:
    """A prompt that was read.

    Attributes:
      logits: float32 [B,V], of the token after it.
      cache: what can be attended to from here on.
    """

    logits: Array
    cache: Cache


def read(
    model: Transformer,
    batch: Batch,
    cache: Cache,
    *,
    edits: Mapping[str, Edit] | None = None,
    chunk: int = 512,
) -> Read:
    """Reads prompts that end together, in chunks.

    Args:
      model: the model.
      batch: padded on the left.
      cache: empty; consumed.
      edits: what to change.
      chunk: tokens read at a time.

    Raises:
      ValueError: prompts padded on the right, a chunk of no tokens.
    """
    return _read(model, batch, cache, edits, chunk, 0, watched=False)[0]


def watch(
    model: Transformer,
    batch: Batch,
    *,
    window: int | None,
    edits: Mapping[str, Edit] | None = None,
    chunk: int = 512,
) -> tuple[Read, Array]:
    """Reads prompts into a full cache, and sums the attention that each token receives.

    Args:
      model: the model.
      batch: padded on the left.
      window: last tokens whose attention counts; None for all. Where a prompt is shorter, all.
      edits: what to change.
      chunk: tokens read at a time.

    Returns:
      The prompt read, with a `KVCache`; and float32 [L,B,H,T], the weight that each token got
      from each query head, summed over the tokens that count.

    Raises:
      ValueError: as `read`; a window of no tokens.
    """
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 token, got {window}")
    rows, length = np.shape(batch.tokens)
    first = 0 if window is None else max(length - window, 0)
    cache = empty_cache(model.config, rows, length)
    found, received = _read(model, batch, cache, edits, chunk, first, watched=True)
    assert received is not None
    return found, received


def _read(
    model: Transformer,
    batch: Batch,
    cache: Cache,
    edits: Mapping[str, Edit] | None,
    chunk: int,
    first: int,
    *,
    watched: bool,
) -> tuple[Read, Array | None]:
    """`first` is the first token that is watched."""
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    if not mask[:, -1].all():
        raise ValueError("prompts must end together: pack them with side='left'")
    length, total, logits = tokens.shape[1], None, None
    cuts = [*range(0, first, chunk), *range(first, length, chunk), length]
    for start, end in itertools.pairwise(cuts):
        piece = tokens[:, start:end], mask[:, start:end]
        watching = watched and start >= first
        logits, cache, received = _pass(model, *piece, cache, edits, watched=watching)
        if watching:
            total = received if total is None else total + received
    assert logits is not None
    return Read(logits, cache), total


def on_the_left(batch: Batch) -> Batch:
    """The same prompts padded on the left, on the host."""
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    # Stable: padding first, then the tokens in their order.
    order = np.argsort(mask, axis=1, kind="stable")
    return Batch(np.take_along_axis(tokens, order, 1), np.take_along_axis(mask, order, 1))


@partial(jax.jit, static_argnames="watched", donate_argnames="cache")
def _pass(
    model: Transformer,
    tokens: Array,
    mask: Array,
    cache: Cache,
    edits: Mapping[str, Edit] | None,
    *,
    watched: bool,
) -> tuple[Array, Cache, Array | None]:
    last = jnp.full((tokens.shape[0], 1), tokens.shape[1] - 1)
    taps = {"received": Tap("pattern", jax.tree_util.Partial(_received))} if watched else {}
    out = model(tokens, mask, edits=edits, cache=cache, taps=taps, logits_at=last)
    assert out.cache is not None
    return out.logits[:, 0], out.cache, out.taps.get("received")


def _received(pattern: Array, context: Context) -> Array:
    """float32 [B,H,S], sums of a pattern [B,H,T,S] over real queries."""
    return jnp.einsum("bhts,bt->bhs", pattern, context.token_mask.astype(pattern.dtype))
