"""How far an approximation agrees with what it approximates."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from jaxheads.sweep.named import NamedArray


@dataclass(frozen=True)
class Agreement:
    """An approximation against the exact values, over the entries that both have.

    Attributes:
      entries: how many.
      pearson: linear correlation; NaN where one side does not vary.
      spearman: correlation of ranks, those of equal values averaged; likewise.
      largest_error: greatest absolute difference, in the unit of the values.
      mean_error: mean absolute difference.
      top: k, how many entries count as the most important.
      overlap: share of the k entries of greatest magnitude that are the same in both.
    """

    entries: int
    pearson: float
    spearman: float
    largest_error: float
    mean_error: float
    top: int
    overlap: float

    def as_dict(self) -> dict[str, float | int | None]:
        """For JSON: NaN as None."""
        found = dataclasses.asdict(self)
        return {name: None if math.isnan(value) else value for name, value in found.items()}


def agreement(
    approximate: NamedArray | np.ndarray, exact: NamedArray | np.ndarray, *, top: int = 10
) -> Agreement:
    """Compares an approximation with what it approximates, entry by entry.

    Args:
      approximate: e.g. of `attribution_patching`.
      exact: of the same axes in the same order (plain arrays: of the same shape), e.g. of
        `patch`. Entries that are NaN on either side are left out.
      top: k of the overlap; all entries where there are fewer.

    Raises:
      ValueError: different axes or labels, fewer than two common entries, or `top` below 1.
    """
    if isinstance(approximate, NamedArray) and isinstance(exact, NamedArray):
        _check_alike(approximate, exact)
    elif np.shape(approximate) != np.shape(exact):
        raise ValueError(f"cannot compare shapes {np.shape(approximate)} and {np.shape(exact)}")
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    a, b = (np.asarray(part, np.float64).ravel() for part in (approximate, exact))
    both = ~(np.isnan(a) | np.isnan(b))
    a, b = a[both], b[both]
    if len(a) < 2:
        raise ValueError(f"need at least two entries to compare, got {len(a)}")
    errors, count = np.abs(a - b), min(top, len(a))
    return Agreement(
        len(a),
        _correlation(a, b),
        _correlation(_ranks(a), _ranks(b)),
        float(errors.max()),
        float(errors.mean()),
        count,
        len(_largest(a, count) & _largest(b, count)) / count,
    )


def _check_alike(approximate: NamedArray, exact: NamedArray) -> None:
    if approximate.axes != exact.axes:
        raise ValueError(
            f"cannot compare axes {approximate.axes} of the approximation with {exact.axes}"
        )
    for axis, ours, theirs in zip(exact.axes, approximate.labels, exact.labels, strict=True):
        if ours != theirs:
            raise ValueError(
                f"cannot compare axis {axis!r}: its {len(ours)} and {len(theirs)} labels differ"
            )


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's, NaN where one does not vary."""
    if not (np.ptp(a) and np.ptp(b)):
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing their mean."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def _largest(values: np.ndarray, count: int) -> set[int]:
    return set(np.argsort(-np.abs(values), kind="stable")[:count].tolist())
