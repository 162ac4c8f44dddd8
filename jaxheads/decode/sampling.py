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
      min_p: float32 scalar, share of the largest probability below which a token is left
        out; 0 keeps all.
      repetition_penalty: float32 scalar; 1 changes nothing.
      greedy: whether temperature is 0. Static, so that greedy decoding draws nothing.
      cuts: whether top_k or top_p was given. Static, so that nothing is searched without.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    repetition_penalty: Array
    greedy: bool = struct.field(pytree_node=False)
    cuts: bool = struct.field(pytree_node=False)

    @classmethod
    def of(
        cls,
        vocab_size: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
    ) -> Sampler:
        """Checks options and makes them arrays.

        Args:
          vocab_size: V of the model.
          temperature: 0 takes the most likely token; otherwise logits are divided by it.
          top_k: keep the k most likely tokens only.
          top_p: keep the fewest tokens whose probability reaches p only.
          min_p: keep tokens at least min_p times as likely as the most likely one only.
          repetition_penalty: above 1 makes tokens that occurred less likely.

        Raises:
          ValueError: temperature below 0, top_k below 1, top_p outside (0, 1], min_p
            outside [0, 1], or a repetition penalty that is not above 0.
        """
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
        if min_p is not None and not 0 <= min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1], got {min_p}")
        if not 0 < repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be above 0, got {repetition_penalty}")
        return cls(
            temperature=jnp.float32(temperature),
            top_k=jnp.int32(vocab_size if top_k is None else min(top_k, vocab_size)),
            top_p=jnp.float32(1.0 if top_p is None else top_p),
            min_p=jnp.float32(0.0 if min_p is None else min_p),
            repetition_penalty=jnp.float32(repetition_penalty),
            greedy=temperature == 0,
            cuts=temperature != 0 and (top_k is not None or top_p is not None),
        )


def sample(sampler: Sampler, logits: Array, seen: Array, key: Array) -> Array:
    """Draws the next token of each row.

    In this order: the repetition penalty, the temperature, top-k, top-p, min-p. Top-p
    (Holtzman et al. 2020) keeps the smallest set of most likely tokens whose probability, after
    top-k and temperature, reaches p; min-p (Nguyen et al. 2024) those whose probability is at
    least min_p times the largest. The most likely token is always kept, and tokens exactly as
    likely as one that is kept are kept too.

    Args:
      sampler: the options.
      logits: float32 [B,V].
      seen: bool [B,V], tokens that occurred in the prompt or in the output.
      key: random key; not read if greedy.

    Returns:
      int32 [B].
    """
    logits = penalised(logits, seen, sampler.repetition_penalty)
    if sampler.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = logits / sampler.temperature
    if sampler.cuts:
        scaled = _cut(scaled, sampler)
    least = scaled.max(axis=-1, keepdims=True) + jnp.log(sampler.min_p)
    chosen = jax.random.categorical(key, jnp.where(scaled < least, -jnp.inf, scaled), axis=-1)
    return chosen.astype(jnp.int32)


def penalised(logits: Array, seen: Array, penalty: Array) -> Array:
    """Logits [B,V] with the repetition penalty of Keskar et al. (2019, section 4.1).

    Of tokens that were seen, positive logits are divided by the penalty and negative ones
    multiplied by it (the paper divides both, which would make the negative ones likelier).
    """
    lowered = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, lowered, logits)


def _cut(logits: Array, sampler: Sampler) -> Array:
    """Top-k, then top-p, of logits [B,V].

    A threshold is searched for, bit by bit, which is exact and many times faster than sorting
    a vocabulary.
    """
    order = _ordered(logits)
    likely = order >= _threshold(order, jnp.ones_like(logits), sampler.top_k)[:, None]
    weights = jnp.where(likely, jnp.exp(logits - logits.max(axis=-1, keepdims=True)), 0)
    least = sampler.top_p * weights.sum(axis=-1)
    inside = (order >= _threshold(order, weights, least)[:, None]) | (sampler.top_p >= 1)
    return jnp.where(likely & inside, logits, -jnp.inf)


def _ordered(x: Array) -> Array:
    """float32 as uint32 of the same order."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits < sign, bits | sign, ~bits)


def _threshold(order: Array, weights: Array, least: Array) -> Array:
    """uint32 [B]: the largest value such that the weights of what is not below sum to `least`.

    Args:
      order: uint32 [B,V].
      weights: float32 [B,V], 0 or more.
      least: float32 scalar or [B].
    """

    def with_bit(index: Array, found: Array) -> Array:
        larger = found | (jnp.uint32(1 << 31) >> index.astype(jnp.uint32))
        above = jnp.where(order >= larger[:, None], weights, 0).sum(axis=-1)
        return jnp.where(above >= least, larger, found)

    return jax.lax.fori_loop(0, 32, with_bit, jnp.zeros_like(order[:, 0]))
