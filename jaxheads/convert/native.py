"""The native checkpoint: the parameter tree by orbax, the config as JSON, the tokenizer.

A directory with `jaxheads.json`, `params/` and the tokenizer's files.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from jaxheads.convert.files import fresh_directory
from jaxheads.convert.readers import read_json
from jaxheads.model.config import ModelConfig
from jaxheads.model.parameters import Tree, check_parameters, flatten, nest

if TYPE_CHECKING:
    from jaxheads.model.transformer import Transformer
    from jaxheads.text import Tokenizer

DESCRIPTION = "jaxheads.json"
VERSION = 1


def save(
    model: Transformer,
    tokenizer: Tokenizer | None,
    directory: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> Path:
    """Writes a native checkpoint: what `load` reads fastest, bit for bit.

    Args:
      model: the model; its parameters may be sharded.
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
        "config": dataclasses.asdict(model.config),
    }
    with fresh_directory(directory, overwrite=overwrite) as folder:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / "params", model.params)
        text = json.dumps(description, indent=2) + "\n"
        (folder / DESCRIPTION).write_text(text, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(folder)
    return Path(directory)


def restore(directory: Path, dtype: str | None = None) -> tuple[ModelConfig, Tree]:
    """Reads the config and the parameters of a native checkpoint.

    Args:
      directory: the checkpoint.
      dtype: dtype of the parameters and the activations; None as they were saved.

    Returns:
      The config and the parameter tree, on JAX's default device.

    Raises:
      ValueError: another version, a config field that is missing or unknown, or
        parameters that do not fit the config.
    """
    import orbax.checkpoint as ocp

    config = read_description(directory)
    if dtype is not None:
        config = config.replace(dtype=dtype)
    params = (directory / "params").absolute()
    if not params.is_dir():
        raise ValueError(f"{directory} has no params/: the checkpoint is not whole")
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            saved = checkpointer.metadata(params).item_metadata.tree
            check_parameters(config, saved)
            # Into a target: without one, orbax restores onto the devices it was saved from.
            device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            target = {
                path: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=device)
                for path, leaf in flatten(saved)
            }
            return config, checkpointer.restore(params, nest(target))
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(f"cannot restore {params}: {error}") from error


def read_description(directory: Path) -> ModelConfig:
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
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    missing = [name for name in known if name not in found]
    extra = [name for name in found if name not in known]
    if missing or extra:
        raise ValueError(
            f"{path}, config: missing {', '.join(missing) or 'none'}; "
            f"unknown {', '.join(extra) or 'none'}"
        )
    return ModelConfig(**found)
