"""`Transformer`: a pretrained model as one pure function of (tokens, edits).

Axes: B batch, T query positions, S key positions, L layers, H query heads, K key/value
heads, Dh head size, D model width, F MLP width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from jaxheads.model.batch import Batch
from jaxheads.model.block import Block
from jaxheads.model.cache import KVCache
from jaxheads.model.config import ModelConfig
from jaxheads.model.context import Context, Edit, Tap, TapsLike, as_taps, layer_slices
from jaxheads.model.norms import RMSNorm
from jaxheads.model.parameters import (
    Tree,
    check_parameters,
    nest,
    parameter_table,
    random_parameters,
)
from jaxheads.model.rotary import rotary_angles
from jaxheads.names import choose
from jaxheads.sites import find_site

Array = jax.Array
PHASES = ("prefill", "decode")


@struct.dataclass
class Output:
    """What one forward pass returns.

    Attributes:
      logits: float32 [B,T,V]; [B,N,V] where `logits_at` chose N slots.
      taps: what was tapped, by name; sites of the stack have a leading layer axis.
      cache: the cache with this pass's keys and values, or None if none was given.
    """

    logits: Array
    taps: dict[str, Any]
    cache: KVCache | None = None


class Embedding(nnx.Module):
    """Holds the table `tokens` [V,D]."""

    def __init__(self, params: Mapping[str, Array]) -> None:
        self.tokens = nnx.Param(params["tokens"])


class Unembedding(nnx.Module):
    """Holds the map `kernel` [V,D] from the final norm to logits."""

    def __init__(self, params: Mapping[str, Array]) -> None:
        self.kernel = nnx.Param(params["kernel"])


class Transformer(nnx.Module):
    """A decoder as a pytree: its leaves are the parameters, its config is static.

    Use it with plain `jax.jit`, `grad`, `vmap`, `lax.scan` and `checkpoint`; nothing in it
    is ever updated in place.
    """

    def __init__(self, config: ModelConfig, params: Mapping[str, Any]) -> None:
        """Wraps a parameter tree.

        Args:
          config: the model's config.
          params: nested dict of arrays as listed by `parameter_table(config)`.

        Raises:
          ValueError: a parameter is missing, unexpected or of the wrong shape.
        """
        check_parameters(config, params)
        self.config = config
        self.embed = Embedding(params["embed"])
        self.blocks = Block(params["blocks"])
        self.final_norm = RMSNorm(params["final_norm"])
        self.unembed = None if config.tied else Unembedding(params["unembed"])

    @classmethod
    def random(cls, config: ModelConfig, key: Array, dtype: str = "float32") -> Transformer:
        """A randomly initialised model."""
        return cls(config, random_parameters(config, key, dtype))

    @property
    def params(self) -> Tree:
        """The parameters as a nested dict of arrays, the form that is saved and converted."""

        def leaf(path: str) -> Array:
            node: Any = self
            for name in path.split("/"):
                node = getattr(node, name)
            return node[...]

        return nest({path: leaf(path) for path in parameter_table(self.config)})

    def astype(self, dtype: str) -> Transformer:
        """A copy with parameters and activations in `dtype`."""
        config = self.config.replace(dtype=dtype)
        return Transformer(config, jax.tree.map(lambda leaf: leaf.astype(dtype), self.params))

    def __repr__(self) -> str:
        c = self.config
        leaves = [leaf for leaf in jax.tree.leaves(self) if hasattr(leaf, "shape")]
        count = sum(math.prod(leaf.shape) for leaf in leaves)
        dtypes = "/".join(sorted({str(leaf.dtype) for leaf in leaves}))
        return (
            f"Transformer({c.n_layers} layers x {c.n_heads} heads of {c.head_dim} "
            f"({c.n_kv_heads} key/value heads), width {c.d_model}, MLP {c.d_mlp}, "
            f"vocabulary {c.vocab_size}, {count:,} parameters in {dtypes})"
        )

    __str__ = __repr__

    def __call__(
        self,
        tokens: Array | np.ndarray | Batch,
        mask: Array | np.ndarray | None = None,
        *,
        edits: Mapping[str, Edit] | None = None,
        taps: TapsLike = (),
        cache: KVCache | None = None,
        phase: str = "prefill",
        logits_at: Array | np.ndarray | None = None,
    ) -> Output:
        """Runs the model. Compiled once per shape and structure of the arguments.

        Args:
          tokens: int [B,T], or a `Batch` that carries its mask.
          mask: bool [B,T], True at real tokens; None when all are real. A row gives the
            same values at its real tokens however it is padded, left or right.
          edits: what to change, e.g. `jh.mask_heads(config, [(18, 6)])`.
          taps: what to hand back: names of sites, or a mapping to reducers; see `as_taps`.
            Taps see edited values.
          cache: keys and values of the tokens before these; T new slots are written.
          phase: "prefill" or "decode"; edits may be restricted to one of them.
          logits_at: int [B,N], slots of the given tokens at which `final` and `logits` are
            computed; None for all. Saves the unembedding where it is not needed.

        Returns:
          An `Output`.

        Raises:
          ValueError: unknown sites, edits that do not fit, tokens beyond the vocabulary (when
            they are concrete; under a trace they give NaN), an empty or overlong sequence.
        """
        if isinstance(tokens, Batch):
            if mask is not None:
                raise ValueError("mask must not be given twice: the Batch already carries one")
            batch = tokens
            tokens, mask = batch.tokens, batch.mask
        choose("phase", phase, PHASES)
        edits = {} if edits is None else edits
        for site in edits:
            find_site(site)
        if not hasattr(tokens, "shape"):
            tokens = np.asarray(tokens)
        check_tokens(self.config, tokens, mask, cache)
        _check_slots(logits_at, *tokens.shape)
        return _forward(self, tokens, mask, edits, as_taps(taps), cache, logits_at, phase=phase)


def check_tokens(
    config: ModelConfig,
    tokens: Array | np.ndarray,
    mask: Array | np.ndarray | None = None,
    cache: KVCache | None = None,
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


def _check_slots(logits_at: Array | np.ndarray | None, rows: int, width: int) -> None:
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


@partial(jax.jit, static_argnames=("phase",))
def _forward(
    model: Transformer,
    tokens: Array,
    mask: Array | None,
    edits: Mapping[str, Edit],
    taps: dict[str, Tap],
    cache: KVCache | None,
    logits_at: Array | None,
    *,
    phase: str,
) -> Output:
    config = model.config
    outside = {site: edit for site, edit in edits.items() if not find_site(site).stacked}
    inside = layer_slices(edits, config.n_layers)
    context, cache = _begin(config, tokens, mask, cache, phase)
    context = replace(context, edits=outside, taps=taps)

    table = model.embed.tokens[...]
    # An id outside the vocabulary becomes NaN rather than some other token.
    rows = jnp.where(tokens < 0, config.vocab_size, tokens)
    embedded = jnp.take(table, rows, axis=0, mode="fill").astype(config.compute_dtype)
    x, context = context.visit("embed", embedded)

    def body(x: Array, layer: tuple) -> tuple[Array, tuple]:
        block, edits_here, index, cached = layer
        here = replace(context, layer=index, edits=edits_here, tapped={}, values={})
        x, here, attended = block(x, here, cached)
        return x, (here.tapped, attended if cache is not None else None)

    cached = None if cache is None else (cache.k, cache.v)
    layers = (model.blocks, inside, jnp.arange(config.n_layers), cached)
    x, (tapped, attended) = jax.lax.scan(body, x, layers)

    if logits_at is not None:
        context = _read_at(context, logits_at)
        x = jnp.take_along_axis(x, jnp.asarray(logits_at)[..., None], axis=1)
    x, context = context.visit("final", model.final_norm(x, config.norm_eps))
    kernel = table if model.unembed is None else model.unembed.kernel[...]
    logits = jnp.einsum(
        "btd,vd->btv", x, kernel.astype(x.dtype), preferred_element_type=jnp.float32
    )
    logits, context = context.visit("logits", logits)
    if cache is not None:
        length = cache.length + tokens.shape[1]
        cache = replace(cache, k=attended[0], v=attended[1], length=length)
    return Output(logits, {**context.tapped, **tapped}, cache)


def _begin(
    config: ModelConfig, tokens: Array, mask: Array | None, cache: KVCache | None, phase: str
) -> tuple[Context, KVCache | None]:
    """Positions, visibility and angles of these tokens, shared by every layer."""
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    count = jnp.cumsum(mask, axis=1) - 1
    start: Array | int = 0
    key_mask = mask
    if cache is not None:
        start = cache.length
        count = count + cache.mask.sum(axis=1, keepdims=True)
        key_mask = jax.lax.dynamic_update_slice(cache.mask, mask, (0, start))
        cache = replace(cache, mask=key_mask)
    positions = jnp.maximum(count, 0)
    slots = start + jnp.arange(tokens.shape[1])
    causal = jnp.arange(key_mask.shape[1]) <= slots[:, None]
    context = Context(
        config=config,
        positions=positions,
        slots=slots[None],
        token_mask=mask,
        allowed=(causal & key_mask[:, None, :])[:, None],
        angles=rotary_angles(positions, config.head_dim, config.rope_base),
        start=start,
        phase=phase,
    )
    return context, cache


def _read_at(context: Context, slots: Array) -> Context:
    """The context of the chosen slots [B,N] only, for what follows the stack."""
    positions = jnp.take_along_axis(context.positions, slots, axis=1)
    token_mask = jnp.take_along_axis(context.token_mask, slots, axis=1)
    slots = slots + context.start
    return replace(context, positions=positions, token_mask=token_mask, slots=slots)
