"""`Tower`: embeddings, a stack of blocks run by one scan, and the last norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from jaxheads.model.attention import Cached
from jaxheads.model.block import Block
from jaxheads.model.cache import Cache
from jaxheads.model.config import ModelConfig
from jaxheads.model.context import Context, Edit, Tap, layer_slices
from jaxheads.model.embedding import Embedding
from jaxheads.model.layout import gathered, rematerialised, whole
from jaxheads.model.norms import optional_norm
from jaxheads.model.relative import RelativeBias
from jaxheads.model.rotary import rotary_angles
from jaxheads.model.sight import AS_ORDERED, Sight, allowed_keys
from jaxheads.sites import find_site

Array = jax.Array


@struct.dataclass
class Layers:
    """What differs between the blocks of a stack; every leaf has a leading layer axis.

    Attributes:
      block: the parameters.
      index: int [L].
      rope: int [L], which of the stack's rotary encodings is the layer's; None where all
        share one.
      window: int [L], how far a token sees, 0 for no limit; None where no layer has a limit.
    """

    block: Block
    index: Array
    rope: Array | None
    window: Array | None


class Tower(nnx.Module):
    """Holds embed, blocks (every leaf stacked on a layer axis), final_norm and relative."""

    def __init__(self, config: ModelConfig, params: Mapping[str, Any]) -> None:
        self.config = config
        self.embed = Embedding(params.get("embed", {}))
        self.relative = RelativeBias(params["relative"]) if "relative" in params else None
        self.blocks = Block(params["blocks"])
        self.final_norm = optional_norm(params, "final_norm")

    def begin(
        self,
        mask: Array,
        cache: Cache | None,
        phase: str,
        edits: Mapping[str, Edit],
        taps: Mapping[str, Tap],
        segments: Array | None = None,
        sight: Sight = AS_ORDERED,
    ) -> tuple[Context, Cache | None]:
        """Positions, visibility and angles of the tokens of mask [B,T], shared by all layers.

        The angles are those of every rotary encoding in use, with a leading axis for them.
        """
        config = self.config
        mask = whole(mask, 1)
        count = jnp.cumsum(mask, axis=1) - 1
        start: Array | int = 0
        key_mask = mask
        if cache is not None:
            start = cache.length
            count = count + cache.mask.sum(axis=1, keepdims=True)
            cache = cache.started(mask)
            key_mask = cache.mask
        positions = jnp.maximum(count, 0)
        slots, keys = start + jnp.arange(mask.shape[1]), jnp.arange(key_mask.shape[1])
        allowed = allowed_keys(config, sight, mask, key_mask, start)
        if segments is not None:
            segments = whole(segments, 1)
            allowed = allowed & (segments[:, None, :, None] == segments[:, None, None, :])
            positions = positions - _first_of_segment(positions, segments)
        if sight.positions is not None:
            positions = jnp.asarray(sight.positions)
        context = Context(
            config=config,
            positions=positions,
            slots=slots[None],
            token_mask=mask,
            allowed=allowed,
            angles=_angles(config, positions),
            start=start,
            phase=phase,
            bias=None if self.relative is None else self.relative(slots, keys, config),
            edits={site: edit for site, edit in edits.items() if not find_site(site).stacked},
            taps=taps,
        )
        return context, cache

    def run(
        self,
        x: Array,
        context: Context,
        edits: Mapping[str, Edit],
        cache: Cache | None,
        remat: str = "none",
    ) -> tuple[Array, dict[str, Any], Cache | None]:
        """Runs the blocks on x [B,T,D], the residual stream that enters the first.

        `remat` is one of `REMAT`.

        Returns:
          The residual stream after the last block (before the last norm), what was tapped
          in the stack, with a leading layer axis, and the cache with new keys and values.
        """
        inside = layer_slices(edits, self.config.n_layers)

        # The cache is carried, so that it is written in place and never copied as a whole.
        def body(carry: tuple, sliced: tuple) -> tuple[tuple, Mapping[str, Any]]:
            (x, cache), (layer, edits_here) = carry, sliced
            x, here, extended = self.step(x, context, layer, edits_here, cache)
            return (x, None if cache is None else extended), here.tapped

        carry, inputs = (x, cache), (self.layers(), inside)
        (x, cache), tapped = jax.lax.scan(rematerialised(body, x, remat), carry, inputs)
        return x, tapped, None if cache is None else cache.ended(context.token_mask)

    def layers(self) -> Layers:
        """The blocks and what else differs between them, to be scanned or indexed."""
        config = self.config
        ropes = _different_ropes(config)
        which = np.array([ropes.index(rope) for rope in config.ropes]) if len(ropes) > 1 else None
        return Layers(
            self.blocks,
            jnp.arange(config.n_layers),
            None if which is None else jnp.asarray(which),
            jnp.asarray(config.windows) if any(config.windows) else None,
        )

    def step(
        self,
        x: Array,
        context: Context,
        layer: Layers,
        edits: Mapping[str, Edit],
        cached: Cached | None = None,
    ) -> tuple[Array, Context, Any]:
        """Runs one block on x [B,T,D].

        Args:
          x: the residual stream before it.
          context: as `begin` made it.
          layer: the slice of `layers()` at this block.
          edits: the edits of this block, without a layer axis.
          cached: the tokens before, or None.

        Returns:
          As `Block.__call__`.
        """
        angles, allowed = context.angles, context.allowed
        if angles is not None:
            angles = angles[0] if layer.rope is None else angles[layer.rope]
        if layer.window is not None:
            distance = jnp.abs(context.slots[0][:, None] - jnp.arange(allowed.shape[-1]))
            allowed = allowed & ((distance < layer.window) | (layer.window == 0))
        here = replace(
            context, layer=layer.index, edits=edits, tapped={}, values={}, angles=angles,
            allowed=allowed,
        )  # fmt: skip
        return gathered(layer.block, x, x.dtype)(x, here, cached)

    def finish(self, x: Array, context: Context) -> tuple[Array, Context]:
        """The last norm, and the site `final`."""
        if self.final_norm is not None:
            x = self.final_norm(x, self.config)
        return context.visit("final", x)


def _first_of_segment(positions: Array, segments: Array) -> Array:
    """int [B,T]: the position of the first token of each token's segment."""
    before = jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1]
    return jax.lax.cummax(jnp.where(segments != before, positions, 0), axis=1)


def _different_ropes(config: ModelConfig) -> tuple:
    return tuple(dict.fromkeys(config.ropes))


def _angles(config: ModelConfig, positions: Array) -> Array | None:
    """Angles of each of the different encodings, which layers share."""
    if not config.rotates:
        return None
    return rotary_angles(positions, _different_ropes(config), config.rotated_dim)
