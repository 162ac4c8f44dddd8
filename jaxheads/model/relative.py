"""Relative position biases (Raffel et al. 2020, section 2.1)."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from jaxheads.model.config import ModelConfig

Array = jax.Array


def relative_bucket(distance: Array, buckets: int, farthest: int, causal: bool) -> Array:
    """The bucket of a distance, as T5's reference implementation counts them.

    Half of the buckets hold one distance each, the other half grow logarithmically up to
    `farthest`. Where not causal, half of all are for keys after the query.

    Args:
      distance: int, key minus query, in tokens.
      buckets: number of buckets.
      farthest: distances from here on share the last bucket.
      causal: whether keys only stand before their query.
    """
    start: Array | int = 0
    if causal:
        steps = jnp.maximum(-distance, 0)
    else:
        buckets //= 2
        start, steps = jnp.where(distance > 0, buckets, 0), jnp.abs(distance)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(steps, 1) / exact) / jnp.log(farthest / exact)
    far = exact + (ratio * (buckets - exact)).astype(jnp.int32)
    return start + jnp.where(steps < exact, steps, jnp.minimum(far, buckets - 1))


class RelativeBias(nnx.Module):
    """Holds the table bias [N,H], shared by all layers."""

    def __init__(self, params: Mapping[str, Array]) -> None:
        self.bias = nnx.Param(params["bias"])

    def __call__(self, queries: Array, keys: Array, config: ModelConfig) -> Array:
        """What is added to the attention logits, float32 [1,H,T,S].

        Args:
          queries: int [T], slots of the queries.
          keys: int [S], slots of the keys.
          config: the model's config.
        """
        distance = keys[None, :] - queries[:, None]
        bucket = relative_bucket(
            distance, config.relative_buckets, config.relative_distance, config.causal
        )
        return jnp.moveaxis(self.bias[...].astype(jnp.float32)[bucket], -1, 0)[None]
