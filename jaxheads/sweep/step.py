"""`Step`: one block of a sweep, for one point, at the window of its wave.

Axes: B rows, T slots, W slots of a window (the last of T), L layers, D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxheads.model.attention import Slots
from jaxheads.model.cache import KVCache
from jaxheads.model.context import Context, Edit, Tap
from jaxheads.model.transformer import Transformer, read_at
from jaxheads.sweep.metrics import Metric, read_tokens
from jaxheads.sweep.points import Points

Array = jax.Array


@struct.dataclass
class Prefix:
    """The unedited run: what every edit of a sweep starts from.

    Attributes:
      mask: bool [B,T], real tokens.
      streams: [L,B,T,D], the residual stream entering each block.
      k: [L,B,T,K,Dh], keys; None where every edit computes all slots.
      v: [L,B,T,K,Dh], values, likewise.
      metric: float32 [B], the metric of the unedited run.
    """

    mask: Array
    streams: Array
    k: Array | None
    v: Array | None
    metric: Array


@struct.dataclass
class Stream:
    """The residual stream of a point; leading axes stand for several points.

    Attributes:
      own: [B,W,D], each row's slots of the window.
      common: [1,T-W,D], the slots before the window, where all rows have them in common;
        None where they are those of the unedited run.
    """

    own: Array
    common: Array | None = None


@dataclasses.dataclass(frozen=True)
class Step:
    """One block at the window of a wave; the methods are of one point."""

    model: Transformer
    prefix: Prefix
    points: Points
    layer: Array
    block: Any
    shared: Any
    start: int

    @classmethod
    def at(
        cls, model: Transformer, prefix: Prefix, points: Points, layer: Array, start: int
    ) -> Step:
        """The step at `layer`, an int scalar, on the slots from `start` on."""

        def here(leaf: Array) -> Array:
            return lax.dynamic_index_in_dim(jnp.asarray(leaf), layer, keepdims=False)

        block = jax.tree.map(here, model.layers())
        return cls(model, prefix, points, layer, block, jax.tree.map(here, points.shared), start)

    def context(self, start: int) -> Context:
        """Of the slots from `start` on; those before are as if cached."""
        mask = self.prefix.mask
        past = None
        if start:
            before = mask & (jnp.arange(mask.shape[1]) < start)
            past = KVCache(jnp.zeros(()), jnp.zeros(()), before, jnp.asarray(start, jnp.int32))
        return self.model.begin(mask[:, start:], past, "prefill", {}, {})[0]

    def before(self, x: Stream, edits: Mapping[str, Edit]) -> tuple[Array | None, Slots | None]:
        """What lies before the window.

        Returns:
          The common slots after the block, if there are any; keys and values of the slots before
          the window, or None without a window.
        """
        if not self.start:
            return None, None
        if x.common is None:
            assert self.prefix.k is not None and self.prefix.v is not None
            return None, Slots(self.prefix.k[self.layer], self.prefix.v[self.layer])
        mask = self.prefix.mask
        context, _ = self.model.begin(mask[:1, : self.start], None, "prefill", {}, {})
        common, _, known = self.model.step(x.common, context, self.block, edits)
        rest = ((0, 0), (0, mask.shape[1] - self.start), (0, 0), (0, 0))
        k, v = (jnp.pad(part, rest).repeat(mask.shape[0], axis=0) for part in (known.k, known.v))
        return common, Slots(k, v)

    def edits(self, arguments: Any, *, entering: bool) -> Mapping[str, Edit]:
        """Those of a point that begins in this block, or began below."""
        build = self.points.entering if entering else self.points.later
        return {} if build is None else build(arguments, self.shared, self.layer, self.start)

    def begin(self, arguments: Any) -> Stream:
        """The stream after the block in which a point begins."""
        return self._run(self._stream(arguments), self.edits(arguments, entering=True))

    def through(self, x: Stream, arguments: Any) -> Stream:
        """The stream after a block above."""
        return self._run(x, self.edits(arguments, entering=False))

    def record(self, taps: Mapping[str, Tap], x: Stream, arguments: Any) -> dict[str, Array]:
        """What is tapped in a block above."""
        context = dataclasses.replace(self.context(self.start), taps=taps)
        edits = self.edits(arguments, entering=False)
        _, cached = self.before(x, edits)
        return dict(self.model.step(x.own, context, self.block, edits, cached)[1].tapped)

    def finish(self, metric: Metric, reads: int, x: Stream | None, arguments: Any) -> Array:
        """The metric [B] after the last block; x is None for a point that begins in it."""
        edits = self.edits(arguments, entering=x is None)
        start, slots = self.start, self.prefix.mask.shape[1]
        if x is None:
            own = self._run(self._stream(arguments), edits).own
        elif reads < slots - start:
            _, cached = self.before(x, edits)
            # Only keys and values of this pass are used, so the rest of it is never computed.
            _, _, known = self.model.step(x.own, self.context(start), self.block, edits, cached)
            own, start = x.own[:, -reads:], slots - reads
            own, _, _ = self.model.step(own, self.context(start), self.block, edits, known)
        else:
            own = self._run(x, edits).own
        return self._measure(metric, own, start, arguments)

    def _stream(self, arguments: Any) -> Stream:
        """What enters the block in which a point begins."""
        x = self.prefix.streams[self.layer]
        common = x[:1, : self.start] if self.points.alike and self.start else None
        own = x[:, self.start :]
        if self.points.outside is None or "embed" not in (edits := self.points.outside(arguments)):
            return Stream(own, common)
        context = dataclasses.replace(self.context(self.start), edits=edits)
        # Points that edit the embedding begin in the first layer, and so does every other.
        return Stream(context.visit("embed", own)[0], common)

    def _run(self, x: Stream, edits: Mapping[str, Edit]) -> Stream:
        common, cached = self.before(x, edits)
        own = self.model.step(x.own, self.context(self.start), self.block, edits, cached)[0]
        return Stream(own, common)

    def _measure(self, metric: Metric, x: Array, start: int, arguments: Any) -> Array:
        edits = {} if self.points.outside is None else self.points.outside(arguments)
        slots = jnp.asarray(metric.slots) - start
        context = dataclasses.replace(read_at(self.context(start), slots), edits=edits)
        x = jnp.take_along_axis(x, slots[..., None], axis=1)
        x, context = self.model.finish(x, context)
        tokens = None if metric.tokens is None else jnp.asarray(metric.tokens)
        if tokens is not None and "logits" not in edits:
            return metric(self.model.logits_of(x, tokens))
        logits, _ = context.visit("logits", self.model.logits_of(x))
        return metric(read_tokens(logits, metric))
