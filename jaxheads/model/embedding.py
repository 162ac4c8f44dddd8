"""From token ids or pixels to the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxheads.model.config import ModelConfig
from jaxheads.model.layout import axes_of, gathered, lay, take_rows
from jaxheads.model.norms import optional_norm
from jaxheads.model.parameters import optional

Array = jax.Array


class Embedding(nnx.Module):
    """Holds the tables that a model has.

    tokens [V,D]; or patches [W,U,C,D], their bias patch_bias [D] and the learned tokens
    before them, prefix [X,D]; positions [P,D]; types [Y,D]; and a norm.
    """

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.tokens = optional(params, "tokens")
        self.patches = optional(params, "patches")
        self.patch_bias = optional(params, "patch_bias")
        self.prefix = optional(params, "prefix")
        self.positions = optional(params, "positions")
        self.types = optional(params, "types")
        self.norm = optional_norm(params, "norm")

    def __call__(
        self, x: Array, positions: Array, types: Array | None, config: ModelConfig
    ) -> Array:
        """Adds what depends on the place to x [B,T,D], and normalises.

        Args:
          x: embedded tokens or patches.
          positions: int [B,T], counted over real tokens.
          types: int [B,T], token types; None for the first type everywhere.
          config: the model's config.
        """
        if self.types is not None:
            table = self.types[...].astype(x.dtype)
            x = x + (table[0] if types is None else take_rows(table, types))
        if self.positions is not None:
            table = gathered(self.positions[...], x, x.dtype).astype(x.dtype)
            x = x + take_rows(table, positions + config.position_offset)
        return x if self.norm is None else self.norm(x, config)

    def embed_images(self, images: Array, config: ModelConfig) -> Array:
        """Patches of pixels [B,height,width,C], embedded, after the learned tokens: [B,T,D]."""
        assert self.patches is not None, "a vision model has patches"
        x = images.astype(config.compute_dtype)
        patches = gathered(self.patches[...], x, x.dtype)
        x = jax.lax.conv_general_dilated(
            x,
            patches.astype(x.dtype),
            window_strides=self.patches.shape[:2],
            padding="VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        if self.patch_bias is not None:
            x = x + self.patch_bias[...].astype(x.dtype)
        if self.prefix is None:
            return x
        prefix = jnp.broadcast_to(self.prefix[...], (len(x), *self.prefix.shape))
        prefix = lay(prefix.astype(x.dtype), axes_of(x))
        return jnp.concatenate([prefix, x], axis=1)


def embed_tokens(table: Array, tokens: Array, config: ModelConfig) -> Array:
    """Rows of the table [V,D] for ids [B,T], scaled; NaN where an id is outside of it."""
    x = take_rows(gathered(table, tokens, config.compute_dtype), tokens)
    x = x.astype(config.compute_dtype)
    # The factor is rounded to the dtype first, as the reference of Gemma does.
    return x if config.embed_scale == 1 else x * jnp.asarray(config.embed_scale, x.dtype)
