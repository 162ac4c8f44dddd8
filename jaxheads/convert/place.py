"""Where the arrays of a model go: rules from the names of their axes to the axes of a mesh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxheads.names import choose

Placement = Callable[[str, tuple[str, ...], tuple[int, ...]], jax.sharding.Sharding]
"""(path of a parameter, names of its axes, its shape) -> how it is sharded."""

AXES = ("H", "K", "F", "V", "D")
"""Axes that can be sharded, in the order in which they claim an axis of the mesh."""

DEFAULT_RULES: Mapping[str, str] = MappingProxyType(
    {"H": "tensor", "K": "tensor", "F": "tensor", "V": "tensor", "D": "fsdp"}
)


def by_axes(mesh: jax.sharding.Mesh, rules: Mapping[str, str] = DEFAULT_RULES) -> Placement:
    """Shards every parameter by the names of its axes.

    The default is tensor parallelism over heads, neurons and vocabulary, and fully sharded
    data parallelism over the model width. Three cases are settled here:

    - A rule whose mesh axis the mesh lacks has no effect, so the default rules serve a mesh
      of "tensor" or of "fsdp" alone.
    - Two axes of one parameter with the same mesh axis: the first in the order of `AXES`
      gets it, the other stays whole.
    - Fewer key/value heads than devices along the mesh axis: K stays whole there, every
      device has a copy. Any other size that does not divide is an error.

    Args:
      mesh: the devices; for `Transformer`, with axes of type Auto.
      rules: axis of a parameter (one of `AXES`) -> axis of the mesh.

    Returns:
      A function (path, axes, shape) -> `NamedSharding`. It raises ValueError for a
      parameter that cannot be split evenly.

    Raises:
      ValueError: a rule for an axis that cannot be sharded, or no rule names an axis of
        the mesh.
    """
    for axis in rules:
        choose("axis of a rule", axis, AXES)
    if not set(rules.values()) & set(mesh.axis_names):
        raise ValueError(
            f"no rule shards anything over this mesh: its axes are {', '.join(mesh.axis_names)}, "
            f"the rules name {', '.join(sorted(set(rules.values()))) or 'none'}"
        )

    def place(path: str, axes: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
        claimed: dict[str, str] = {}  # axis of the mesh -> axis of the parameter
        for axis in sorted(set(axes) & set(rules), key=AXES.index):
            over, size = rules[axis], shape[axes.index(axis)]
            if over not in mesh.axis_names or over in claimed:
                continue
            devices = mesh.shape[over]
            if axis == "K" and size < devices:
                continue
            if size % devices:
                raise ValueError(
                    f"{path} of shape {shape} cannot be sharded: {axis} = {size} is not a "
                    f"multiple of the {devices} devices along mesh axis {over!r}; "
                    f"leave {axis} out of the rules to keep it whole"
                )
            claimed[over] = axis
        spec = {axis: over for over, axis in claimed.items()}
        return NamedSharding(mesh, PartitionSpec(*(spec.get(axis) for axis in axes)))

    return place
