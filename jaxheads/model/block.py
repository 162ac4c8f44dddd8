"""One transformer block: the order in which its sites are visited."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxheads.model.attention import Attention, Cached
from jaxheads.model.context import Context
from jaxheads.model.mlp import MLP
from jaxheads.model.norms import Norm, optional_norm
from jaxheads.model.parameters import optional

Array = jax.Array


class Block(nnx.Module):
    """Attention, attention to an encoder where there is one, and MLP, on a residual stream.

    `config.norm_place` says where the norm of a branch acts:

        pre        x + f(norm(x))
        post       norm(x + f(x))
        branch     x + norm(f(x))
        sandwich   x + post_norm(f(norm(x)))
    """

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.attn_norm = Norm(params["attn_norm"])
        self.attn = Attention(params["attn"])
        self.attn_post_norm = optional_norm(params, "attn_post_norm")
        self.attn_scale = optional(params, "attn_scale")
        self.cross_norm = optional_norm(params, "cross_norm")
        self.cross = Attention(params["cross"]) if "cross" in params else None
        self.mlp_norm = Norm(params["mlp_norm"])
        self.mlp = MLP(params["mlp"])
        self.mlp_post_norm = optional_norm(params, "mlp_post_norm")
        self.mlp_scale = optional(params, "mlp_scale")

    def __call__(
        self, x: Array, context: Context, cached: Cached | None
    ) -> tuple[Array, Context, Any]:
        """Maps the residual stream [B,T,D] before the block to the one after it.

        Args and returns as for `Attention.__call__`.
        """
        config = context.config
        x, context = context.visit("resid_pre", x)
        before = x
        normed = _read(self.attn_norm, x, context)
        if not config.first_attn_norm:
            normed = jnp.where(context.layer == 0, x, normed)
        normed, context = context.visit("attn_in", normed)
        out, context, cached = self.attn(normed, context, cached)
        out = _written(self.attn_norm, self.attn_post_norm, self.attn_scale, out, context)
        out, context = context.visit("attn_out", out)
        x = _sum(self.attn_norm, x, out, context)
        if self.cross is not None and self.cross_norm is not None:
            x, context = self._attend_to_memory(self.cross, self.cross_norm, x, context)
        x, context = context.visit("resid_mid", x)
        normed = _read(self.mlp_norm, before if config.parallel else x, context)
        normed, context = context.visit("mlp_in", normed)
        out, context = self.mlp(normed, context)
        out = _written(self.mlp_norm, self.mlp_post_norm, self.mlp_scale, out, context)
        out, context = context.visit("mlp_out", out)
        x, context = context.visit("resid_post", _sum(self.mlp_norm, x, out, context))
        return x, context, cached

    @staticmethod
    def _attend_to_memory(
        cross: Attention, norm: Norm, x: Array, context: Context
    ) -> tuple[Array, Context]:
        x, context = context.visit("cross.resid_pre", x)
        normed, context = context.visit("cross.attn_in", _read(norm, x, context))
        out, context = cross.attend_to_memory(normed, context)
        out = _written(norm, None, None, out, context)
        out, context = context.visit("cross.attn_out", out)
        return _sum(norm, x, out, context), context


def _read(norm: Norm, x: Array, context: Context) -> Array:
    """What a branch reads of the stream."""
    return norm(x, context.config) if context.config.norm_place in ("pre", "sandwich") else x


def _written(
    norm: Norm, post: Norm | None, scale: nnx.Param | None, out: Array, context: Context
) -> Array:
    """What a branch writes to the stream."""
    config = context.config
    if config.norm_place == "branch":
        out = norm(out, config)
    if post is not None:
        out = post(out, config)
    return out if scale is None else out * scale[...].astype(out.dtype)


def _sum(norm: Norm, x: Array, out: Array, context: Context) -> Array:
    """The stream after a branch."""
    config = context.config
    return norm(x + out, config) if config.norm_place == "post" else x + out
