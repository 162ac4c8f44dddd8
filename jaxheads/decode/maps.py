"""What caches that hold different tokens for different heads cannot do."""

from __future__ import annotations

from jaxheads.model.context import Context


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
