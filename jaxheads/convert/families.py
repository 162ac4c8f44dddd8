"""The families that can be loaded and exported, by name."""

from __future__ import annotations

from collections.abc import Mapping

from jaxheads.convert.llama import LLAMA
from jaxheads.convert.schema import Source
from jaxheads.convert.table import Family, Format
from jaxheads.names import unknown

FAMILIES: Mapping[str, Family] = {family.name: family for family in (LLAMA,)}


def find_format(kind: str, source: Source) -> Format:
    """The table for an open file: its format, and the family that its config names.

    Args:
      kind: "huggingface" or "gguf".
      source: the open file.

    Raises:
      ValueError: the file names no family, or one that is not known.
    """
    tables = {
        name: family.formats[kind] for name, family in FAMILIES.items() if kind in family.formats
    }
    key = next(iter(tables.values())).schema.family_key
    name = source.config.get(key)
    if name is None:
        raise ValueError(f"cannot load {source.where}: missing key {key}")
    if name not in tables:
        raise ValueError(f"cannot load {source.where}: {unknown(key, name, tables)}")
    return tables[name]
