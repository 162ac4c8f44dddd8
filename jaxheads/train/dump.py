"""The sharding dump: what the rules make of every leaf of a state."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from jax.sharding import NamedSharding

from jaxheads.train.mesh import AnyMesh
from jaxheads.train.rules import Rule, paths, shown, spec_of


def describe(tree: Any, mesh: AnyMesh, rules: Iterable[Rule] = ()) -> dict[str, Any]:
    """The sharding dump, as JSON holds it.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s.
      mesh: with axes of `AXES`; an `AbstractMesh` does.
      rules: in front of the default ones.

    Returns:
      "mesh": its axes; "bytes": of all leaves; "bytes_per_device": on each device;
      "undivided": the bytes of leaves that are whole on every device; "leaves": path ->
      [dtype and shape, mesh axes of the dimensions, shape on one device].

    Raises:
      ValueError: as `rules.specs`.
    """
    rules = tuple(rules)
    leaves, total, local, whole = {}, 0, 0, 0
    for path, leaf in paths(tree):
        spec = spec_of(path, leaf.shape, mesh, rules)
        part = NamedSharding(mesh, spec).shard_shape(tuple(leaf.shape))
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        total += size
        local += math.prod(part) * leaf.dtype.itemsize
        whole += 0 if any(spec) else size
        leaves[path] = [
            f"{leaf.dtype.name}[{','.join(map(str, leaf.shape))}]",
            shown(spec),
            f"[{','.join(map(str, part))}]",
        ]
    return {
        "mesh": dict(mesh.shape),
        "bytes": total,
        "bytes_per_device": local,
        "undivided": whole,
        "leaves": leaves,
    }
