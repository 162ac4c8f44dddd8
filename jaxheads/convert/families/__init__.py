"""The families that can be loaded and exported, by name."""

from __future__ import annotations

from collections.abc import Mapping

from jaxheads.convert.families.bart import BART
from jaxheads.convert.families.bert import BERT
from jaxheads.convert.families.clip import CLIP
from jaxheads.convert.families.dinov2 import DINOV2
from jaxheads.convert.families.distilbert import DISTILBERT
from jaxheads.convert.families.gemma2 import GEMMA2
from jaxheads.convert.families.gemma3 import GEMMA3
from jaxheads.convert.families.gpt2 import GPT2
from jaxheads.convert.families.gpt_neo import GPT_NEO
from jaxheads.convert.families.gpt_neox import GPT_NEOX
from jaxheads.convert.families.llama import LLAMA
from jaxheads.convert.families.mistral import MISTRAL
from jaxheads.convert.families.modernbert import MODERNBERT
from jaxheads.convert.families.olmo2 import OLMO2
from jaxheads.convert.families.opt import OPT
from jaxheads.convert.families.phi3 import PHI3
from jaxheads.convert.families.qwen2 import QWEN2
from jaxheads.convert.families.qwen3 import QWEN3
from jaxheads.convert.families.roberta import ROBERTA
from jaxheads.convert.families.smollm3 import SMOLLM3
from jaxheads.convert.families.stablelm import STABLELM
from jaxheads.convert.families.t5 import T5
from jaxheads.convert.families.vit import DEIT, VIT
from jaxheads.convert.schema import Source
from jaxheads.convert.table import Family, Format
from jaxheads.names import unknown

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        BART,
        BERT,
        CLIP,
        DEIT,
        DINOV2,
        DISTILBERT,
        GEMMA2,
        GEMMA3,
        GPT2,
        GPT_NEO,
        GPT_NEOX,
        LLAMA,
        MISTRAL,
        MODERNBERT,
        OLMO2,
        OPT,
        PHI3,
        QWEN2,
        QWEN3,
        ROBERTA,
        SMOLLM3,
        STABLELM,
        T5,
        VIT,
    )
}


def find_format(kind: str, source: Source) -> Format:
    """The table for an open file: its format, and the family that its config names.

    Args:
      kind: "huggingface" or "gguf".
      source: the open file.

    Raises:
      ValueError: the file names no family, or one that is not known.
    """
    tables = {
        name: family.formats[kind]
        for family in FAMILIES.values()
        if kind in family.formats
        for name in family.formats[kind].names or (family.name,)
    }
    key = next(iter(tables.values())).schema.family_key
    name = source.config.get(key)
    if name is None:
        raise ValueError(f"cannot load {source.where}: missing key {key}")
    if name not in tables:
        raise ValueError(
            f"cannot load {source.where}: {unknown(key, name, tables)} "
            "docs/adding-a-family.md shows how to add one."
        )
    return tables[name].spelled_as(source.shapes)
