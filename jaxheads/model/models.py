"""The kinds of model, by the kind of their config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxheads.model.clip import Clip, ClipConfig
from jaxheads.model.config import ModelConfig
from jaxheads.model.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from jaxheads.model.transformer import Transformer

Config = ModelConfig | EncoderDecoderConfig | ClipConfig
Model = Transformer | EncoderDecoder | Clip

KINDS: Mapping[str, tuple[type[Config], type[Model]]] = {
    "transformer": (ModelConfig, Transformer),
    "encoder_decoder": (EncoderDecoderConfig, EncoderDecoder),
    "clip": (ClipConfig, Clip),
}
"""Name of a kind, as native checkpoints write it -> (config, model)."""


def build(config: Config, params: Mapping[str, Any]) -> Model:
    """The model of a config around a parameter tree."""
    _, model = KINDS[kind_of(config)]
    return model(config, params)  # type: ignore[arg-type]


def kind_of(config: Config) -> str:
    """The name of the kind of a config."""
    return next(name for name, (cls, _) in KINDS.items() if isinstance(config, cls))
