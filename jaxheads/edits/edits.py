"""`Edits`: which edit acts at which site."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.edits.kinds import Affine, Chain, Gated, chain
from jaxheads.model.config import ModelConfig
from jaxheads.model.context import Edit
from jaxheads.model.transformer import PHASES
from jaxheads.names import choose
from jaxheads.sites import axis_sizes, find_site

Array = jax.Array
When = str | Array | np.ndarray | None


@jax.tree_util.register_pytree_with_keys_class
class Edits(Mapping[str, Edit]):
    """A mapping from sites to edits, and a pytree of their arrays.

    `a | b` applies a, then b. It differentiates, stacks for `vmap` and shards like any
    other pytree. Immutable: every method returns a new value.
    """

    __slots__ = ("_edits",)

    def __init__(self, edits: Mapping[str, Edit] | None = None, **by_site: Edit) -> None:
        """Collects edits by site, e.g. `Edits(z=Affine(scale=...))`.

        Raises:
          ValueError: an unknown site.
        """
        self._edits = {**(edits or {}), **by_site}
        for site in self._edits:
            find_site(site)

    def __getitem__(self, site: str) -> Edit:
        return self._edits[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._edits)

    def __len__(self) -> int:
        return len(self._edits)

    def __or__(self, other: Mapping[str, Edit]) -> Edits:
        """The edits of `self`, then those of `other`."""
        merged = dict(self._edits)
        for site, edit in other.items():
            merged[site] = chain(merged[site], edit) if site in merged else edit
        return Edits(merged)

    def when(self, when: When) -> Edits:
        """Restricts every edit.

        Args:
          when: "prefill" or "decode" to act only in that phase of generation; a bool
            [B,T] (or [1,T]) array to act only at those slots of the sequence; None for no
            restriction.

        Raises:
          ValueError: an unknown phase, or a mask that is not [B,T] of bool.
        """
        if when is None:
            return self
        return Edits({site: _gate(site, edit, when) for site, edit in self.items()})

    def under(self, prefix: str) -> Edits:
        """The same edits at the sites under a prefix.

        Args:
          prefix: "encoder" for the encoder of a model of two stacks, "cross" for attention
            to it. `mask_heads(config.encoder, heads).under("encoder")` acts at "encoder.z".

        Raises:
          ValueError: a site that does not exist under this prefix.
        """
        return Edits({f"{prefix}.{site}": edit for site, edit in self.items()})

    @classmethod
    def identity(cls, config: ModelConfig, *sites: str, offset: bool = False) -> Edits:
        """Edits that change nothing, to differentiate or to train.

        Args:
          config: of the model to edit.
          sites: where.
          offset: False gives a scale of 1 per head (per layer where the site has no head
            axis); True an offset of 0 per feature, e.g. [L,1,1,H,Dh] at `z`.

        Raises:
          ValueError: an unknown site.
        """
        size = axis_sizes(config)
        edits = {}
        for name in sites:
            site = find_site(name)
            axes = ("L",) * site.stacked + site.axes
            shape = tuple(size[a] if a in size and (offset or a in "LHK") else 1 for a in axes)
            edits[name] = Affine(offset=jnp.zeros(shape)) if offset else Affine(jnp.ones(shape))
        return cls(edits)

    @classmethod
    def stack(cls, many: Iterable[Edits]) -> Edits:
        """Stacks edits of one structure on a new leading axis, for `jax.vmap`.

        Raises:
          ValueError: none given, or their structures or shapes differ.
        """
        many = list(many)
        if not many:
            raise ValueError("no edits to stack: expected at least one")
        structures = {jax.tree.structure(edits) for edits in many}
        shapes = {tuple(jnp.shape(leaf) for leaf in jax.tree.leaves(e)) for e in many}
        if len(structures) > 1 or len(shapes) > 1:
            raise ValueError(
                f"edits to stack must have one structure and one set of shapes, got "
                f"{len(structures)} structures with leaves of shapes {sorted(shapes)}"
            )
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *many)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file; see `jaxheads.edits.files`."""
        from jaxheads.edits.files import save

        save(self, path)

    @classmethod
    def load(cls, path: str | Path, kinds: Iterable[type] = ()) -> Edits:
        """Reads what `save` wrote; `kinds` are the classes of edits of your own in it."""
        from jaxheads.edits.files import load

        return load(path, kinds)

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Edit]], tuple[str, ...]]:
        """Children with their keys, and the sites as static structure."""
        sites = tuple(sorted(self._edits))
        return [(jax.tree_util.DictKey(site), self._edits[site]) for site in sites], sites

    @classmethod
    def tree_unflatten(cls, sites: tuple[str, ...], edits: Iterable[Edit]) -> Edits:
        """The inverse of flattening."""
        made = object.__new__(cls)
        made._edits = dict(zip(sites, edits, strict=True))
        return made

    def __repr__(self) -> str:
        lines = [f"  {site}: {describe(site, edit)}" for site, edit in self.items()]
        return "\n".join(["Edits(", *lines, ")"]) if lines else "Edits()"


def _gate(site: str, edit: Edit, when: When) -> Gated:
    if isinstance(when, str):
        return Gated(edit, phase=choose("phase", when, PHASES))
    mask = jnp.asarray(when)
    if mask.ndim != 2 or mask.dtype != bool:
        raise ValueError(
            f"when= must be 'prefill', 'decode' or a bool [B,T] mask, got {mask.dtype} "
            f"of shape {mask.shape}"
        )
    return Gated(edit, mask[None] if find_site(site).stacked else mask)


_NEUTRAL = {"scale": 1.0, "offset": 0.0, "weight": 0.0}


def describe(site: str, edit: Edit) -> str:
    """One line about an edit: its kind, its leaves, and how many heads or layers it changes."""
    if isinstance(edit, Chain):
        return " then ".join(describe(site, part) for part in edit.edits)
    if isinstance(edit, Gated):
        limits = [edit.phase] if edit.phase else []
        if edit.tokens is not None:
            limits.append(f"tokens {_shape(edit.tokens)}")
        return f"{describe(site, edit.edit)} when {' and '.join(limits)}"
    fields = getattr(edit, "__dataclass_fields__", {})
    leaves = {name: getattr(edit, name) for name in fields}
    parts = [_leaf(site, name, leaf) for name, leaf in leaves.items() if leaf is not None]
    return f"{type(edit).__name__}({', '.join(parts)})"


def _leaf(site: str, name: str, value: Any) -> str:
    if not hasattr(value, "shape"):
        return f"{name}={value!r}"
    text = f"{name}={_shape(value)}"
    spec = find_site(site)
    concrete = isinstance(value, jax.Array | np.ndarray) and not isinstance(value, jax.core.Tracer)
    if name not in _NEUTRAL or not concrete or value.ndim != spec.stacked + len(spec.axes):
        return text
    changed = np.asarray(value) != _NEUTRAL[name]
    axes = ("L",) * spec.stacked + spec.axes
    heads = axes.index(spec.head_axis) if spec.head_axis else None
    if not spec.stacked:
        return text
    if heads is None or changed.shape[heads] == 1:
        layers = changed.any(axis=tuple(range(1, changed.ndim)))
        return f"{text}, {layers.sum()} of {layers.size} layers changed"
    moved = changed.any(axis=tuple(axis for axis in range(1, changed.ndim) if axis != heads))
    named = [f"{layer}.{head}" for layer, head in np.argwhere(moved)[:6]]
    more = ", ..." if moved.sum() > len(named) else ""
    listed = f": {', '.join(named)}{more}" if named else ""
    return f"{text}, {moved.sum()} of {moved.size} heads changed{listed}"


def _shape(array: Array) -> str:
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"
