"""Checks and draws that the generators share."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def at_least(name: str, value: int, least: int) -> None:
    """Raises ValueError unless `value` is at least `least`."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def count_of(count: int, available: int, of: str) -> None:
    """Raises ValueError unless `count` different things can be drawn from `available`."""
    at_least("count", count, 1)
    if count > available:
        raise ValueError(f"count is {count}, but there are only {available} different {of}")


def different(draw: Callable[[], T], count: int, key: Callable[[T], object] = repr) -> list[T]:
    """The first `count` draws that differ in `key`.

    Raises:
      ValueError: 1000 draws in a row gave nothing new, as when fewer than `count` exist.
    """
    found: dict[object, T] = {}
    in_vain = 0
    while len(found) < count:
        drawn = draw()
        known = len(found)
        found.setdefault(key(drawn), drawn)
        in_vain = in_vain + 1 if len(found) == known else 0
        if in_vain == 1000:
            raise ValueError(
                f"count is {count}, but after {known} different draws 1000 more gave nothing new"
            )
    return list(found.values())
