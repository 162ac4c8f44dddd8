"""`Pool`: keys and values of some heads of all layers, layer after layer, without padding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array


@struct.dataclass
class Pool:
    """Keys and values of N heads at S slots each.

    Attributes:
      k: [B,N,S,Dh], or int8.
      v: [B,N,S,Dh], or int8.
      k_scale: float32 [B,N,S,1] by which int8 keys are multiplied, else None.
      v_scale: of the values.
    """

    k: Array
    v: Array
    k_scale: Array | None = None
    v_scale: Array | None = None

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int], dtype: Any, bits: int | None) -> Pool:
        """Zeros of shape [B,N,S,Dh]."""

        # Each its own buffer, so that a cache can be donated.
        def zeros(kind: Any, width: int) -> Array:
            return jnp.zeros((*shape[:3], width), kind)

        if bits is None:
            return cls(zeros(dtype, shape[3]), zeros(dtype, shape[3]))
        values = (zeros(jnp.int8, shape[3]) for _ in "kv")
        return cls(*values, *(zeros(jnp.float32, 1) for _ in "kv"))

    @property
    def heads(self) -> int:
        """N."""
        return int(self.k.shape[1])

    def encoded(self, k: Array, v: Array) -> Pool:
        """Keys and values [B,N,T,Dh] as this pool holds them."""
        if self.k_scale is None:
            return Pool(k.astype(self.k.dtype), v.astype(self.v.dtype))
        (k, k_scale), (v, v_scale) = quantise(k), quantise(v)
        return Pool(k, v, k_scale, v_scale)

    def decoded(self, dtype: Any) -> tuple[Array, Array]:
        """Keys and values [B,N,S,Dh] to compute with."""
        if self.k_scale is None or self.v_scale is None:
            return self.k.astype(dtype), self.v.astype(dtype)
        return (self.k * self.k_scale).astype(dtype), (self.v * self.v_scale).astype(dtype)


def quantise(x: Array) -> tuple[Array, Array]:
    """x [...,Dh] as int8 [...,Dh] and the float32 scale [...,1] to multiply it by.

    Symmetric, one scale for each vector: its largest entry becomes 127.
    """
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
    scale = jnp.where(scale > 0, scale, 1.0)
    return jnp.round(x / scale).astype(jnp.int8), scale


def cut(pool: Any, first: Array, count: int) -> Any:
    """`count` heads of every leaf [B,N,...], from the head `first` on."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, count, 1), pool)


@struct.dataclass
class Place:
    """Where the heads of one layer lie in a pool, as a block of one size for all layers.

    The block holds all heads of the layer, and heads of others that are left as they are.

    Attributes:
      first: int32 scalar, the first head of the block.
      ranks: int32 [width], which of the layer's heads each head of the block is.
      mine: bool [width], whether it is one.
    """

    first: Array
    ranks: Array
    mine: Array

    @classmethod
    def of(cls, first: Array, count: Array, width: int, total: int) -> Place:
        """Of a layer with `count` <= `width` heads from `first` on, in a pool of `total`."""
        start = jnp.minimum(first, total - width)
        ranks = start + jnp.arange(width) - first
        return cls(start, jnp.maximum(ranks, 0), (ranks >= 0) & (ranks < count))

    @property
    def width(self) -> int:
        """Heads of the block."""
        return int(self.mine.shape[0])

    def read(self, leaf: Array, slot: Array | int = 0, slots: int | None = None) -> Array:
        """The block of a leaf [B,N,S,...], at `slots` slots from `slot` on; None for all."""
        size = leaf.shape[2] if slots is None else slots
        shape = (leaf.shape[0], self.width, size, *leaf.shape[3:])
        return jax.lax.dynamic_slice(leaf, self._index(leaf, slot), shape)

    def write(self, leaf: Array, block: Array, slot: Array | int = 0) -> Array:
        """The leaf with `block` at the layer's own heads, from `slot` on, in place."""
        old = self.read(leaf, slot, block.shape[2])
        mine = self.mine.reshape(-1, *(1,) * (leaf.ndim - 2))
        return jax.lax.dynamic_update_slice(
            leaf, jnp.where(mine, block, old), self._index(leaf, slot)
        )

    def _index(self, leaf: Array, slot: Array | int) -> tuple[Array | int, ...]:
        return (0, self.first, slot, *(0,) * (leaf.ndim - 3))
