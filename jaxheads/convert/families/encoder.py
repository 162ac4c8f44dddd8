"""What the tables of text encoders and vision models have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxheads.convert.schema import Part
from jaxheads.model.config import ModelConfig

ENCODER_CONSTANTS: Mapping[str, Any] = {
    "causal": False,
    "ropes": (None,),
    "norm": "layer",
    "norm_bias": True,
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
    "gated": False,
    "unembed_bias": True,
}
"""Fields of an encoder with learned positions, layer norms and biases everywhere."""


def class_part(names: Mapping[str, str]) -> Part:
    """The part that writes Hugging Face's class of a model; `names` has one for each head."""
    return Part((), lambda raw, fields: {}, lambda c: {"architectures": [_class_of(c, names)]})


def _class_of(config: ModelConfig, names: Mapping[str, str]) -> str:
    if config.head not in names:
        raise ValueError(
            f"this family has no model with config.head {config.head!r} (known: {', '.join(names)})"
        )
    return names[config.head]
