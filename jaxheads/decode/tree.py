"""`Tree`: which continuations are drafted and verified together. All of it is static.

Source: Cai et al. (2024), "Medusa: Simple LLM Inference Acceleration Framework with Multiple
Decoding Heads", section 2.1.2 for tree attention, section 2.3.3 for trees made from accuracies.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np

Path = tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """Nodes named by the ranks that lead to them.

    The root, `()`, is the next token of the model itself. The node (0, 2) is the third choice of
    the second draft head after the first choice of the first.

    Attributes:
      paths: of all nodes; sorted by depth, then by rank.

    Raises:
      ValueError: no root, a node named twice or without its parent, a negative rank.
    """

    paths: tuple[Path, ...]

    def __post_init__(self) -> None:
        known = set(self.paths)
        if () not in known:
            raise ValueError("a tree needs its root, the path ()")
        if len(known) < len(self.paths):
            raise ValueError(f"paths must differ, got {self.paths}")
        for path in self.paths:
            if path and path[:-1] not in known:
                raise ValueError(f"path {path} has no parent: expected {path[:-1]} in the tree")
            if min(path, default=0) < 0:
                raise ValueError(f"ranks must be at least 0, got path {path}")
        object.__setattr__(self, "paths", tuple(sorted(known, key=lambda p: (len(p), p))))

    @classmethod
    def of_widths(cls, widths: Sequence[int]) -> Tree:
        """Every node at depth i+1 whose ranks are below `widths`: (1, 1, 1) is one chain.

        Raises:
          ValueError: a width below 1.
        """
        if min(widths, default=1) < 1:
            raise ValueError(f"widths must be at least 1, got {tuple(widths)}")
        return cls(
            tuple(
                path
                for depth in range(len(widths) + 1)
                for path in product(*map(range, widths[:depth]))
            )
        )

    @classmethod
    def most_likely(cls, accuracies: np.ndarray, size: int) -> Tree:
        """The tree of `size` nodes that are most likely accepted, if heads are independent.

        Args:
          accuracies: float [heads,ranks], how often the choice of a rank is right.
          size: N, nodes with the root.

        Raises:
          ValueError: fewer than one node, or more than the accuracies name.
        """
        heads, ranks = accuracies.shape
        most = sum(ranks**depth for depth in range(heads + 1))
        if not 1 <= size <= most:
            raise ValueError(f"size must lie in 1..{most}, got {size}")
        waiting: list[tuple[float, Path]] = [(-1.0, ())]
        chosen: list[Path] = []
        while len(chosen) < size:
            value, path = heapq.heappop(waiting)
            chosen.append(path)
            if len(path) < heads:
                for rank, accuracy in enumerate(accuracies[len(path)]):
                    heapq.heappush(waiting, (value * float(accuracy), (*path, rank)))
        return cls(tuple(chosen))

    @property
    def size(self) -> int:
        """N, nodes with the root."""
        return len(self.paths)

    @property
    def heads(self) -> int:
        """Draft heads that are used: the depth of the deepest node."""
        return len(self.paths[-1])

    @cached_property
    def depth(self) -> np.ndarray:
        """int32 [N], how far each node is from the root."""
        return np.array([len(path) for path in self.paths], np.int32)

    @cached_property
    def lines(self) -> np.ndarray:
        """int32 [N,heads+1]: the nodes from the root to each node, itself repeated after it."""
        index = {path: node for node, path in enumerate(self.paths)}
        steps = range(self.heads + 1)
        return np.array([[index[path[:d]] for d in steps] for path in self.paths], np.int32)

    @cached_property
    def parent(self) -> np.ndarray:
        """int32 [N], the parent of each node; the root is its own."""
        return self.lines[np.arange(self.size), np.maximum(self.depth - 1, 0)]

    @cached_property
    def ancestors(self) -> np.ndarray:
        """bool [N,N]: [i,j] says whether node j is on the line from the root to node i."""
        found = np.zeros((self.size, self.size), bool)
        found[np.arange(self.size)[:, None], self.lines] = True
        return found

    def levels(self) -> list[Level]:
        """How the nodes of each depth from 1 on come from those of the depth before."""
        levels = []
        for depth in range(1, self.heads + 1):
            children = np.flatnonzero(self.depth == depth)
            inner, place = np.unique(self.parent[children], return_inverse=True)
            ranks = np.array([self.paths[child][-1] for child in children], np.int32)
            levels.append(Level(self.lines[inner, :depth], place.astype(np.int32), ranks))
        return levels


@dataclass(frozen=True)
class Level:
    """The children of one depth.

    Attributes:
      lines: int32 [P,i+1], for each node with children, the nodes from the root to it.
      parents: int32 [C], whose child each is, an index into `lines`.
      ranks: int32 [C], the rank of each among all children its parent could have.
    """

    lines: np.ndarray
    parents: np.ndarray
    ranks: np.ndarray
