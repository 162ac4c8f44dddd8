"""The mesh of a run: how many devices each kind of parallelism gets.

Axes, in the order in which devices are laid out, the most distant first:

- "data": every device group has a copy of the state and its own rows of the batch;
- "fsdp": fully sharded data parallelism: rows of the batch, and the state divided over D;
- "sequence": the tokens of a row;
- "tensor": heads, neurons and vocabulary, whose values are exchanged in every layer.

An axis of size 1 is left out of the mesh, and one device has no mesh at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType

from jaxheads.model.config import ModelConfig
from jaxheads.names import choose
from jaxheads.sites import axis_sizes

AXES = ("data", "fsdp", "sequence", "tensor")
BATCH_AXES = ("data", "fsdp")
"""Mesh axes that divide the rows of a batch."""

MODES = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}
REST = -1
"""The size of an axis that takes all devices that the others leave."""

AnyMesh = jax.sharding.Mesh | AbstractMesh


@dataclass(frozen=True)
class Mesh:
    """Settings of a mesh.

    Attributes:
      data: devices along "data"; -1 for all that the other axes leave. At most one axis is -1.
      fsdp: devices along "fsdp".
      sequence: devices along "sequence".
      tensor: devices along "tensor".
      mode: "explicit" has layouts in the types of arrays, and a wrong one is an error; "auto"
        leaves layouts of intermediate values to the compiler.
    """

    data: int = REST
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1
    mode: str = "explicit"

    def __post_init__(self) -> None:
        choose("mesh mode", self.mode, MODES)
        for axis, size in self._given().items():
            if size < 1 and size != REST:
                raise ValueError(f"mesh axis {axis} must be at least 1, or -1, got {size}")
        rest = [axis for axis, size in self._given().items() if size == REST]
        if len(rest) > 1:
            raise ValueError(f"at most one mesh axis can be -1, got {' and '.join(rest)}")

    def _given(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in AXES}

    def sizes(self, devices: int) -> dict[str, int]:
        """Devices along each axis, all of `AXES`.

        Args:
          devices: how many there are.

        Raises:
          ValueError: the mesh needs more devices, leaves some idle, or its fixed axes do not
            divide their number.
        """
        given = self._given()
        fixed = {axis: size for axis, size in given.items() if size != REST}
        product = math.prod(fixed.values())
        shown = " x ".join(f"{axis}={size}" for axis, size in fixed.items() if size > 1) or "1"
        if product > devices:
            raise ValueError(
                f"the mesh {shown} needs {product} devices, but there are only {devices}"
            )
        if len(fixed) == len(given):
            if product != devices:
                raise ValueError(
                    f"the mesh {shown} uses {product} of {devices} devices: set one axis to -1 "
                    "to take the rest, or show JAX fewer devices"
                )
            return given
        if devices % product:
            raise ValueError(
                f"the mesh {shown} needs a multiple of {product} devices, but there are {devices}"
            )
        return {axis: fixed.get(axis, devices // product) for axis in AXES}


def make_mesh(settings: Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh | None:
    """The mesh of the devices at hand, or None for one device.

    Neighbours along the last axes are neighbours in the network where it is known (TPU). Over
    several TPU slices, "data" or else "fsdp" runs across them: it is exchanged once a step.

    Args:
      settings: sizes and mode.
      devices: which; None for all of this run, of every host.

    Raises:
      ValueError: the settings do not fit the number of devices, or neither "data" nor "fsdp"
        is a multiple of the number of slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = {axis: n for axis, n in settings.sizes(len(devices)).items() if n > 1}
    if not shape:
        return None
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        grid = _across_slices(shape, slices, devices)
    else:
        grid = mesh_utils.create_device_mesh(
            tuple(shape.values()), devices, allow_split_physical_axes=True
        )
    return jax.sharding.Mesh(grid, tuple(shape), axis_types=_types(settings, shape))


def abstract_mesh(settings: Mesh, devices: int) -> AbstractMesh | None:
    """The same mesh without devices, for layouts on paper; errors as in `Mesh.sizes`."""
    shape = {axis: n for axis, n in settings.sizes(devices).items() if n > 1}
    if not shape:
        return None
    return AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=_types(settings, shape))


def check_fit(
    mesh: AnyMesh | None,
    *,
    batch_size: int,
    accumulate: int = 1,
    length: int | None = None,
    config: Any = None,
) -> None:
    """Refuses a batch or a model that the mesh cannot divide evenly, before any work.

    Args:
      mesh: the mesh, or None.
      batch_size: rows of the global batch.
      accumulate: micro-batches that it is cut into.
      length: T, tokens of a row; None leaves it unchecked.
      config: of the model (of one stack or of two); None leaves it unchecked.

    Raises:
      ValueError: something does not divide; the message names it, the sizes and the axes.
    """
    if accumulate < 1 or batch_size < 1 or batch_size % accumulate:
        raise ValueError(
            f"a batch of {batch_size} rows cannot be cut into {accumulate} micro-batches"
        )
    if mesh is None:
        return
    sizes = {axis: mesh.shape.get(axis, 1) for axis in AXES}
    rows = sizes["data"] * sizes["fsdp"]
    if batch_size // accumulate % rows:
        cut = f" / accumulate {accumulate}" if accumulate > 1 else ""
        raise ValueError(
            f"batch size {batch_size}{cut} is not a multiple of the {rows} devices that divide "
            f"it (data={sizes['data']} x fsdp={sizes['fsdp']})"
        )
    if length is not None and length % sizes["sequence"]:
        raise ValueError(
            f"rows of {length} tokens are not a multiple of sequence={sizes['sequence']}"
        )
    if config is not None:
        sides = {"": config} if isinstance(config, ModelConfig) else config.sides
        for side, stack in sides.items():
            _check_model(stack, sizes, side)


def _check_model(config: ModelConfig, sizes: dict[str, int], side: str) -> None:
    of = f" of the {side} stack" if side else ""
    axis = axis_sizes(config)
    names = {"H": "heads", "F": "neurons", "V": "vocabulary"}
    for letter, name in names.items():
        if axis[letter] % sizes["tensor"]:
            raise ValueError(
                f"{letter} = {axis[letter]} {name}{of} is not a multiple of "
                f"tensor={sizes['tensor']}"
            )
    # Fewer key/value heads than devices stay whole on each.
    if axis["K"] > sizes["tensor"] and axis["K"] % sizes["tensor"]:
        raise ValueError(
            f"K = {axis['K']} key/value heads{of} are more than tensor={sizes['tensor']} and not "
            "a multiple of it"
        )
    if axis["D"] % sizes["fsdp"]:
        raise ValueError(f"D = {axis['D']}{of} is not a multiple of fsdp={sizes['fsdp']}")


def _across_slices(shape: dict[str, int], slices: int, devices: list[Any]) -> np.ndarray:
    over = next((a for a in BATCH_AXES if a in shape and shape[a] % slices == 0), None)
    if over is None:
        raise ValueError(
            f"the devices are {slices} slices, but neither data nor fsdp of {dict(shape)} is a "
            f"multiple of {slices}"
        )
    outer = [slices if axis == over else 1 for axis in shape]
    inner = [size // n for size, n in zip(shape.values(), outer, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, allow_split_physical_axes=True
    )


def _types(settings: Mesh, shape: dict[str, int]) -> tuple[AxisType, ...]:
    return (MODES[settings.mode],) * len(shape)
