"""The axes along which parts of a site are taken apart: layers, heads, positions, neurons."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from jaxheads.names import choose
from jaxheads.sites import find_site

Heads = Iterable[tuple[int, int]]
AXES = ("layer", "head", "position", "neurons")


def check_axes(over: Sequence[str], site: str) -> None:
    """Raises ValueError for axes that a sweep of this site does not have."""
    spec = find_site(site)
    for axis in over:
        choose("axis", axis, AXES)
    if len(set(over)) != len(over) or "layer" not in over:
        raise ValueError(f"over must name each axis once and 'layer' among them, got {over}")
    if "head" in over and spec.head_axis is None:
        raise ValueError(f"site {site!r} {spec.signature} has no axis 'head'")
    if "neurons" in over and spec.axes[-1] not in ("F", "D"):
        raise ValueError(f"site {site!r} {spec.signature} has no axis 'neurons'")


def only(
    axis: str, only: Iterable[int], sizes: Mapping[str, int], over: Sequence[str]
) -> np.ndarray:
    """bool, broadcasting over the axes in use: True at the indices named."""
    if axis not in over:
        raise ValueError(f"{axis}s can be chosen only if {axis!r} is one of over={tuple(over)}")
    mask = np.zeros(sizes[axis], bool)
    for index in only:
        if not 0 <= index < sizes[axis]:
            raise ValueError(f"{axis} {index} is out of range 0..{sizes[axis] - 1}")
        if mask[index]:
            raise ValueError(f"{axis} {index} is named twice")
        mask[index] = True
    present = [name for name in AXES if name in over]
    return mask.reshape([-1 if name == axis else 1 for name in present])


def only_heads(heads: Heads, sizes: Mapping[str, int], over: Sequence[str]) -> np.ndarray:
    """bool, broadcasting over the axes in use: True at the (layer, head) pairs.

    Raises:
      ValueError: a head out of range or named twice, or no axis "head".
    """
    if "head" not in over:
        raise ValueError(f"heads can be chosen only if 'head' is one of over={tuple(over)}")
    mask = np.zeros((sizes["layer"], sizes["head"]), bool)
    for layer, head in heads:
        if not (0 <= layer < mask.shape[0] and 0 <= head < mask.shape[1]):
            raise ValueError(
                f"head {layer}.{head} is out of range: the site has layers 0..{mask.shape[0] - 1} "
                f"and heads 0..{mask.shape[1] - 1}"
            )
        if mask[layer, head]:
            raise ValueError(f"head {layer}.{head} is named twice")
        mask[layer, head] = True
    return mask.reshape(*mask.shape, *(1 for axis in AXES[2:] if axis in over))


def check_groups(groups: int, features: int) -> None:
    """Raises ValueError for a number of groups that so many features do not have."""
    if not 1 <= groups <= features:
        raise ValueError(f"neuron_groups must lie in 1..{features}, got {groups}")


def group_names(groups: int, features: int) -> tuple[str, ...]:
    """The first and the last feature of each group, e.g. "0-95"."""
    member = np.arange(features) * groups // features
    edges = [np.flatnonzero(member == group)[[0, -1]] for group in range(groups)]
    return tuple(f"{low}-{high}" for low, high in edges)
