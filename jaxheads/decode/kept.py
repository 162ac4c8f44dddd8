"""`KeptCache`: of a prompt only the keys that were chosen, for each head others; all that follows.

Source: what kvpress and the papers of SnapKV, H2O, AdaKV and Task-KV choose after a prompt is read;
here what is not chosen is not there any more.

Layout. Heads of a layer may keep different numbers of tokens, in each row others (AdaKV), so a
row's keys of a layer lie in one array of P slots with the head that each belongs to: memory is what
is kept. A query head is multiplied with all P keys and masks those of other heads: each key is read
once, as in any product with a matrix, but K times as many products are computed as are used.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxheads.decode.pool import Pool
from jaxheads.decode.refusals import refuse_division, refuse_maps
from jaxheads.model.attention import attention_scores, mix_values
from jaxheads.model.cache import KVCache
from jaxheads.model.context import Context

Array = jax.Array


@struct.dataclass
class KeptCache:
    """Chosen keys and values of a prompt, and all of the tokens after it.

    Attributes:
      kept: the chosen ones, [L,B,1,P,Dh].
      owner: int32 [L,B,P], the key/value head of each; K for none.
      tail: of the tokens after the prompt, [L,B,K,N,Dh].
      mask: bool [B,S], True where a column holds a real token; S is the prompt's columns and N.
      length: int32 scalar, columns read so far, padding included.
    """

    kept: Pool
    owner: Array
    tail: Pool
    mask: Array
    length: Array

    @property
    def size(self) -> int:
        """S, columns that can be read, padding included."""
        return int(self.mask.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values, their scales and owners."""
        held = jax.tree.leaves((self.kept, self.owner, self.tail))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in held)

    def started(self, mask: Array) -> KeptCache:
        """With the mask [B,T] of the tokens about to be read."""
        return replace(
            self,
            mask=jax.lax.dynamic_update_slice(self.mask, refuse_division(mask), (0, self.length)),
        )

    def ended(self, mask: Array) -> KeptCache:
        """After all layers have read the tokens of mask [B,T]."""
        return replace(self, length=self.length + mask.shape[1])

    def extend(self, k: Array, v: Array, context: Context) -> tuple[KeptCache, KeptKeys]:
        """As `jaxheads.model.attention.Cached.extend`."""
        layer, first = context.layer, self.size - self.tail.k.shape[3]
        assert layer is not None
        new = self.tail.encoded(*(jnp.moveaxis(x, 2, 1)[None] for x in (k, v)))
        at = (layer, 0, 0, context.start - first, 0)
        tail = jax.tree.map(
            lambda leaf, x: jax.lax.dynamic_update_slice(leaf, x, at), self.tail, new
        )
        kept, mine = (jax.tree.map(lambda leaf: leaf[layer], x) for x in (self.kept, tail))
        return replace(self, tail=tail), KeptKeys(kept, self.owner[layer], mine)


@struct.dataclass
class KeptKeys:
    """What the queries of new tokens of a layer attend to; the attributes without L."""

    kept: Pool
    owner: Array
    tail: Pool

    def attend(
        self, q: Array, context: Context, allowed: Array, bias: Array | None, prefix: str = ""
    ) -> tuple[Array, Context]:
        """As `jaxheads.model.attention.Keys.attend`.

        Raises:
          ValueError: something edits, taps or reads attention maps, which do not exist here.
        """
        refuse_maps(context, "heads hold different tokens")
        assert bias is None
        config = context.config
        scored = partial(attention_scores, scale=config.attn_scale, softcap=config.attn_softcap)
        kept, tail = (
            tuple(jnp.moveaxis(x, 1, 2) for x in part.decoded(q.dtype))
            for part in (self.kept, self.tail)
        )
        heads, group = tail[0].shape[2], q.shape[2] // tail[0].shape[2]
        mine = self.owner[:, None] == jnp.arange(heads).repeat(group)[:, None]
        scores = [
            scored(q, kept[0], mine[:, :, None]),
            scored(q, tail[0], allowed[..., -tail[0].shape[1] :]),
        ]
        pattern = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
        first = kept[0].shape[1]
        z = mix_values(pattern[..., :first], kept[1]) + mix_values(pattern[..., first:], tail[1])
        return z, context


def compress(
    cache: KVCache, keep: Array, *, room: int, slots: int | None = None, bits: int | None = None
) -> KeptCache:
    """A cache with chosen tokens of another that has read a prompt.

    Args:
      cache: full; of its slots those up to its length are the prompt.
      keep: bool [L,B,K,S], which are kept; what is padding never is.
      room: N, tokens that can follow.
      slots: P, for each layer and row; None for the most that any keeps, which must then be known
        outside of jit.
      bits: 8 stores keys and values as int8; None as they are.

    Raises:
      ValueError: `keep` of another shape; fewer slots than are kept (outside of jit); no room.
    """
    layers, rows, heads, size = cache.k.shape[:4]
    if keep.shape != (layers, rows, heads, size):
        raise ValueError(
            f"keep must be [L,B,K,S] = {[layers, rows, heads, size]}, got {list(keep.shape)}"
        )
    if room < 1:
        raise ValueError(f"room must be at least 1 token, got {room}")
    keep = (keep & cache.mask[None, :, None]).reshape(layers, rows, heads * size)
    counts = keep.sum(axis=-1)
    if not isinstance(counts, jax.core.Tracer):
        most = max(int(np.asarray(counts).max()), 1)
        slots = most if slots is None else slots
        if slots < most:
            raise ValueError(f"{most} tokens are kept in a layer, more than slots={slots}")
    elif slots is None:
        raise ValueError("slots must be given under jit: how many tokens are kept is not known")
    return _compress(cache, keep, room=room, slots=min(slots, heads * size), bits=bits)


def _compress(cache: KVCache, keep: Array, *, room: int, slots: int, bits: int | None) -> KeptCache:
    layers, rows, heads, size, width = cache.k.shape
    order = jnp.argsort(~keep, axis=-1, stable=True)[..., :slots]
    real = jnp.take_along_axis(keep, order, axis=-1)

    def chosen(x: Array) -> Array:
        flat = x.reshape(layers, rows, heads * size, width)
        return jnp.take_along_axis(flat, order[..., None], axis=2)[:, :, None]

    def pool(heads: int, slots: int) -> Any:
        one = Pool.empty((layers * rows, heads, slots, width), cache.k.dtype, bits)
        return jax.tree.map(lambda x: x.reshape(layers, rows, *x.shape[1:]), one)

    kept = pool(1, 1).encoded(chosen(cache.k), chosen(cache.v))
    mask = jnp.zeros((rows, size + room), bool).at[:, :size].set(cache.mask)
    return KeptCache(
        kept=kept,
        owner=jnp.where(real, order // size, heads).astype(jnp.int32),
        tail=pool(heads, room),
        mask=mask,
        length=jnp.asarray(size, jnp.int32),
    )
