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
from jaxheads.convert.table import Format, Slot, slots, to_stored
from jaxheads.model.config import ModelConfig
from jaxheads.model.models import Config, Model
from jaxheads.model.parameters import flatten, parameter_table
from jaxheads.names import choose

if TYPE_CHECKING:
    from jaxheads.text import Tokenizer

EXPORT_FORMATS = ("huggingface",)


def export(
    model: Model,
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
    family = FAMILIES[choose("config.family", model.config.family, FAMILIES)]
    fmt = family.formats[format]
    if getattr(model.config, "head", "lm") == "none":
        fmt = fmt.without_prefix()
    params = dict(flatten(model.params))
    keys = write_config(fmt.schema, model.config)
    expressed = _expressed(fmt, keys, model.config)
    dtype = jnp.result_type(*(leaf.dtype for leaf in params.values()))
    with fresh_directory(directory) as folder:
        ids = {
            f"{role}_token_id": getattr(tokenizer, f"{role}_id", None)
            for role in ("bos", "eos", "pad")
        }
        _write_json(folder / "config.json", ids | keys | {"torch_dtype": str(dtype)})
        _write_json(folder / "generation_config.json", {"_from_model_config": True} | ids)
        _write_weights(folder, _tensors(fmt, expressed, params, dtype), max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(folder)
    return Path(directory)


@dataclass
class _Written:
    """Keys and tensors that are about to be written, seen as a file."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    where: str = "the exported config"

    def read(self, name: str) -> np.ndarray:
        """Nothing is there to be read yet."""
        raise ValueError(f"{name} is not written yet")


def _expressed(fmt: Format, keys: dict[str, Any], config: Config) -> Config:
    """The config that a reader of the file will see: ours, or ours with more biases."""
    shapes = {slot.name: slot.shape for group in slots(fmt, config).values() for slot in group}
    seen = read_config(fmt.schema, _Written(keys, shapes), config.dtype)
    ours, theirs = parameter_table(config), parameter_table(seen)
    not_zero = [path for path, leaf in theirs.items() if path not in ours and leaf.fan_in != 0]
    if not_zero or _with_biases_of(seen, config) != seen or any(p not in theirs for p in ours):
        raise ValueError(f"this format cannot express the config {config}")
    return seen


def _with_biases_of(other: Any, config: Any) -> Any:
    """The config with the bias flags of another one, stack by stack."""
    if isinstance(config, ModelConfig):
        return config.replace(**{name: getattr(other, name) for name in _BIASES})
    sides = zip(config.sides.items(), other.sides.values(), strict=True)
    return type(config)(**{name: _with_biases_of(seen, side) for (name, side), seen in sides})


_BIASES = ("qkv_bias", "o_bias", "mlp_bias")


@dataclass(frozen=True)
class _Tensor:
    """A tensor to write: its size now, its array only when its shard is written."""

    name: str
    nbytes: int
    make: Callable[[], np.ndarray]


def _tensors(
    fmt: Format, config: Config, params: Mapping[str, Any], dtype: np.dtype
) -> Iterator[_Tensor]:
    """Every tensor of the file; a parameter that the model lacks is zeros."""
    table = parameter_table(config)
    shared: dict[str, list[Slot]] = {}
    for group in slots(fmt, config).values():
        for slot in group:
            shared.setdefault(slot.name, []).append(slot)

    def part(slot: Slot) -> tuple[np.ndarray, Slot]:
        leaf = params.get(slot.path)
        shape = table[slot.path].shape[len(slot.index) :]
        return np.zeros(shape, dtype) if leaf is None else np.asarray(leaf[slot.index]), slot

    for name, group in shared.items():
        leaf = params.get(group[0].path)
        itemsize = dtype.itemsize if leaf is None else leaf.dtype.itemsize
        make = partial(_stored, [partial(part, slot) for slot in group], config)
        yield _Tensor(name, math.prod(group[0].shape) * itemsize, make)


def _stored(parts: list[Callable[[], tuple[np.ndarray, Slot]]], config: Config) -> np.ndarray:
    return to_stored([part() for part in parts], config)


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
