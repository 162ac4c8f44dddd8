"""The tables of a family: where each parameter lies in a file of each format.

A family of models is data: one row per parameter. A row says, for each file
format, the name of the tensor and how its axes become ours, as an einops pattern
over the axis names of the parameter tree (L, H, K, Dh, D, F, V). Swapping the two
sides of the pattern writes the tensor back.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import einops
import numpy as np

from jaxheads.convert.schema import Composite, Schema
from jaxheads.model.models import Config
from jaxheads.model.parameters import parameter_table
from jaxheads.sites import axis_sizes


@dataclass(frozen=True)
class Stored:
    """A parameter as one file format stores it.

    Attributes:
      name: the tensor's name; a placeholder such as {L} counts through that leading
        axis of the parameter, one tensor per index. A tuple names the tensors of a
        leading axis one by one.
      pattern: einops pattern from the stored tensor to the rest of the parameter's
        axes. `half` and `two` split Dh where a format stores the two halves of the
        rotary pairs interleaved.
      joint: where several parameters share one tensor, the axes whose sizes add up to
        the axis J of the pattern, in their order; "one" for each where J counts them,
        and then J does not remain in the parameter.
      part: which of `joint` this parameter is.
      skip: indices of the first counted axis that have no tensor (their norm is absent).
      shift: the tensor holds the parameter plus this.
    """

    name: str | tuple[str, ...]
    pattern: str
    joint: tuple[str, ...] = ()
    part: int = 0
    skip: tuple[int, ...] = ()
    shift: float = 0.0

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
      varied: config -> rows that take the place of others for models like it.
      names: what the schema's family key may hold; default the family's name.
      ignored: regular expressions of tensor names that hold nothing that the model
        computes with (buffers that can be computed, heads that it does not have).
      refused: tensor name -> why a file that has it cannot be loaded.
      copies: name of a tensor that may repeat a parameter -> the parameter's path. Where
        the parameter tree has no other use for it, it must be equal bit for bit.
      spellings: (ours, theirs): what rows spell like ours some files spell like theirs,
        all of their tensors alike. The prefix that a model without a head does not have
        is one that some files spell "", e.g. ("bert.", "").
    """

    schema: Schema | Composite
    rows: Mapping[str, Stored]
    varied: Callable[[Any], Mapping[str, Stored]] = lambda config: {}
    names: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    spellings: tuple[tuple[str, str], ...] = ()

    def spelled_as(self, tensors: Collection[str]) -> Format:
        """This format with the spellings that the names of a file have."""
        rows, copies = dict(self.rows), dict(self.copies)
        for ours, theirs in self.spellings:
            if any(ours in name for name in tensors):
                continue
            rows = {path: _respell(row, ours, theirs) for path, row in rows.items()}
            copies = {name.replace(ours, theirs, 1): path for name, path in copies.items()}
        return dataclasses.replace(self, rows=rows, copies=copies)

    def without_prefix(self) -> Format:
        """This format as a model without a head is written."""
        bare = [(ours, theirs) for ours, theirs in self.spellings if not theirs]
        return dataclasses.replace(self, spellings=tuple(bare)).spelled_as(())


def _respell(row: Stored, ours: str, theirs: str) -> Stored:
    names = (row.name,) if isinstance(row.name, str) else row.name
    names = tuple(name.replace(ours, theirs, 1) for name in names)
    return dataclasses.replace(row, name=names[0] if isinstance(row.name, str) else names)


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


def sizes(config: Config, path: str) -> dict[str, int]:
    """Sizes of every axis name that the pattern of a parameter may use."""
    part = config.part(path)
    return axis_sizes(part) | {"two": 2, "half": part.head_dim // 2, "one": 1}


def slots(fmt: Format, config: Config, paths: tuple[str, ...] = ()) -> dict[str, list[Slot]]:
    """Every tensor a model of this config has in a format, grouped by parameter path.

    Args:
      fmt: the format's table.
      config: the model.
      paths: parameters to look up; default all that the config has.

    Raises:
      ValueError: the config has a parameter that the format has no row for.
    """
    paths = paths or tuple(parameter_table(config))
    rows = {**fmt.rows, **fmt.varied(config)}
    absent = [path for path in paths if path not in rows]
    if absent:
        raise ValueError(f"this format has no place for the parameters {', '.join(absent)}")
    return {path: _slots_of(path, rows[path], sizes(config, path)) for path in paths}


def _slots_of(path: str, stored: Stored, size: Mapping[str, int]) -> list[Slot]:
    shape = _shape(stored.sides[0], _with_joint(stored, size))
    if not isinstance(stored.name, str):
        return [Slot(name, path, (i,), shape, stored) for i, name in enumerate(stored.name)]
    counted = re.findall(r"{(\w+)}", stored.name)
    return [
        Slot(
            stored.name.format(**dict(zip(counted, index, strict=True))), path, index, shape, stored
        )
        for index in itertools.product(*(range(size[axis]) for axis in counted))
        if not (index and index[0] in stored.skip)
    ]


def _with_joint(stored: Stored, size: Mapping[str, int]) -> dict[str, int]:
    return {**size, "J": sum(size[axis] for axis in stored.joint)}


def _shape(side: str, size: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of one side of a pattern: "(H Dh) D" -> (H*Dh, D)."""
    groups = re.findall(r"\(([^)]*)\)|(\w+)", side)
    return tuple(
        math.prod(1 if axis == "1" else size[axis] for axis in (grouped or single).split())
        for grouped, single in groups
    )


def to_parameter(array: np.ndarray, slot: Slot, config: Config) -> np.ndarray:
    """A stored tensor with the axes of the parameter tree (a view where possible)."""
    stored = slot.stored
    size = sizes(config, slot.path)
    out = _rearrange(array, stored.pattern, stored, size)
    if stored.joint:
        axis, start, stop = _extent(stored, size)
        counted = stored.joint[stored.part] == "one"
        out = out[(slice(None),) * axis + (start if counted else slice(start, stop),)]
    return out - np.asarray(stored.shift, out.dtype) if stored.shift else out


def to_stored(parts: Sequence[tuple[np.ndarray, Slot]], config: Config) -> np.ndarray:
    """A tensor as the format stores it, contiguous.

    Args:
      parts: the parameters (one index of their leading axes) that the tensor holds, with
        their slots: one, or all that share it.
      config: the model.
    """
    first, size = parts[0][1].stored, sizes(config, parts[0][1].path)
    stored, ours = first.sides
    arrays = [np.asarray(array) for array, _ in parts]
    if first.shift:
        arrays = [array + np.asarray(first.shift, array.dtype) for array in arrays]
    whole = arrays[0]
    if first.joint:
        order = sorted(range(len(parts)), key=lambda i: parts[i][1].stored.part)
        join = np.stack if first.joint[0] == "one" else np.concatenate
        whole = join([arrays[i] for i in order], axis=_extent(first, size)[0])
    # Not ascontiguousarray, which makes a vector of a scalar.
    return np.asarray(_rearrange(whole, f"{ours} -> {stored}", first, size), order="C")


def _extent(stored: Stored, size: Mapping[str, int]) -> tuple[int, int, int]:
    """The axis J among ours, and where on it this parameter starts and stops."""
    lengths = [size[axis] for axis in stored.joint]
    start = sum(lengths[: stored.part])
    return stored.sides[1].split().index("J"), start, start + lengths[stored.part]


def _rearrange(
    array: np.ndarray, pattern: str, stored: Stored, size: Mapping[str, int]
) -> np.ndarray:
    if pattern == " -> ":
        return array
    used = set(re.findall(r"\w+", pattern))
    known = {axis: n for axis, n in _with_joint(stored, size).items() if axis in used}
    return einops.rearrange(array, pattern, **known)
