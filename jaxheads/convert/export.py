"""Out to other tools: a directory that they load without code of ours."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from jaxheads.convert.families import FAMILIES
from jaxheads.convert.files import fresh_directory
from jaxheads.convert.schema import read_config, write_config
from jaxheads.convert.table import Format, slots, to_stored
from jaxheads.model.config import ModelConfig
from jaxheads.model.parameters import flatten, parameter_table
from jaxheads.names import choose

if TYPE_CHECKING:
    from jaxheads.model.transformer import Transformer
    from jaxheads.text import Tokenizer

EXPORT_FORMATS = ("huggingface",)


def export(
    model: Transformer,
    directory: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    format: str = "huggingface",
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Writes a model as a directory that transformers loads.

    Arrays keep their stored dtype. Hugging Face's Llama has one flag for the biases of
    q, k, v and o together; where the model has only some of them, the rest are written
    as zeros, which computes the same.

    Args:
      model: the model.
      directory: where to write; new, or an empty directory.
      tokenizer: written along if given.
      format: "huggingface": config.json, generation_config.json and safetensors.
      max_shard_bytes: weights above this are split into several files with an index.

    Returns:
      The directory.

    Raises:
      ValueError: unknown format, a model that the format cannot express, or a directory
        that is not empty or cannot be written. Nothing is left behind.
    """
    choose("export format", format, EXPORT_FORMATS)
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    fmt = FAMILIES["llama"].formats[format]
    params = dict(flatten(model.params))
    keys = write_config(fmt.schema, model.config)
    expressed = _expressed(fmt, keys, model.config)
    dtype = jnp.result_type(*(leaf.dtype for leaf in params.values()))
    with fresh_directory(directory) as folder:
        ids = {
            f"{role}_token_id": getattr(tokenizer, f"{role}_id", None)
            for role in ("bos", "eos", "pad")
        }
        _write_json(folder / "config.json", keys | ids | {"torch_dtype": str(dtype)})
        _write_json(folder / "generation_config.json", {"_from_model_config": True} | ids)
        _write_weights(folder, _tensors(fmt, expressed, params, dtype), max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(folder)
    return Path(directory)


class _Keys:
    """Keys that are about to be written, seen as a file."""

    where = "the exported config"

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.shapes: dict[str, tuple[int, ...]] = {}


def _expressed(fmt: Format, keys: dict[str, Any], config: ModelConfig) -> ModelConfig:
    """The config that a reader of the keys will see: ours, or ours with more biases."""
    seen = read_config(fmt.schema, _Keys(keys), config.dtype)
    ours, theirs = parameter_table(config), parameter_table(seen)
    added = {path: leaf for path, leaf in theirs.items() if path not in ours}
    not_zero = [path for path, leaf in added.items() if leaf.fan_in != 0]
    biases = {name: getattr(seen, name) for name in ("qkv_bias", "o_bias", "mlp_bias")}
    if not_zero or config.replace(**biases) != seen or any(path not in theirs for path in ours):
        raise ValueError(f"this format cannot express the config {config}")
    return seen


@dataclass(frozen=True)
class _Tensor:
    """A tensor to write: its size now, its array only when its shard is written."""

    name: str
    nbytes: int
    make: Callable[[], np.ndarray]


def _tensors(
    fmt: Format, config: ModelConfig, params: Mapping[str, Any], dtype: np.dtype
) -> Iterator[_Tensor]:
    """Every tensor of the file; a parameter that the model lacks is zeros."""
    table = parameter_table(config)
    for path, group in slots(fmt, config).items():
        leaf = np.asarray(params[path]) if path in params else np.zeros(table[path].shape, dtype)
        for slot in group:
            nbytes = math.prod(slot.shape) * leaf.dtype.itemsize
            yield _Tensor(slot.name, nbytes, partial(to_stored, leaf[slot.index], slot, config))


def _write_weights(folder: Path, tensors: Iterable[_Tensor], max_shard_bytes: int) -> None:
    from safetensors.numpy import save_file

    shards: list[list[_Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        name = "model.safetensors" if len(shards) == 1 else name
        # transformers refuses a file that does not say which framework wrote it.
        save_file({t.name: t.make() for t in shard}, folder / name, metadata={"format": "pt"})
        # safetensors makes its files private; give them the mode that files get here.
        (folder / name).chmod((folder / "config.json").stat().st_mode)
        weight_map |= {t.name: name for t in shard}
    if len(shards) > 1:
        size = sum(t.nbytes for shard in shards for t in shard)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
