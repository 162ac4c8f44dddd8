"""Attention as pure functions on arrays with an explicit head axis.

Axes: B batch, T queries, S keys, H query heads, K key/value heads, Dh head size,
D model width. Every function is usable on arrays of any model.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxheads.model.context import Context
from jaxheads.model.layout import contract, like_heads, whole
from jaxheads.model.norms import optional_norm
from jaxheads.model.parameters import optional

Array = jax.Array

MASKED = -1e30
"""The logit of a key that a query may not see: finite, so that edits of the logits
cannot turn it into NaN, and low enough that its weight is exactly zero."""


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
    s, kv = k.shape[1], k.shape[2]
    grouped = q.reshape(b, t, kv, h // kv, dh)
    logits = jnp.einsum("btkge,bske->bkgts", grouped, k, preferred_element_type=jnp.float32)
    logits = logits.reshape(b, h, t, s) * (dh**-0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    return mask_scores(logits if bias is None else logits + bias, allowed)


def mask_scores(scores: Array, allowed: Array) -> Array:
    """Sets the logits of keys that a query may not see to `MASKED`."""
    return jnp.where(allowed, scores, MASKED)


def mix_values(pattern: Array, v: Array) -> Array:
    """pattern [B,H,T,S] applied to v [B,S,K,Dh] -> z [B,T,H,Dh]."""
    b, h, t, s = pattern.shape
    kv, dh = v.shape[2], v.shape[3]
    grouped = pattern.astype(v.dtype).reshape(b, kv, h // kv, t, s)
    return jnp.einsum("bkgts,bske->btkge", grouped, v).reshape(b, t, h, dh)


def head_writes(z: Array, weight: Array) -> Array:
    """Each head's own write z_h W_O[h]: z [B,T,H,Dh], weight [H,Dh,D] -> [B,T,H,D]."""
    return contract("bthe,hed->bthd", z, weight.astype(z.dtype))


def merge_heads(z: Array, weight: Array) -> Array:
    """Sum over heads of `head_writes`, as one matrix product -> [B,T,D]."""
    return contract("bthe,hed->btd", z, weight.astype(z.dtype))


class Attention(nnx.Module):
    """Holds q [D,H,Dh], k and v [D,K,Dh], o [H,Dh,D], their optional biases and qk-norms."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.q, self.k = nnx.Param(params["q"]), nnx.Param(params["k"])
        self.v, self.o = nnx.Param(params["v"]), nnx.Param(params["o"])
        self.q_bias, self.k_bias = optional(params, "q_bias"), optional(params, "k_bias")
        self.v_bias, self.o_bias = optional(params, "v_bias"), optional(params, "o_bias")
        self.q_norm, self.k_norm = optional_norm(params, "q_norm"), optional_norm(params, "k_norm")

    def __call__(
        self, x: Array, context: Context, cached: tuple[Array, Array] | None
    ) -> tuple[Array, Context, tuple[Array, Array]]:
        """Attention of x [B,T,D] to itself and to what is cached.

        Args:
          x: what the branch reads.
          context: the place in the computation; carries mask, angles, edits and taps.
          cached: keys and values [B,S,K,Dh] of the slots before, or None.

        Returns:
          The sum of the heads' writes and the bias [B,T,D], the context with what was
          visited, and the keys and values [B,S,K,Dh] attended to.
        """
        q, context = context.visit("q_pre", project(x, self.q[...], _value(self.q_bias)))
        k, context = context.visit("k_pre", project(x, self.k[...], _value(self.k_bias)))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, context.config), self.k_norm(k, context.config)
        q, context = context.visit("q", context.rotate(q))
        k, context = context.visit("k", context.rotate(k))
        v, context = context.visit("v", project(x, self.v[...], _value(self.v_bias)))
        if cached is not None:
            start = (0, context.start, 0, 0)
            k = jax.lax.dynamic_update_slice(cached[0], k.astype(cached[0].dtype), start)
            v = jax.lax.dynamic_update_slice(cached[1], v.astype(cached[1].dtype), start)
        out, context = self._heads(q, k, v, context, context.allowed, context.bias)
        return out, context, (k, v)

    def attend_to_memory(self, x: Array, context: Context) -> tuple[Array, Context]:
        """Attention of x [B,T,D] to an encoder's output, at the sites `cross.*`."""
        memory, allowed = context.memory, context.memory_allowed
        if memory is None or allowed is None:
            raise ValueError("a block with cross-attention needs the output of an encoder")
        cross = "cross."
        q, context = context.visit(cross + "q", project(x, self.q[...], _value(self.q_bias)))
        k, context = context.visit(cross + "k", project(memory, self.k[...], _value(self.k_bias)))
        v, context = context.visit(cross + "v", project(memory, self.v[...], _value(self.v_bias)))
        return self._heads(q, k, v, context, allowed, None, cross)

    def _heads(
        self,
        q: Array,
        k: Array,
        v: Array,
        context: Context,
        allowed: Array,
        bias: Array | None,
        prefix: str = "",
    ) -> tuple[Array, Context]:
        route: Any = context.edits.get(prefix + "z")
        skip = getattr(route, "skip", None)
        if skip is not None and q.shape[1] > skip[0]:
            # Only the heads that each token chose, without z.
            out = route.attend(q, k, v, self.o[...], context, allowed, bias, prefix)
        else:
            out, context = self._every_head(q, k, v, context, allowed, bias, prefix)
        if self.o_bias is not None:
            out = out + self.o_bias[...].astype(out.dtype)
        return out, context

    def _every_head(
        self,
        q: Array,
        k: Array,
        v: Array,
        context: Context,
        allowed: Array,
        bias: Array | None,
        prefix: str,
    ) -> tuple[Array, Context]:
        z, context = _attend(q, k, v, context, allowed, bias, prefix)
        z, context = context.visit(prefix + "z", z)
        if context.wants(prefix + "head_out"):
            writes, context = context.visit(prefix + "head_out", head_writes(z, self.o[...]))
            return writes.sum(axis=2), context
        return merge_heads(z, self.o[...]), context


def _attend(
    q: Array,
    k: Array,
    v: Array,
    context: Context,
    allowed: Array,
    bias: Array | None,
    prefix: str,
) -> tuple[Array, Context]:
    """z [B,T,H,Dh]; the maps [B,H,T,S] exist only where somebody asks for them."""
    scale, softcap = context.config.attn_scale, context.config.attn_softcap
    k, v = (like_heads(whole(kv, 1), q) for kv in (k, v))
    if softcap is None and not context.wants(prefix + "scores", prefix + "pattern"):
        # Not every backend multiplies float16 with float32 sums here.
        dtype = jnp.float32 if q.dtype == jnp.float16 else q.dtype
        k, v = k.astype(dtype), v.astype(dtype)
        bias = None if bias is None else bias.astype(dtype)
        # The weights [B,H,T,S] are computed again in the backward pass instead of kept.
        fused = partial(jax.nn.dot_product_attention, bias=bias, mask=allowed, scale=scale)
        z = jax.checkpoint(fused, prevent_cse=False)(q.astype(dtype), k, v)
        return z.astype(q.dtype), context
    scores = attention_scores(q, k, allowed, scale=scale, softcap=softcap, bias=bias)
    scores, context = context.visit(prefix + "scores", scores)
    # The mask is the model's: an edit of the logits cannot reveal a key it hides.
    scores = mask_scores(scores, allowed)
    pattern, context = context.visit(prefix + "pattern", jax.nn.softmax(scores, axis=-1))
    return mix_values(pattern, v), context


def _value(param: nnx.Param | None) -> Array | None:
    return None if param is None else param[...]
