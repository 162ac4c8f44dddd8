"""`Points`: the edits of a sweep, each of which begins to act in one layer at one slot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import struct

from jaxheads.model.context import Edit

Array = jax.Array
Build = Callable[[Any, Any, Array, int], Mapping[str, Edit]]
"""(arguments of one point, values shared in this layer, layer, first slot of the window) ->
the edits of the block, without a layer axis and with T counted from that slot."""


@struct.dataclass
class Points:
    """N edits that differ in arrays only, so that one program serves them all.

    Attributes:
      layer: int [N], the first layer whose values change.
      slot: int [N], the first slot whose values change; 0 in models that are not causal.
      arguments: pytree of [N,...], what differs between points.
      shared: pytree of [L,...], what all points may read in a layer, such as the values of
        another run. Kept once, whatever N is.
      entering: makes the edits of the block in which a point begins. Static.
      later: makes those of the blocks above it; None where they are left alone. Static.
      alike: whether an edit does the same in every row and slot. Then the slots that all rows
        begin with are computed once for each edit, not once for each row. Static.
      outside: makes those of the sites outside the stack from a point's arguments. Static.
    """

    layer: np.ndarray
    slot: np.ndarray
    arguments: Any
    shared: Any = None
    entering: Build = struct.field(pytree_node=False, kw_only=True)
    alike: bool = struct.field(pytree_node=False, default=False)
    later: Build | None = struct.field(pytree_node=False, default=None)
    outside: Callable[[Any], Mapping[str, Edit]] | None = struct.field(
        pytree_node=False, default=None
    )

    def __len__(self) -> int:
        return len(self.layer)
