"""`mixture_of_heads`: a `Route` for a model, by how much of each layer stays on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.edits.build import Heads, head_mask
from jaxheads.edits.edits import Edits
from jaxheads.edits.route import GATES, SCORES, Route, layer_keys
from jaxheads.model.config import ModelConfig
from jaxheads.names import choose

Array = jax.Array
STD = 0.02
"""Standard deviation of a new linear router, as in the released code."""


def mixture_of_heads(
    config: ModelConfig,
    key: Array | None = None,
    *,
    shared: int | Sequence[int] | Heads,
    top_k: int | Sequence[int] | None = None,
    share: float | None = None,
    gates: str = "renormalised",
    scores: str = "linear",
) -> Edits:
    """Routing over the heads of every layer; see `jaxheads.edits.route` for the forms.

    Args:
      config: of the model.
      key: of a "linear" router's weights, normal with standard deviation 0.02, and of a
        "random" one's draws. W_s and W_h start at zero, so that `renormalised` gates of shared
        heads start at 1.
      shared: heads that are always on: the first n of every layer; n for each layer; or (layer,
        head) pairs.
      top_k: K of every layer, or for each; or give `share`.
      share: mean share of heads that are on, in (0, 1]: K of each layer is chosen so that layers
        differ by at most one and the mean over layers is as near as it can be.
      gates: one of `GATES`.
      scores: one of `SCORES`.

    Returns:
      Edits of `z`.

    Raises:
      ValueError: more shared heads than heads, K beyond the routed heads, a layer with no head
        on, both or neither of `top_k` and `share`, a missing key, or an unknown form.
    """
    choose("gates", gates, GATES)
    choose("scores", scores, SCORES)
    always = shared_heads(config, shared)
    counts = _top_k(config, always, top_k, share)
    layers, heads, width = config.n_layers, config.n_heads, config.d_model
    weights: dict[str, Any] = {}
    if scores != "query_norm":
        if key is None:
            raise ValueError(f"scores={scores!r} need a random key, got None")
        if scores == "linear":
            weights["router"] = STD * jax.random.normal(key, (layers, width, heads))
        else:
            weights["keys"] = layer_keys(key, layers)
    if gates != "straight_through":
        weights["shared_router"] = jnp.zeros((layers, width, heads))
        weights["balance"] = jnp.zeros((layers, width, 2))
    route = Route(jnp.asarray(always), jnp.asarray(counts), **weights, gates=gates, scores=scores)
    return Edits(z=route)


def shared_heads(config: ModelConfig, shared: int | Sequence[int] | Heads) -> np.ndarray:
    """bool [L,H], the heads that are always on, as `mixture_of_heads` takes them.

    Raises:
      ValueError: more than there are, fewer than none, or a list that is neither one number for
        each layer nor pairs.
    """
    layers, heads = config.n_layers, config.n_heads
    counts: Sequence[int]
    if isinstance(shared, int | np.integer):
        counts = [int(shared)] * layers
    elif not isinstance(shared, Iterable):
        raise ValueError(f"shared must be integers or (layer, head) pairs, got {shared!r}")
    else:
        listed = list(shared)
        if not all(isinstance(one, int | np.integer) for one in listed) or not listed:
            return head_mask(config, listed)  # type: ignore[arg-type]
        if len(listed) != layers:
            raise ValueError(f"shared has {len(listed)} numbers, expected one for {layers} layers")
        counts = listed  # type: ignore[assignment]
    for layer, count in enumerate(counts):
        if not 0 <= count <= heads:
            raise ValueError(
                f"layer {layer}: {count} shared heads, expected 0 to the {heads} that there are"
            )
    return np.arange(heads) < np.asarray(counts)[:, None]


def _top_k(
    config: ModelConfig, shared: np.ndarray, top_k: int | Sequence[int] | None, share: float | None
) -> np.ndarray:
    """int32 [L], checked against the routed heads."""
    if (top_k is None) == (share is None):
        raise ValueError(f"give one of top_k and share, got top_k={top_k} and share={share}")
    routed = (~shared).sum(axis=1)
    if share is not None:
        counts = heads_on(config.n_layers, config.n_heads, share) - shared.sum(axis=1)
        if (counts < 0).any():
            layer = int(np.argmax(counts < 0))
            raise ValueError(
                f"layer {layer}: {shared[layer].sum()} shared heads are more than share={share} "
                f"leaves on, {share * config.n_heads:g} of {config.n_heads}"
            )
    elif isinstance(top_k, int | np.integer):
        counts = np.full(config.n_layers, top_k)
    else:
        counts = np.asarray(top_k)
        if counts.shape != (config.n_layers,) or counts.dtype.kind not in "iu":
            raise ValueError(
                f"top_k has shape {counts.shape} of {counts.dtype}, expected one integer for each "
                f"of the {config.n_layers} layers"
            )
    for layer, (count, most) in enumerate(zip(counts, routed, strict=True)):
        if not 0 <= count <= most:
            raise ValueError(
                f"layer {layer}: top_k is {count}, expected 0 to its {most} routed heads"
            )
        if count + config.n_heads - most == 0:
            raise ValueError(f"layer {layer}: no shared head and top_k = 0 would leave no head on")
    return counts.astype(np.int32)


def heads_on(n_layers: int, n_heads: int, share: float, whole_layers: int = 0) -> np.ndarray:
    """How many heads stay on in each layer, int [L].

    The first layers keep all; the others differ by at most one, and the mean over all layers is
    as near to the share as it can be.

    Args:
      n_layers: L.
      n_heads: H.
      share: mean share of heads that stay on, in (0, 1].
      whole_layers: how many of the first layers keep all.

    Raises:
      ValueError: a share outside (0, 1], more whole layers than layers, none that is routed though
        the share is below 1, or a share that leaves some layer without a head.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}")
    if not 0 <= whole_layers <= n_layers:
        raise ValueError(f"whole_layers must lie in 0..{n_layers}, got {whole_layers}")
    routed = n_layers - whole_layers
    left = share * n_heads * n_layers - n_heads * whole_layers
    if (routed == 0 and share < 1) or left < routed:
        raise ValueError(
            f"share {share:g} of {n_layers} layers of {n_heads} heads, of which {whole_layers} "
            f"keep all, leaves {max(left, 0):g} heads for the {routed} others"
        )
    ends = np.floor(np.arange(1, routed + 1) * (left / max(routed, 1)) + 0.5).astype(int)
    return np.concatenate([np.full(whole_layers, n_heads), np.diff(ends, prepend=0)])
