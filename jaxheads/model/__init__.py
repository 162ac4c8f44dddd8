"""The transformer: one pure function of (tokens, edits)."""

from jaxheads.model.batch import Batch, pack
from jaxheads.model.cache import KVCache, empty_cache
from jaxheads.model.checks import check_tokens
from jaxheads.model.clip import Clip, ClipConfig
from jaxheads.model.config import Image, ModelConfig
from jaxheads.model.context import Context, Edit, Tap
from jaxheads.model.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from jaxheads.model.parameters import parameter_table, random_parameters
from jaxheads.model.rotary import Rope
from jaxheads.model.transformer import Output, Transformer

__all__ = [
    "Batch",
    "Clip",
    "ClipConfig",
    "Context",
    "Edit",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "Image",
    "KVCache",
    "ModelConfig",
    "Output",
    "Rope",
    "Tap",
    "Transformer",
    "check_tokens",
    "empty_cache",
    "pack",
    "parameter_table",
    "random_parameters",
]
