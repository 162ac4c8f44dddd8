"""`Graph`: what writes to the residual stream, what reads it, and which edges may exist.

Senders are the embedding, every head's write and every MLP's output; receivers are, per layer,
each query head's query, each key/value head's key and value, and the MLP's input, and at the
end the stream that is turned into logits. With grouped queries the query heads of a group share
the receivers of their key/value head.

An edge may go from whatever is written before to whatever reads after it: a block's heads read
nothing of their own block, and its MLP reads its heads unless blocks are parallel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxheads.model.config import ModelConfig
from jaxheads.names import unknown

Edge = tuple[str, str]
"""Names of a sender and a receiver, e.g. ("a18.6", "a20.1.q")."""


@dataclass(frozen=True)
class Graph:
    """The graph of a model.

    Names: "embed", "a18.6" (head 6 of layer 18) and "m3" send; "a20.1.q" (by query head),
    "a20.0.k" and "a20.0.v" (by key/value head), "m3" and "logits" receive.

    Attributes:
      n_layers: L.
      n_heads: H, query heads of a layer.
      n_kv_heads: K, key/value heads of a layer.
      parallel: whether an MLP reads the stream before attention.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    parallel: bool = False

    @classmethod
    def of(cls, config: ModelConfig) -> Graph:
        """The graph of a config.

        Raises:
          ValueError: the residual stream is not a sum of what is written to it, or is written
            to by attention to an encoder.
        """
        if config.norm_place != "pre":
            raise ValueError(
                "edges need branches that read a norm of the stream and are added to it "
                f"(config.norm_place 'pre'), got {config.norm_place!r}"
            )
        if config.cross:
            raise ValueError("edges are not defined for attention to an encoder (config.cross)")
        return cls(config.n_layers, config.n_heads, config.n_kv_heads, config.parallel)

    @property
    def sends(self) -> int:
        """Senders of a layer: heads, then the MLP."""
        return self.n_heads + 1

    @property
    def receives(self) -> int:
        """Receivers of a layer: queries, keys, values, then the MLP."""
        return self.n_heads + 2 * self.n_kv_heads + 1

    @cached_property
    def senders(self) -> tuple[str, ...]:
        """Names of the U = 1 + L (H + 1) senders, in the order in which they are computed."""
        names = ["embed"]
        for layer in range(self.n_layers):
            names += [f"a{layer}.{head}" for head in range(self.n_heads)] + [f"m{layer}"]
        return tuple(names)

    @cached_property
    def receivers(self) -> tuple[str, ...]:
        """Names of the V = L (H + 2K + 1) + 1 receivers, in the order in which they read."""
        names = []
        for layer in range(self.n_layers):
            names += [f"a{layer}.{head}.q" for head in range(self.n_heads)]
            names += [f"a{layer}.{head}.{x}" for x in "kv" for head in range(self.n_kv_heads)]
            names.append(f"m{layer}")
        return (*names, "logits")

    @property
    def shape(self) -> tuple[int, int]:
        """(U, V)."""
        return len(self.senders), len(self.receivers)

    @cached_property
    def allowed(self) -> np.ndarray:
        """Bool [U,V], True where an edge may exist. Read-only."""
        layer = np.arange(self.n_layers)
        heads_read = 1 + layer * self.sends  # senders that a layer's heads see
        mlp_reads = heads_read if self.parallel else heads_read + self.n_heads
        seen = np.repeat(heads_read[:, None], self.receives, axis=1)
        seen[:, -1] = mlp_reads
        seen = np.append(seen.ravel(), len(self.senders))
        found = np.arange(len(self.senders))[:, None] < seen
        found.flags.writeable = False
        return found

    @cached_property
    def feeds(self) -> np.ndarray:
        """Bool [V,U], True where a receiver is an input of a sender. Read-only.

        A key or value feeds all heads of its group; "logits" feeds nothing.
        """
        group = self.n_heads // self.n_kv_heads
        heads, keys = np.arange(self.n_heads), np.arange(self.n_kv_heads)
        one = np.zeros((self.receives, self.sends), bool)
        one[heads, heads] = True
        for start in (self.n_heads, self.n_heads + self.n_kv_heads):
            one[start + keys, : self.n_heads] = heads // group == keys[:, None]
        one[-1, -1] = True
        found = np.zeros(self.shape[::-1], bool)
        found[:-1, 1:] = np.kron(np.eye(self.n_layers, dtype=bool), one)
        found.flags.writeable = False
        return found

    def index(self, edges: Iterable[Edge]) -> np.ndarray:
        """Int [N,2], positions of the senders and receivers of edges.

        Raises:
          ValueError: an unknown sender or receiver, a sender that is not computed before the
            receiver reads, the same edge twice.
        """
        senders, receivers = self._places
        found: dict[tuple[int, int], None] = {}
        for edge in edges:
            if not isinstance(edge, (tuple, list)) or len(edge) != 2:
                raise ValueError(f"an edge is (sender, receiver), got {edge!r}")
            for kind, name, known in zip(
                ("sender", "receiver"), edge, (senders, receivers), strict=True
            ):
                if name not in known:
                    raise ValueError(_short(kind, name, known))
            place = (senders[edge[0]], receivers[edge[1]])
            if not self.allowed[place]:
                raise ValueError(f"{edge[1]} reads before {edge[0]} is computed: no such edge")
            if place in found:
                raise ValueError(f"edge {edge[0]} -> {edge[1]} is given twice")
            found[place] = None
        return np.array(list(found), np.int32).reshape(-1, 2)

    def names(self, index: np.ndarray) -> list[Edge]:
        """The edges at positions int [N,2]."""
        return [(self.senders[u], self.receivers[v]) for u, v in index]

    def mask(self, edges: Iterable[Edge]) -> np.ndarray:
        """Float32 [U,V], 1 at the edges given and 0 elsewhere.

        Raises:
          ValueError: as `index`.
        """
        mask = np.zeros(self.shape, np.float32)
        u, v = self.index(edges).T
        mask[u, v] = 1
        return mask

    def sending(self, nodes: Iterable[str]) -> np.ndarray:
        """Float32 [U,V], 1 at all edges from the senders named.

        Raises:
          ValueError: an unknown sender.
        """
        senders, _ = self._places
        mask = np.zeros(self.shape, np.float32)
        for name in nodes:
            if name not in senders:
                raise ValueError(_short("sender", name, senders))
            mask[senders[name]] = self.allowed[senders[name]]
        return mask

    def connected(self, mask: np.ndarray) -> np.ndarray:
        """The edges of a mask that lie on a path from "embed" to "logits", float32 [U,V].

        Args:
          mask: float [U,V]; edges that are not 0 exist.
        """
        there = (np.asarray(mask) != 0) & self.allowed
        from_embed = np.zeros(len(self.senders), bool)
        from_embed[0] = True
        to_logits = np.zeros(len(self.receivers), bool)
        to_logits[-1] = True
        for _ in range(2 * self.n_layers + 1):  # no path visits more senders
            reached = there[from_embed].any(axis=0)
            from_embed |= self.feeds[reached].any(axis=0)
            useful = there[:, to_logits].any(axis=1)
            to_logits |= self.feeds[:, useful].any(axis=1)
        return (there & from_embed[:, None] & to_logits).astype(np.float32)

    @cached_property
    def _places(self) -> tuple[dict[str, int], dict[str, int]]:
        senders = {name: i for i, name in enumerate(self.senders)}
        return senders, {name: i for i, name in enumerate(self.receivers)}


def _short(kind: str, name: object, known: Iterable[str]) -> str:
    """`unknown`, without the hundreds of names that a graph has."""
    message = unknown(kind, name, known)
    known = list(known)
    return f"{message.split(' Known:')[0]} Known: {', '.join(known[:3])}, ..., {known[-1]}."
