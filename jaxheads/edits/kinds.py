"""The kinds of edit: each is a pytree that maps a value and its context to a new value.

Array leaves have the axes of the site with the layer axis L in front and broadcast against
it: a head mask at `z` [L,B,T,H,Dh] is a scale of shape [L,1,1,H,1]. Sites outside the stack
have no L. A leaf of the user's own kind only needs that leading axis.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxheads.edits.experts import Experts, OwnTokens
from jaxheads.edits.route import Route
from jaxheads.edits.streaming import StreamingMix
from jaxheads.model.context import Context, Edit
from jaxheads.model.layout import contract, gathered
from jaxheads.names import choose

Array = jax.Array

REFERENCES = ("self", "uniform", "first")


@struct.dataclass
class Affine:
    """x * scale + offset: head masks, pruning, value scaling, LoFiT, ITI, steering.

    A leaf of None is absent: no scale, no offset.
    """

    scale: Array | None = None
    offset: Array | None = None

    def __call__(self, value: Array, context: Context) -> Array:
        """Returns value * scale + offset."""
        if self.scale is not None:
            value = value * fitting("scale", self.scale, value)
        if self.offset is not None:
            value = value + fitting("offset", self.offset, value)
        return value


@struct.dataclass
class Mix:
    """(1 - weight) * x + weight * value: patching, mean ablation, soft injection, clamps.

    Attributes:
      value: what is mixed in.
      weight: how much of it, 0 keeps x and 1 replaces it.
    """

    value: Array
    weight: Array

    def __call__(self, value: Array, context: Context) -> Array:
        """Returns (1 - weight) * x + weight * value."""
        weight = fitting("weight", self.weight, value)
        return (1 - weight) * value + weight * fitting("value", self.value, value)


@struct.dataclass
class Project:
    """Keeps or removes the part of x inside a subspace of its last axis.

    Attributes:
      basis: orthonormal columns; the site's axes with L in front and one more axis for the
        rank, e.g. [L,1,1,1,D,r] at `resid_post` or [L,1,1,H,Dh,r] at `z`. A zero
        column spans nothing.
      weight: how much of the change is applied, 0 none (the default for heads or layers
        that are left alone) and 1 all; None means 1 everywhere.
      keep: True keeps the subspace, False removes it. Static.
    """

    basis: Array
    weight: Array | None = None
    keep: bool = struct.field(pytree_node=False, default=False)

    def __call__(self, value: Array, context: Context) -> Array:
        """Returns x + weight * (P x - x), with P the projection kept or removed."""
        fitting("basis", self.basis[..., 0], value)
        part = jnp.einsum("...d,...dr->...r", value, self.basis)
        inside = jnp.einsum("...r,...dr->...d", part, self.basis)
        change = inside - value if self.keep else -inside
        return value + (
            change if self.weight is None else fitting("weight", self.weight, value) * change
        )


@struct.dataclass
class LowRank:
    """x + scale * (source @ down) @ up: LoRA's change of the map from `source` to the site.

    Hu et al. (2021), "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3. `source` is a
    site that the block computes before this one, and what the model's own weights read:
    `attn_in` at `q_pre`, `k_pre` and `v`, `z` at `attn_out`, `neurons` at `mlp_out`. Then it
    folds into them.

    Attributes:
      down: [L,*source,r], the axes of the source after batch and token, then the rank r, e.g.
        [L,D,r] of `attn_in` or [L,H,Dh,r] of `z`.
      up: [L,r,*site], e.g. [L,r,H,Dh] at `q_pre`.
      source: name of the site that is read. Static.
      scale: factor, alpha / r. Static, so it is never trained.
    """

    down: Array
    up: Array
    source: str = struct.field(pytree_node=False)
    scale: float = struct.field(pytree_node=False, default=1.0)

    @property
    def needs(self) -> tuple[str, ...]:
        """The site that is read."""
        return (self.source,)

    def __call__(self, value: Array, context: Context) -> Array:
        """Returns value + scale * (source @ down) @ up, in the dtype of the source."""
        source = getattr(context, self.source)
        read, written = jnp.shape(self.down)[:-1], jnp.shape(self.up)[1:]
        for name, ours, theirs in (("down", read, source), ("up", written, value)):
            if ours != theirs.shape[2:]:
                raise ValueError(
                    f"{name} has axes {ours} beside its rank, expected {theirs.shape[2:]}"
                )
        if jnp.shape(self.up)[0] != jnp.shape(self.down)[-1]:
            raise ValueError(
                f"down has rank {jnp.shape(self.down)[-1]} and up {jnp.shape(self.up)[0]}"
            )
        down, up = gathered((self.down, self.up), source, source.dtype)
        ins, outs = "ijk"[: len(read)], "xyz"[: len(written)]
        part = contract(f"bt{ins},{ins}r->btr", source, down.astype(source.dtype))
        change = contract(f"btr,r{outs}->bt{outs}", part, up.astype(source.dtype))
        return value + self.scale * change


@struct.dataclass
class AttendTo:
    """Moves attention to a reference: (1 - weight) * pattern + weight * reference.

    For the site `pattern`. SoftPAG's identity attention, uniform attention and forced sinks
    are built from the mask of the batch at hand, so they hold for every length and padding.

    Attributes:
      weight: strength, broadcasting against the pattern, e.g. [L,1,H,1,1].
      reference: "self" (the query's own token), "uniform" (all keys it may see) or "first"
        (the first key it may see). Static.
    """

    weight: Array
    reference: str = struct.field(pytree_node=False, default="uniform")

    def __call__(self, value: Array, context: Context) -> Array:
        """Returns the mixed pattern."""
        choose("reference", self.reference, REFERENCES)
        allowed = context.visible.astype(value.dtype)
        seen = jnp.cumsum(allowed, axis=-1)
        if self.reference == "uniform":
            target = allowed / jnp.maximum(seen[..., -1:], 1)
        elif self.reference == "first":
            target = allowed * (seen == 1)
        else:
            own = jnp.arange(value.shape[-1]) == context.slots[:, None, :, None]
            target = allowed * own
        weight = fitting("weight", self.weight, value)
        return (1 - weight) * value + weight * target


@struct.dataclass
class Gated:
    """An edit that acts only at some tokens or in one phase of generation.

    Attributes:
      edit: what acts.
      tokens: bool [1,B,T] (a leading layer axis, then batch and slots) where it acts, or
        None for every token. Slots past T, such as generated ones, are left alone. At
        `scores` and `pattern` the query's slot counts.
      phase: "prefill" or "decode" to act only then, or None for both. Static.
    """

    edit: Any
    tokens: Array | None = None
    phase: str | None = struct.field(pytree_node=False, default=None)

    @property
    def needs(self) -> tuple[str, ...]:
        """Sites that the inner edit reads."""
        return getattr(self.edit, "needs", ())

    def __call__(self, value: Array, context: Context) -> Array:
        """Returns the edited value where the gate is open, the old one elsewhere."""
        if self.phase is not None and self.phase != context.phase:
            return value
        edited = self.edit(value, context)
        if self.tokens is None:
            return edited
        rows = max(self.tokens.shape[0], context.slots.shape[0])
        slots = jnp.broadcast_to(context.slots, (rows, context.slots.shape[1]))
        tokens = jnp.broadcast_to(self.tokens, (rows, self.tokens.shape[1]))
        # One more slot, closed, stands for all that lie past the mask.
        closed = jnp.pad(tokens, ((0, 0), (0, 1)))
        gate = jnp.take_along_axis(closed, jnp.minimum(slots, tokens.shape[1]), axis=1)
        return jnp.where(_along_tokens(gate, value, context.token_axis), edited, value)


def _along_tokens(gate: Array, value: Array, axis: int) -> Array:
    """Gives a [B,T] gate the axes of the value, whose token axis depends on the site."""
    shape = [1] * value.ndim
    shape[0], shape[axis] = gate.shape
    return gate.reshape(shape)


@struct.dataclass
class Chain:
    """Several edits of one site, applied in order."""

    edits: tuple[Any, ...]

    @property
    def needs(self) -> tuple[str, ...]:
        """Sites that any of the edits reads."""
        return tuple(site for edit in self.edits for site in getattr(edit, "needs", ()))

    def __call__(self, value: Array, context: Context) -> Array:
        """Applies the first edit, then the next to its result, and so on."""
        for edit in self.edits:
            value = edit(value, context).astype(value.dtype)
        return value


KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        Affine,
        Mix,
        Project,
        LowRank,
        Route,
        Experts,
        OwnTokens,
        StreamingMix,
        AttendTo,
        Gated,
        Chain,
    )
}
"""The built-in kinds by name, as files refer to them."""


def chain(first: Edit, second: Edit) -> Edit:
    """`first`, then `second`; chains are flattened."""
    parts = [edit.edits if isinstance(edit, Chain) else (edit,) for edit in (first, second)]
    return Chain((*parts[0], *parts[1]))


def fitting(name: str, leaf: Array, value: Array) -> Array:
    """`leaf`, after checking that it broadcasts against `value` without enlarging it.

    Raises:
      ValueError: it does not; the message gives both shapes.
    """
    shape = jnp.shape(leaf)
    fits = len(shape) == value.ndim and all(
        ours in (1, theirs) for ours, theirs in zip(shape, value.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{name} has shape {shape} per layer, expected each axis of {value.shape} or 1"
        )
    return leaf
