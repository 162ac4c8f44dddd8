"""`Context`: where the computation stands, and the one place where edits and taps act."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax.tree_util import Partial

from jaxheads.model.config import ModelConfig
from jaxheads.model.rotary import rotate
from jaxheads.names import unknown
from jaxheads.sites import COMPUTED_IF_ASKED, SITES, find_site

Array = jax.Array


class Edit(Protocol):
    """What changes a value at a site: any pytree that can be called like this.

    Within the block stack an edit is called once per layer, with the layer's slice of its
    array leaves. A class may name in `needs` the sites whose values it reads from the
    context, so that they are computed.
    """

    def __call__(self, value: Array, context: Context) -> Array:
        """Returns the new value, of the same shape."""
        ...


@struct.dataclass
class Tap:
    """What to hand back from a site.

    Attributes:
      site: the site's name.
      reduce: None for the value itself, or a function of (value, context) evaluated inside
        the layer scan, so that only its result is stacked over layers. To pass it arrays,
        use `jax.tree_util.Partial(function, ...)`: its arguments are traced, not baked in.
      needs: further sites that `reduce` reads from the context.
    """

    site: str = struct.field(pytree_node=False)
    reduce: Callable[[Array, Context], Any] | None = None
    needs: tuple[str, ...] = struct.field(pytree_node=False, default=())


TapsLike = str | Sequence[str] | Mapping[str, Any]


def as_taps(taps: TapsLike) -> dict[str, Tap]:
    """Normalises taps to a dict from result name to `Tap`.

    Args:
      taps: a site's name, a sequence of them, or a mapping from result name to a `Tap`, to
        a site's name, or (where the result name is itself a site) to a reducer or None.

    Raises:
      ValueError: an unknown site.
      TypeError: something that is none of the above.
    """
    if isinstance(taps, str):
        taps = (taps,)
    if not isinstance(taps, Mapping):
        taps = dict.fromkeys(taps)
    return {name: _as_tap(name, wanted) for name, wanted in taps.items()}


def _as_tap(name: str, wanted: Any) -> Tap:
    if isinstance(wanted, Tap):
        tap = wanted
    elif isinstance(wanted, str):
        tap = Tap(wanted)
    elif wanted is None:
        tap = Tap(name)
    elif callable(wanted):
        tap = Tap(name, wanted)
    else:
        raise TypeError(f"tap {name!r} must be a site name, a Tap or a reducer, got {wanted!r}")
    for site in (tap.site, *tap.needs):
        find_site(site)
    if tap.reduce is not None and not isinstance(tap.reduce, Partial):
        tap = dataclasses.replace(tap, reduce=Partial(tap.reduce))
    return tap


@dataclass(frozen=True)
class Context:
    """The surroundings of one value, handed to edits and reducers.

    Values already computed in this block are attributes named after their sites:
    `context.attn_in`, `context.q`, `context.pattern`, ...

    Attributes:
      config: the model's config.
      positions: int [B,T], position of each query token counted over real tokens.
      slots: int [B,T] or [1,T], column of each query token in the whole sequence,
        padding and cached tokens included.
      token_mask: bool [B,T], True at real query tokens.
      allowed: bool [B,1,T,S], True where a query may see a key.
      angles: cosines and sines of the query positions, float32 [2,B,T,1,dim/2] (outside the
        stack with a leading axis, one of each encoding); None without a rotary encoding.
      bias: added to the attention logits, float32 [1,H,T,S], or None.
      memory: output of the encoder [B,S,D], or None.
      memory_allowed: bool [B,1,1,S], True where the encoder's token is real, or None.
      start: slot of the first query token (0 without a cache).
      phase: "prefill" or "decode".
      layer: int scalar, index of the block; None outside the stack.
      site: the site being edited or tapped.
      edits: the edits that may act, by site.
      taps: the taps, by result name.
      values: values computed so far, by site.
      tapped: what the taps collected so far, by result name.
    """

    config: ModelConfig
    positions: Array
    slots: Array
    token_mask: Array
    allowed: Array
    angles: Array | None
    start: Array | int
    phase: str
    bias: Array | None = None
    memory: Array | None = None
    memory_allowed: Array | None = None
    layer: Array | None = None
    site: str = ""
    edits: Mapping[str, Edit] = field(default_factory=dict)
    taps: Mapping[str, Tap] = field(default_factory=dict)
    values: Mapping[str, Array] = field(default_factory=dict)
    tapped: Mapping[str, Any] = field(default_factory=dict)

    def visit(self, site: str, value: Array) -> tuple[Array, Context]:
        """Applies the edit at `site`, records what is tapped there, and remembers the value.

        Returns:
          The value, edited; and the context that knows it.

        Raises:
          ValueError: the edit returned another shape, or does not fit the site.
        """
        if site in self.edits:
            value = self._edit(site, value)
        context = dataclasses.replace(self, values={**self.values, site: value}, site=site)
        collected = {
            name: value if tap.reduce is None else tap.reduce(value, context)
            for name, tap in self.taps.items()
            if tap.site == site
        }
        if collected:
            context = dataclasses.replace(context, tapped={**self.tapped, **collected})
        return value, context

    def _edit(self, site: str, value: Array) -> Array:
        try:
            edited = self.edits[site](value, dataclasses.replace(self, site=site))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"edit at {site!r} failed on a value of shape {value.shape} "
                f"({find_site(site).signature} without L): {error}"
            ) from error
        if edited.shape != value.shape:
            raise ValueError(
                f"edit at {site!r} must return shape {value.shape} "
                f"({find_site(site).signature} without L), got {edited.shape}"
            )
        return edited.astype(value.dtype)

    @property
    def token_axis(self) -> int:
        """Axis of the query tokens in the value of `site`."""
        axes = find_site(self.site).axes
        return axes.index("T")

    @property
    def visible(self) -> Array:
        """bool [B,1,T,S], True where a query of `site` sees a key ([B,1,1,S] under "cross.")."""
        if self.site.startswith("cross.") and self.memory_allowed is not None:
            return self.memory_allowed
        return self.allowed

    def wants(self, *sites: str) -> bool:
        """Whether any of these sites is edited, tapped, or read by an edit or reducer."""
        asked = set(self.edits) | {tap.site for tap in self.taps.values()}
        for reader in (*self.edits.values(), *self.taps.values()):
            asked.update(getattr(reader, "needs", ()))
        return not asked.isdisjoint(sites)

    def rotate(self, heads: Array) -> Array:
        """Applies the rotary encoding of the query positions to [B,T,H,Dh]."""
        return heads if self.angles is None else rotate(heads, self.angles[0], self.angles[1])

    def __getattr__(self, name: str) -> Array:
        # Reached only for names that are not fields: the values of sites.
        values = self.__dict__.get("values", {})
        if name in values:
            return values[name]
        if name not in SITES:
            fields = (field.name for field in dataclasses.fields(self))
            raise AttributeError(unknown("attribute of context", name, (*SITES, *fields)))
        if name in COMPUTED_IF_ASKED:
            raise AttributeError(
                f"context.{name} is not computed unless asked for: name it in `needs`"
            )
        raise AttributeError(
            f"context.{name} is not known here; computed so far: {', '.join(values) or 'none'}"
        )


def layer_slices(edits: Mapping[str, Edit], n_layers: int) -> dict[str, Edit]:
    """The edits of the stack with every leaf broadcast to a leading axis of n_layers.

    Raises:
      ValueError: an unknown site, or a leaf whose leading axis is neither L nor 1.
    """

    def spread(path: Any, leaf: Array) -> Array:
        if jnp.ndim(leaf) and leaf.shape[0] in (1, n_layers):
            return jnp.broadcast_to(leaf, (n_layers, *leaf.shape[1:]))
        raise ValueError(
            f"edit at {site!r}: leaf {jax.tree_util.keystr(path).lstrip('.')} has shape "
            f"{jnp.shape(leaf)}, expected a leading layer axis of {n_layers} (or 1). "
            "A stack of edits is applied with jax.vmap."
        )

    stacked = {}
    for site, edit in edits.items():
        if find_site(site).stacked:
            stacked[site] = jax.tree_util.tree_map_with_path(spread, edit)
    return stacked
