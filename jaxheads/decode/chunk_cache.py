"""`ChunkCache`: each head attends to a few chunks of a long text, inside the trained length.

Source: Lu et al. (2024), "LongHeads", and its released code. The text is cut into chunks of w
tokens. A query sees the first chunk, the last full one, its own, and of the others those whose
representations fit it best, `chunks` in all. Their keys are placed side by side, rotated as if they
were at positions 0, 1, ..., and the query as if it stood at its place in the last of them: no
distance is larger than chunks * w, however long the text. Nothing is trained. Memory is that of a
full cache and more; what is saved is attention, and what is gained is length.

A chunk is represented for each query head: u is the mean over its tokens of attention among them,
not causal, and c = sum_i softmax(u k_i / sqrt(Dh)) k_i over its keys before their rotary encoding;
a query, before its own, scores it by q c. Here the scores of the query heads that share a key/value
head are averaged, as the paper's models have none that do. The released code, in prefill, does not
let a token see itself; here it does.

Rows have no padding, and at most w tokens are read at a time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxheads.decode.refusals import refuse_division, refuse_maps
from jaxheads.model.attention import MASKED
from jaxheads.model.config import ModelConfig
from jaxheads.model.context import Context
from jaxheads.model.rotary import rotary_angles, rotate

Array = jax.Array


@struct.dataclass
class ChunkCache:
    """Keys and values of C chunks of w tokens, and how each chunk is represented.

    Attributes:
      k: [L,B,C*w,K,Dh], before the rotary encoding, after edits.
      v: [L,B,C*w,K,Dh].
      queries: [L,B,w,H,Dh], with their encoding, of the chunk that is not yet full.
      about: float32 [L,B,C,H,Dh], c of each full chunk.
      mask: bool [B,C*w], True where a slot holds a token.
      length: int32 scalar, tokens read so far.
      chunks: n, that a query sees. Static.
    """

    k: Array
    v: Array
    queries: Array
    about: Array
    mask: Array
    length: Array
    chunks: int = struct.field(pytree_node=False)

    @classmethod
    def empty(
        cls, config: ModelConfig, batch: int, size: int, *, width: int = 256, chunks: int = 16
    ) -> ChunkCache:
        """A cache for rows of up to `size` tokens, which is rounded up to whole chunks.

        Args:
          config: of the model.
          batch: B.
          size: tokens.
          width: w, tokens of a chunk.
          chunks: n, chunks that a query sees.

        Raises:
          ValueError: chunks or tokens below their least (3 chunks: the first, the last full one
            and its own), more than the model's context, or a model without one rotary encoding.
        """
        if width < 1 or size < 1:
            raise ValueError(f"width and size must be at least 1 token, got {width} and {size}")
        if chunks < 3:
            raise ValueError(f"chunks must be at least 3, got {chunks}")
        if chunks * width > config.context_length:
            raise ValueError(
                f"{chunks} chunks of {width} tokens exceed the model's context of "
                f"{config.context_length}, which they are to stay within"
            )
        if len(set(config.ropes)) != 1 or config.ropes[0] is None or not config.causal:
            raise ValueError(
                "chunks are placed anew by one rotary encoding of a causal model, got "
                f"{len(set(config.ropes))} encodings, causal={config.causal}"
            )
        if any(config.windows):
            raise ValueError(f"chunks need layers without windows, got {set(config.windows)}")
        count = -(-size // width)
        layers, heads, kv, dims = (
            config.n_layers,
            config.n_heads,
            config.n_kv_heads,
            config.head_dim,
        )

        def zeros(*shape: int, dtype: Any = config.compute_dtype) -> Array:
            return jnp.zeros((layers, batch, *shape, dims), dtype)

        return cls(
            k=zeros(count * width, kv),
            v=zeros(count * width, kv),
            queries=zeros(width, heads),
            about=zeros(count, heads, dtype=jnp.float32),
            mask=jnp.zeros((batch, count * width), bool),
            length=jnp.zeros((), jnp.int32),
            chunks=chunks,
        )

    @property
    def size(self) -> int:
        """Tokens that can be read."""
        return int(self.mask.shape[1])

    @property
    def width(self) -> int:
        """w."""
        return int(self.queries.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values, queries and representations."""
        return sum(int(x.nbytes) for x in (self.k, self.v, self.queries, self.about))

    def started(self, mask: Array) -> ChunkCache:
        """With the mask [B,T] of the tokens about to be read.

        Raises:
          ValueError: more of them than a chunk has.
        """
        if mask.shape[1] > self.width:
            raise ValueError(
                f"at most a chunk of {self.width} tokens is read at a time, got {mask.shape[1]}"
            )
        here = jax.lax.dynamic_update_slice(self.mask, refuse_division(mask), (0, self.length))
        return replace(self, mask=here)

    def ended(self, mask: Array) -> ChunkCache:
        """After all layers have read the tokens of mask [B,T]."""
        return replace(self, length=self.length + mask.shape[1])

    def extend(self, k: Array, v: Array, context: Context) -> tuple[ChunkCache, ChunkKeys]:
        """As `jaxheads.model.attention.Cached.extend`."""
        layer, start, width, count = context.layer, context.start, self.width, k.shape[1]
        assert layer is not None and context.angles is not None

        def put(cache: Array, new: Array) -> Array:
            at = (layer, 0, start, 0, 0)
            return jax.lax.dynamic_update_slice(cache, new[None].astype(cache.dtype), at)

        held = replace(self, k=put(self.k, unrotated(k, context.angles)), v=put(self.v, v))
        new = unrotated(context.q, context.angles).astype(self.queries.dtype)
        number, offset = start // width, start % width

        def placed(queries: Array, first: Array | int) -> Array:
            """Of the slots of a chunk, those of new tokens, the first of which is at `first`."""
            index = jnp.arange(width) - first
            mine = ((index >= 0) & (index < count))[:, None, None]
            return jnp.where(mine, jnp.take(new, jnp.clip(index, 0, count - 1), axis=1), queries)

        queries = placed(self.queries[layer], offset)
        full = offset + count >= width
        keys, values = (
            jax.lax.dynamic_slice_in_dim(x[layer], number * width, width, axis=1)
            for x in (held.k, held.v)
        )
        about = represented(queries, keys, values, context.config)
        about = jnp.where(full, about, self.about[layer][:, number])
        at = (layer, 0, number, 0, 0)
        held = replace(
            held,
            queries=self.queries.at[layer].set(
                jnp.where(full, placed(queries, offset - width), queries)
            ),
            about=jax.lax.dynamic_update_slice(self.about, about[None, :, None], at),
        )
        return held, ChunkKeys(held.k[layer], held.v[layer], held.about[layer], new, self.chunks)


@struct.dataclass
class ChunkKeys:
    """What the queries of new tokens of a layer attend to; the attributes without L.

    Attributes:
      k: as in `ChunkCache`.
      v: as in `ChunkCache`.
      about: as in `ChunkCache`.
      q: [B,T,H,Dh], the queries before their encoding.
      chunks: n. Static.
    """

    k: Array
    v: Array
    about: Array
    q: Array
    chunks: int = struct.field(pytree_node=False)

    def attend(
        self, q: Array, context: Context, allowed: Array, bias: Array | None, prefix: str = ""
    ) -> tuple[Array, Context]:
        """As `jaxheads.model.attention.Keys.attend`.

        Raises:
          ValueError: something edits, taps or reads attention maps, which do not exist here.
        """
        refuse_maps(context, "every query sees chunks of its own")
        assert bias is None
        config = context.config
        b, t, h, dh = q.shape
        kv, count = self.k.shape[2], self.about.shape[1]
        width = self.k.shape[1] // count
        mine = context.slots[0] // width
        ids = self._chosen(mine)
        valid = ids < count
        # [B,T,K,n,w], the tokens of the chosen chunks in order.
        tokens = ids[..., None] * width + jnp.arange(width)
        seen = valid[..., None] & (tokens <= context.slots[0][:, None, None, None])
        rows = jnp.arange(b)[:, None, None, None]
        heads = jnp.arange(kv)[:, None]
        at = jnp.minimum(tokens, self.k.shape[1] - 1).reshape(b, t, kv, -1)
        k, v = (x[rows, at, heads] for x in (self.k, self.v))
        k = _rotated(k.reshape(b * t * kv, -1, 1, dh), jnp.arange(k.shape[3]), config)
        k = k.reshape(b, t, kv, -1, dh).astype(q.dtype)
        place = (valid.sum(axis=-1) - 1) * width + (context.slots[0] % width)[:, None]
        grouped = self.q.reshape(b * t * kv, 1, h // kv, dh)
        grouped = _rotated(grouped, place.reshape(-1, 1), config).reshape(b, t, kv, -1, dh)
        scale = dh**-0.5 if config.attn_scale is None else config.attn_scale
        logits = jnp.einsum("btkge,btkje->btkgj", grouped, k, preferred_element_type=jnp.float32)
        logits = logits * scale
        if config.attn_softcap is not None:
            logits = config.attn_softcap * jnp.tanh(logits / config.attn_softcap)
        logits = jnp.where(seen.reshape(b, t, kv, 1, -1), logits, MASKED)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        z = jnp.einsum("btkgj,btkje->btkge", weights, v)
        return z.reshape(b, t, h, dh).astype(q.dtype), context

    def _chosen(self, mine: Array) -> Array:
        """int32 [B,T,K,n], chunks in ascending order; the number of chunks where there are fewer.

        Args:
          mine: int [T], the chunk of each query.
        """
        b, t, h, _ = self.q.shape
        kv, count = self.k.shape[2], self.about.shape[1]
        q = self.q.astype(jnp.float32)
        fit = jnp.einsum("bthe,bche->bthc", q, self.about)
        fit = fit.reshape(b, t, kv, h // kv, count).mean(axis=3)
        index, mine = jnp.arange(count), mine[:, None, None]
        always = (index == 0) | (index == mine) | (index == mine - 1)
        fit = jnp.where(index > mine, -jnp.inf, jnp.where(always, jnp.inf, fit))
        best, ids = jax.lax.top_k(fit, min(self.chunks, count))
        return jnp.sort(jnp.where(best == -jnp.inf, count, ids), axis=-1)


def represented(q: Array, k: Array, v: Array, config: ModelConfig) -> Array:
    """c of one full chunk, float32 [B,H,Dh].

    Args:
      q: [B,w,H,Dh], before the rotary encoding.
      k: [B,w,K,Dh], before it.
      v: [B,w,K,Dh].
      config: of the model.
    """
    width, group = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2).astype(jnp.float32) for x in (k, v))
    q = q.astype(jnp.float32)
    local = jnp.arange(width)
    scale = q.shape[-1] ** -0.5 if config.attn_scale is None else config.attn_scale
    turned = (_rotated(x, local, config) for x in (q, k))
    weights = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", *turned) * scale, axis=-1)
    u = jnp.einsum("bhts,bshe->bhe", weights, v) / width
    weights = jax.nn.softmax(jnp.einsum("bhe,bshe->bhs", u, k) * scale, axis=-1)
    return jnp.einsum("bhs,bshe->bhe", weights, k)


def unrotated(x: Array, angles: Array) -> Array:
    """x [B,T,H,Dh] before it was rotated by angles [2,B,T,1,dim/2]."""
    cos, sin = angles
    size = cos**2 + sin**2
    return rotate(x, cos / size, -sin / size)


def _rotated(x: Array, positions: Array, config: ModelConfig) -> Array:
    """x [N,T,H,Dh] at positions [T] or [N,T]."""
    positions = jnp.broadcast_to(positions, x.shape[:2])
    cos, sin = rotary_angles(positions, config.ropes[:1], config.rotated_dim)[0]
    return rotate(x, cos, sin)
