"""What routers do over the tokens of a batch: sums made inside the layer scan.

Sums of tokens, not means, so that parts of a data set add up; and sums over a whole batch that is
divided over a mesh are sums over all devices, so that a product of means (the load-balance loss)
is one of global means.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxheads.edits.kinds import Chain, Gated
from jaxheads.edits.route import Route, Routing
from jaxheads.model.context import Context, Tap
from jaxheads.model.layout import contract

Array = jax.Array


@struct.dataclass
class RoutingSums:
    """Sums over real tokens, of one layer; with a leading L as a tap returns them. float32.

    Attributes:
      tokens: [], real tokens.
      probability: [H], of the router's probabilities; 0 at shared heads.
      chosen: [H], tokens at which each head was on.
      entropy: [], of the entropy of the probabilities, nats.
      log_z_squared: [], of the squared log of the router's normaliser.
      routed: [], number of routed heads in the layer (no sum).
      top_k: [], K (no sum).
    """

    tokens: Array
    probability: Array
    chosen: Array
    entropy: Array
    log_z_squared: Array
    routed: Array
    top_k: Array


def find_route(edit: Any) -> Route:
    """The `Route` among the edits of a site.

    Raises:
      ValueError: none, or several.
    """
    found = _routes(edit)
    if len(found) != 1:
        raise ValueError(f"expected one Route among the edits of 'z', found {len(found)}")
    return found[0]


def _routes(edit: Any) -> list[Route]:
    if isinstance(edit, Chain):
        return [route for part in edit.edits for route in _routes(part)]
    if isinstance(edit, Gated):
        return _routes(edit.edit)
    return [edit] if isinstance(edit, Route) else []


def decided(context: Context) -> Routing:
    """The routing of a block, for reducers that run after attention.

    Computed from the same values as the edit's own, so that the compiler computes it once.

    Raises:
      ValueError: the edits of `z` hold no `Route`, or several.
    """
    return find_route(context.edits.get("z")).routing(context)


def routing_sums(value: Array, context: Context) -> RoutingSums:
    """Reducer for a tap of `attn_out`: sums over the real tokens of a block's `Route`."""
    route = find_route(context.edits.get("z"))
    return sums_of(decided(context), context.token_mask, jnp.sum(~route.shared), route.top_k)


def sums_of(
    routing: Routing, mask: Array, routed: Array | float, top_k: Array | float
) -> RoutingSums:
    """Sums over the real tokens, bool [B,T], of what a router decided among heads or experts."""
    real, p = mask.astype(jnp.float32), routing.probabilities
    # The limit of p log p at 0 is 0; its gradient there is left out.
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), axis=-1)
    return RoutingSums(
        tokens=jnp.sum(real),
        probability=contract("bt,bth->h", real, p),
        chosen=contract("bt,bth->h", real, routing.chosen.astype(jnp.float32)),
        entropy=jnp.sum(real * entropy),
        log_z_squared=jnp.sum(real * jnp.square(routing.log_z)),
        routed=jnp.asarray(routed, jnp.float32),
        top_k=jnp.asarray(top_k, jnp.float32),
    )


def heads_chosen(value: Array, context: Context) -> Array:
    """Reducer for a tap of `attn_out`: bool [B,T,H], the heads that are on at each token."""
    return decided(context).chosen


def head_gates(value: Array, context: Context) -> Array:
    """Reducer for a tap of `attn_out`: float32 [B,T,H], the gates of each token."""
    return decided(context).gates


def routing_taps() -> dict[str, Tap]:
    """The tap "routing", from which losses and statistics are made."""
    return {"routing": Tap("attn_out", jax.tree_util.Partial(routing_sums))}


def add_sums(one: RoutingSums, other: RoutingSums) -> RoutingSums:
    """The sums over two sets of tokens, for the same router."""
    added = jax.tree.map(jnp.add, one, other)
    return added.replace(routed=one.routed, top_k=one.top_k)


def load(sums: RoutingSums) -> Array:
    """float32 [...,H]: the share of tokens at which each head is on."""
    return sums.chosen / jnp.maximum(sums.tokens, 1)[..., None]


def overlap(chosen: Array, shared: Array, mask: Array) -> Array:
    """How alike neighbouring layers choose, against chance.

    For a token, the share of the routed heads chosen in one layer whose index is chosen in the
    next layer too, among heads that both route; means over real tokens. Chance is what
    independent choices with the same loads would give.

    Args:
      chosen: bool [L,B,T,H], from a tap with `heads_chosen`.
      shared: bool [L,H].
      mask: bool [B,T], real tokens.

    Returns:
      float32 [L-1,2]: the overlap and chance of layers l and l + 1; NaN where no head is routed
      in both.
    """
    weights = mask.astype(jnp.float32) / jnp.maximum(jnp.sum(mask), 1)
    both = ~(shared[:-1] | shared[1:])
    on = chosen.astype(jnp.float32)
    loads = jnp.einsum("bt,lbth->lh", weights, on)
    together = jnp.einsum("bt,lbth,lbth->lh", weights, on[:-1], on[1:])
    first = jnp.sum(jnp.where(both, loads[:-1], 0), axis=-1)
    found = jnp.sum(jnp.where(both, together, 0), axis=-1)
    chance = jnp.sum(jnp.where(both, loads[:-1] * loads[1:], 0), axis=-1)
    return jnp.stack([found, chance], axis=-1) / first[:, None]


def as_metrics(sums: RoutingSums) -> dict[str, Array]:
    """Scalars for a log, over routed heads of layers that choose: their least and largest load,
    and the mean entropy of the router's probabilities, in nats.

    Args:
      sums: with a leading L.
    """
    loads = load(sums)
    routed = (sums.probability > 0) & (sums.top_k > 0)[..., None]
    tokens = jnp.maximum(sums.tokens, 1)
    return {
        "router_entropy": jnp.sum(sums.entropy / tokens) / jnp.maximum(jnp.sum(sums.routed > 0), 1),
        "least_load": jnp.min(jnp.where(routed, loads, 1.0)),
        "largest_load": jnp.max(jnp.where(routed, loads, 0.0)),
    }
