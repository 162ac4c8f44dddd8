"""`Batch`: tokens together with which of them are real and which are targets."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from flax import struct

Array = jax.Array | np.ndarray


@struct.dataclass
class Batch:
    """A rectangle of token ids.

    Attributes:
      tokens: int32 [B,T].
      mask: bool [B,T], True where a token is real, False where it is padding.
        Padding may stand on the left or on the right.
      targets: bool [B,T] or None, True at the tokens whose prediction counts (an
        answer, say). None counts every real token that follows a real one.
      segments: int32 [B,T] or None, which of the texts packed into a row a token belongs to,
        counted from 1; 0 at padding. Texts do not see each other.
    """

    tokens: Array
    mask: Array
    targets: Array | None = None
    segments: Array | None = None

    @property
    def target_mask(self) -> Array:
        """bool [B,T]: tokens that are predicted from the one before and counted."""
        predictable = self.mask[:, 1:] & self.mask[:, :-1]
        if self.targets is not None:
            predictable = predictable & self.targets[:, 1:]
        if self.segments is not None:
            predictable = predictable & (self.segments[:, 1:] == self.segments[:, :-1])
        first = predictable[:, :1] & False
        return _concatenate([first, predictable])

    def answers(self, width: int | None = None) -> Answers:
        """Where the targets are, so that only they need unembedding. On the host.

        Args:
          width: N, columns of the result; default the most targets of any row.

        Raises:
          ValueError: a row with more targets than `width`, or no target at all.
        """
        counted = np.asarray(self.target_mask)
        longest = int(counted.sum(axis=1).max())
        width = longest if width is None else width
        if not 0 < longest <= width:
            raise ValueError(f"rows have up to {longest} targets, expected 1 to {width}")
        rows = counted.shape[0]
        slots, mask = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
        for row, targets in enumerate(counted):
            (found,) = np.nonzero(targets)
            slots[row, : len(found)] = found - 1
            mask[row, : len(found)] = True
        ids = np.take_along_axis(np.asarray(self.tokens), slots + 1, axis=1)
        return Answers(slots, ids, mask)


@struct.dataclass
class Answers:
    """The target tokens of a batch, packed to the left.

    Attributes:
      slots: int32 [B,N], the slot whose logits predict each target (the one before it).
      ids: int32 [B,N], the target tokens.
      mask: bool [B,N], True where there is a target.
    """

    slots: Array
    ids: Array
    mask: Array


def _concatenate(parts: list[Array]) -> Array:
    on_host = all(isinstance(part, np.ndarray) for part in parts)
    return (np if on_host else jax.numpy).concatenate(parts, axis=1)


def pack(
    rows: Sequence[Sequence[int]],
    targets: Sequence[Sequence[bool]] | None = None,
    *,
    side: str = "right",
    length: int | None = None,
    pad: int = 0,
) -> Batch:
    """Pads rows of token ids to one rectangle, on the host.

    Args:
      rows: token ids, one sequence per row, none empty.
      targets: for each row, which of its tokens are targets; None for all.
      side: the side that is padded, "right" or "left".
      length: T; default the longest row. Fix it to keep one compiled program.
      pad: the id written into padding (never read: padding is masked).

    Returns:
      A `Batch` of numpy arrays.

    Raises:
      ValueError: no rows, an empty row, an unknown side, or a row longer than
        `length`.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', got {side!r}")
    if not rows:
        raise ValueError("no rows to pack: expected at least one sequence of token ids")
    for index, row in enumerate(rows):
        if not len(row):
            raise ValueError(f"row {index} is empty: a prompt needs at least one token")
    longest = max(len(row) for row in rows)
    length = longest if length is None else length
    if longest > length:
        raise ValueError(f"a row has {longest} tokens, more than length={length}")
    tokens = np.full((len(rows), length), pad, np.int32)
    mask = np.zeros((len(rows), length), bool)
    counted = None if targets is None else np.zeros((len(rows), length), bool)
    for index, row in enumerate(rows):
        start = 0 if side == "right" else length - len(row)
        place = slice(start, start + len(row))
        tokens[index, place] = row
        mask[index, place] = True
        if counted is not None and targets is not None:
            counted[index, place] = targets[index]
    return Batch(tokens, mask, counted)
