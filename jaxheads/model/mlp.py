"""The gated MLP (Shazeer 2020, eq. 5-6)."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from jaxheads.model.config import ACTIVATIONS
from jaxheads.model.context import Context
from jaxheads.model.parameters import optional

Array = jax.Array


class GatedMLP(nnx.Module):
    """Holds gate and up [D,F], down [F,D] and their optional biases."""

    def __init__(self, params: Mapping[str, Array]) -> None:
        self.gate, self.up = nnx.Param(params["gate"]), nnx.Param(params["up"])
        self.down = nnx.Param(params["down"])
        self.gate_bias, self.up_bias = optional(params, "gate_bias"), optional(params, "up_bias")
        self.down_bias = optional(params, "down_bias")

    def __call__(self, x: Array, context: Context) -> tuple[Array, Context]:
        """Maps x [B,T,D] to the branch output [B,T,D]."""
        activation = ACTIVATIONS[context.config.activation]
        gate = activation(_linear(x, self.gate, self.gate_bias))
        neurons, context = context.visit("neurons", gate * _linear(x, self.up, self.up_bias))
        return context.visit("mlp_out", _linear(neurons, self.down, self.down_bias))


def _linear(x: Array, weight: nnx.Param, bias: nnx.Param | None) -> Array:
    out = jnp.einsum("bti,io->bto", x, weight[...].astype(x.dtype))
    return out if bias is None else out + bias[...].astype(x.dtype)
