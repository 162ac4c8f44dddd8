"""`RoutingPenalty`: the load-balance loss and the z-loss of routers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxheads.model.context import Tap
from jaxheads.routing.statistics import RoutingSums, as_metrics, routing_taps

Array = jax.Array


@struct.dataclass
class RoutingPenalty:
    """balance * L_b + z * L_z, for losses that take a `penalty`.

    Attributes:
      balance: weight of the load-balance loss; MoH takes 0.01. Static.
      z: weight of the z-loss; Zoph et al. (2022), ST-MoE, take 0.001. Static.
    """

    balance: float = struct.field(pytree_node=False, default=0.01)
    z: float = struct.field(pytree_node=False, default=0.0)

    def __post_init__(self) -> None:
        for name in ("balance", "z"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

    @property
    def taps(self) -> Mapping[str, Tap]:
        """What is read: sums over the tokens of the batch."""
        return routing_taps()

    def __call__(self, tapped: Mapping[str, Any]) -> tuple[Array, dict[str, Array]]:
        """The weighted sum; and the metrics "balance", "router_z" (both without their weights),
        "router_entropy", "least_load" and "largest_load".
        """
        sums: RoutingSums = tapped["routing"]
        losses = {"balance": balance_loss(sums), "router_z": z_loss(sums)}
        value = self.balance * losses["balance"] + self.z * losses["router_z"]
        return value, losses | as_metrics(sums)


def balance_loss(sums: RoutingSums) -> Array:
    """E * sum over routed heads of P f, float32 []; the mean over layers that choose.

    P is the mean over tokens of a head's probability, f the share of tokens that chose it, E the
    number of routed heads: K when routing is uniform, more when it collapses. MoH's eq. 7 has no
    factor E; its released code has it. The product is of means over the whole batch.

    Args:
      sums: with a leading L.
    """
    tokens = jnp.maximum(sums.tokens, 1)[..., None]
    # Shared heads have a probability of 0.
    p, f = sums.probability / tokens, jax.lax.stop_gradient(sums.chosen / tokens)
    layers = sums.routed * jnp.sum(p * f, axis=-1)
    choosing = (sums.top_k > 0).astype(jnp.float32)
    return jnp.sum(layers * choosing) / jnp.maximum(jnp.sum(choosing), 1)


def z_loss(sums: RoutingSums) -> Array:
    """Mean over tokens and layers with routed heads of log(sum of exp of scores)^2, float32 [].

    Source: Zoph et al. (2022), "ST-MoE", eq. 5. It keeps the scores small.

    Args:
      sums: with a leading L.
    """
    # Layers without routed heads have a sum of 0.
    layers = jnp.sum(sums.log_z_squared / jnp.maximum(sums.tokens, 1))
    return layers / jnp.maximum(jnp.sum(sums.routed > 0), 1)
