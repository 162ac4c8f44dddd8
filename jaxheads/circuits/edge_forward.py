"""The forward pass of a circuit: each receiver reads, from each sender, what the circuit computes
or what the corrupted run computed.

Receiver v reads corrupted stream + sum_u M[u,v] (out_u - corrupted out_u), where out_u is what
sender u writes in this very run. This is the evaluation of circuits of Conmy et al. (2023),
"Towards Automated Circuit Discovery" (ACDC), section 3, with edges between 0 and 1 allowed, so
that it has a derivative by M. It runs the model's own blocks with their reads replaced.

Axes: B rows, T positions, L layers, H query heads, K key/value heads, D model width, U senders,
V receivers and R receivers of one layer (see `Graph`), N slots read by the metric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxheads.circuits.graph import Graph
from jaxheads.model.batch import Batch
from jaxheads.model.block import Block
from jaxheads.model.config import ModelConfig
from jaxheads.model.context import Context
from jaxheads.model.embedding import embed_tokens
from jaxheads.model.tower import Layers
from jaxheads.model.transformer import Transformer, read_at
from jaxheads.sweep.metrics import Metric, as_metric, name_of
from jaxheads.sweep.pairs import check_pair as check_same_form

Array = jax.Array

MASKS_AT_ONCE = 4
"""Runs of a circuit in one program; each holds U [B,T,D] arrays."""


@struct.dataclass
class Writes:
    """What every sender writes in one run, and the streams that are read.

    Attributes:
      embed: [B,T,D].
      heads: [L,B,T,H,D], after a branch's scale.
      mlps: [L,B,T,D].
      pre: [L,B,T,D], streams read by attention.
      mid: [L,B,T,D], streams read by the MLPs.
      last: [B,T,D], the stream after the last block.
    """

    embed: Array
    heads: Array
    mlps: Array
    pre: Array
    mid: Array
    last: Array

    def senders(self) -> Array:
        """[U,B,T,D], in the order of `Graph.senders`."""
        layered = jnp.concatenate([jnp.moveaxis(self.heads, 3, 1), self.mlps[:, None]], axis=1)
        return jnp.concatenate([self.embed[None], layered.reshape(-1, *layered.shape[2:])])


WRITES = ("embed", "head_out", "mlp_out", "resid_pre", "resid_mid", "resid_post")
"""The taps that `writes_of` takes."""


def writes_of(model: Transformer, taps: dict[str, Array]) -> Writes:
    """`Writes` of the taps `WRITES`."""
    scale = model.blocks.attn_scale
    heads = taps["head_out"]
    if scale is not None:
        heads = heads * scale[...][:, None, None, None].astype(heads.dtype)
    mid = taps["resid_pre" if model.config.parallel else "resid_mid"]
    last = taps["resid_post"][-1]
    return Writes(taps["embed"], heads, taps["mlp_out"], taps["resid_pre"], mid, last)


def run_writes(model: Transformer, batch: Batch) -> Writes:
    """What every sender writes on a batch. Jittable."""
    slots = jnp.zeros((batch.tokens.shape[0], 1), jnp.int32)
    return writes_of(model, model(batch, taps=WRITES, logits_at=slots).taps)


@struct.dataclass
class _Replace:
    value: Array

    def __call__(self, value: Array, context: Context) -> Array:
        """Returns another value."""
        return self.value


@struct.dataclass
class _ReplaceMLPInput:
    """What an MLP reads, once the heads of its own block are known."""

    block: Block
    stream: Array  # [B,T,D], without the heads of the same block
    kept: Array  # [H], weights of the heads of the same block
    heads: Array  # corrupted writes of these heads [B,T,H,D]
    needs: tuple[str, ...] = struct.field(pytree_node=False, default=("head_out",))

    def __call__(self, value: Array, context: Context) -> Array:
        """Returns the norm of the stream [B,T,D]."""
        change = _written(self.block, context.head_out) - self.heads
        stream = self.stream + jnp.einsum("h,bthd->btd", self.kept, change)
        return self.block.mlp_norm(stream, context.config)


def _written(block: Block, heads: Array) -> Array:
    """Heads' writes [B,T,H,D] as they are added to the stream."""
    scale = block.attn_scale
    return heads if scale is None else heads * scale[...].astype(heads.dtype)


def receivers_input(block: Block, config: ModelConfig, layer: Array, streams: Array) -> Array:
    """What attention reads of streams [...,D]: their norm, but for a first layer without."""
    normed = block.attn_norm(streams, config)
    return normed if config.first_attn_norm else jnp.where(layer == 0, streams, normed)


def _attention_edits(block: Block, config: ModelConfig, normed: Array) -> dict[str, Any]:
    """Queries, keys and values of separate inputs [R-1,B,T,D]."""
    h, k = config.n_heads, config.n_kv_heads
    attn = block.attn
    edits = {}
    for site, start, count, weight, bias in (
        ("q_pre", 0, h, attn.q, attn.q_bias),
        ("k_pre", h, k, attn.k, attn.k_bias),
        ("v", h + k, k, attn.v, attn.v_bias),
    ):
        read = normed[start : start + count]
        value = jnp.einsum("hbtd,dhe->bthe", read, weight[...].astype(read.dtype))
        value = value if bias is None else value + bias[...].astype(read.dtype)
        edits[site] = _Replace(value)
    return edits


def masked_metric(
    model: Transformer, batch: Batch, corrupted: Writes, metric: Metric, mask: Array
) -> Array:
    """The metric of a run in which receivers read mixtures, float32 [B].

    Jittable, differentiable by the mask (the derivative keeps the scan's state of every layer:
    for small models) and vmappable over masks. A mask of ones is the model, one of zeros the
    corrupted run. Entries of edges that may not exist are not read.

    Args:
      model: the model.
      batch: the clean prompts.
      corrupted: what senders write on the corrupted prompts.
      metric: what is measured of the run.
      mask: float [U,V], the share of the clean side in what a receiver reads from a sender.
    """
    config, graph = model.config, Graph.of(model.config)
    n_sends, h = graph.sends, config.n_heads
    context, _ = model.begin(jnp.asarray(batch.mask), None, "prefill", {}, {})
    embed = _embedding(model, batch, context)
    mask = jnp.asarray(mask, embed.dtype)
    of_layer = mask[:, :-1].reshape(len(mask), config.n_layers, graph.receives)
    # What is not written yet differs by nothing: so no layer needs to know who came before.
    changes = jnp.zeros((len(mask), *embed.shape), embed.dtype)
    changes = changes.at[0].set(embed - corrupted.embed)

    def body(changes: Array, sliced: tuple[Layers, Array, tuple]) -> tuple[Array, None]:
        layer, kept, (base_heads, base_mlp, pre, mid) = sliced
        first = 1 + layer.index * n_sends
        mixed = jnp.einsum("ur,ubtd->rbtd", kept, changes)
        streams = pre + mixed[:-1]
        normed = receivers_input(layer.block, config, layer.index, streams)
        edits = _attention_edits(layer.block, config, normed)
        own = jax.lax.dynamic_slice(kept[:, -1], (first,), (h,))
        own = jnp.zeros_like(own) if config.parallel else own
        edits["mlp_in"] = _ReplaceMLPInput(layer.block, mid + mixed[-1], own, base_heads)
        _, here, _ = model.step(pre, context, layer, edits)
        heads = _written(layer.block, here.head_out) - base_heads
        new = jnp.concatenate([jnp.moveaxis(heads, 2, 0), (here.mlp_out - base_mlp)[None]])
        return jax.lax.dynamic_update_slice(changes, new, (first, 0, 0, 0)), None

    layered = (corrupted.heads, corrupted.mlps, corrupted.pre, corrupted.mid)
    scanned = (model.layers(), jnp.moveaxis(of_layer, 1, 0), layered)
    changes, _ = jax.lax.scan(body, changes, scanned)
    slots = jnp.asarray(metric.slots)
    last = _at(corrupted.last, slots) + jnp.einsum(
        "u,ubnd->bnd", mask[:, -1], jax.vmap(_at, (0, None))(changes, slots)
    )
    final, _ = model.finish(last, read_at(context, slots))
    return metric(model.logits_of(final, metric.tokens))


def _embedding(model: Transformer, batch: Batch, context: Context) -> Array:
    assert model.embed.tokens is not None, "checked by as_metric"
    x = embed_tokens(model.embed.tokens[...], jnp.asarray(batch.tokens), model.config)
    return model.embed(x, context.positions, None, model.config)


def _at(stream: Array, slots: Array) -> Array:
    """[B,T,D] at slots [B,N] -> [B,N,D]."""
    return jnp.take_along_axis(stream, slots[..., None], axis=1)


@jax.jit
def _corrupted_writes(model: Transformer, batch: Batch) -> Writes:
    return run_writes(model, batch)


@jax.jit
def _metric_of_masks(
    model: Transformer, batch: Batch, corrupted: Writes, metric: Metric, masks: Array
) -> Array:
    run = partial(masked_metric, model, batch, corrupted, metric)
    return jnp.mean(jax.vmap(run)(masks), axis=-1)


@struct.dataclass
class Runner:
    """Measures circuits of one model on one batch of pairs.

    Attributes:
      model: the model.
      clean: the clean prompts.
      corrupted: what senders write on the corrupted prompts.
      metric: what is measured.
      at_once: masks run in one program.
    """

    model: Transformer
    clean: Batch
    corrupted: Writes
    metric: Metric
    at_once: int = struct.field(pytree_node=False, default=MASKS_AT_ONCE)

    @classmethod
    def of(
        cls,
        model: Transformer,
        clean: Batch,
        corrupted: Batch,
        metric: Metric | Callable,
        at_once: int = MASKS_AT_ONCE,
    ) -> Runner:
        """Runs the corrupted prompts.

        Raises:
          ValueError: as `check_pair`; `at_once` below 1.
        """
        if at_once < 1:
            raise ValueError(f"at_once must be at least 1, got {at_once}")
        made = check_pair(model, clean, corrupted, metric)
        return cls(model, clean, _corrupted_writes(model, corrupted), made, at_once)

    def __call__(self, masks: Iterable[np.ndarray]) -> np.ndarray:
        """The metric, averaged over rows, of the circuits of masks [U,V]; float64 [N].

        Raises:
          ValueError: the metric is NaN.
        """
        found, left = [np.zeros(0)], iter(masks)
        while part := list(islice(left, self.at_once)):
            # Filled up, so that there is one shape and one program.
            full = np.stack(part + part[-1:] * (self.at_once - len(part)))
            values = _metric_of_masks(self.model, self.clean, self.corrupted, self.metric, full)
            found.append(np.asarray(values, np.float64)[: len(part)])
        return check_finite(self.metric, np.concatenate(found))

    def ends(self) -> tuple[float, float]:
        """The metric of the corrupted run and of the model.

        Raises:
          ValueError: they are equal, so that there is nothing to explain, or NaN.
        """
        shape = Graph.of(self.model.config).shape
        corrupted, clean = self([np.zeros(shape, np.float32), np.ones(shape, np.float32)])
        if abs(clean - corrupted) <= 1e-5 * max(1, abs(clean)):  # rounding
            raise ValueError(
                f"{name_of(self.metric)} is {clean:.6g} on the clean and on the corrupted "
                "prompts: there is no effect to explain"
            )
        return float(corrupted), float(clean)


def check_pair(
    model: Transformer, clean: Batch, corrupted: Batch, metric: Metric | Callable
) -> Metric:
    """The metric, once model, prompts and metric are found to fit.

    Raises:
      ValueError: a model without a graph (see `Graph.of`) or without logits for each token;
        clean and corrupted prompts of different shape or padding; a metric that does not fit
        (see `as_metric`).
    """
    Graph.of(model.config)
    check_same_form(clean, corrupted)
    return as_metric(model, clean, metric)


def check_finite(metric: Metric, values: np.ndarray) -> np.ndarray:
    """The values, or ValueError if one is NaN or infinite."""
    if not np.isfinite(values).all():
        wrong = values[~np.isfinite(values)].flat[0]
        raise ValueError(f"{name_of(metric)} is {wrong}: expected a finite number for every row")
    return values
