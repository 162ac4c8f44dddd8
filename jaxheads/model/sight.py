"""`Sight`: who sees whom and where tokens stand, where the order of the slots does not say it.

Two uses: the nodes of a tree of drafts, which see their ancestors (Miao et al. 2023,
"SpecInfer", section 4.2), and prompts whose first tokens see one another in both directions
(Raffel et al. 2019, "T5", section 3.2.1, causal with prefix).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxheads.model.cache import Cache
from jaxheads.model.config import ModelConfig

Array = jax.Array


@struct.dataclass
class Sight:
    """What replaces the order of the slots; None leaves it as it is.

    Attributes:
      positions: int [B,T], the position of each token.
      sees: bool [T,T] or [B,T,T], which of these tokens each one sees; those in the cache are
        seen by all.
      prefix: int [B], how many first real tokens of a row see one another in both directions.
    """

    positions: Array | np.ndarray | None = None
    sees: Array | np.ndarray | None = None
    prefix: Array | np.ndarray | None = None


AS_ORDERED = Sight()
"""What order says."""


def allowed_keys(
    config: ModelConfig, sight: Sight, mask: Array, key_mask: Array, start: Array | int
) -> Array:
    """Which keys the queries see: bool [B,1,T or 1,S].

    Args:
      config: says whether the model is causal.
      sight: what replaces that.
      mask: bool [B,T], the real queries.
      key_mask: bool [B,S], the real keys, the queries' own from the slot `start` on.
      start: slot of the first query.
    """
    allowed = key_mask[:, None, None, :]
    keys = jnp.arange(key_mask.shape[1])
    if sight.sees is not None:
        sees = jnp.asarray(sight.sees)
        sees = sees[None] if sees.ndim == 2 else sees
        before = jnp.broadcast_to(keys < start, (*sees.shape[:2], len(keys)))
        return allowed & jax.lax.dynamic_update_slice_in_dim(before, sees, start, axis=2)[:, None]
    if not config.causal:
        return allowed
    order = keys <= (start + jnp.arange(mask.shape[1]))[:, None]
    if sight.prefix is None:
        return allowed & order
    first = mask & (jnp.cumsum(mask, axis=1) <= jnp.asarray(sight.prefix)[:, None])
    among = jax.lax.dynamic_update_slice_in_dim(jnp.zeros_like(key_mask), first, start, axis=1)
    return allowed & (order | (first[:, None, :, None] & among[:, None, None, :]))


def check_sight(
    config: ModelConfig, sight: Sight, shape: tuple[int, ...], cache: Cache | None, phase: str
) -> None:
    """Raises ValueError for what a model cannot do with tokens of this shape.

    Values are checked only when they are concrete, not under a trace.
    """
    given = {name: value for name, value in vars(sight).items() if value is not None}
    if not given:
        return
    if config.image is not None:
        raise ValueError(f"{', '.join(given)} have no meaning for images, expected None")
    rows, width = shape
    expected = {
        "positions": ((rows, width),),
        "sees": ((width, width), (rows, width, width)),
        "prefix": ((rows,),),
    }
    for name, value in given.items():
        if jnp.shape(value) not in expected[name]:
            shapes = " or ".join(map(str, expected[name]))
            raise ValueError(f"{name} has shape {jnp.shape(value)}, expected {shapes}")
        kind, told = (np.bool_, "bool") if name == "sees" else (np.integer, "integers")
        if not np.issubdtype(jnp.asarray(value).dtype, kind):
            raise ValueError(f"{name} must be {told}, got {jnp.asarray(value).dtype}")
    if ("positions" in given or "sees" in given) and (
        any(config.windows) or config.relative_buckets
    ):
        raise ValueError(
            "positions and sees need a model without windows and position biases, which count "
            f"slots: got windows {sorted(set(config.windows))}, "
            f"relative_buckets={config.relative_buckets}"
        )
    _check_range("positions", sight.positions, config.context_length - 1)
    if sight.prefix is not None:
        _check_prefix(config, sight, cache, phase)
        _check_range("prefix", sight.prefix, width)


def _check_prefix(config: ModelConfig, sight: Sight, cache: Cache | None, phase: str) -> None:
    if not config.causal:
        raise ValueError("prefix is for causal models: in this one all tokens see one another")
    if sight.sees is not None:
        raise ValueError("prefix and sees must not both be given: sees says it all")
    held = 0 if cache is None or _is_traced(cache.length) else int(cache.length)
    if phase == "decode" or held:
        after = f"a cache that holds {held} slots" if held else "phase='decode'"
        raise ValueError(
            f"prefix needs the prompt whole, got {after}: tokens that were read before cannot see "
            "these"
        )


def _check_range(name: str, value: Array | np.ndarray | None, most: int) -> None:
    if value is None or _is_traced(value):
        return
    low, high = np.asarray(value).min(), np.asarray(value).max()
    if low < 0 or high > most:
        raise ValueError(f"{name} must lie in 0..{most}, got {low} to {high}")


def _is_traced(x: object) -> bool:
    return isinstance(x, jax.core.Tracer)
