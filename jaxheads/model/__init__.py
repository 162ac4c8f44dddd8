"""The transformer: one pure function of (tokens, edits)."""

from jaxheads.model.batch import Batch, pack
from jaxheads.model.cache import KVCache, empty_cache
from jaxheads.model.config import ModelConfig
from jaxheads.model.context import Context, Edit, Tap
from jaxheads.model.parameters import parameter_table, random_parameters
from jaxheads.model.transformer import Output, Transformer, check_tokens

__all__ = [
    "Batch",
    "Context",
    "Edit",
    "KVCache",
    "ModelConfig",
    "Output",
    "Tap",
    "Transformer",
    "check_tokens",
    "empty_cache",
    "pack",
    "parameter_table",
    "random_parameters",
]
