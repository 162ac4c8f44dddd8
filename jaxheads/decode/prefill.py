"""Reading prompts into a cache, whole or in chunks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads.decode.contrast import Model
from jaxheads.model.cache import Cache
from jaxheads.model.context import Edit, Tap
from jaxheads.model.layout import axes_of, lay
from jaxheads.model.transformer import Output
from jaxheads.sites import find_site

Array = jax.Array
Carry = tuple[Cache, Array]


def prefill(
    model: Model,
    tokens: Array,
    mask: Array,
    cache: Cache,
    edits: Mapping[str, Edit],
    taps: Mapping[str, Tap],
    chunk: int | None,
    prefix: Array | None = None,
) -> tuple[Array, dict[str, Any], Cache]:
    """Reads prompts.

    Args:
      model: the model.
      tokens: int [B,T].
      mask: bool [B,T], True where a token is real.
      cache: empty.
      edits: what to change.
      taps: what to hand back; `check_chunked` says what cannot be, of chunks.
      chunk: tokens read at a time, by a scan that carries the cache; None for all at once.
      prefix: int [B], first tokens that see one another; only at once, by a `Transformer`.

    Returns:
      Logits float32 [B,V] of the token after each row's last, what was tapped, the cache.
    """
    rows, width = tokens.shape
    last = last_slots(mask)
    if chunk is None or chunk >= width:
        sight: dict[str, Any] = {} if prefix is None else {"prefix": prefix}
        out = model(
            tokens, mask, edits=edits, taps=taps, cache=cache, logits_at=last[:, None], **sight
        )
        return out.logits[:, 0], out.taps, cache_of(out)

    def read(carry: Carry, start: Array | int, size: int) -> tuple[Carry, dict[str, Any]]:
        cache, logits = carry
        part, real = (jax.lax.dynamic_slice_in_dim(x, start, size, 1) for x in (tokens, mask))
        slot = last - start
        at = jnp.clip(slot, 0, size - 1)[:, None]
        out = model(part, real, edits=edits, taps=taps, cache=cache, logits_at=at)
        here = (slot >= 0) & (slot < size)
        return (cache_of(out), jnp.where(here[:, None], out.logits[:, 0], logits)), out.taps

    nothing = jnp.zeros((rows, model.config.vocab_size), jnp.float32)
    first = jax.eval_shape(lambda: read((cache, nothing), 0, chunk))
    carry: Carry = (cache, lay(nothing, axes_of(first[0][1])))
    whole = width // chunk
    carry, tapped = jax.lax.scan(
        lambda carry, start: read(carry, start, chunk), carry, jnp.arange(whole) * chunk
    )
    pieces = [{name: _joined(taps[name], value) for name, value in tapped.items()}]
    if width % chunk:
        carry, rest = read(carry, whole * chunk, width % chunk)
        pieces.append(rest)
    found = {
        name: jnp.concatenate([piece[name] for piece in pieces], axis=_token_axis(tap))
        for name, tap in taps.items()
    }
    return carry[1], found, carry[0]


def last_slots(mask: Array) -> Array:
    """int [B]: the last real slot of each row of mask [B,T]."""
    return mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)


def check_chunked(taps: Mapping[str, Tap]) -> None:
    """Raises ValueError for taps whose value over all tokens is not that of chunks, joined."""
    for name, tap in taps.items():
        if tap.reduce is not None:
            raise ValueError(
                f"prompt tap {name!r} has a reducer, which would see one chunk at a time: tap the "
                "site itself, or read the prompt whole (chunk=None)"
            )
        if tap.site in ("final", "logits"):
            raise ValueError(
                f"prompt tap {name!r}: {tap.site!r} exists at the last token only, and not in "
                "chunks: read the prompt whole (chunk=None)"
            )


def cache_of(out: Output) -> Cache:
    """The cache of a pass that was given one."""
    assert out.cache is not None
    return out.cache


def _token_axis(tap: Tap) -> int:
    site = find_site(tap.site)
    # Of keys and values those of the tokens read are tapped, before the cached ones join them.
    return int(site.stacked) + site.axes.index("T" if "T" in site.axes else "S")


def _joined(tap: Tap, chunks: Array) -> Array:
    """Values of C chunks [C,...,t,...] as one [...,C*t,...]."""
    axis = _token_axis(tap)
    moved = jnp.moveaxis(chunks, 0, axis)
    return moved.reshape(*moved.shape[:axis], -1, *moved.shape[axis + 2 :])
