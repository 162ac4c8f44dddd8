"""What caches that hold different tokens for different heads cannot do."""

from __future__ import annotations

import jax

from jaxheads.model.context import Context
from jaxheads.model.layout import divided

Array = jax.Array


def refuse_maps(context: Context, why: str) -> None:
    """Refuses edits, taps and readers of attention maps, which such a cache does not make.

    Raises:
      ValueError: there is one.
    """
    if context.wants("scores", "pattern"):
        raise ValueError(
            f"scores and pattern cannot be edited, tapped or read where {why}. Use a full cache "
            "(KVCache)"
        )


def refuse_division(mask: Array) -> Array:
    """The mask [B,T] of new tokens; refused if it is divided over a mesh in Explicit mode.

    Raises:
      ValueError: it is.
    """
    if divided(mask):
        raise ValueError(
            "caches that hold different tokens for different heads run on a mesh in Auto mode only "
            "(Mesh(mode='auto')), got rows divided in Explicit mode"
        )
    return mask
