"""The tables of a family: where each parameter lies in a file of each format.

A family of models is data: one row per parameter. A row says, for each file
format, the name of the tensor and how its axes become ours, as an einops pattern
over the axis names of the parameter tree (L, H, K, Dh, D, F, V). Swapping the two
sides of the pattern writes the tensor back.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import einops
import numpy as np

from jaxheads.convert.schema import Schema
from jaxheads.model.config import ModelConfig
from jaxheads.model.parameters import parameter_table
from jaxheads.sites import axis_sizes


@dataclass(frozen=True)
class Stored:
    """A parameter as one file format stores it.

    Attributes:
      name: the tensor's name; a placeholder such as {L} counts through that
        leading axis of the parameter, one tensor per index.
      pattern: einops pattern from the stored tensor to the rest of the
        parameter's axes. `half` and `two` split Dh where a format stores the two
        halves of the rotary pairs interleaved.
    """

    name: str
    pattern: str

    @property
    def sides(self) -> tuple[str, str]:
        """The stored axes and ours."""
        stored, ours = self.pattern.split(" -> ")
        return stored, ours


@dataclass(frozen=True)
class Format:
    """A family in one file format.

    Attributes:
      schema: how the file's metadata becomes a `ModelConfig`.
      rows: path of a parameter -> where it is stored.
      ignored: regular expressions of tensor names that hold nothing to load
        (buffers that can be computed).
      refused: tensor name -> why a file that has it cannot be loaded.
      copies: parameter path -> the path it must equal bit for bit when a file
        stores it although the config says that it is tied.
    """

    schema: Schema
    rows: Mapping[str, Stored]
    ignored: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """A family of models: its name and its table in each format."""

    name: str
    formats: Mapping[str, Format]


@dataclass(frozen=True)
class Slot:
    """One tensor of one file and the place in the parameter tree it fills.

    Attributes:
      name: the tensor's full name, e.g. "model.layers.3.self_attn.q_proj.weight".
      path: the parameter's path, e.g. "blocks/attn/q".
      index: where in the parameter's leading axes, e.g. (3,).
      shape: the shape the stored tensor must have.
      stored: the row this slot comes from.
    """

    name: str
    path: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    stored: Stored


def sizes(config: ModelConfig) -> dict[str, int]:
    """Sizes of every axis name that a pattern may use."""
    return axis_sizes(config) | {"two": 2, "half": config.head_dim // 2}


def slots(fmt: Format, config: ModelConfig, paths: tuple[str, ...] = ()) -> dict[str, list[Slot]]:
    """Every tensor a model of this config has in a format, grouped by parameter path.

    Args:
      fmt: the format's table.
      config: the model.
      paths: parameters to look up; default all that the config has.

    Raises:
      ValueError: the config has a parameter that the format has no row for.
    """
    size = sizes(config)
    paths = paths or tuple(parameter_table(config))
    absent = [path for path in paths if path not in fmt.rows]
    if absent:
        raise ValueError(f"this format has no place for the parameters {', '.join(absent)}")
    return {path: _slots_of(path, fmt.rows[path], size) for path in paths}


def _slots_of(path: str, stored: Stored, size: Mapping[str, int]) -> list[Slot]:
    counted = re.findall(r"{(\w+)}", stored.name)
    shape = _shape(stored.sides[0], size)
    return [
        Slot(
            stored.name.format(**dict(zip(counted, index, strict=True))), path, index, shape, stored
        )
        for index in itertools.product(*(range(size[axis]) for axis in counted))
    ]


def _shape(side: str, size: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of one side of a pattern: "(H Dh) D" -> (H*Dh, D)."""
    groups = re.findall(r"\(([^)]*)\)|(\w+)", side)
    return tuple(
        math.prod(size[axis] for axis in (grouped or single).split()) for grouped, single in groups
    )


def to_parameter(array: np.ndarray, slot: Slot, config: ModelConfig) -> np.ndarray:
    """A stored tensor with the axes of the parameter tree (a view where possible)."""
    return _rearrange(array, slot.stored.pattern, config)


def to_stored(array: Any, slot: Slot, config: ModelConfig) -> np.ndarray:
    """A parameter (one index of its leading axes) as the format stores it, contiguous."""
    stored, ours = slot.stored.sides
    return np.ascontiguousarray(_rearrange(np.asarray(array), f"{ours} -> {stored}", config))


def _rearrange(array: np.ndarray, pattern: str, config: ModelConfig) -> np.ndarray:
    used = set(re.findall(r"\w+", pattern))
    known = {axis: size for axis, size in sizes(config).items() if axis in used}
    return einops.rearrange(array, pattern, **known)
