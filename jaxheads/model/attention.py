"""Attention as pure functions on arrays with an explicit head axis.

Axes: B batch, T queries, S keys, H query heads, K key/value heads, Dh head size,
D model width. Every function is usable on arrays of any model.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from jaxheads.model.context import Context
from jaxheads.model.parameters import optional

Array = jax.Array

MASKED = -1e30
"""The logit of a key that a query may not see: finite, so that edits of the logits
cannot turn it into NaN, and low enough that its weight is exactly zero."""


def project(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x [B,T,D] @ weight [D,H,Dh] (+ bias [H,Dh]) -> [B,T,H,Dh]."""
    heads = jnp.einsum("btd,dhe->bthe", x, weight.astype(x.dtype))
    return heads if bias is None else heads + bias.astype(x.dtype)


def attention_scores(q: Array, k: Array, allowed: Array) -> Array:
    """Masked logits q.k / sqrt(Dh), float32 [B,H,T,S].

    Args:
      q: [B,T,H,Dh].
      k: [B,S,K,Dh]; query head h reads key head h // (H/K).
      allowed: bool [B,1,T,S], True where a query sees a key.
    """
    b, t, h, dh = q.shape
    s, kv = k.shape[1], k.shape[2]
    grouped = q.reshape(b, t, kv, h // kv, dh)
    logits = jnp.einsum("btkge,bske->bkgts", grouped, k, preferred_element_type=jnp.float32)
    return mask_scores(logits.reshape(b, h, t, s) * dh**-0.5, allowed)


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
    return jnp.einsum("bthe,hed->bthd", z, weight.astype(z.dtype))


def merge_heads(z: Array, weight: Array) -> Array:
    """Sum over heads of `head_writes`, as one matrix product -> [B,T,D]."""
    return jnp.einsum("bthe,hed->btd", z, weight.astype(z.dtype))


class Attention(nnx.Module):
    """Holds q [D,H,Dh], k and v [D,K,Dh], o [H,Dh,D] and their optional biases."""

    def __init__(self, params: Mapping[str, Array]) -> None:
        self.q, self.k = nnx.Param(params["q"]), nnx.Param(params["k"])
        self.v, self.o = nnx.Param(params["v"]), nnx.Param(params["o"])
        self.q_bias, self.k_bias = optional(params, "q_bias"), optional(params, "k_bias")
        self.v_bias, self.o_bias = optional(params, "v_bias"), optional(params, "o_bias")

    def __call__(
        self, x: Array, context: Context, cached: tuple[Array, Array] | None
    ) -> tuple[Array, Context, tuple[Array, Array]]:
        """Attention over x [B,T,D].

        Args:
          x: normalised input of the branch.
          context: the place in the computation; carries mask, angles, edits and taps.
          cached: keys and values [B,S,K,Dh] of the slots before, or None.

        Returns:
          The branch output [B,T,D], the context with what was visited, and the keys and
          values [B,S,K,Dh] attended to.
        """
        q, context = context.visit("q_pre", project(x, self.q[...], _value(self.q_bias)))
        k, context = context.visit("k_pre", project(x, self.k[...], _value(self.k_bias)))
        q, context = context.visit("q", context.rotate(q))
        k, context = context.visit("k", context.rotate(k))
        v, context = context.visit("v", project(x, self.v[...], _value(self.v_bias)))
        if cached is not None:
            start = (0, context.start, 0, 0)
            k = jax.lax.dynamic_update_slice(cached[0], k.astype(cached[0].dtype), start)
            v = jax.lax.dynamic_update_slice(cached[1], v.astype(cached[1].dtype), start)
        z, context = self._attend(q, k, v, context)
        z, context = context.visit("z", z)
        if context.wants("head_out"):
            writes, context = context.visit("head_out", head_writes(z, self.o[...]))
            out = writes.sum(axis=2)
        else:
            out = merge_heads(z, self.o[...])
        if self.o_bias is not None:
            out = out + self.o_bias[...].astype(out.dtype)
        out, context = context.visit("attn_out", out)
        return out, context, (k, v)

    @staticmethod
    def _attend(q: Array, k: Array, v: Array, context: Context) -> tuple[Array, Context]:
        if not context.wants("scores", "pattern"):
            return jax.nn.dot_product_attention(q, k, v, mask=context.allowed), context
        scores, context = context.visit("scores", attention_scores(q, k, context.allowed))
        # The mask is the model's: an edit of the logits cannot reveal a key it hides.
        scores = mask_scores(scores, context.allowed)
        pattern, context = context.visit("pattern", jax.nn.softmax(scores, axis=-1))
        return mix_values(pattern, v), context


def _value(param: nnx.Param | None) -> Array | None:
    return None if param is None else param[...]
