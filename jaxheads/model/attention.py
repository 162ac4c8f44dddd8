"""Attention as pure functions on arrays with an explicit head axis.

Axes: B batch, T queries, S keys, H query heads, K key/value heads, Dh head size,
D model width. Every function is usable on arrays of any model.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx, struct

from jaxheads.model.context import Context
from jaxheads.model.layout import axes_of, contract, like_heads, whole
from jaxheads.model.norms import optional_norm
from jaxheads.model.parameters import optional

Array = jax.Array

MASKED = -1e30
"""The logit of a key that a query may not see: finite, so that edits of the logits
cannot turn it into NaN, and low enough that its weight is exactly zero."""

PIECE = 512
"""Slots that are worth a program of their own, which leaves those after them out."""


def project(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x [B,T,D] @ weight [D,H,Dh] (+ bias [H,Dh]) -> [B,T,H,Dh]."""
    heads = contract("btd,dhe->bthe", x, weight.astype(x.dtype))
    return heads if bias is None else heads + bias.astype(x.dtype)


def attention_scores(
    q: Array,
    k: Array,
    allowed: Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Array | None = None,
) -> Array:
    """Masked attention logits, float32 [B,H,T,S].

    Args:
      q: [B,T,H,Dh].
      k: [B,S,K,Dh]; query head h reads key head h // (H/K).
      allowed: bool [B,1,T,S], True where a query sees a key.
      scale: factor of q.k; None for Dh ** -0.5.
      softcap: the logits x become softcap * tanh(x / softcap).
      bias: [1 or B,H,T,S], added to the logits.
    """
    b, t, h, dh = q.shape
    rows = _rows(q.reshape(b, t, k.shape[2], -1, dh).transpose(0, 2, 3, 1, 4), axes_of(q)[1])
    keys = k.transpose(0, 2, 1, 3)
    logits = jnp.einsum("bk...e,bkse->bk...s", rows, keys, preferred_element_type=jnp.float32)
    # By way of the groups: a divided axis is split or merged, not both at once.
    logits = logits.reshape(b, k.shape[2], -1, t, k.shape[1]).reshape(b, h, t, -1)
    logits = logits * (dh**-0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    return mask_scores(logits if bias is None else logits + bias, allowed)


def mask_scores(scores: Array, allowed: Array) -> Array:
    """Sets the logits of keys that a query may not see to `MASKED`."""
    return jnp.where(allowed, scores, MASKED)


def mix_values(pattern: Array, v: Array) -> Array:
    """pattern [B,H,T,S] applied to v [B,S,K,Dh] -> z [B,T,H,Dh]."""
    b, h, t, s = pattern.shape
    kv, dh = v.shape[2:]
    rows = _rows(pattern.astype(v.dtype).reshape(b, kv, -1, t, s), axes_of(pattern)[2])
    z = jnp.einsum("bk...s,bkse->bk...e", rows, v.transpose(0, 2, 1, 3))
    return z.reshape(b, kv, -1, t, dh).transpose(0, 3, 1, 2, 4).reshape(b, t, h, dh)


def _rows(grouped: Array, divided: tuple[str, ...]) -> Array:
    """[B,K,G,T,E] as [B,K,G*T,E], unless the T are divided over devices.

    A product of matrices with one axis of rows is twice as fast as one with two, on CPU.
    """
    if divided:
        return grouped
    b, kv, _, _, size = grouped.shape
    return grouped.reshape(b, kv, -1, size)


def head_writes(z: Array, weight: Array) -> Array:
    """Each head's own write z_h W_O[h]: z [B,T,H,Dh], weight [H,Dh,D] -> [B,T,H,D]."""
    return contract("bthe,hed->bthd", z, weight.astype(z.dtype))


def merge_heads(z: Array, weight: Array) -> Array:
    """Sum over heads of `head_writes`, as one matrix product -> [B,T,D]."""
    return contract("bthe,hed->btd", z, weight.astype(z.dtype))


class Keys(Protocol):
    """What queries attend to: keys and values of the tokens that they may see."""

    def attend(
        self, q: Array, context: Context, allowed: Array, bias: Array | None, prefix: str = ""
    ) -> tuple[Array, Context]:
        """Attention of q [B,T,H,Dh].

        Args:
          q: after position encoding and edits.
          context: the place in the computation.
          allowed: bool [B,1,T or 1,S], True where a query sees a key.
          bias: [1 or B,H,T,S], added to the logits, or None.
          prefix: of the names of the sites: "" or "cross.".

        Returns:
          z [B,T,H,Dh], and the context with the maps that were visited.
        """
        ...


class Cached(Protocol):
    """Keys and values of tokens already read, to which those of new ones can be added."""

    def extend(self, k: Array, v: Array, context: Context) -> tuple[Any, Keys]:
        """Takes the keys and values of new tokens of a layer.

        Args:
          k: [B,T,K,Dh], after position encoding and edits.
          v: [B,T,K,Dh].
          context: of the layer; the first token goes to the slot `context.start`.

        Returns:
          The cache that holds them, of the same type, and what these tokens' queries attend to.
        """
        ...


@struct.dataclass
class Slots:
    """Keys and values of one layer, every token at its slot.

    Attributes:
      k: [B,S,K,Dh], after position encoding and edits.
      v: [B,S,K,Dh], after edits.
      used: int32 scalar, first slots that may be seen; None for all. What comes after them is
        left out of the products, a piece of `PIECE` slots or more at a time.
    """

    k: Array
    v: Array
    used: Array | int | None = None

    def extend(self, k: Array, v: Array, context: Context) -> tuple[Slots, Slots]:
        """As `Cached.extend`."""
        start = (0, context.start, 0, 0)
        written = Slots(
            jax.lax.dynamic_update_slice(self.k, k.astype(self.k.dtype), start),
            jax.lax.dynamic_update_slice(self.v, v.astype(self.v.dtype), start),
        )
        return written, written

    def attend(
        self, q: Array, context: Context, allowed: Array, bias: Array | None, prefix: str = ""
    ) -> tuple[Array, Context]:
        """As `Keys.attend`; the maps [B,H,T,S] exist only where somebody asks for them."""
        scale, softcap = context.config.attn_scale, context.config.attn_softcap
        # Not every backend multiplies float16 with float32 sums.
        dtype = jnp.float32 if q.dtype == jnp.float16 else q.dtype
        k, v = (like_heads(whole(kv, 1), q).astype(dtype) for kv in (self.k, self.v))
        scored = partial(attention_scores, scale=scale, softcap=softcap)
        if not context.wants(prefix + "scores", prefix + "pattern"):

            def over(size: int, q: Array, k: Array, v: Array) -> Array:
                near = None if bias is None else bias[..., :size]
                scores = scored(q, k[:, :size], allowed[..., :size], bias=near)
                return mix_values(jax.nn.softmax(scores, axis=-1), v[:, :size])

            def mixed(q: Array, k: Array, v: Array) -> Array:
                pieces = min(8, k.shape[1] // PIECE)
                if self.used is None or q.shape[1] == 1 or pieces < 2:
                    return over(k.shape[1], q, k, v)
                sizes = [-(-k.shape[1] * (i + 1) // pieces) for i in range(pieces)]
                enough = jnp.searchsorted(jnp.asarray(sizes), self.used)
                return jax.lax.switch(enough, [partial(over, size) for size in sizes], q, k, v)

            # The weights [B,H,T,S] are computed again in the backward pass instead of kept.
            z = jax.checkpoint(mixed, prevent_cse=False)(q.astype(dtype), k, v)
            return z.astype(q.dtype), context
        scores = scored(q.astype(dtype), k, allowed, bias=bias)
        scores, context = context.visit(prefix + "scores", scores)
        # The mask is the model's: an edit of the logits cannot reveal a key it hides.
        scores = mask_scores(scores, allowed)
        pattern, context = context.visit(prefix + "pattern", jax.nn.softmax(scores, axis=-1))
        return mix_values(pattern, v).astype(q.dtype), context


class Attention(nnx.Module):
    """Holds q [D,H,Dh], k and v [D,K,Dh], o [H,Dh,D], their optional biases and qk-norms."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.q, self.k = nnx.Param(params["q"]), nnx.Param(params["k"])
        self.v, self.o = nnx.Param(params["v"]), nnx.Param(params["o"])
        self.q_bias, self.k_bias = optional(params, "q_bias"), optional(params, "k_bias")
        self.v_bias, self.o_bias = optional(params, "v_bias"), optional(params, "o_bias")
        self.q_norm, self.k_norm = optional_norm(params, "q_norm"), optional_norm(params, "k_norm")

    def __call__(
        self, x: Array, context: Context, cached: Cached | None
    ) -> tuple[Array, Context, Any]:
        """Attention of x [B,T,D] to itself and to what is cached.

        Args:
          x: what the branch reads.
          context: the place in the computation; carries mask, angles, edits and taps.
          cached: the tokens before, or None.

        Returns:
          The sum of the heads' writes and the bias [B,T,D], the context with what was
          visited, and `cached` with these tokens; their own `Slots` where there was none.
        """
        q, context = context.visit("q_pre", project(x, self.q[...], _value(self.q_bias)))
        k, context = context.visit("k_pre", project(x, self.k[...], _value(self.k_bias)))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, context.config), self.k_norm(k, context.config)
        q, context = context.visit("q", context.rotate(q))
        k, context = context.visit("k", context.rotate(k))
        v, context = context.visit("v", project(x, self.v[...], _value(self.v_bias)))
        keys: Keys
        if cached is None:
            cached = keys = Slots(k, v)
        else:
            cached, keys = cached.extend(k, v, context)
        out, context = self._heads(q, keys, context, context.allowed, context.bias)
        return out, context, cached

    def attend_to_memory(self, x: Array, context: Context) -> tuple[Array, Context]:
        """Attention of x [B,T,D] to an encoder's output, at the sites `cross.*`."""
        memory, allowed = context.memory, context.memory_allowed
        if memory is None or allowed is None:
            raise ValueError("a block with cross-attention needs the output of an encoder")
        cross = "cross."
        q, context = context.visit(cross + "q", project(x, self.q[...], _value(self.q_bias)))
        k, context = context.visit(cross + "k", project(memory, self.k[...], _value(self.k_bias)))
        v, context = context.visit(cross + "v", project(memory, self.v[...], _value(self.v_bias)))
        return self._heads(q, Slots(k, v), context, allowed, None, cross)

    def _heads(
        self,
        q: Array,
        keys: Keys,
        context: Context,
        allowed: Array,
        bias: Array | None,
        prefix: str = "",
    ) -> tuple[Array, Context]:
        route: Any = context.edits.get(prefix + "z")
        skip = getattr(route, "skip", None)
        if skip is not None and q.shape[1] > skip[0]:
            # Only the heads that each token chose, without z.
            out = route.attend(q, keys, self.o[...], context, allowed, bias, prefix)
        else:
            z, context = keys.attend(q, context, allowed, bias, prefix)
            out, context = self._merged(z, context, prefix)
        if self.o_bias is not None:
            out = out + self.o_bias[...].astype(out.dtype)
        return out, context

    def _merged(self, z: Array, context: Context, prefix: str) -> tuple[Array, Context]:
        """The sum of the heads' writes [B,T,D] of z [B,T,H,Dh]."""
        z, context = context.visit(prefix + "z", z)
        if context.wants(prefix + "head_out"):
            writes, context = context.visit(prefix + "head_out", head_writes(z, self.o[...]))
            return writes.sum(axis=2), context
        return merge_heads(z, self.o[...]), context


def _value(param: nnx.Param | None) -> Array | None:
    return None if param is None else param[...]
