"""Routing of heads: what a router does over many tokens, and losses made of it."""

from jaxheads.routing.penalty import RoutingPenalty
from jaxheads.routing.statistics import (
    RoutingSums,
    add_sums,
    find_route,
    load,
    overlap,
    routing_sums,
    routing_taps,
)

__all__ = [
    "RoutingPenalty",
    "RoutingSums",
    "add_sums",
    "find_route",
    "load",
    "overlap",
    "routing_sums",
    "routing_taps",
]
