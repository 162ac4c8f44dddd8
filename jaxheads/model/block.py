"""One transformer block: the order in which its sites are visited."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from jaxheads.model.attention import Attention
from jaxheads.model.context import Context
from jaxheads.model.mlp import GatedMLP
from jaxheads.model.norms import RMSNorm

Array = jax.Array


class Block(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.attn_norm = RMSNorm(params["attn_norm"])
        self.attn = Attention(params["attn"])
        self.mlp_norm = RMSNorm(params["mlp_norm"])
        self.mlp = GatedMLP(params["mlp"])

    def __call__(
        self, x: Array, context: Context, cached: tuple[Array, Array] | None
    ) -> tuple[Array, Context, tuple[Array, Array]]:
        """Maps the residual stream [B,T,D] before the block to the one after it.

        Args and returns as for `Attention.__call__`.
        """
        eps = context.config.norm_eps
        x, context = context.visit("resid_pre", x)
        normed, context = context.visit("attn_in", self.attn_norm(x, eps))
        out, context, attended = self.attn(normed, context, cached)
        x, context = context.visit("resid_mid", x + out)
        normed, context = context.visit("mlp_in", self.mlp_norm(x, eps))
        out, context = self.mlp(normed, context)
        x, context = context.visit("resid_post", x + out)
        return x, context, attended
