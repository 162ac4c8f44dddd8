"""The native checkpoint: the parameter tree by orbax, the config as JSON, the tokenizer.

A directory with `jaxheads.json`, `params/` and the tokenizer's files.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from etils import epath

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
      directory: where to write; an address such as gs://bucket/model too, where a save that
        ends early leaves files but no description.
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
    if "://" in os.fspath(directory):
        folder: Any = epath.Path(directory)
        context: Any = contextlib.nullcontext(folder)  # nothing there can be renamed
    else:
        folder, context = Path(directory), fresh_directory(directory, overwrite=overwrite)
    with context as target:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(target / "params", model.params, force=overwrite)
        if jax.process_index() == 0:
            if tokenizer is not None:
                _save_tokenizer(tokenizer, target)
            # Last: it says that the rest is there.
            (target / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
    return folder


def _save_tokenizer(tokenizer: Tokenizer, target: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        tokenizer.save(name)
        for file in Path(name).iterdir():
            (target / file.name).write_bytes(file.read_bytes())


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
