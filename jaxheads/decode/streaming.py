"""`Ring`: what streaming heads keep, and their attention. See `jaxheads.decode.head_cache`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from jaxheads.decode.kinds import HeadKinds
from jaxheads.decode.pool import Place, Pool
from jaxheads.model.attention import MASKED, attention_scores, mix_values
from jaxheads.model.config import ModelConfig
from jaxheads.model.context import Context

Array = jax.Array


@struct.dataclass
class Streamed:
    """Which tokens the queries of new ones see in streaming heads; the same in all layers.

    Keys are those in the ring, then the new ones.

    Attributes:
      visible: bool [B,T,W+T], seen as themselves.
      hidden: bool [B,T,W+T], seen only in the sums of what was dropped.
      before: int32 [B], tokens that had been dropped before.
      source: int32 [B,W], which new token comes to a slot of the ring; -1 keeps the old one.
      leaving: bool [B,W+T], tokens that are in the ring no more, or never come in.
    """

    visible: Array
    hidden: Array
    before: Array
    source: Array
    leaving: Array


@struct.dataclass
class Ring:
    """Keys and values of M streaming heads.

    Attributes:
      pool: W = sinks + recent slots: a token at the slot of its position.
      dropped: float32 [B,M,2,Dh], sums of the keys and of the values that a head dropped; None
        without compensation.
      sinks: first tokens that are kept. Static.
      dense: whether new tokens see one another whatever the distance, in prefill. Static.
    """

    pool: Pool
    dropped: Array | None
    sinks: int = struct.field(pytree_node=False)
    dense: bool = struct.field(pytree_node=False)

    @classmethod
    def empty(cls, config: ModelConfig, kinds: HeadKinds, batch: int, heads: int) -> Ring:
        """Of `heads` heads of `batch` rows."""
        shape = (batch, heads, kinds.sinks + kinds.recent, config.head_dim)
        dropped = jnp.zeros((batch, heads, 2, config.head_dim)) if kinds.compensate else None
        pool = Pool.empty(shape, config.compute_dtype, kinds.bits)
        return cls(pool, dropped, kinds.sinks, kinds.prefill == "dense")

    @property
    def recent(self) -> int:
        """Last tokens that are kept."""
        return int(self.pool.k.shape[2]) - self.sinks

    def sees(self, tokens: Array, context: Context) -> Streamed:
        """What queries see.

        Args:
          tokens: int32 [B], real tokens read before.
          context: of the new tokens.
        """
        sinks, recent = self.sinks, self.recent
        width, length = sinks + recent, context.positions.shape[1]
        old = self._positions(tokens)
        new = jnp.where(context.token_mask, context.positions, -1)
        keys = jnp.concatenate([old, new], axis=1)
        seen = jax.lax.dynamic_slice_in_dim(context.allowed[:, 0], context.start, length, axis=2)
        known = jnp.broadcast_to(old[:, None] >= 0, (*new.shape, width))
        known = jnp.concatenate([known, seen], axis=2)
        near = (keys < sinks)[:, None] | (keys[:, None] > context.positions[..., None] - recent)
        if self.dense and context.phase == "prefill":
            near = jnp.ones_like(near)
        after = tokens + jnp.sum(context.token_mask, axis=1, dtype=jnp.int32)
        stays = (keys < sinks) | (keys >= after[:, None] - recent)
        kept = stays[:, width:] & (new >= 0)
        slot = jnp.where(new < sinks, new, sinks + (new - sinks) % recent)
        comes = kept[:, :, None] & (slot[:, :, None] == jnp.arange(width))
        return Streamed(
            visible=known & near,
            hidden=known & ~near,
            before=jnp.maximum(tokens - width, 0),
            source=jnp.max(jnp.where(comes, jnp.arange(length)[:, None], -1), axis=1),
            leaving=~stays & (keys >= 0),
        )

    def decodes(self, context: Context) -> bool:
        """Whether one token is read, which sees what is near and nothing else."""
        return context.positions.shape[1] == 1 and not (self.dense and context.phase == "prefill")

    def seen_alone(self, tokens: Array, context: Context) -> Streamed:
        """What the query of one token sees of a ring that holds it already.

        Args:
          tokens: int32 [B], real tokens read before it.
          context: of the token.
        """
        after = tokens + context.token_mask[:, 0]
        there = self._positions(after) >= 0
        nothing = jnp.zeros_like(there)
        return Streamed(
            visible=there[:, None],
            hidden=nothing[:, None],
            before=jnp.maximum(after - there.shape[1], 0),
            source=jnp.full(there.shape, -1),
            leaving=nothing,
        )

    def _positions(self, tokens: Array) -> Array:
        """int32 [B,W], the position of the token at each slot after `tokens` [B]; -1 of none."""
        slot, last = jnp.arange(self.sinks + self.recent), tokens[:, None] - 1
        turned = slot + (last - slot) // self.recent * self.recent
        return jnp.where(slot > last, -1, jnp.where(slot < self.sinks, slot, turned))

    def written(
        self, new: Pool, before: Ring, place: Place, first: Array, streamed: Streamed
    ) -> Ring:
        """With the new tokens of a layer.

        Args:
          new: [B,K,T,...], full heads first.
          before: the block of heads of `place` in this ring.
          place: of the layer's streaming heads in this ring.
          first: int32 scalar, the first of them in `new`.
          streamed: which tokens come and go.
        """
        ranks = first + place.ranks
        source = streamed.source[:, None, :, None]
        mine = jax.tree.map(lambda leaf: jnp.take(leaf, ranks, axis=1), new)

        def put(leaf: Array, old: Array, x: Array) -> Array:
            found = jnp.take_along_axis(x, jnp.maximum(source, 0), axis=2)
            return place.write(leaf, jnp.where(source >= 0, found, old))

        pool = jax.tree.map(put, self.pool, before.pool, mine)
        if self.dropped is None or before.dropped is None:
            return replace(self, pool=pool)
        old = before.pool.decoded(jnp.float32)
        leaving = streamed.leaving.astype(jnp.float32)
        sums = [
            jnp.einsum("bs,bkse->bke", leaving, jnp.concatenate(pair, axis=2))
            for pair in zip(old, mine.decoded(jnp.float32), strict=True)
        ]
        total = before.dropped + jnp.stack(sums, axis=2)
        return replace(self, pool=pool, dropped=place.write(self.dropped, total))


def attend_streaming(
    q: Array, ring: Ring, new: Pool, streamed: Streamed, config: ModelConfig
) -> Array:
    """z [B,T,H,Dh] of streaming heads.

    Args:
      q: [B,T,H,Dh].
      ring: of their key/value heads, without the new tokens.
      new: the new tokens of these heads.
      streamed: what is seen.
      config: of the model.
    """
    # Keys and values [B,W+T,K,Dh].
    k, v = (
        jnp.moveaxis(jnp.concatenate(pair, axis=2), 1, 2)
        for pair in zip(ring.pool.decoded(q.dtype), new.decoded(q.dtype), strict=True)
    )
    scored = partial(attention_scores, scale=config.attn_scale, softcap=config.attn_softcap)
    scores = scored(q, k, streamed.visible[:, None])
    if ring.dropped is None:
        return mix_values(jax.nn.softmax(scores, axis=-1), v)
    count = streamed.before[:, None] + jnp.sum(streamed.hidden, axis=2)
    hidden = streamed.hidden.astype(jnp.float32)
    # The mean key and value of each query's dropped tokens, [B,T,K,Dh].
    means = []
    for x, total in zip((k, v), jnp.moveaxis(ring.dropped, 2, 0), strict=True):
        sums = jnp.einsum("bts,bske->btke", hidden, x.astype(jnp.float32)) + total[:, None]
        means.append((sums / jnp.maximum(count, 1)[..., None, None]).astype(q.dtype))
    b, t, h, dh = q.shape
    # Each query has its own key here: queries are rows.
    rows = (b * t, 1, h, dh)
    alone = scored(q.reshape(rows), means[0].reshape(b * t, 1, -1, dh), jnp.bool_(True))
    extra = alone.reshape(b, t, h).transpose(0, 2, 1) + jnp.log(jnp.maximum(count, 1))[:, None]
    extra = jnp.where(count[:, None] > 0, extra, MASKED)
    pattern = jax.nn.softmax(jnp.concatenate([scores, extra[..., None]], axis=-1), axis=-1)
    weight = pattern[..., -1].transpose(0, 2, 1).astype(q.dtype)
    kv = v.shape[2]
    spread = jnp.broadcast_to(means[1][:, :, :, None], (b, t, kv, h // kv, dh)).reshape(q.shape)
    return mix_values(pattern[..., :-1], v) + weight[..., None] * spread
