"""What is trained: leaves of a parameter tree by path, and within them layers and heads.

A `Selection` divides a parameter tree into what is trained and what is frozen. `only` wraps an
optimizer so that of the trained leaves only the chosen slices move.

A key/value head is shared by the G query heads of its group. Its slices are trained if any of
them is chosen: the chosen head then can change all that it computes, at the price that the
others of its group see its keys and values change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from jaxheads.edits import Edits
from jaxheads.model.parameters import Tree, flatten, nest
from jaxheads.names import unknown
from jaxheads.sites import find_site

Head = tuple[int, int]
Heads = Sequence[Head] | Mapping[str, Sequence[Head]]

HEAD_AXES: Mapping[str, tuple[str, int]] = {
    "q": ("H", 2),
    "k": ("K", 2),
    "v": ("K", 2),
    "o": ("H", 1),
    "q_bias": ("H", 1),
    "k_bias": ("K", 1),
    "v_bias": ("K", 1),
}
"""Parameters of attention that belong to single heads: whose heads, and on which axis."""

KINDS: Mapping[str, tuple[str, ...]] = {
    "all": ("*",),
    "attention": ("*attn/*", "*cross/*"),
    "heads": tuple(f"*{group}/{name}" for group in ("attn", "cross") for name in HEAD_AXES),
    "mlp": ("*mlp/*",),
    "norms": ("*norm/scale", "*norm/bias"),
    "biases": ("*bias",),
    "embeddings": ("*embed/tokens", "*embed/positions", "*embed/types"),
    "unembedding": ("*unembed/*",),
}
"""Names for patterns."""


@dataclass(frozen=True)
class Selection:
    """A parameter tree divided in two.

    Attributes:
      trainable: nested dict of the leaves of which something is trained.
      frozen: nested dict of the other leaves.
      mask: a tree like `trainable`; at each leaf None where all of it is trained, else a bool
        array that broadcasts to it, True where it is.
      count: trained scalars.
    """

    trainable: Tree
    frozen: Tree
    mask: Tree
    count: int


def select(
    params: Mapping[str, Any],
    patterns: Sequence[str] | None = None,
    *,
    heads: Heads | None = None,
    layers: Sequence[int] | None = None,
) -> Selection:
    """Chooses what of a parameter tree is trained.

    Args:
      params: nested dict of arrays, or of their shapes, as `model.params`.
      patterns: globs over paths such as "blocks/attn/*" ("*" also matches "/"), or names of
        `KINDS` such as "mlp". A leaf is chosen if one of them matches; one that begins with
        "!" takes away again what it matches, wherever it stands. None chooses the head's
        parameters where `heads` are given, everything where they are not.
      heads: (layer, query head) pairs; of the chosen parameters that belong to single heads
        (`HEAD_AXES`), only the slices of these are trained, and of a key/value head if any
        query head of its group is among them. In a tree with several attentions, a mapping
        from paths of theirs, e.g. {"decoder/blocks/cross": [(0, 1)]}.
      layers: of all other chosen leaves with a layer axis, the layers that are trained; None
        for all.

    Raises:
      ValueError: a pattern that matches nothing, nothing chosen, a head or layer outside of
        the tree, or `heads` or `layers` that restrict nothing.
    """
    leaves = dict(flatten(params))
    chosen = _matching(leaves, patterns, heads)
    masks: dict[str, np.ndarray | None] = dict.fromkeys(chosen)
    by_head: set[str] = set()
    for group, pairs in _groups(leaves, heads).items():
        inside = [path for path in chosen if _belongs(path, group)]
        if not inside:
            raise ValueError(f"heads of {group!r} are given, but no pattern chooses its parameters")
        masks |= {path: _slices(leaves, path, group, pairs) for path in inside}
        by_head.update(inside)
    if layers is not None:
        if not len(layers):
            raise ValueError("layers is empty, expected at least one layer or None for all")
        inside = [p for p in chosen if "blocks" in p.split("/") and p not in by_head]
        if not inside:
            raise ValueError("layers are given, but no chosen leaf has layers to choose from")
        masks |= {path: _layers(path, leaves[path].shape, layers) for path in inside}
    count = sum(_count(leaves[path].shape, mask) for path, mask in masks.items())
    return Selection(
        trainable=nest({path: leaves[path] for path in chosen}),
        frozen=nest({path: leaf for path, leaf in leaves.items() if path not in chosen}),
        mask=nest(masks),
        count=count,
    )


def merge(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> Tree:
    """The parameter tree that was divided: the leaves of both.

    Raises:
      ValueError: a leaf is in both.
    """
    ours, theirs = dict(flatten(trainable)), dict(flatten(frozen))
    twice = sorted(ours.keys() & theirs.keys())
    if twice:
        raise ValueError(f"{twice[0]} is both trained and frozen, expected it in one of them")
    return nest(ours | theirs)


def mask_edits(edits: Edits, heads: Sequence[Head]) -> Any:
    """A mask that trains only the given heads of edits.

    Args:
      edits: edits of the stack, at sites with a value per head.
      heads: (layer, head) pairs; of a site of keys or values, heads are key/value heads.

    Returns:
      A tree like `edits` of bool arrays that broadcast to its leaves.

    Raises:
      ValueError: a site without heads, a leaf that heads or layers share, or a head outside.
    """

    def of_site(name: str) -> Any:
        site = find_site(name)
        if not site.stacked or site.head_axis is None:
            raise ValueError(f"edits at {name!r} {site.signature} have no heads to choose from")
        axis = 1 + site.axes.index(site.head_axis)

        def of_leaf(leaf: Any) -> np.ndarray:
            if leaf.ndim <= axis:
                raise ValueError(
                    f"a leaf of the edit at {name!r} has shape {leaf.shape}, expected layers "
                    f"first and heads on axis {axis}"
                )
            return _head_mask(leaf.shape, axis, heads, f"edit at {name!r}")

        return jax.tree.map(of_leaf, edits[name])

    return Edits({name: of_site(name) for name in edits})


@struct.dataclass
class Restricted:
    """The state of an optimizer that `only` restricts.

    Attributes:
      mask: what it is restricted to. An array of the state and not a constant of the program,
        so that one compiled step serves every choice of heads.
      inner: the optimizer's own state.
    """

    mask: Any
    inner: Any


def only(mask: Any, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Restricts an optimizer to chosen slices of the leaves.

    The gradients of all other slices are zero before the optimizer sees them, so they count in
    no norm, and their updates are -0.0 after it, whatever weight decay made of them: x + -0.0 is
    x to the last bit, which x + 0.0 is not where x is -0.0. (Hardware may flush subnormal
    numbers in that addition; `restore` undoes it.) Adafactor takes its statistics over whole
    leaves, zeros included.

    Args:
      mask: a tree like the trained one; None or a bool array at each leaf, as
        `Selection.mask`.
      optimizer: what is restricted.

    Returns:
      A transformation whose state is a `Restricted`. `mask` is read when that is made; later
      updates go by the state.
    """
    extended = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> Restricted:
        # Copied: a training step gives the buffers of its state away.
        copied = jax.tree.map(lambda leaf: jnp.array(leaf, bool, copy=True), mask)
        return Restricted(copied, extended.init(params))

    def update(
        gradient: Any, state: Restricted, params: Any = None, **more: Any
    ) -> tuple[Any, Restricted]:
        gradient = _where(state.mask, gradient, 0.0)
        updates, inner = extended.update(gradient, state.inner, params, **more)
        return _where(state.mask, updates, -0.0), Restricted(state.mask, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def restore(mask: Any, trained: Any, original: Any) -> Any:
    """`trained` where the mask says so and `original` elsewhere, bit for bit.

    For what an average of the trained values did to slices that were not trained.
    """
    return jax.tree.map(
        lambda m, new, old: new if m is None else jnp.where(m, new, old),
        mask, trained, original, is_leaf=_is_none,
    )  # fmt: skip


def _where(mask: Any, tree: Any, other: float) -> Any:
    def choose(m: Any, x: Any) -> Any:
        return x if m is None else jnp.where(m, x, jnp.asarray(other, x.dtype))

    return jax.tree.map(choose, mask, tree, is_leaf=_is_none)


def _is_none(node: Any) -> bool:
    return node is None


def _matching(
    paths: Mapping[str, Any], patterns: Sequence[str] | None, heads: Heads | None
) -> list[str]:
    if isinstance(patterns, str):
        raise ValueError(f"patterns must be a list, got the string {patterns!r}")
    if patterns is None:
        patterns = ["all"] if heads is None else ["heads"]
    wanted = [_found(pattern, paths) for pattern in patterns if not pattern.startswith("!")]
    barred = [_found(pattern[1:], paths) for pattern in patterns if pattern.startswith("!")]
    # Patterns that only take away take away from everything.
    inside = set().union(*wanted) if wanted else set(paths)
    chosen = [path for path in paths if path in inside.difference(*barred)]
    if not chosen:
        raise ValueError(f"patterns {list(patterns)} choose nothing of the parameter tree")
    return chosen


def _found(pattern: str, paths: Mapping[str, Any]) -> set[str]:
    globs = KINDS.get(pattern, (pattern,))
    found = {path for path in paths for glob in globs if fnmatchcase(path, glob)}
    if not found:
        raise ValueError(unknown("path or pattern", pattern, [*paths, *KINDS]))
    return found


def _groups(leaves: Mapping[str, Any], heads: Heads | None) -> dict[str, Sequence[Head]]:
    """The heads of each attention, by the path of its parameters."""
    if heads is None:
        return {}
    known = [path.removesuffix("/q") for path in leaves if path.endswith(("attn/q", "cross/q"))]
    if not isinstance(heads, Mapping):
        if len(known) != 1:
            raise ValueError(
                f"the tree has {len(known)} attentions ({', '.join(known)}): heads must be a "
                "mapping from these paths"
            )
        heads = {known[0]: heads}
    for group, pairs in heads.items():
        if group not in known:
            raise ValueError(unknown("attention", group, known))
        if not len(pairs):
            raise ValueError(f"no heads of {group!r} are given, expected at least one")
    return dict(heads)


def _belongs(path: str, group: str) -> bool:
    head, _, name = path.rpartition("/")
    return head == group and name in HEAD_AXES


def _slices(leaves: Mapping[str, Any], path: str, group: str, pairs: Sequence[Head]) -> np.ndarray:
    kind, axis = HEAD_AXES[path.rpartition("/")[2]]
    shape, queries = leaves[path].shape, leaves[f"{group}/q"].shape[2]
    # Checked as query heads first: a key/value head is named by those that read it.
    _head_mask((shape[0], queries), 1, pairs, group)
    shared = queries // shape[axis]
    assert kind == "K" or shared == 1
    return _head_mask(shape, axis, [(layer, head // shared) for layer, head in pairs], path)


def _head_mask(shape: tuple[int, ...], axis: int, pairs: Sequence[Head], what: str) -> np.ndarray:
    """bool, of size 1 but for the layers on axis 0 and the heads on `axis`."""
    mask = np.zeros([n if i in (0, axis) else 1 for i, n in enumerate(shape)], bool)
    for layer, head in pairs:
        if not (0 <= layer < shape[0] and 0 <= head < shape[axis]):
            raise ValueError(
                f"head ({layer}, {head}) of {what}: expected a layer in 0..{shape[0] - 1} and a "
                f"head in 0..{shape[axis] - 1}"
            )
        mask[(layer,) + (0,) * (axis - 1) + (head,)] = True
    return mask


def _layers(path: str, shape: tuple[int, ...], layers: Sequence[int]) -> np.ndarray:
    mask = np.zeros((shape[0],) + (1,) * (len(shape) - 1), bool)
    for layer in layers:
        if not 0 <= layer < shape[0]:
            raise ValueError(f"layer {layer} of {path}: expected one of 0..{shape[0] - 1}")
        mask[layer] = True
    return mask


def _count(shape: tuple[int, ...], mask: np.ndarray | None) -> int:
    size = math.prod(shape)
    return size if mask is None else int(mask.sum()) * (size // mask.size)
