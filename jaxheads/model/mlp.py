"""The MLP: gated (Shazeer 2020, eq. 5-6) or plain."""

from __future__ import annotations

from collections.abc import Mapping

import jax
from flax import nnx

from jaxheads.model.config import ACTIVATIONS
from jaxheads.model.context import Context
from jaxheads.model.layout import contract
from jaxheads.model.parameters import optional

Array = jax.Array


class MLP(nnx.Module):
    """Holds up [D,F] and down [F,D], gate [D,F] if gated, and their optional biases."""

    def __init__(self, params: Mapping[str, Array]) -> None:
        self.gate, self.gate_bias = optional(params, "gate"), optional(params, "gate_bias")
        self.up, self.up_bias = nnx.Param(params["up"]), optional(params, "up_bias")
        self.down, self.down_bias = nnx.Param(params["down"]), optional(params, "down_bias")

    def __call__(self, x: Array, context: Context) -> tuple[Array, Context]:
        """Maps x [B,T,D] to what the branch computes [B,T,D]."""
        activation = ACTIVATIONS[context.config.activation]
        neurons = linear(x, self.up, self.up_bias)
        if self.gate is None:
            neurons = activation(neurons)
        else:
            # Kept for the backward pass: the two factors, not what lies between them.
            product = jax.checkpoint(lambda gate, up: activation(gate) * up, prevent_cse=False)
            neurons = product(linear(x, self.gate, self.gate_bias), neurons)
        neurons, context = context.visit("neurons", neurons)
        return linear(neurons, self.down, self.down_bias), context


def linear(x: Array, weight: nnx.Param, bias: nnx.Param | None) -> Array:
    """x [B,T,I] or [B,I] @ weight [I,O] (+ bias [O]) in the dtype of x."""
    inner = "bt"[: x.ndim - 1]
    out = contract(f"{inner}i,io->{inner}o", x, weight[...].astype(x.dtype))
    return out if bias is None else out + bias[...].astype(x.dtype)
