"""Checks that the generators share."""


def at_least(name: str, value: int, least: int) -> None:
    """Raises ValueError unless `value` is at least `least`."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def count_of(count: int, available: int, of: str) -> None:
    """Raises ValueError unless `count` different things can be drawn from `available`."""
    at_least("count", count, 1)
    if count > available:
        raise ValueError(f"count is {count}, but there are only {available} different {of}")
