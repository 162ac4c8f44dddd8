"""The native checkpoint: the parameter tree by orbax, the config as JSON, the tokenizer.

A directory with `jaxheads.json`, `params/` and the tokenizer's files.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from jaxheads.convert.files import fresh_directory
from jaxheads.convert.readers import read_json
from jaxheads.model.models import KINDS, Config, Model, kind_of
from jaxheads.names import choose

if TYPE_CHECKING:
    from jaxheads.text import Tokenizer

DESCRIPTION = "jaxheads.json"
VERSION = 1


def save(
    model: Model,
    tokenizer: Tokenizer | None,
    directory: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> Path:
    """Writes a native checkpoint: what `load` reads fastest, bit for bit.

    Args:
      model: the model; its parameters may be sharded, over several processes too, which
        then all call this.
      tokenizer: its tokenizer, or None.
      directory: where to write.
      overwrite: whether a directory that is not empty may be replaced.

    Returns:
      The directory.

    Raises:
      ValueError: the directory is not empty, or cannot be written. Nothing is left behind.
    """
    import orbax.checkpoint as ocp

    description = {
        "format": "jaxheads",
        "version": VERSION,
        "kind": kind_of(model.config),
        "config": model.config.to_dict(),
    }
    with fresh_directory(directory, overwrite=overwrite) as folder:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / "params", model.params)
        if jax.process_index() == 0:
            text = json.dumps(description, indent=2) + "\n"
            (folder / DESCRIPTION).write_text(text, encoding="utf-8")
            if tokenizer is not None:
                tokenizer.save(folder)
    return Path(directory)


def read_description(directory: Path) -> Config:
    """The config of a native checkpoint.

    Raises:
      ValueError: another format or version, or fields that are missing or unknown.
    """
    path = directory / DESCRIPTION
    description = read_json(path)
    kind, version = description.get("format"), description.get("version")
    if (kind, version) != ("jaxheads", VERSION):
        raise ValueError(
            f"{path} has format {kind!r} version {version!r}, "
            f"this jaxheads reads 'jaxheads' version {VERSION}"
        )
    found = description.get("config")
    if not isinstance(found, dict):
        raise ValueError(f"{path} has no 'config'")
    try:
        config, _ = KINDS[choose("kind of model", str(description.get("kind")), KINDS)]
        return config.from_dict(found)
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from error
