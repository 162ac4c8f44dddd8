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
from jaxheads.model.cache import Cache
from jaxheads.model.checks import (
    check_images,
    check_segments,
    check_sites,
    check_slots,
    check_tokens,
    check_types,
)
from jaxheads.model.config import ACTIVATIONS, ModelConfig
from jaxheads.model.context import Context, Edit, Tap, TapsLike, as_taps
from jaxheads.model.embedding import embed_tokens
from jaxheads.model.layout import REMAT, contract, gathered
from jaxheads.model.mlp import linear
from jaxheads.model.norms import Norm
from jaxheads.model.parameters import (
    Tree,
    check_parameters,
    nest,
    optional,
    parameter_table,
    random_parameters,
)
from jaxheads.model.sight import Sight, check_sight
from jaxheads.model.tower import Tower
from jaxheads.names import choose
from jaxheads.sites import find_site

Array = jax.Array
PHASES = ("prefill", "decode")


@struct.dataclass
class Output:
    """What one forward pass returns.

    Attributes:
      logits: float32 [B,T,V]; [B,N,V] where `logits_at` chose N slots; [B,1,V] of a
        classifier; None of a model without a head.
      taps: what was tapped, by name; sites of the stack have a leading layer axis.
      cache: the cache with this pass's keys and values, or None if none was given.
      pooled: [B,D] of a model with a pooler, [B,Z] of one with a projection (unless
        `logits_at` chose slots), else None.
    """

    logits: Array
    taps: dict[str, Any]
    cache: Cache | None = None
    pooled: Array | None = None


class Unembedding(nnx.Module):
    """Holds kernel [V,D], the map to logits, unless it is the embedding; and their bias [V]."""

    def __init__(self, params: Mapping[str, Array]) -> None:
        self.kernel, self.bias = optional(params, "kernel"), optional(params, "bias")

    def __call__(
        self, x: Array, table: Array | None, config: ModelConfig, ids: Array | None = None
    ) -> Array:
        """Logits of x [B,T,D], float32 [B,T,V]; [B,T,M] of the tokens ids [B,M] if given.

        `table` [V,D] is the embedding.
        """
        kernel = table if self.kernel is None else self.kernel[...]
        assert kernel is not None, "tied to an embedding that is not there"
        kernel = gathered(kernel, x, x.dtype)
        kernel, axes = (kernel, "vd") if ids is None else (kernel[ids], "bvd")
        if config.logit_scale != 1:
            x = x * config.logit_scale
        kernel = kernel.astype(x.dtype)
        logits = contract(f"btd,{axes}->btv", x, kernel, preferred_element_type=jnp.float32)
        if self.bias is not None:
            bias = self.bias[...].astype(jnp.float32)
            logits = logits + (bias if ids is None else bias[ids][:, None])
        if config.logit_softcap is not None:
            logits = config.logit_softcap * jnp.tanh(logits / config.logit_softcap)
        return logits


class MaskedHead(nnx.Module):
    """Holds dense [D,E], its bias and a norm: what BERT puts before the unembedding."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.dense, self.dense_bias = nnx.Param(params["dense"]), optional(params, "dense_bias")
        self.norm = Norm(params["norm"])

    def __call__(self, x: Array, config: ModelConfig) -> Array:
        """Maps x [B,T,D] to [B,T,D]."""
        activation = ACTIVATIONS[config.activation]
        return self.norm(activation(linear(x, self.dense, self.dense_bias)), config)


class Pooler(nnx.Module):
    """Holds kernel [D,E] and bias [E] of a dense layer with tanh over the first token."""

    def __init__(self, params: Mapping[str, Array]) -> None:
        self.kernel, self.bias = nnx.Param(params["kernel"]), nnx.Param(params["bias"])

    def __call__(self, x: Array) -> Array:
        """Maps x [B,D] to [B,D]."""
        return jnp.tanh(linear(x, self.kernel, self.bias))


class Projection(nnx.Module):
    """Holds kernel [D,Z]: one token's vector as CLIP compares it."""

    def __init__(self, params: Mapping[str, Array]) -> None:
        self.kernel = nnx.Param(params["kernel"])

    def __call__(self, x: Array) -> Array:
        """Maps x [B,D] to [B,Z]."""
        return linear(x, self.kernel, None)


class Transformer(Tower):
    """One stack of blocks as a pytree: its leaves are the parameters, its config is static.

    A language model, a text encoder or a vision model. Use it with plain `jax.jit`, `grad`,
    `vmap`, `lax.scan` and `checkpoint`; nothing in it is ever updated in place.
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
        super().__init__(config, params)
        self.head = MaskedHead(params["head"]) if "head" in params else None
        self.unembed = None if config.head == "none" else Unembedding(params.get("unembed", {}))
        self.pooler = Pooler(params["pooler"]) if "pooler" in params else None
        self.projection = Projection(params["projection"]) if "projection" in params else None

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

    def logits_of(self, x: Array, ids: Array | None = None) -> Array:
        """Logits of the normalised last stream x [B,T,D], float32.

        Args:
          x: the value of the site `final`.
          ids: int [B,M], the tokens wanted; None for the whole vocabulary.

        Returns:
          [B,T,V], or [B,T,M] of the tokens wanted.
        """
        assert self.unembed is not None, "a model without a head has no logits"
        table = None if self.embed.tokens is None else self.embed.tokens[...]
        if self.head is not None:
            x = self.head(x, self.config)
        return self.unembed(x, table, self.config, ids)

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
        cache: Cache | None = None,
        phase: str = "prefill",
        logits_at: Array | np.ndarray | None = None,
        token_types: Array | np.ndarray | None = None,
        segments: Array | np.ndarray | None = None,
        positions: Array | np.ndarray | None = None,
        sees: Array | np.ndarray | None = None,
        prefix: Array | np.ndarray | None = None,
        remat: str = "none",
    ) -> Output:
        """Runs the model. Compiled once per shape and structure of the arguments.

        Args:
          tokens: int [B,T], or a `Batch` that carries its mask; for a vision model images,
            float [B,height,width,C], normalised as its preprocessor does.
          mask: bool [B,T], True at real tokens; None when all are real. A row gives the
            same values at its real tokens however it is padded, left or right.
          edits: what to change, e.g. `jh.mask_heads(config, [(18, 6)])`.
          taps: what to hand back: names of sites, or a mapping to reducers; see `as_taps`.
            Taps see edited values.
          cache: keys and values of the tokens before these; T new slots are written.
          phase: "prefill" or "decode"; edits may be restricted to one of them.
          logits_at: int [B,N], slots of the given tokens at which `final` and `logits` are
            computed; None for all. Saves the unembedding where it is not needed.
          token_types: int [B,T], for models with token types; None for the first type.
          segments: int [B,T], which of the texts packed into a row a token belongs to, 0 for
            padding: tokens see their own text only, and positions count from its start. None
            for one text a row. A `Batch` may carry it.
          positions: int [B,T], the position of each token; None counts real ones.
          sees: bool [T,T] or [B,T,T], which of these tokens each one sees (those in the cache
            are seen by all); None for those before it, or all where not causal.
          prefix: int [B], how many first real tokens of a row see one another in both
            directions; the prompt must be read whole. None for none.
          remat: what each block keeps for the backward pass: "none" all but attention weights
            and activations of the gated MLP, "dots" the products with weights, "full" only the
            block's input. Values and gradients are the same.

        Returns:
          An `Output`.

        Raises:
          ValueError: unknown sites, edits that do not fit, tokens beyond the vocabulary (when
            they are concrete; under a trace they give NaN), an empty or overlong sequence.
        """
        if isinstance(tokens, Batch):
            if mask is not None or segments is not None:
                raise ValueError(
                    "mask and segments must not be given twice: the Batch already carries them"
                )
            batch = tokens
            tokens, mask, segments = batch.tokens, batch.mask, batch.segments
        choose("phase", phase, PHASES)
        choose("remat", remat, REMAT)
        edits = {} if edits is None else edits
        for site in edits:
            find_site(site)
        if not hasattr(tokens, "shape"):
            tokens = np.asarray(tokens)
        if self.config.image is not None:
            check_images(self.config, tokens, mask, cache, logits_at)
        else:
            check_tokens(self.config, tokens, mask, cache)
            check_slots(logits_at, *tokens.shape)
        check_types(self.config, tokens, token_types)
        check_segments(tokens, segments, cache)
        sight = Sight(positions, sees, prefix)
        check_sight(self.config, sight, tokens.shape, cache, phase)
        taps = as_taps(taps)
        check_sites(self.config, edits, taps)
        return _forward(
            self, tokens, mask, edits, taps, cache, logits_at, token_types, segments, sight,
            phase=phase, remat=remat,
        )  # fmt: skip


@partial(jax.jit, static_argnames=("phase", "remat"))
def _forward(
    model: Transformer,
    tokens: Array,
    mask: Array | None,
    edits: Mapping[str, Edit],
    taps: dict[str, Tap],
    cache: Cache | None,
    logits_at: Array | None,
    token_types: Array | None,
    segments: Array | None,
    sight: Sight,
    *,
    phase: str,
    remat: str,
) -> Output:
    config = model.config
    table = None if model.embed.tokens is None else model.embed.tokens[...]
    if table is None:
        x = model.embed.embed_images(tokens, config)
        mask = jnp.ones(x.shape[:2], bool)
    else:
        x = embed_tokens(table, tokens, config)
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    context, cache = model.begin(mask, cache, phase, edits, taps, segments, sight)
    x = model.embed(x, context.positions, token_types, config)
    x, context = context.visit("embed", x)
    x, tapped, cache = model.run(x, context, edits, cache, remat)

    if logits_at is not None:
        context = read_at(context, logits_at)
        x = jnp.take_along_axis(x, jnp.asarray(logits_at)[..., None], axis=1)
    x, context = model.finish(x, context)
    pooled, pool = None, model.pooler or model.projection
    if pool is not None and logits_at is None:
        slot = _pooled_slot(config, tokens, mask)[:, None, None]
        pooled = pool(jnp.take_along_axis(x, slot, axis=1)[:, 0])
    logits: Any = None
    if model.unembed is not None:
        read = x[:, :1] if config.head == "classes" else x
        logits, context = context.visit("logits", model.logits_of(read))
    return Output(logits, {**context.tapped, **tapped}, cache, pooled)


def read_at(context: Context, slots: Array) -> Context:
    """The context of the chosen slots [B,N] only, for what follows the stack."""
    positions = jnp.take_along_axis(context.positions, slots, axis=1)
    token_mask = jnp.take_along_axis(context.token_mask, slots, axis=1)
    slots = slots + context.start
    return replace(context, positions=positions, token_mask=token_mask, slots=slots)


def _pooled_slot(config: ModelConfig, tokens: Array, mask: Array) -> Array:
    """int [B]: the slot of the token that stands for the whole row."""
    if config.projected == "eos":
        return jnp.argmax((tokens == config.eos_id) & mask, axis=1)
    if config.projected == "highest":
        return jnp.argmax(jnp.where(mask, tokens, -1), axis=1)
    return jnp.argmax(mask, axis=1)
