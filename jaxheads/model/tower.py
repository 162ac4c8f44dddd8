"""`Tower`: embeddings, a stack of blocks run by one scan, and the last norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxheads.model.block import Block
from jaxheads.model.cache import KVCache
from jaxheads.model.config import ModelConfig
from jaxheads.model.context import Context, Edit, Tap, layer_slices
from jaxheads.model.embedding import Embedding
from jaxheads.model.norms import optional_norm
from jaxheads.model.relative import RelativeBias
from jaxheads.model.rotary import rotary_angles
from jaxheads.sites import find_site

Array = jax.Array


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
        cache: KVCache | None,
        phase: str,
        edits: Mapping[str, Edit],
        taps: Mapping[str, Tap],
    ) -> tuple[Context, KVCache | None]:
        """Positions, visibility and angles of the tokens of mask [B,T], shared by all layers."""
        config = self.config
        count = jnp.cumsum(mask, axis=1) - 1
        start: Array | int = 0
        key_mask = mask
        if cache is not None:
            start = cache.length
            count = count + cache.mask.sum(axis=1, keepdims=True)
            key_mask = jax.lax.dynamic_update_slice(cache.mask, mask, (0, start))
            cache = replace(cache, mask=key_mask)
        positions = jnp.maximum(count, 0)
        slots, keys = start + jnp.arange(mask.shape[1]), jnp.arange(key_mask.shape[1])
        allowed = key_mask[:, None, None, :]
        if config.causal:
            allowed = allowed & (keys <= slots[:, None])
        context = Context(
            config=config,
            positions=positions,
            slots=slots[None],
            token_mask=mask,
            allowed=allowed,
            angles=None,
            start=start,
            phase=phase,
            bias=None if self.relative is None else self.relative(slots, keys, config),
            edits={site: edit for site, edit in edits.items() if not find_site(site).stacked},
            taps=taps,
        )
        return context, cache

    def run(
        self, x: Array, context: Context, edits: Mapping[str, Edit], cache: KVCache | None
    ) -> tuple[Array, dict[str, Any], KVCache | None]:
        """Runs the blocks on x [B,T,D], the residual stream that enters the first.

        Returns:
          The residual stream after the last block (before the last norm), what was tapped
          in the stack, with a leading layer axis, and the cache with new keys and values.
        """
        config = self.config
        inside = layer_slices(edits, config.n_layers)
        angles, which = _angles(config, context.positions)
        windows = jnp.asarray(config.windows) if any(config.windows) else None
        distance = jnp.abs(context.slots[0][:, None] - jnp.arange(context.allowed.shape[-1]))

        def body(x: Array, layer: tuple) -> tuple[Array, tuple]:
            block, edits_here, index, rope, window, cached = layer
            here = replace(context, layer=index, edits=edits_here, tapped={}, values={})
            if angles is not None:
                here = replace(here, angles=angles[0] if rope is None else angles[rope])
            if window is not None:
                near = (distance < window) | (window == 0)
                here = replace(here, allowed=context.allowed & near)
            x, here, attended = block(x, here, cached)
            return x, (here.tapped, attended if cache is not None else None)

        cached = None if cache is None else (cache.k, cache.v)
        layers = (self.blocks, inside, jnp.arange(config.n_layers), which, windows, cached)
        x, (tapped, attended) = jax.lax.scan(body, x, layers)
        if cache is not None:
            length = cache.length + context.token_mask.shape[1]
            cache = replace(cache, k=attended[0], v=attended[1], length=length)
        return x, tapped, cache

    def finish(self, x: Array, context: Context) -> tuple[Array, Context]:
        """The last norm, and the site `final`."""
        if self.final_norm is not None:
            x = self.final_norm(x, self.config)
        return context.visit("final", x)


def _angles(config: ModelConfig, positions: Array) -> tuple[Array | None, Array | None]:
    """Angles of the different encodings, and the one of each layer where they differ."""
    if not config.rotates:
        return None, None
    different = tuple(dict.fromkeys(config.ropes))
    angles = rotary_angles(positions, different, config.rotated_dim)
    if len(different) == 1:
        return angles, None
    return angles, jnp.asarray(np.array([different.index(rope) for rope in config.ropes]))
