"""Compiling a step for devices that are not here, and what that says of it.

Two kinds of topology can be compiled anywhere: "cpu:8", fake devices, and TPUs such as
"v5e:4x4", by the TPU compiler of the package `libtpu`, which needs no TPU. A GPU program is
compiled only where that GPU is.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jaxheads.train.hlo import COLLECTIVES, read_program
from jaxheads.train.rules import Rule, shardings
from jaxheads.train.step import TrainState, start

TPUS = ("v2", "v3", "v4", "v5e", "v5p", "v6e", "tpu7x")
"""Generations that the TPU compiler knows."""

_FORM = "cpu:8 (fake devices) or a TPU and its chips, for instance v5e:4x4 or v5p:4x4x4"


@dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      platform: "cpu" or "tpu".
      name: "8" devices, or the TPU compiler's name, e.g. "v5e:4x4".
    """

    platform: str
    name: str

    @classmethod
    def parse(cls, text: str) -> Topology:
        """Reads "cpu:8" or "v5e:4x4".

        Raises:
          ValueError: another form, or a device that cannot be compiled for here.
        """
        kind, _, layout = text.partition(":")
        if kind == "cpu":
            if not layout.isdecimal() or int(layout) < 1:
                raise ValueError(f"topology {text!r}: expected cpu:N with N of at least 1")
            return cls("cpu", layout)
        if re.fullmatch(r"(gpu|cuda|rocm|[abh]\d+|gb\d+|mi\d+).*", kind):
            raise ValueError(
                f"topology {text!r} cannot be compiled here: a GPU program needs that GPU. Use "
                f"{_FORM}; memory and collectives of cpu:N are close"
            )
        if kind not in TPUS:
            raise ValueError(
                f"unknown topology {text!r}: expected {_FORM}. TPUs: {', '.join(TPUS)}"
            )
        if not re.fullmatch(r"\d+(x\d+){1,2}", layout):
            raise ValueError(
                f"topology {text!r}: expected the chips along each axis, e.g. {kind}:2x2"
            )
        return cls("tpu", text)

    def devices(self) -> list[Any]:
        """The devices; of a TPU they can only be compiled for.

        Raises:
          ValueError: JAX has already started with fewer CPU devices, the TPU compiler is not
            installed, or it refuses the layout.
        """
        return _fake_devices(int(self.name)) if self.platform == "cpu" else _tpus(self.name)


def _fake_devices(count: int) -> list[Any]:
    with contextlib.suppress(RuntimeError):  # JAX has started; there may be enough
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"topology cpu:{count} needs {count} fake devices, but JAX has started with "
            f"{len(devices)}: ask for the topology before anything touches a device"
        )
    return devices[:count]


def _tpus(name: str) -> list[Any]:
    try:
        return list(topologies.get_topology_desc(name, platform="tpu").devices)
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        if "INVALID_ARGUMENT" in text:
            raise ValueError(f"topology {name!r} is refused by the TPU compiler: {text}") from error
        raise ValueError(
            f"topology {name!r} needs the TPU compiler, which could not be loaded: {text}. "
            "Install the package libtpu; no TPU is needed"
        ) from error


def abstract(tree: Any, mesh: jax.sharding.Mesh | None, rules: tuple[Rule, ...] = ()) -> Any:
    """Shapes and dtypes of a tree with where they would lie, and no memory.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s.
      mesh: whose devices may be elsewhere; None says nothing of where.
      rules: in front of the default ones.
    """
    shapes = jax.eval_shape(lambda x: x, tree)
    if mesh is None:
        return shapes
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings(shapes, mesh, rules),
    )


def abstract_state(
    trainable: Any,
    optimizer: Any,
    mesh: jax.sharding.Mesh | None,
    rules: tuple[Rule, ...] = (),
    *,
    average: bool = False,
) -> TrainState:
    """The state before the first step as `abstract`.

    Args:
      trainable: what is trained, arrays or `jax.ShapeDtypeStruct`s.
      optimizer: an optax transformation.
      mesh: as for `abstract`.
      rules: as for `abstract`.
      average: whether the state keeps an average.
    """
    state = jax.eval_shape(lambda tree: start(tree, optimizer, average=average), trainable)
    return abstract(state, mesh, rules)


def compile_for(
    function: Callable[..., Any], *arguments: Any, mesh: jax.sharding.Mesh | None, device: Any
) -> jax.stages.Compiled:
    """Compiles a jitted function for devices that may be elsewhere.

    Args:
      function: jitted.
      *arguments: as `abstract` makes them.
      mesh: the devices; None for one.
      device: the one, where there is no mesh.
    """
    if mesh is None:
        single = SingleDeviceSharding(device)
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=single), arguments
        )
        return function.lower(*arguments).compile()  # type: ignore[attr-defined]
    with jax.set_mesh(mesh):
        return function.lower(*arguments).compile()  # type: ignore[attr-defined]


def report(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """What one call of a compiled program costs on one device.

    Args:
      compiled: from `jax.jit(...).lower(...).compile()`.

    Returns:
      As JSON holds it: "devices"; "memory" in bytes: "arguments", "outputs" (without what
      takes an argument's place), "temporaries", "code" and their "total"; "flops" of all
      matrix products; "collectives": kind -> "count" and "bytes" (of the arrays gathered,
      reduced or sent) of a call; "loops_of_unknown_length", whose bodies are counted once.
    """
    program = read_program(compiled.as_text() or "")
    found = program.collectives()
    return {
        "devices": program.devices,
        "memory": _memory(compiled.memory_analysis()),
        "flops": program.flops(),
        "collectives": {
            kind: {
                "count": sum(one.times for one in found if one.kind == kind),
                "bytes": sum(one.times * one.bytes for one in found if one.kind == kind),
            }
            for kind in COLLECTIVES
            if any(one.kind == kind for one in found)
        },
        "loops_of_unknown_length": program.endless,
    }


def _memory(stats: Any) -> dict[str, int]:
    parts = {
        "arguments": stats.argument_size_in_bytes,
        # Outputs that take the place of donated arguments are counted there.
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    return parts | {"total": sum(parts.values())}
