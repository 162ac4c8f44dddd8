"""Weights in and out: Hugging Face directories, GGUF files, native checkpoints."""

from jaxheads.convert.export import EXPORT_FORMATS, export
from jaxheads.convert.families import FAMILIES
from jaxheads.convert.load import load, load_model
from jaxheads.convert.native import save
from jaxheads.convert.registry import NAMED_MODELS

__all__ = [
    "EXPORT_FORMATS",
    "FAMILIES",
    "NAMED_MODELS",
    "export",
    "load",
    "load_model",
    "save",
]
