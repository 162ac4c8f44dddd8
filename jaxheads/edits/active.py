"""Which layers an edit changes, read off its arrays on the host."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

import jax
import numpy as np

from jaxheads.edits.kinds import Affine, AttendTo, Chain, Gated, LowRank, Mix, Project


@singledispatch
def active_layers(edit: Any, n_layers: int) -> np.ndarray:
    """Where a stack of edits of one site may change something.

    Args:
      edit: N edits of one kind, stacked: leaves [N,L,...] (L may be 1 for all layers).
      n_layers: L.

    Returns:
      bool [N,L], False where an edit leaves the layer exactly as it is. Kinds that are not
      built in count as active everywhere.
    """
    leaves = jax.tree.leaves(edit)
    return np.ones((len(leaves[0]) if leaves else 1, n_layers), bool)


@active_layers.register
def _(edit: Affine, n_layers: int) -> np.ndarray:
    scaled = None if edit.scale is None else _differs(edit.scale, 1.0, n_layers)
    moved = None if edit.offset is None else _differs(edit.offset, 0.0, n_layers)
    if scaled is None or moved is None:
        found = moved if scaled is None else scaled
        return np.zeros((1, n_layers), bool) if found is None else found
    return scaled | moved


@active_layers.register(Mix)
@active_layers.register(AttendTo)
def _(edit: Mix | AttendTo, n_layers: int) -> np.ndarray:
    return _differs(edit.weight, 0.0, n_layers)


@active_layers.register
def _(edit: Project, n_layers: int) -> np.ndarray:
    if edit.weight is None:
        return np.ones((len(edit.basis), n_layers), bool)
    return _differs(edit.weight, 0.0, n_layers)


@active_layers.register
def _(edit: LowRank, n_layers: int) -> np.ndarray:
    factors = [_differs(leaf, 0.0, n_layers) for leaf in (edit.down, edit.up)]
    return factors[0] & factors[1] & (edit.scale != 0)


@active_layers.register
def _(edit: Gated, n_layers: int) -> np.ndarray:
    inner = active_layers(edit.edit, n_layers)
    return inner & (edit.phase != "decode")


@active_layers.register
def _(edit: Chain, n_layers: int) -> np.ndarray:
    return np.any([active_layers(part, n_layers) for part in edit.edits], axis=0)


def _differs(leaf: Any, neutral: float, n_layers: int) -> np.ndarray:
    array = np.asarray(leaf)
    found = (array != neutral).any(axis=tuple(range(2, array.ndim)))
    return np.broadcast_to(found, (len(found), n_layers))
