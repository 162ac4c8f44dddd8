"""From an open file to a parameter tree, one leaf at a time, each device its own shards."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from jaxheads.convert.place import Placement
from jaxheads.convert.readers import FLOATS, Reader, some
from jaxheads.convert.table import Format, Slot, slots, to_parameter
from jaxheads.model.models import Config
from jaxheads.model.parameters import Parameter, Tree, nest, parameter_table

Progress = Callable[[int, int, str], None]
"""Called as (tensors done, tensors in all, name of the last one)."""

_LINE, _RUN = 16, 1024  # bytes of the target and values of the source in a tile: measured


def fill_parameters(
    reader: Reader,
    fmt: Format,
    config: Config,
    dtype: str,
    on_progress: Progress | None = None,
    sharding: Placement | None = None,
) -> Tree:
    """Reads every parameter of a model onto the devices.

    Of each tensor, only what the devices of this process hold is read (of a quantised one,
    the whole). At any time at most one leaf's shards exist twice, so the peak is what the
    devices hold plus the largest leaf of it (plus what the operating system keeps of mapped
    files).

    An index that has no tensor (a norm that a layer lacks) is zero.

    Args:
      reader: the open file.
      fmt: its family's table.
      config: the model's config.
      dtype: dtype of the parameters.
      on_progress: called after each tensor.
      sharding: where each parameter goes; None for JAX's default device.

    Returns:
      The nested dict of arrays.

    Raises:
      ValueError: before anything is read, one message that names every tensor that is
        missing, misshapen or left over, or a parameter that cannot be sharded.
    """
    plan = slots(fmt, config)
    check_tensors(reader, fmt, config, plan)
    table = parameter_table(config)
    places = {path: _place(path, leaf, sharding) for path, leaf in table.items()}
    kind = np.dtype(jax.numpy.dtype(dtype))
    total, done = sum(map(len, plan.values())), 0
    leaves: dict[str, jax.Array] = {}
    with ThreadPoolExecutor(_cores()) as pool:
        for path, parameter in table.items():
            pieces = _pieces(places[path], parameter.shape, kind)
            if len(plan[path]) < math.prod(parameter.shape[: len(plan[path][0].index)]):
                for piece in pieces:
                    piece.buffer[...] = 0

            def fill(slot: Slot, pieces: list[_Piece] = pieces) -> str:
                array = to_parameter(reader.read(slot.name), slot, config)
                for piece in pieces:
                    piece.fill(array, slot.index)
                return slot.name

            for name in pool.map(fill, plan[path]):
                done += 1
                if on_progress:
                    on_progress(done, total, name)
            leaves[path] = _on_devices(pieces, places[path], parameter.shape)
            del pieces, fill
    return nest(leaves)


def check_tensors(reader: Reader, fmt: Format, config: Config, plan: dict[str, list[Slot]]) -> None:
    """Raises ValueError unless the file holds exactly the tensors of the plan."""
    expected = {slot.name: slot for group in plan.values() for slot in group}
    left_over = [name for name in reader.shapes if name not in expected]
    left_over = [name for name in left_over if not any(re.fullmatch(p, name) for p in fmt.ignored)]
    problems = [f"{name}: {why}" for name, why in fmt.refused.items() if name in left_over]
    left_over = [name for name in left_over if name not in fmt.refused]
    for name, path in fmt.copies.items():
        if name in left_over and path in plan:
            left_over.remove(name)
            if not _same(reader, name, plan[path][0].name):
                problems.append(f"{name} is not the copy of {path} that the config says it is")
    present = [name for name in expected if name in reader.shapes]
    odd = [f"{name} ({reader.dtypes[name]})" for name in present if not reader.readable(name)]
    if odd:
        problems.append(
            f"tensors that are not plain floats: {some(odd)}; known types: {', '.join(FLOATS)}"
        )
    missing = [name for name in expected if name not in reader.shapes]
    if missing:
        problems.append(f"missing tensors: {some(missing)}")
    if left_over:
        problems.append(f"tensors with no place in the model: {some(left_over)}")
    misshapen = [
        f"{name} has shape {reader.shapes[name]}, the config says {slot.shape}"
        for name, slot in expected.items()
        if name in reader.shapes and reader.shapes[name] != slot.shape
    ]
    if misshapen:
        problems.append(some(misshapen))
    if problems:
        raise ValueError(f"cannot load {reader.where}: " + "; ".join(problems))


def _same(reader: Reader, copy: str, original: str) -> bool:
    kinds = (reader.shapes.get(copy), reader.dtypes.get(copy))
    if kinds != (reader.shapes.get(original), reader.dtypes.get(original)):
        return False
    first, second = (reader.read(name).view(np.uint8) for name in (copy, original))
    return np.array_equal(first, second)


@dataclass(frozen=True)
class _Piece:
    """A part of a parameter as some devices of this process hold it.

    Attributes:
      index: the part of each axis of the parameter, with start and stop.
      devices: who holds it; None is JAX's default device.
      buffer: its values, before they go to the devices.
    """

    index: tuple[slice, ...]
    devices: tuple[jax.Device | None, ...]
    buffer: np.ndarray

    def fill(self, array: np.ndarray, at: tuple[int, ...]) -> None:
        """Takes its part of the parameter's `array` at the leading indices `at`."""
        leading, rest = self.index[: len(at)], self.index[len(at) :]
        if all(part.start <= i < part.stop for i, part in zip(at, leading, strict=True)):
            here = tuple(i - part.start for i, part in zip(at, leading, strict=True))
            _copy(self.buffer[(*here, ...)], array[rest])


def _place(path: str, leaf: Parameter, sharding: Placement | None) -> Sharding | None:
    if sharding is None:
        return None
    place = sharding(path, leaf.axes, leaf.shape)
    try:
        place.shard_shape(leaf.shape)
    except ValueError as error:
        raise ValueError(f"{path} cannot be sharded: {error}") from error
    return place


def _pieces(place: Sharding | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> list[_Piece]:
    """One piece for each distinct part; its buffer is not filled yet."""
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device | None]] = {}
    if place is None:
        holders[tuple((0, size) for size in shape)] = [None]
    else:
        for device, index in place.addressable_devices_indices_map(shape).items():
            parts = zip(index or (), shape, strict=True)
            bounds = tuple(part.indices(size)[:2] for part, size in parts)
            holders.setdefault(bounds, []).append(device)
    return [
        _Piece(
            tuple(slice(start, stop) for start, stop in bounds),
            tuple(devices),
            _empty(tuple(stop - start for start, stop in bounds), dtype),
        )
        for bounds, devices in holders.items()
    ]


def _on_devices(pieces: list[_Piece], place: Sharding | None, shape: tuple[int, ...]) -> jax.Array:
    """The whole parameter; waits until the buffers are no longer needed."""
    arrays = [jax.device_put(piece.buffer, device) for piece in pieces for device in piece.devices]
    jax.block_until_ready(arrays)
    if place is None:
        return arrays[0]
    return jax.make_array_from_single_device_arrays(shape, place, arrays)


def _empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """An array, not touched yet, at an address that the CPU backend takes over uncopied.

    Of `np.empty`, which asks for huge pages where `np.zeros` does not: first touching them
    takes a quarter of the time.
    """
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """Writes `source` into the contiguous `target`, converting the dtype.

    NumPy follows the target's order, so a transposed source costs it a cache miss for every
    value. Tiles of a cache line of the target by a run of the source are eight times faster.
    """
    if target.dtype == source.dtype:  # as integers, which NumPy moves faster
        word = np.dtype(f"u{target.dtype.itemsize}")
        target, source = target.view(word), source.view(word)
    shape, strides = _merged(source)
    source = np.lib.stride_tricks.as_strided(source, shape, strides, writeable=False)
    target = target.reshape(shape)
    run = min(range(len(shape)), key=lambda axis: strides[axis], default=0)
    if len(shape) < 2 or run == len(shape) - 1:
        target[...] = source
        return
    line = _LINE // target.itemsize
    for start in range(0, shape[run], _RUN):
        for column in range(0, shape[-1], line):
            tile = [slice(None)] * len(shape)
            tile[run], tile[-1] = slice(start, start + _RUN), slice(column, column + line)
            target[tuple(tile)] = source[tuple(tile)]


def _merged(source: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides with neighbouring axes joined wherever one stride serves both."""
    shape: list[int] = []
    strides: list[int] = []
    for size, stride in zip(source.shape, source.strides, strict=True):
        if size == 1:
            continue
        if shape and strides[-1] == size * stride:
            shape[-1], strides[-1] = shape[-1] * size, stride
        else:
            shape.append(size)
            strides.append(stride)
    return tuple(shape), tuple(strides)
