"""What a model is, in words for people."""

from __future__ import annotations

from typing import TypeGuard

from jaxheads.model.clip import ClipConfig
from jaxheads.model.encoder_decoder import EncoderDecoderConfig
from jaxheads.model.models import Config, Model
from jaxheads.model.transformer import Transformer

_TEXT = {
    "lm": "language model",
    "mlm": "masked language model",
    "classes": "text classifier",
    "none": "text model without a head",
}


def kind_name(config: Config) -> str:
    """The kind of model that a config describes, e.g. "causal language model"."""
    if isinstance(config, EncoderDecoderConfig):
        return "encoder-decoder"
    if isinstance(config, ClipConfig):
        return "pair of a text and a vision encoder"
    if config.image is not None:
        return "image classifier" if config.head == "classes" else "vision model without a head"
    return f"{'causal ' if config.causal else ''}{_TEXT[config.head]}"


def is_causal_lm(model: Model) -> TypeGuard[Transformer]:
    """Whether a model predicts each next token from those before it, in one stack."""
    return isinstance(model, Transformer) and model.config.causal and model.config.head == "lm"
