"""Choosing the next token from logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array


@struct.dataclass
class Sampler:
    """Sampling options as arrays, so that their values do not recompile.

    Attributes:
      temperature: float32 scalar; 0 is greedy.
      top_k: int32 scalar, tokens kept; the vocabulary's size keeps all.
      top_p: float32 scalar, probability kept; 1 keeps all.
      greedy: whether temperature is 0. Static, so that greedy decoding sorts nothing.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    greedy: bool = struct.field(pytree_node=False)

    @classmethod
    def of(
        cls, temperature: float, top_k: int | None, top_p: float | None, vocab_size: int
    ) -> Sampler:
        """Checks options and makes them arrays.

        Raises:
          ValueError: temperature below 0, top_k below 1, or top_p outside (0, 1].
        """
        if not temperature >= 0:
            raise ValueError(f"temperature must be 0 or more, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
        return cls(
            temperature=jnp.float32(temperature),
            top_k=jnp.int32(vocab_size if top_k is None else min(top_k, vocab_size)),
            top_p=jnp.float32(1.0 if top_p is None else top_p),
            greedy=temperature == 0,
        )


def sample(sampler: Sampler, logits: Array, key: Array) -> Array:
    """Draws int32 [B] from logits [B,V].

    Top-p keeps the smallest set of most likely tokens whose probability, after top-k and
    temperature, reaches p (Holtzman et al. 2020); the most likely token is always kept.
    """
    if sampler.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1) / sampler.temperature
    ranked = jnp.where(jnp.arange(ranked.shape[-1]) < sampler.top_k, ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    ranked = jnp.where(before < sampler.top_p, ranked, -jnp.inf)
    chosen = jax.random.categorical(key, ranked, axis=-1)
    return jnp.take_along_axis(order, chosen[:, None], axis=-1)[:, 0].astype(jnp.int32)
