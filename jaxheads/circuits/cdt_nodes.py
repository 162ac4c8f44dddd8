"""Nodes of a decomposition: where a relevant part begins, and where it is measured.

Axes: B batch, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.model.batch import Batch
from jaxheads.model.transformer import Transformer
from jaxheads.names import choose
from jaxheads.sites import SITES

Array = jax.Array

SOURCE_SITES = ("resid_pre", "z", "mlp_out")
TARGET_SITES = ("q", "k", "v", "z", "mlp_in")
_NAMES = tuple(SITES)
_EVERYWHERE = -1


@dataclass(frozen=True)
class Node:
    """A place in the computation, as source or as target.

    Attributes:
      site: a name of `SOURCE_SITES` or `TARGET_SITES`.
      layer: counted from 0.
      head: the query head, at sites with heads; for `k` and `v` that of the key/value head it
        reads. None at the other sites.
      position: of the token, counted over real tokens, negative from the last one; one for
        all rows or one for each; None for every real token.
    """

    site: str
    layer: int
    head: int | None = None
    position: int | tuple[int, ...] | None = None


class Nodes(NamedTuple):
    """Nodes as arrays: the index of their site in the table, int; `slots` [...,B]."""

    site: Array
    layer: Array
    head: Array
    slots: Array


def head_nodes(model: Transformer, position: int | tuple[int, ...] | None = None) -> list[Node]:
    """Every head as a source, layer by layer: L x H nodes at `z`."""
    layers, heads = range(model.config.n_layers), range(model.config.n_heads)
    return [Node("z", layer, head, position) for layer in layers for head in heads]


def placed_at(nodes: Nodes, site: str, layer: Array, mask: Array, n_heads: int) -> Array:
    """bool [...,B,T,n_heads]: where the nodes [...] of this site and layer are."""
    here = (nodes.site == _NAMES.index(site)) & (nodes.layer == layer)
    slots = nodes.slots[..., None]
    tokens = ((slots == jnp.arange(mask.shape[1])) | (slots == _EVERYWHERE)) & mask
    heads = nodes.head[..., None] == jnp.arange(n_heads)
    return (here[..., None] & heads)[..., None, None, :] & tokens[..., None]


def check_model(model: Transformer) -> None:
    """Raises ValueError for a model that the rules do not cover."""
    if not isinstance(model, Transformer):
        raise ValueError(
            f"contextual decomposition needs a Transformer, got {type(model).__name__}"
        )
    config = model.config
    if config.cross:
        raise ValueError("contextual decomposition has no rule for config.cross (cross-attention)")
    if config.image is not None:
        raise ValueError("contextual decomposition needs token ids, but config.image is set")
    if config.dtype != "float32":
        raise ValueError(
            "contextual decomposition subtracts nearly equal activations: expected config.dtype "
            f"'float32', got {config.dtype!r}; use model.astype('float32')"
        )


def check_node(model: Transformer, role: str, node: Node, sites: Sequence[str]) -> None:
    """Raises ValueError for a node that the model does not have, or not in this role."""
    if not isinstance(node, Node):
        raise ValueError(f"a {role} must be a Node, got {node!r}")
    choose(f"site of a {role}", node.site, sites)
    config, with_head = model.config, SITES[node.site].head_axis is not None
    if not 0 <= node.layer < config.n_layers:
        raise ValueError(f"{role} {node}: layer must lie in 0..{config.n_layers - 1}")
    if with_head and (node.head is None or not 0 <= node.head < config.n_heads):
        raise ValueError(f"{role} {node}: head must lie in 0..{config.n_heads - 1}")
    if not with_head and node.head is not None:
        raise ValueError(f"{role} {node}: site {node.site!r} has no heads, expected head None")


def slots_of(node: Node, batch: Batch) -> np.ndarray:
    """int32 [B]: the slot of the node's token in each row."""
    mask = np.asarray(batch.mask)
    if node.position is None:
        return np.full(len(mask), _EVERYWHERE, np.int32)
    position = np.asarray(node.position)
    if position.shape not in ((), (len(mask),)) or not np.issubdtype(position.dtype, np.integer):
        raise ValueError(
            f"{node}: position must be an integer, or {len(mask)} of them, one per row"
        )
    count = mask.sum(axis=1)
    counted = np.where(position < 0, position + count, position)
    wrong = np.flatnonzero((counted < 0) | (counted >= count))
    if wrong.size:
        row = int(wrong[0])
        raise ValueError(f"{node}: row {row} has {count[row]} real tokens, no such position")
    return (mask.argmax(axis=1) + counted).astype(np.int32)


def as_arrays(node: Node, batch: Batch) -> Nodes:
    """One node as arrays."""
    index = np.int32(_NAMES.index(node.site))
    return Nodes(index, np.int32(node.layer), np.int32(node.head or 0), slots_of(node, batch))  # type: ignore[arg-type]


def stack(nodes: Sequence[Nodes]) -> Nodes:
    """Nodes of one shape on a new leading axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *nodes)


def spread_mean(
    model: Transformer, batch: Batch, means: Mapping[str, Array | np.ndarray], site: str
) -> Array:
    """A mean with all the axes of its site; those it lacks have size 1."""
    if site not in means:
        raise ValueError(f"means has no {site!r}, but there are sources at it")
    config, mean = model.config, jnp.asarray(means[site], jnp.float32)
    last = (config.n_heads, config.head_dim) if site == "z" else (config.d_model,)
    rows, length = batch.tokens.shape
    for between in ((), (length,), (rows, length)):
        if mean.shape == (config.n_layers, *between, *last):
            ones = (1,) * (2 - len(between))
            return mean.reshape(config.n_layers, *ones, *between, *last)
    raise ValueError(
        f"means[{site!r}] has shape {mean.shape}, expected {(config.n_layers, *last)}, or with "
        f"axes ({length},) or ({rows}, {length}) after the first"
    )
