"""Routing of heads: what a router does over many tokens, and losses made of it."""

from jaxheads.routing.examine import examine, in_batches
from jaxheads.routing.penalty import RoutingPenalty
from jaxheads.routing.statistics import (
    RoutingSums,
    add_sums,
    find_route,
    load,
    overlap,
    routing_sums,
    routing_taps,
    sums_of,
)
from jaxheads.routing.view import Lift, RoutingView, Sentence, Speciality

__all__ = [
    "Lift",
    "RoutingPenalty",
    "RoutingSums",
    "RoutingView",
    "Sentence",
    "Speciality",
    "add_sums",
    "examine",
    "find_route",
    "in_batches",
    "load",
    "overlap",
    "routing_sums",
    "routing_taps",
    "sums_of",
]
