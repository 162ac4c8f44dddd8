"""Rotary position encoding (Su et al. 2021, eq. 34) in the rotate-half layout."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def rotary_angles(positions: Array, head_dim: int, base: float) -> tuple[Array, Array]:
    """Cosines and sines for each position.

    Args:
      positions: int [B,T].
      head_dim: Dh.
      base: theta.

    Returns:
      (cos, sin), float32 [B,T,1,Dh/2]; the singleton axis broadcasts over heads.
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angle = positions[..., None].astype(jnp.float32) / base**exponent
    return jnp.cos(angle)[:, :, None, :], jnp.sin(angle)[:, :, None, :]


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the pairs (x_i, x_{i + Dh/2}) of x [B,T,H,Dh] by their angles, in float32.

    This is the pairing that Hugging Face weights of the Llama family expect; GGUF files
    store the rows for interleaved pairs (x_2i, x_2i+1) and are permuted when read.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
