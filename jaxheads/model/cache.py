"""`KVCache`: keys and values of the tokens already read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from jaxheads.model.config import ModelConfig

Array = jax.Array


@struct.dataclass
class KVCache:
    """Keys and values of every layer in a buffer of S slots.

    Attributes:
      k: [L,B,S,K,Dh], after position encoding and edits.
      v: [L,B,S,K,Dh], after edits.
      mask: bool [B,S], True where a slot holds a real token.
      length: int scalar, slots written so far (padding included).
    """

    k: Array
    v: Array
    mask: Array
    length: Array

    @property
    def size(self) -> int:
        """S, slots of the buffer."""
        return self.k.shape[2]


def empty_cache(config: ModelConfig, batch: int, size: int) -> KVCache:
    """A cache of `size` slots for `batch` rows, in the dtype of the activations."""
    shape = (config.n_layers, batch, size, config.n_kv_heads, config.head_dim)
    zeros = jnp.zeros(shape, config.compute_dtype)
    return KVCache(zeros, zeros, jnp.zeros((batch, size), bool), jnp.zeros((), jnp.int32))
