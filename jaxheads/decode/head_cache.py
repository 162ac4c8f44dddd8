"""`HeadCache`: the whole context for the key/value heads that need it, a short one for the rest.

Layout. Layers may keep different numbers of full heads, and nothing is padded: the full heads of
all layers lie in one pool [B,N,S,Dh], layer after layer, and the streaming ones in a pool
[B,M,W,Dh], N + M = L K. Where a layer's heads begin in the pools is data, and how many are full
chooses one of at most K + 1 branches. So the layer scan stays, one program serves all layers, the
pools are written in place, and memory is what the kinds say.

A streaming head sees the first `sinks` tokens and the last `recent` ones, itself among them, in
prefill and decoding alike (Xiao et al. 2023, "Efficient Streaming Language Models with Attention
Sinks"; but here tokens keep their positions in the text). Its keys lie in a ring of W = sinks +
recent slots: the token at position p at slot p if it is a sink, else at sinks + (p - sinks) mod
recent. Keys are stored rotated, so nothing ever moves. Positions count real tokens: padding takes
no slot of a ring.

With compensation (Tang et al. 2024, "RazorAttention", eq. 6) the tokens that a streaming head no
longer sees stand in its softmax as one: their mean key and value, with the logarithm of their
number added to the logit. That is exact if their keys are equal.

On a mesh it runs in Auto mode only. Heads could not be divided: layers do not have equal numbers of
each kind.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxheads.decode.kinds import HeadKinds
from jaxheads.decode.pool import Place, Pool, cut
from jaxheads.decode.refusals import refuse_division, refuse_maps
from jaxheads.decode.streaming import Ring, Streamed, attend_streaming
from jaxheads.model.attention import attention_scores, mix_values
from jaxheads.model.config import ModelConfig
from jaxheads.model.context import Context

Array = jax.Array


@struct.dataclass
class Where:
    """Where the heads of each layer lie.

    Attributes:
      order: int32 [L,K], key/value heads, the full ones first.
      counts: int32 [L], full heads.
      full, ring: int32 [L], the first head in the pools.
      choices: (least, most) full heads of a layer. Static.
    """

    order: Array
    counts: Array
    full: Array
    ring: Array
    choices: tuple[int, int] = struct.field(pytree_node=False)

    @classmethod
    def of(cls, full: np.ndarray) -> Where:
        """Of bool [L,K]."""
        counts = full.sum(axis=1)
        streaming = full.shape[1] - counts

        def ints(values: np.ndarray) -> Array:
            return jnp.asarray(values, jnp.int32)

        return cls(
            order=ints(np.argsort(~full, axis=1, kind="stable")),
            counts=ints(counts),
            full=ints(np.cumsum(counts) - counts),
            ring=ints(np.cumsum(streaming) - streaming),
            choices=(int(counts.min()), int(counts.max())),
        )


@struct.dataclass
class HeadCache:
    """Keys and values of the tokens already read, by kind of head. See the module.

    Attributes:
      full: of full heads, S slots: a token at the slot of its column.
      ring: of streaming heads.
      where: which heads are where.
      mask: bool [B,S], True where a column holds a real token.
      tokens: int32 [B], real tokens read so far.
      length: int32 scalar, columns read so far, padding included.
    """

    full: Pool
    ring: Ring
    where: Where
    mask: Array
    tokens: Array
    length: Array

    @classmethod
    def empty(cls, config: ModelConfig, kinds: HeadKinds, batch: int, size: int) -> HeadCache:
        """A cache for `batch` rows of up to `size` columns, in the dtype of the activations.

        Raises:
          ValueError: kinds of another model; a model whose attention has windows or a bias of
            positions; no columns.
        """
        layers, heads = config.n_layers, config.n_kv_heads
        if kinds.full.shape != (layers, heads):
            raise ValueError(
                f"kinds of heads are {list(kinds.full.shape)}, expected [{layers}, {heads}] of "
                "this model: they were made for another one"
            )
        if any(config.windows) or config.relative_buckets or not config.causal:
            raise ValueError(
                "head-wise caches are for causal models without windows and position biases, got "
                f"causal={config.causal}, windows {sorted(set(config.windows))}, "
                f"relative_buckets={config.relative_buckets}"
            )
        if size < 1:
            raise ValueError(f"a cache needs room for at least 1 token, got {size}")
        full = int(kinds.full.sum())
        shape = (batch, full, size, config.head_dim)
        return cls(
            full=Pool.empty(shape, config.compute_dtype, kinds.bits),
            ring=Ring.empty(config, kinds, batch, layers * heads - full),
            where=Where.of(kinds.full),
            mask=jnp.zeros((batch, size), bool),
            tokens=jnp.zeros(batch, jnp.int32),
            length=jnp.zeros((), jnp.int32),
        )

    @property
    def size(self) -> int:
        """S, columns that can be read, padding included."""
        return int(self.mask.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values, their scales and the sums of what was dropped."""
        held = jax.tree.leaves((self.full, self.ring))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in held)

    def started(self, mask: Array) -> HeadCache:
        """With the mask [B,T] of the tokens about to be read."""
        return replace(
            self,
            mask=jax.lax.dynamic_update_slice(self.mask, refuse_division(mask), (0, self.length)),
        )

    def ended(self, mask: Array) -> HeadCache:
        """After all layers have read the tokens of mask [B,T]."""
        tokens = self.tokens + jnp.sum(mask, axis=1, dtype=jnp.int32)
        return replace(self, tokens=tokens, length=self.length + mask.shape[1])

    def extend(self, k: Array, v: Array, context: Context) -> tuple[HeadCache, HeadKeys]:
        """Takes the keys and values of new tokens of a layer.

        Args:
          k: [B,T,K,Dh], after position encoding and edits.
          v: [B,T,K,Dh].
          context: of the layer.

        Returns:
          The cache that holds them, and what the queries of these tokens attend to.
        """
        layer, where = context.layer, self.where
        assert layer is not None
        order, count = where.order[layer], where.counts[layer]
        # The same values are attended to, whenever they are read: as the pools hold them.
        new = self.full.encoded(*(jnp.moveaxis(x, 2, 1)[:, order] for x in (k, v)))
        full, ring = self.full, self.ring
        if full.heads:
            place = Place.of(where.full[layer], count, where.choices[1], full.heads)
            full = jax.tree.map(
                lambda leaf, x: place.write(leaf, jnp.take(x, place.ranks, 1), context.start),
                full,
                new,
            )
        streamed, before, alone = ring.sees(self.tokens, context), None, ring.decodes(context)
        if ring.pool.heads:
            width = len(order) - where.choices[0]
            place = Place.of(where.ring[layer], len(order) - count, width, ring.pool.heads)
            # Only these heads are needed from before.
            block = jax.tree.map(place.read, ring)
            before = (block, where.ring[layer] - place.first)
            ring = ring.written(new, block, place, count, streamed)
            if alone:
                # What the one new token overwrites it does not see: it attends to what is there
                # now. Were the old ring still needed, every write would copy it.
                before = (ring, where.ring[layer])
                streamed = ring.seen_alone(self.tokens, context)
                new = jax.tree.map(lambda leaf: leaf[:, :, :0], new)
        keys = HeadKeys(full, before, new, where, streamed)
        return replace(self, full=full, ring=ring), keys


@struct.dataclass
class HeadKeys:
    """What the queries of new tokens of a layer attend to.

    Attributes:
      full: with the new tokens.
      before: the streaming heads without the new tokens, among a block of heads, and the first
        of them in it; None where no layer has any.
      new: keys and values of the new tokens, full heads first, [B,K,T,...].
      where: which heads are where.
      streamed: which tokens streaming heads see.
    """

    full: Pool
    before: tuple[Ring, Array] | None
    new: Pool
    where: Where
    streamed: Streamed

    def attend(
        self, q: Array, context: Context, allowed: Array, bias: Array | None, prefix: str = ""
    ) -> tuple[Array, Context]:
        """As `jaxheads.model.attention.Keys.attend`.

        Raises:
          ValueError: something edits, taps or reads attention maps, which do not exist here.
        """
        refuse_maps(context, "heads hold different tokens")
        assert context.layer is not None and bias is None
        b, t, h, dh = q.shape
        layer, where = context.layer, self.where
        order = where.order[layer]
        heads = len(order)
        q = q.reshape(b, t, heads, -1, dh)[:, :, order].reshape(b, t, h, dh)
        least, most = where.choices

        def branch(count: int) -> Any:
            return lambda: self._mixed(q, count, context, allowed)

        z = jax.lax.switch(
            where.counts[layer] - least, [branch(count) for count in range(least, most + 1)]
        )
        back = jnp.argsort(order)
        return z.reshape(b, t, heads, -1, dh)[:, :, back].reshape(b, t, h, dh), context

    def _mixed(self, q: Array, count: int, context: Context, allowed: Array) -> Array:
        """z [B,T,H,Dh] of a layer whose first `count` key/value heads are full."""
        config, layer, where = context.config, context.layer, self.where
        heads = self.new.k.shape[1]
        group = q.shape[2] // heads
        parts = []
        if count:
            k, v = cut(self.full, where.full[layer], count).decoded(q.dtype)
            k, v = (jnp.moveaxis(x, 1, 2) for x in (k, v))
            scores = attention_scores(
                q[:, :, : count * group], k, allowed,
                scale=config.attn_scale, softcap=config.attn_softcap,
            )  # fmt: skip
            parts.append(mix_values(jax.nn.softmax(scores, axis=-1), v))
        if count < heads:
            assert self.before is not None
            block, first = self.before
            ring = cut(block, first, heads - count)
            new = jax.tree.map(lambda leaf: leaf[:, count:], self.new)
            rest = q[:, :, count * group :]
            parts.append(attend_streaming(rest, ring, new, self.streamed, config))
        return jnp.concatenate(parts, axis=2)
