"""`KVCache`: keys and values of the tokens already read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
from flax import struct

from jaxheads.model.attention import Keys, Slots
from jaxheads.model.config import ModelConfig
from jaxheads.model.context import Context

Array = jax.Array


class Cache(Protocol):
    """Keys and values of the tokens that all layers have read: a pytree, carried from pass to pass.

    Attributes:
      mask: bool [B,S], True where a slot holds a real token.
      length: int32 scalar, slots written so far (padding included).
    """

    mask: Any
    length: Any

    @property
    def size(self) -> int:
        """S, slots of the buffer: how many tokens can be read, padding included."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values in the arrays, with what else is kept to read them."""
        ...

    def started(self, mask: Array) -> Self:
        """With the mask [B,T] of the tokens about to be read."""
        ...

    def extend(self, k: Array, v: Array, context: Context) -> tuple[Self, Keys]:
        """As `jaxheads.model.attention.Cached.extend`."""
        ...

    def ended(self, mask: Array) -> Self:
        """After all layers have read the tokens of mask [B,T]."""
        ...


@struct.dataclass
class KVCache:
    """Keys and values of every head at every slot.

    Attributes:
      k: [L,B,K,S,Dh], after position encoding and edits. A head's tokens lie side by side, as
        products with them read them.
      v: [L,B,K,S,Dh], after edits.
      mask: as in `Cache`.
      length: as in `Cache`.
    """

    k: Array
    v: Array
    mask: Array
    length: Array

    @property
    def size(self) -> int:
        """As `Cache.size`."""
        return int(self.k.shape[3])

    @property
    def nbytes(self) -> int:
        """As `Cache.nbytes`."""
        return int(self.k.nbytes + self.v.nbytes)

    def started(self, mask: Array) -> KVCache:
        """As `Cache.started`."""
        return replace(self, mask=jax.lax.dynamic_update_slice(self.mask, mask, (0, self.length)))

    def ended(self, mask: Array) -> KVCache:
        """As `Cache.ended`."""
        return replace(self, length=self.length + mask.shape[1])

    def extend(self, k: Array, v: Array, context: Context) -> tuple[KVCache, Slots]:
        """As `Cache.extend`."""
        layer = context.layer
        assert layer is not None

        def written(cache: Array, new: Array) -> Array:
            new = jnp.moveaxis(new, 2, 1)[None].astype(cache.dtype)
            return jax.lax.dynamic_update_slice(cache, new, (layer, 0, 0, context.start, 0))

        held = replace(self, k=written(self.k, k), v=written(self.v, v))
        keys, values = (jnp.moveaxis(part[layer], 1, 2) for part in (held.k, held.v))
        return held, Slots(keys, values, context.start + k.shape[1])


def empty_cache(config: ModelConfig, batch: int, size: int) -> KVCache:
    """A cache of `size` slots for `batch` rows, in the dtype of the activations."""
    shape = (config.n_layers, batch, config.n_kv_heads, size, config.head_dim)
    # Two buffers, so that a cache can be donated.
    k, v = (jnp.zeros(shape, config.compute_dtype) for _ in "kv")
    return KVCache(k, v, jnp.zeros((batch, size), bool), jnp.zeros((), jnp.int32))
