"""Which side of a train/held-out split a document falls on, decided by its key alone."""

from __future__ import annotations

import hashlib

from jaxheads.names import choose

SPLITS = ("train", "held_out", "all")
"""The splits of every source that has none of its own."""


def check_held_out(held_out: float) -> None:
    """Raises ValueError unless the held-out share lies strictly between 0 and 1."""
    if isinstance(held_out, bool) or not isinstance(held_out, int | float) or not 0 < held_out < 1:
        raise ValueError(f"held_out must lie strictly between 0 and 1, got {held_out!r}")


def in_split(key: str, split: str, held_out: float) -> bool:
    """Whether the document called `key` belongs to `split`.

    The first 8 bytes of the key's SHA-256, read as a fraction of 2**64, are compared with
    `held_out`. So a side does not depend on which other documents there are, on their order,
    on the machine or on a seed.

    Args:
      key: what identifies the document; documents with one key are on one side.
      split: "train", "held_out" or "all".
      held_out: the expected share of the keys that is held out, between 0 and 1.

    Raises:
      ValueError: an unknown split.
    """
    if choose("split", split, SPLITS) == "all":
        return True
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    held = int.from_bytes(digest[:8], "big") < held_out * 2**64
    return held == (split == "held_out")
