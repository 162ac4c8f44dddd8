"""Packing: token sequences of many lengths laid into rows of one length, without waste."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxheads.model.batch import Batch


@dataclass(frozen=True)
class Plan:
    """Where each piece of the sequences goes.

    Piece p is `size[p]` tokens from place `start[p]` of the concatenated sequences, written to
    row `row[p]` from slot `slot[p]` on, as the segment `segment[p]` of that row.

    Attributes:
      start, size, row, slot, segment: int64 [P], ordered by row, then slot; segments of a row
        count from 1.
      rows: N.
      length: T.
    """

    start: np.ndarray
    size: np.ndarray
    row: np.ndarray
    slot: np.ndarray
    segment: np.ndarray
    rows: int
    length: int

    @property
    def efficiency(self) -> float:
        """The share of the N*T slots that hold a token."""
        return float(self.size.sum() / (self.rows * self.length))


def plan_rows(sizes: Sequence[int] | np.ndarray, length: int, *, one_per_row: bool = False) -> Plan:
    """Best-fit-decreasing packing (Ding et al. 2024, "Fewer Truncations Improve Language
    Modeling", section 3).

    A sequence longer than a row is first cut into full rows and a remainder; nothing else is
    cut. Then the pieces, longest first, each go to the fullest row that has room for them.

    Args:
      sizes: [n], tokens of each sequence, all at least 1.
      length: T, tokens of a row.
      one_per_row: give every piece a row of its own.

    Raises:
      ValueError: no sequences, an empty one, or a length below 1.
    """
    if length < 1:
        raise ValueError(f"length of a row must be at least 1, got {length}")
    counts = np.asarray(sizes, np.int64)
    if not len(counts):
        raise ValueError("no sequences to pack: expected at least one")
    if counts.min() < 1:
        raise ValueError(f"sequence {int(counts.argmin())} is empty: expected at least one token")
    starts, pieces = _cut(counts, length)
    rows = np.arange(len(pieces)) if one_per_row else _best_fit(pieces, length)
    # Within a row the pieces stand in the order of the sequences.
    order = np.lexsort((starts, rows))
    start, size, row = starts[order], pieces[order], rows[order]
    first = np.r_[True, row[1:] != row[:-1]]
    index = np.arange(len(row))
    opened = np.maximum.accumulate(np.where(first, index, 0))
    before = np.cumsum(size) - size
    return Plan(
        start=start,
        size=size,
        row=row,
        slot=before - before[opened],
        segment=index - opened + 1,
        rows=int(row[-1]) + 1,
        length=length,
    )


def fill_rows(
    plan: Plan, tokens: np.ndarray, targets: np.ndarray | None = None, *, block: int = 1024
) -> Iterator[Batch]:
    """The rows of a plan, `block` at a time, in order.

    Args:
      plan: where everything goes.
      tokens: int [M], all sequences one after another.
      targets: bool [M], which of them are targets; None leaves `targets` None.
      block: rows of each result but the last.

    Yields:
      A `Batch` of numpy arrays: `tokens` int32, `mask` and `targets` bool, `segments` int32,
      all [block,T]. Padding is on the right, with token 0 and segment 0.
    """
    for low in range(0, plan.rows, block):
        high = min(low + block, plan.rows)
        rows = np.zeros((high - low, plan.length), np.int32)
        segments = np.zeros_like(rows)
        counted = None if targets is None else np.zeros(rows.shape, bool)
        first, last = np.searchsorted(plan.row, (low, high))
        for p in range(first, last):
            read = slice(plan.start[p], plan.start[p] + plan.size[p])
            write = plan.row[p] - low, slice(plan.slot[p], plan.slot[p] + plan.size[p])
            rows[write] = tokens[read]
            segments[write] = plan.segment[p]
            if counted is not None and targets is not None:
                counted[write] = targets[read]
        yield Batch(rows, segments > 0, counted, segments)


def _cut(sizes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Places and sizes of the pieces, in the order of the sequences."""
    per = -(-sizes // length)
    begin = np.repeat(np.cumsum(sizes) - sizes, per)
    end = begin + np.repeat(sizes, per)
    number = np.arange(len(begin)) - np.repeat(np.cumsum(per) - per, per)
    starts = begin + number * length
    return starts, np.minimum(end - starts, length)


def _best_fit(sizes: np.ndarray, length: int) -> np.ndarray:
    """The row of each piece; rows are numbered by their first piece in the order given."""
    room: list[list[int]] = [[] for _ in range(length + 1)]
    # Bit c is set where some row has room for exactly c more tokens, so the fullest row that
    # fits is the lowest set bit at or above a size.
    open_rows = 0
    rows = np.empty(len(sizes), np.int64)
    count = 0
    for piece in np.argsort(-sizes, kind="stable"):
        size = int(sizes[piece])
        fitting = open_rows >> size
        if fitting:
            left = size + (fitting & -fitting).bit_length() - 1
            row = room[left].pop()
            if not room[left]:
                open_rows &= ~(1 << left)
        else:
            left, row = length, count
            count += 1
        rows[piece] = row
        left -= size
        if left:
            room[left].append(row)
            open_rows |= 1 << left
    _, seen, number = np.unique(rows, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(seen))[number]
