"""What a model refuses before it computes anything."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.model.cache import Cache
from jaxheads.model.config import ModelConfig
from jaxheads.model.context import Edit, Tap
from jaxheads.sites import CROSS_SITES, ENCODER

Array = jax.Array


def check_sites(config: ModelConfig, edits: Mapping[str, Edit], taps: Mapping[str, Tap]) -> None:
    """Raises ValueError for edits and taps of sites that a model of this config never visits."""
    absent = set() if config.cross else set(CROSS_SITES)
    if config.head == "none":
        absent.add("logits")
    asked = {f"edit at {site!r}": site for site in edits}
    asked |= {f"tap {name!r}": tap.site for name, tap in taps.items()}
    for what, site in asked.items():
        if site in absent or site.startswith(ENCODER):
            raise ValueError(f"{what}: this model has no site {site!r}")


def check_images(
    config: ModelConfig,
    images: Array | np.ndarray,
    mask: Array | np.ndarray | None = None,
    cache: Cache | None = None,
    logits_at: Array | np.ndarray | None = None,
) -> None:
    """Raises ValueError for images that the model cannot take."""
    image = config.image
    assert image is not None
    shape, expected = jnp.shape(images), (image.height, image.width, image.channels)
    if len(shape) != 4 or shape[1:] != expected:
        raise ValueError(f"images must have shape [B,height,width,C] = [B,{expected}], got {shape}")
    if not np.issubdtype(jnp.asarray(images).dtype, np.floating):
        raise ValueError(f"images must be floats, got {jnp.asarray(images).dtype}")
    for name, value in (("mask", mask), ("cache", cache), ("logits_at", logits_at)):
        if value is not None:
            raise ValueError(f"{name} has no meaning for images, expected None")


def check_types(
    config: ModelConfig, tokens: Array | np.ndarray, types: Array | np.ndarray | None
) -> None:
    """Raises ValueError for token types that the model cannot take."""
    if types is None:
        return
    if not config.n_token_types:
        raise ValueError("token_types were given to a model that has none")
    if jnp.shape(types) != jnp.shape(tokens):
        raise ValueError(
            f"token_types have shape {jnp.shape(types)}, expected that of tokens, "
            f"{jnp.shape(tokens)}"
        )
    if not isinstance(types, jax.core.Tracer):
        low, high = np.asarray(types).min(), np.asarray(types).max()
        if low < 0 or high >= config.n_token_types:
            raise ValueError(
                f"token_types must lie in 0..{config.n_token_types - 1}, got {low} to {high}"
            )


def check_segments(
    tokens: Array | np.ndarray,
    segments: Array | np.ndarray | None,
    cache: Cache | None,
) -> None:
    """Raises ValueError for segments that the model cannot take."""
    if segments is None:
        return
    if jnp.shape(segments) != jnp.shape(tokens):
        raise ValueError(
            f"segments have shape {jnp.shape(segments)}, expected that of tokens, "
            f"{jnp.shape(tokens)}"
        )
    if not jnp.issubdtype(jnp.asarray(segments).dtype, jnp.integer):
        raise ValueError(f"segments must be integers, got {jnp.asarray(segments).dtype}")
    if cache is not None:
        raise ValueError("segments and a cache do not go together: packed rows are for training")


def check_tokens(
    config: ModelConfig,
    tokens: Array | np.ndarray,
    mask: Array | np.ndarray | None = None,
    cache: Cache | None = None,
) -> None:
    """Raises ValueError for token ids that the model cannot take.

    Ids are compared with the vocabulary only when they are concrete, not under a trace.
    """
    shape = jnp.shape(tokens)
    if len(shape) != 2:
        raise ValueError(f"tokens must have shape [B,T], got {shape}")
    if not np.issubdtype(jnp.asarray(tokens).dtype, np.integer):
        raise ValueError(f"tokens must be integers, got {jnp.asarray(tokens).dtype}")
    if 0 in shape:
        raise ValueError(f"tokens of shape {shape} are empty: a prompt needs at least one token")
    if mask is not None and jnp.shape(mask) != shape:
        raise ValueError(f"mask has shape {jnp.shape(mask)}, expected that of tokens, {shape}")
    if mask is not None and jnp.asarray(mask).dtype != bool:
        raise ValueError(f"mask must be bool, got {jnp.asarray(mask).dtype}")
    if shape[1] > config.context_length:
        raise ValueError(
            f"a sequence of {shape[1]} tokens exceeds the model's context of "
            f"{config.context_length}"
        )
    if cache is not None:
        if cache.mask.shape[0] != shape[0]:
            raise ValueError(f"{shape[0]} rows do not fit a cache of {cache.mask.shape[0]} rows")
        known = not isinstance(cache.length, jax.core.Tracer)
        used = int(cache.length) if known else 0
        if used + shape[1] > cache.size:
            after = f" after {used} others" if used else ""
            raise ValueError(f"{shape[1]} tokens{after} do not fit a cache of {cache.size} slots")
    if not isinstance(tokens, jax.core.Tracer):
        ids = np.asarray(tokens)
        low, high = ids.min(), ids.max()
        if low < 0 or high >= config.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"token id {bad} is outside the vocabulary of {config.vocab_size}")


def check_slots(logits_at: Array | np.ndarray | None, rows: int, width: int) -> None:
    """Raises ValueError for slots that tokens of this shape do not have."""
    if logits_at is None:
        return
    shape = jnp.shape(logits_at)
    dtype = jnp.asarray(logits_at).dtype
    if len(shape) != 2 or shape[0] != rows or not np.issubdtype(dtype, np.integer):
        raise ValueError(
            f"logits_at must be integers of shape [B,N] with B={rows}, got {dtype} of {shape}"
        )
    if not isinstance(logits_at, jax.core.Tracer) and logits_at.size:
        slots = np.asarray(logits_at)
        if slots.min() < 0 or slots.max() >= width:
            raise ValueError(
                f"logits_at must lie in 0..{width - 1}, got {slots.min()} to {slots.max()}"
            )
