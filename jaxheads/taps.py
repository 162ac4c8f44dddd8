"""Reducers for taps, and statistics gathered with them.

A reducer is a function of (value, context) that runs inside the layer scan, so that only
its result is stacked over layers. Values and results are given without the layer axis.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from jaxheads.model.batch import Batch
from jaxheads.model.context import Context, Tap
from jaxheads.model.transformer import Transformer
from jaxheads.sites import find_site

Array = jax.Array


def head_norm(value: Array, context: Context) -> Array:
    """Euclidean norm over the last axis, float32: [B,T,H,Dh] -> [B,T,H]."""
    return jnp.linalg.norm(value.astype(jnp.float32), axis=-1)


def last_token(value: Array, context: Context) -> Array:
    """The value at each row's last real query token: [B,T,...] -> [B,...]."""
    width = context.token_mask.shape[1]
    last = width - 1 - jnp.argmax(context.token_mask[:, ::-1], axis=1)
    value = jnp.moveaxis(value, context.token_axis, 1)
    return jnp.take_along_axis(value, last.reshape(-1, *(1,) * (value.ndim - 1)), axis=1)[:, 0]


def token_sum(value: Array, context: Context) -> Array:
    """Sum over the tokens that count in a mean, float32: [B,T,...] -> [...].

    Padding is left out, and so is each row's first token: it is the attention sink and can
    carry an activation thousands of times the norm of any other.
    """
    weights = counted_tokens(context).astype(jnp.float32)
    value = jnp.moveaxis(value, context.token_axis, 1)
    return jnp.einsum("bt,bt...->...", weights, value.astype(jnp.float32))


def counted_tokens(context: Context) -> Array:
    """bool [B,T]: real tokens other than the first of their row."""
    return context.token_mask & (context.positions > 0)


def mean_activation(model: Transformer, batches: Iterable[Batch], site: str = "z") -> Array:
    """Mean of a site over real tokens of data, the first token of each row left out.

    Args:
      model: the model.
      batches: at least one batch; batches of one shape share one compiled program.
      site: a site whose value has batch and token axes.

    Returns:
      float32 without the batch and token axes, e.g. [L,H,Dh] for `z`.

    Raises:
      ValueError: no batch, no token that counts, or a site without a token axis per value.
    """
    if find_site(site).axes[:2] != ("B", "T"):
        raise ValueError(f"site {site!r} {find_site(site).signature} has no mean over tokens")
    total, count = jnp.zeros(()), jnp.zeros((), jnp.int32)
    for batch in batches:
        sums, tokens = _token_sums(model, batch, site)
        total, count = total + sums, count + tokens
    if not int(count):
        raise ValueError("no tokens to average: expected a batch with rows of two or more tokens")
    return total / count


@jax.jit(static_argnames="site")
def _token_sums(model: Transformer, batch: Batch, site: str) -> tuple[Array, Array]:
    taps = {
        "sum": Tap(site, token_sum),
        "count": Tap("embed", lambda value, context: counted_tokens(context).sum()),
    }
    nothing = jnp.zeros((batch.tokens.shape[0], 0), jnp.int32)
    # What follows the stack is left out, unless it is what is asked for.
    logits_at = nothing if find_site(site).stacked else None
    found = model(batch, taps=taps, logits_at=logits_at).taps
    return found["sum"], found["count"]
