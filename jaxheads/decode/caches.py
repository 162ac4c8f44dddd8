"""What generation asks of a cache besides `Cache`: rows repeated for samples, its layout."""

from __future__ import annotations

from dataclasses import replace
from functools import partial, singledispatch

import jax
import jax.numpy as jnp

from jaxheads.decode.head_cache import HeadCache
from jaxheads.model.cache import Cache, KVCache, empty_cache
from jaxheads.model.layout import Array, axes_of, lay
from jaxheads.model.transformer import Transformer


def cache_for(model: Transformer, mask: Array, size: int) -> KVCache:
    """An empty `KVCache` of `size` slots, divided over devices as the rows and heads are.

    Args:
      model: whose key/value heads are cached.
      mask: bool [B,T], of the prompts.
      size: S, slots.
    """
    cache = empty_cache(model.config, mask.shape[0], size)
    rows, heads = axes_of(mask)[0], axes_of(model.blocks.attn.k[...])[2]
    heads = tuple(name for name in heads if name not in rows)
    k, v = (lay(part, ((), rows, heads, (), ())) for part in (cache.k, cache.v))
    return replace(cache, k=k, v=v, mask=lay(cache.mask, (rows, ())))


@singledispatch
def repeated(cache: Cache, times: int) -> Cache:
    """A cache whose rows each occur `times` times, beside each other.

    Raises:
      ValueError: a kind of cache for which nobody registered how.
    """
    raise ValueError(
        f"samples={times} needs a cache whose rows repeat, {type(cache).__name__} has none"
    )


@repeated.register
def _(cache: KVCache, times: int) -> KVCache:
    k, v = (repeat_rows(part, times, axis=1) for part in (cache.k, cache.v))
    return replace(cache, k=k, v=v, mask=repeat_rows(cache.mask, times))


@repeated.register
def _(cache: HeadCache, times: int) -> HeadCache:
    rows = (cache.full, cache.ring, cache.mask, cache.tokens)
    full, ring, mask, tokens = jax.tree.map(partial(repeat_rows, times=times), rows)
    return replace(cache, full=full, ring=ring, mask=mask, tokens=tokens)


def repeat_rows(x: Array, times: int, axis: int = 0) -> Array:
    """Each entry of an axis `times` times, beside each other: of B rows B*times."""
    if times == 1:
        return x
    before, after = x.shape[: axis + 1], x.shape[axis + 1 :]
    wide = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), (*before, times, *after))
    return lay(wide.reshape(*before[:axis], before[axis] * times, *after), axes_of(x))
