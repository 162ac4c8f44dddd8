"""`path_patch`: what a sender does to a metric through chosen receivers only.

Path patching (Wang et al. 2022, "Interpretability in the Wild", section 3.1; Goldowsky-Dill et
al. 2023) in three runs. A corrupted run lends the sender's value. In a clean run with that value,
every other head keeps its clean output, so that nothing but the direct path (and MLPs, unless
they are frozen too) reaches the receivers, which are recorded. In a last clean run only the
receivers take what was recorded.

Freezing heads costs nothing: `attn_out` is set to its clean value, an edit that ignores its
input, so attention is never computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxheads.edits import Mix
from jaxheads.model.batch import Batch
from jaxheads.model.config import ModelConfig
from jaxheads.model.context import Context, Edit
from jaxheads.model.transformer import Transformer
from jaxheads.names import choose
from jaxheads.sweep.effects import effects, normalised_by
from jaxheads.sweep.engine import Progress, shape_of, silent
from jaxheads.sweep.metrics import AnyMetric, as_metric
from jaxheads.sweep.named import Label, NamedArray
from jaxheads.sweep.pairs import check_pair, first_difference, values_at
from jaxheads.sweep.plan import DEFAULT_BUDGET
from jaxheads.sweep.points import Points
from jaxheads.sweep.receivers import LOGITS, Receiver, as_receivers, receiver_points

Array = jax.Array
SENDERS = ("heads", "mlps", "both")
MLPS = ("recomputed", "frozen")
MLP = -1
"""The MLP of a layer among its senders."""


def path_patch(
    model: Transformer,
    clean: Batch,
    corrupted: Batch,
    metric: AnyMetric,
    receivers: str | Receiver | Iterable[str | Receiver] = LOGITS,
    *,
    senders: str = "heads",
    mlps: str = "recomputed",
    positions: Iterable[int] | None = None,
    normalised: bool = False,
    rows: bool = False,
    memory_budget: int = DEFAULT_BUDGET,
    mesh: jax.sharding.Mesh | None = None,
    on_progress: Progress = silent,
) -> NamedArray:
    """Path patching: the change of a metric when receivers see a sender's corrupted value.

    All other heads keep their clean values on the way from sender to receivers. A sender that
    stands in the layer of the last receiver or above it cannot reach one: its score is 0.

    Args:
      model: a model with logits for every token.
      clean: prompts with the behaviour in question.
      corrupted: prompts without it, of the same shape and padding.
      metric: as in `sweep`.
      receivers: "logits", the last residual stream; or queries, keys and values of heads, such
        as "18.6.q", which are replaced together. Keys and values are named by key/value head.
      senders: "heads", "mlps" or "both", each patched alone.
      mlps: whether MLPs on the way are "recomputed" or "frozen" to clean values too.
      positions: slots at which senders take their corrupted value; default all.
      normalised: divide by the difference between the two runs, so that 1 is as if the whole
        prompt were corrupted.
      rows: as in `sweep`.
      memory_budget: as in `sweep`; what receivers record is not counted.
      mesh: as in `sweep`.
      on_progress: as in `sweep`. With receivers in heads there are two runs, counted one after
        the other.

    Returns:
      `NamedArray` with axes "layer" and "head" for heads, "layer" for MLPs, "layer" and "sender"
      for both, where the last sender is "mlp" (and "row"): metric with the paths corrupted minus
      metric of the clean run, mean over rows.

    Raises:
      ValueError: as for `sweep`; an unknown receiver, one out of range, named twice, or
        "logits" beside others; unknown `senders` or `mlps`; positions out of range; clean and
        corrupted of different shape or padding; two runs whose metrics are equal, if
        `normalised`.
    """
    config = model.config
    choose("senders", senders, SENDERS)
    choose("mlps", mlps, MLPS)
    chosen = as_receivers(receivers, config)
    check_pair(clean, corrupted)
    made = as_metric(model, clean, metric)
    width = np.shape(clean.tokens)[1]
    slots = _slots(positions, width)
    layer, sender = _all_senders(config, senders)
    differ = first_difference(clean, corrupted, config.causal)
    first = min((slot for slot in slots if slot >= differ), default=width)
    reached = np.full(len(layer), first < width)
    if chosen:
        reached &= layer < max(receiver.layer for receiver in chosen)
    places = np.flatnonzero(reached)
    if not chosen:
        # Tokens meet in attention alone, which is frozen: only slots that are read matter.
        shape = shape_of(model, clean, made)
        first = shape.slots - shape.reads
    sites = {"heads": ("z",), "mlps": ("mlp_out",), "both": ("z", "mlp_out")}[senders]
    points = sender_points(
        model, clean, layer[places], sender[places], first,
        _sent(model, clean, corrupted, sites, positions is not None, slots), mlps == "frozen",
    )  # fmt: skip
    if chosen and len(places):
        points = receiver_points(
            model, clean, made, points, chosen, memory_budget, mesh, on_progress
        )
    names: dict[str, tuple[Label, ...]] = {"layer": tuple(range(config.n_layers))}
    if senders == "heads":
        names["head"] = tuple(range(config.n_heads))
    elif senders == "both":
        names["sender"] = (*range(config.n_heads), "mlp")
    found = effects(
        model, clean, made, points, tuple(names), tuple(names.values()),
        tuple(map(len, names.values())), places, rows, memory_budget, mesh, on_progress,
        unchanged=np.flatnonzero(~reached), mlps=mlps,
        receivers=", ".join(map(str, chosen)) or LOGITS,
    )  # fmt: skip
    return normalised_by(found, model, corrupted, made) if normalised else found


def sender_points(
    model: Transformer,
    batch: Batch,
    layer: np.ndarray,
    sender: np.ndarray,
    slot: int,
    sent: Mapping[str, Array],
    frozen: bool,
) -> Points:
    """Senders that act on what reads them directly, all other heads being frozen.

    Args:
      model: the model.
      batch: whose values others keep.
      layer: int [N], of each sender.
      sender: int [N], its head, or `MLP`.
      slot: the first slot of interest.
      sent: what they send: "z", broadcasting against [L,B,T,H,Dh], and "mlp_out" [L,B,T,D]; one
        of them may be left out.
      frozen: whether MLPs too keep their values of the batch.
    """
    kept = values_at(model, batch, "attn_out", *(("mlp_out",) if frozen else ()))
    return Points(
        layer,
        np.full(len(layer), slot, np.int32),
        sender,
        {"sent": dict(sent), "kept": kept},
        entering=_send,
        later=_freeze,
    )


# Builders of edits: (arguments of a point, values shared in the layer, layer, first slot of the
# window) -> edits of the block.


def _send(sender: Array, shared: Any, layer: Array, start: int) -> Mapping[str, Edit]:
    """The sender's own block, whose other heads see nothing new."""
    sent, kept = ({site: _from(start, x) for site, x in shared[name].items()}
                  for name in ("sent", "kept"))  # fmt: skip
    edits: dict[str, Edit] = {}
    if "z" in sent:
        here = jnp.arange(sent["z"].shape[2]) == sender
        edits["z"] = Mix(sent["z"], here[None, None, :, None].astype(sent["z"].dtype))
    if "mlp_out" in sent and "mlp_out" in kept:
        edits["mlp_out"] = _Fixed(jnp.where(sender == MLP, sent["mlp_out"], kept["mlp_out"]))
    elif "mlp_out" in sent:
        here = jnp.reshape(sender == MLP, (1, 1, 1))
        edits["mlp_out"] = Mix(sent["mlp_out"], here.astype(sent["mlp_out"].dtype))
    elif "mlp_out" in kept:
        edits["mlp_out"] = _Fixed(kept["mlp_out"])
    return edits


def _freeze(sender: Array, shared: Any, layer: Array, start: int) -> Mapping[str, Edit]:
    return {site: _Fixed(_from(start, x)) for site, x in shared["kept"].items()}


def _from(start: int, value: Array) -> Array:
    """The slots of a window, of a value [B,T,...] or the same for all slots."""
    return value if value.shape[1] == 1 else value[:, start:]


@struct.dataclass
class _Fixed:
    """Sets a value whatever it was, so that what it would have been is not computed."""

    value: Array

    def __call__(self, value: Array, context: Context) -> Array:
        return jnp.broadcast_to(self.value, value.shape)


def _sent(
    model: Transformer,
    clean: Batch,
    corrupted: Batch,
    sites: tuple[str, ...],
    some: bool,
    slots: Iterable[int],
) -> dict[str, Array]:
    """Corrupted values at some slots, clean ones at others."""
    other = values_at(model, corrupted, *sites)
    if not some:
        return other
    own = values_at(model, clean, *sites)
    at = np.isin(np.arange(np.shape(clean.tokens)[1]), list(slots))
    axes = {site: (1, 1, -1) + (1,) * (own[site].ndim - 3) for site in sites}
    return {site: jnp.where(at.reshape(axes[site]), other[site], own[site]) for site in sites}


def _all_senders(config: ModelConfig, senders: str) -> tuple[np.ndarray, np.ndarray]:
    """Layer and head (or `MLP`) of every sender, int [N]."""
    heads = {"mlps": []}.get(senders, list(range(config.n_heads)))
    each = np.array(heads + [MLP] * (senders != "heads"), np.int32)
    layer = np.repeat(np.arange(config.n_layers, dtype=np.int32), len(each))
    return layer, np.tile(each, config.n_layers)


def _slots(positions: Iterable[int] | None, width: int) -> list[int]:
    if positions is None:
        return list(range(width))
    slots = list(positions)
    if not slots:
        raise ValueError("positions is empty: expected at least one slot")
    for slot in slots:
        if not 0 <= slot < width:
            raise ValueError(f"position {slot} is out of range 0..{width - 1}")
    return slots
