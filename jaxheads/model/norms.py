"""Normalisation."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

Array = jax.Array


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, reduced in float32.

    Source: Zhang and Sennrich (2019), eq. 4. Like the reference implementations of the
    Llama family, the result is rounded to x's dtype before it is scaled.
    """
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * inverse).astype(x.dtype) * scale.astype(x.dtype)


class RMSNorm(nnx.Module):
    """Holds the scale [D] of an RMS norm."""

    def __init__(self, params: Mapping[str, Array]) -> None:
        self.scale = nnx.Param(params["scale"])

    def __call__(self, x: Array, eps: float) -> Array:
        """Normalises x [...,D]."""
        return rms_norm(x, self.scale[...], eps)
