"""Normalisation."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from jaxheads.model.config import ModelConfig
from jaxheads.model.parameters import optional

Array = jax.Array


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, reduced in float32.

    Source: Zhang and Sennrich (2019), eq. 4. Like the reference implementations of the
    Llama family, the result is rounded to x's dtype before it is scaled.
    """
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * inverse).astype(x.dtype) * scale.astype(x.dtype)


def rms_norm_plus_one(x: Array, scale: Array, eps: float) -> Array:
    """`rms_norm` by 1 + scale, rounded once at the end, as Gemma's reference does."""
    wide = 1 + scale.astype(jnp.float32)
    return rms_norm(x.astype(jnp.float32), wide, eps).astype(x.dtype)


def layer_norm(x: Array, scale: Array, bias: Array | None, eps: float) -> Array:
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis, in float32.

    Source: Ba et al. (2016), eq. 4.
    """
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    out = centred * inverse * scale.astype(jnp.float32)
    return (out if bias is None else out + bias.astype(jnp.float32)).astype(x.dtype)


class Norm(nnx.Module):
    """Holds the scale of a norm and the bias of a layer norm, over the last axes."""

    def __init__(self, params: Mapping[str, Array]) -> None:
        self.scale = nnx.Param(params["scale"])
        self.bias = optional(params, "bias")

    def __call__(self, x: Array, config: ModelConfig) -> Array:
        """Normalises x [...,D] with the norm that the config names.

        A scale of two axes [H,Dh] normalises over both.
        """
        shape, scale = x.shape, self.scale[...].reshape(-1)
        x = x.reshape(*shape[: x.ndim - self.scale.ndim], scale.size)
        if config.norm == "layer":
            bias = None if self.bias is None else self.bias[...].reshape(-1)
            return layer_norm(x, scale, bias, config.norm_eps).reshape(shape)
        norm = rms_norm_plus_one if config.norm_plus_one else rms_norm
        return norm(x, scale, config.norm_eps).reshape(shape)


def optional_norm(params: Mapping[str, Mapping[str, Array]], name: str) -> Norm | None:
    """The norm `name` for a module to hold, or None if the tree has none."""
    return Norm(params[name]) if name in params else None
