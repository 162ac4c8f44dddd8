"""Receivers of path patching: queries, keys and values that take what was recorded of a sender."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxheads.model.batch import Batch
from jaxheads.model.config import ModelConfig
from jaxheads.model.context import Context, Edit, Tap
from jaxheads.model.transformer import Transformer
from jaxheads.names import choose
from jaxheads.sites import axis_sizes, find_site
from jaxheads.sweep.engine import Progress, record_points
from jaxheads.sweep.metrics import Metric
from jaxheads.sweep.points import Points

Array = jax.Array
LOGITS = "logits"


@dataclass(frozen=True, order=True)
class Receiver:
    """The query, key or value of a head.

    Attributes:
      layer: its layer.
      head: a query head for "q", a key/value head for "k" and "v".
      site: "q", "k" or "v".
    """

    layer: int
    head: int
    site: str

    def __post_init__(self) -> None:
        choose("site of a receiver", self.site, ("q", "k", "v"))

    @classmethod
    def parse(cls, name: str) -> Receiver:
        """Of a name such as "18.6.q", or "a18.6.q" as in a circuit.

        Raises:
          ValueError: another form.
        """
        found = re.fullmatch(r"a?(\d+)\.(\d+)\.([qkv])", name)
        if found is None:
            raise ValueError(
                f"unknown receiver {name!r}: expected {LOGITS!r} or layer.head.site with site q, k "
                "or v, e.g. '18.6.q'"
            )
        return cls(int(found[1]), int(found[2]), found[3])

    def __str__(self) -> str:
        return f"{self.layer}.{self.head}.{self.site}"


def as_receivers(
    receivers: str | Receiver | Iterable[str | Receiver], config: ModelConfig
) -> tuple[Receiver, ...]:
    """The receivers in heads, sorted and checked; none stands for the logits.

    Raises:
      ValueError: an unknown receiver, one out of range, named twice, or "logits" beside others.
    """
    given = [receivers] if isinstance(receivers, (str, Receiver)) else list(receivers)
    if given == [LOGITS]:
        return ()
    if not given:
        raise ValueError(f"no receivers: expected {LOGITS!r} or names such as '18.6.q'")
    if LOGITS in given:
        raise ValueError(
            f"{LOGITS!r} cannot be patched together with heads: it decides the metric alone"
        )
    found = [Receiver.parse(one) if isinstance(one, str) else one for one in given]
    for one in found:
        kind = "query" if one.site == "q" else "key/value"
        heads = axis_sizes(config)[find_site(one.site).head_axis or "H"]
        if not (0 <= one.layer < config.n_layers and 0 <= one.head < heads):
            raise ValueError(
                f"receiver {one} is out of range: the model has layers 0..{config.n_layers - 1} "
                f"and {kind} heads 0..{heads - 1}"
            )
        if found.count(one) > 1:
            raise ValueError(f"receiver {one} is named twice")
    return tuple(sorted(found))


def receiver_points(
    model: Transformer,
    batch: Batch,
    metric: Metric,
    points: Points,
    receivers: tuple[Receiver, ...],
    budget: int,
    mesh: jax.sharding.Mesh | None,
    on_progress: Progress,
) -> Points:
    """Runs senders up to the receivers, and makes the edits that change the receivers alone.

    Args:
      model: the model.
      batch: the prompts.
      metric: decides how far windows reach.
      points: the senders, all of them below the last receiver.
      receivers: as `as_receivers` checked them, at least one.
      budget: as in `run_points`.
      mesh: as in `run_points`.
      on_progress: as in `run_points`.

    Returns:
      For each sender the clean run in which receivers take what was recorded. It begins in the
      layer of the first receiver above the sender.
    """
    found: dict[int, dict[str, list[int]]] = {}
    for receiver in receivers:
        if receiver.layer > 0:  # nothing sends to the first layer
            found.setdefault(receiver.layer, {}).setdefault(receiver.site, []).append(receiver.head)
    layers = sorted(found)
    taps = {
        layer: {site: Tap(site, jax.tree_util.Partial(_heads_of, jnp.asarray(heads)))
                for site, heads in found[layer].items()}
        for layer in layers
    }  # fmt: skip
    recorded = record_points(
        model, batch, metric, points, taps, budget=budget, mesh=mesh, on_progress=on_progress
    )
    arguments, shared = {}, {}
    for site in sorted({receiver.site for receiver in receivers if receiver.layer > 0}):
        parts = [layer for layer in layers if site in found[layer]]
        arguments[site] = np.concatenate([recorded[layer][site] for layer in parts], axis=3)
        places = [(layer, head) for layer in parts for head in found[layer][site]]
        size = axis_sizes(model.config)[find_site(site).head_axis or "H"]
        mask = np.zeros((model.config.n_layers, len(places), size), bool)
        for index, (layer, head) in enumerate(places):
            mask[layer, index, head] = True
        shared[site] = mask
    next_layer = np.array(layers, np.int32)[np.searchsorted(layers, points.layer, side="right")]
    return Points(
        next_layer,
        points.slot,
        arguments,
        shared,
        entering=_receive,
        later=_receive if len(layers) > 1 else None,
    )


def _receive(arguments: Any, shared: Any, layer: Array, start: int) -> Mapping[str, Edit]:
    return {site: _Recorded(values, shared[site]) for site, values in arguments.items()}


def _heads_of(heads: Array, value: Array, context: Context) -> Array:
    return value[:, :, heads]


@struct.dataclass
class _Recorded:
    """Some heads' values at the last W slots.

    Attributes:
      values: [B,W,R,Dh], of R receivers.
      heads: bool [R,H or K], the head of each receiver; none if it stands in another layer.
    """

    values: Array
    heads: Array

    def __call__(self, value: Array, context: Context) -> Array:
        first = value.shape[1] - self.values.shape[1]
        new = self.values[:, :, jnp.argmax(self.heads, axis=0)].astype(value.dtype)
        here = self.heads.any(axis=0)[:, None]
        return value.at[:, first:].set(jnp.where(here, new, value[:, first:]))
