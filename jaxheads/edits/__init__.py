"""Edits: what to change, where, as arrays."""

from jaxheads.edits.build import (
    attend_to,
    clamp_neurons,
    head_mask,
    mask_heads,
    offset_heads,
    project_out,
    scale_heads,
    set_activation,
    steer,
    streaming_mix,
)
from jaxheads.edits.dropout import Dropout, dropout
from jaxheads.edits.edits import Edits
from jaxheads.edits.experts import Experts, OwnTokens
from jaxheads.edits.kinds import Affine, AttendTo, Chain, Gated, LowRank, Mix, Project
from jaxheads.edits.low_rank import lora, restrict_heads
from jaxheads.edits.mixture import mixture_of_heads
from jaxheads.edits.route import Route
from jaxheads.edits.streaming import StreamingMix

__all__ = [
    "Affine",
    "AttendTo",
    "Chain",
    "Dropout",
    "Edits",
    "Experts",
    "Gated",
    "LowRank",
    "Mix",
    "OwnTokens",
    "Project",
    "Route",
    "StreamingMix",
    "attend_to",
    "clamp_neurons",
    "dropout",
    "head_mask",
    "lora",
    "mask_heads",
    "mixture_of_heads",
    "offset_heads",
    "project_out",
    "restrict_heads",
    "scale_heads",
    "set_activation",
    "steer",
    "streaming_mix",
]
