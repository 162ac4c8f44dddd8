"""What generation asks of a cache besides `Cache`: rows repeated for samples, its layout."""

from __future__ import annotations

from dataclasses import replace
from functools import partial, singledispatch
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads.decode.chunk_cache import ChunkCache
from jaxheads.decode.contrast import Contrasted, DoLa, Pair
from jaxheads.decode.head_cache import HeadCache
from jaxheads.decode.kept import KeptCache
from jaxheads.model.cache import KVCache, empty_cache
from jaxheads.model.layout import Array, axes_of, lay
from jaxheads.model.transformer import Transformer


@singledispatch
def cache_for(model: Any, mask: Array, size: int) -> Any:
    """An empty `KVCache`, divided over devices as the rows and heads are; or a `Pair` of them.

    Args:
      model: whose key/value heads are cached.
      mask: bool [B,T], of the prompts.
      size: S, slots.
    """
    raise TypeError(f"no cache is known for {type(model).__name__}")


@cache_for.register
def _(model: Transformer, mask: Array, size: int) -> KVCache:
    cache = empty_cache(model.config, mask.shape[0], size)
    rows, heads = axes_of(mask)[0], axes_of(model.blocks.attn.k[...])[2]
    heads = tuple(name for name in heads if name not in rows)
    k, v = (lay(part, ((), rows, heads, (), ())) for part in (cache.k, cache.v))
    return replace(cache, k=k, v=v, mask=lay(cache.mask, (rows, ())))


@cache_for.register
def _(model: DoLa, mask: Array, size: int) -> KVCache:
    cache: KVCache = cache_for(model.model, mask, size)
    return cache


@cache_for.register
def _(model: Contrasted, mask: Array, size: int) -> Pair:
    return Pair(*(cache_for(model.model, mask, size) for _ in range(2)))


@singledispatch
def repeated(cache: Any, times: int) -> Any:
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


@repeated.register
def _(cache: KeptCache, times: int) -> KeptCache:
    held = (cache.kept, cache.owner, cache.tail)
    kept, owner, tail = jax.tree.map(partial(repeat_rows, times=times, axis=1), held)
    return replace(cache, kept=kept, owner=owner, tail=tail, mask=repeat_rows(cache.mask, times))


@repeated.register
def _(cache: ChunkCache, times: int) -> ChunkCache:
    held = (cache.k, cache.v, cache.queries, cache.about)
    k, v, queries, about = jax.tree.map(partial(repeat_rows, times=times, axis=1), held)
    mask = repeat_rows(cache.mask, times)
    return replace(cache, k=k, v=v, queries=queries, about=about, mask=mask)


@repeated.register
def _(cache: Pair, times: int) -> Pair:
    return Pair(repeated(cache.expert, times), repeated(cache.amateur, times))


def repeat_rows(x: Array, times: int, axis: int = 0) -> Array:
    """Each entry of an axis `times` times, beside each other: of B rows B*times."""
    if times == 1:
        return x
    before, after = x.shape[: axis + 1], x.shape[axis + 1 :]
    wide = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), (*before, times, *after))
    return lay(wide.reshape(*before[:axis], before[axis] * times, *after), axes_of(x))
