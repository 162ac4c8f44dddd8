"""From an open file to a parameter tree, one leaf at a time."""

from __future__ import annotations

import re
from collections.abc import Callable

import jax
import numpy as np

from jaxheads.convert.readers import Reader, some
from jaxheads.convert.table import Format, Slot, slots, to_parameter
from jaxheads.model.config import ModelConfig
from jaxheads.model.parameters import Tree, nest, parameter_table

Progress = Callable[[int, int, str], None]
"""Called as (tensors done, tensors in all, name of the last one)."""


def fill_parameters(
    reader: Reader,
    fmt: Format,
    config: ModelConfig,
    dtype: str,
    on_progress: Progress | None = None,
) -> Tree:
    """Reads every parameter of a model.

    At any time at most one leaf exists twice, so the peak is the weights in `dtype`
    plus their largest leaf (plus what the operating system keeps of mapped files).

    Args:
      reader: the open file.
      fmt: its family's table.
      config: the model's config.
      dtype: dtype of the parameters.
      on_progress: called after each tensor.

    Returns:
      The nested dict of arrays on JAX's default device.

    Raises:
      ValueError: before anything is read, one message that names every tensor that is
        missing, misshapen or left over.
    """
    plan = slots(fmt, config)
    check_tensors(reader, fmt, config, plan)
    total, done = sum(map(len, plan.values())), 0
    leaves: dict[str, jax.Array] = {}
    for path, parameter in parameter_table(config).items():
        leaf = _empty(parameter.shape, dtype)
        for slot in plan[path]:
            leaf[slot.index] = to_parameter(reader.read(slot.name), slot, config)
            done += 1
            if on_progress:
                on_progress(done, total, slot.name)
        leaves[path] = jax.device_put(leaf)
        del leaf
    return nest(leaves)


def check_tensors(
    reader: Reader, fmt: Format, config: ModelConfig, plan: dict[str, list[Slot]]
) -> None:
    """Raises ValueError unless the file holds exactly the tensors of the plan."""
    expected = {slot.name: slot for group in plan.values() for slot in group}
    left_over = [name for name in reader.shapes if name not in expected]
    left_over = [name for name in left_over if not any(re.fullmatch(p, name) for p in fmt.ignored)]
    problems = [f"{name}: {why}" for name, why in fmt.refused.items() if name in left_over]
    left_over = [name for name in left_over if name not in fmt.refused]
    for path, original in fmt.copies.items():
        name = fmt.rows[path].name
        if path not in plan and name in left_over:
            left_over.remove(name)
            if not _same(reader, name, fmt.rows[original].name):
                problems.append(f"{name} is not the copy of {original} that the config says it is")
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


def _empty(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An uninitialised array at an address that the CPU backend takes over uncopied."""
    kind = np.dtype(jax.numpy.dtype(dtype))
    size = int(np.prod(shape)) * kind.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(kind).reshape(shape)
