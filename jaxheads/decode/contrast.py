"""Models whose next token is chosen by contrast: of two edits of one model, or of two depths.

Both are called as a `Transformer` is, and generation takes either in the place of one. Their logits
are scores: log-probabilities minus log-probabilities, -inf at tokens that are not plausible, those
with less than `plausible` of the probability of the most likely one (Li et al. 2023, eq. 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxheads.model.cache import Cache
from jaxheads.model.config import ModelConfig
from jaxheads.model.context import Context, Edit, Tap, TapsLike, as_taps
from jaxheads.model.transformer import Output, Transformer

Array = jax.Array
_EXITS = "contrast/exits"


@struct.dataclass
class Pair:
    """The caches of the two edits of a model, as one.

    Attributes:
      expert: of the model as it is asked about.
      amateur: of the one that is subtracted.
    """

    expert: Any
    amateur: Any

    @property
    def mask(self) -> Array:
        """As `Cache.mask`."""
        return self.expert.mask

    @property
    def length(self) -> Array:
        """As `Cache.length`."""
        return self.expert.length

    @property
    def size(self) -> int:
        """As `Cache.size`."""
        return int(self.expert.size)

    @property
    def nbytes(self) -> int:
        """As `Cache.nbytes`."""
        return int(self.expert.nbytes + self.amateur.nbytes)


@struct.dataclass
class Contrasted:
    """log p - strength log p', p' of the same model with other edits.

    Source: Li et al. (2023), "Contrastive Decoding", with its smaller model replaced by the model
    itself with some heads masked; the contrast at the last layer of LOL (Chen et al. 2024), eq.
    known from its abstract only, is of this form.

    Attributes:
      model: the model.
      amateur: edits of p', on top of none; those handed to the call act on p only.
      strength: float32 scalar; 0 leaves p.
      plausible: float32 scalar in [0, 1].
    """

    model: Transformer
    amateur: Mapping[str, Edit]
    strength: Array | float = 1.0
    plausible: Array | float = 0.1

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        return self.model.config

    def __call__(
        self,
        tokens: Any,
        mask: Any = None,
        *,
        edits: Mapping[str, Edit] | None = None,
        taps: TapsLike = (),
        cache: Any = None,
        phase: str = "prefill",
        logits_at: Any = None,
    ) -> Output:
        """As `Transformer.__call__`; the cache is a `Pair`. Taps are of the expert."""
        run = partial(self.model, tokens, mask, phase=phase, logits_at=logits_at)
        expert = run(edits=edits, taps=taps, cache=None if cache is None else cache.expert)
        amateur = run(edits=self.amateur, cache=None if cache is None else cache.amateur)
        scores = contrast(expert.logits, amateur.logits, self.strength, self.plausible)
        both: Any = None if cache is None else Pair(expert.cache, amateur.cache)
        return replace(expert, logits=scores, cache=both)


@struct.dataclass
class DoLa:
    """log p - log p', p' read off the residual stream at the depth where it differs most from p.

    Source: Chuang et al. (2024), "DoLa". Of the candidate layers the one is taken whose
    distribution has the largest Jensen-Shannon divergence from p, for each token. As in the
    released code the stream is unembedded as it is, unless `normed`; unlike it, the divergence is
    that of the paper: the code takes KL(M || p) and its mean over the vocabulary. The card of a
    model with tied embeddings should expect little: there the paper's gain is not known.

    Attributes:
      model: a language model with a last norm.
      layers: candidates: layer j stands for the stream that enters block j, 0 for the embedding.
        Static.
      normed: whether the last norm acts before early exits too. Static.
      plausible: float32 scalar in [0, 1].
    """

    model: Transformer
    layers: tuple[int, ...] = struct.field(pytree_node=False)
    normed: bool = struct.field(pytree_node=False, default=False)
    plausible: Array | float = 0.1

    @classmethod
    def of(cls, model: Transformer, which: str = "high", **options: Any) -> DoLa:
        """With the even layers of the lower ("low") or upper half ("high") as candidates.

        Layer 0 is left out where embeddings are tied: it predicts the token that was just read.

        Raises:
          ValueError: another half.
        """
        half = model.config.n_layers // 2
        halves = {
            "low": range(0, half, 2),
            "high": range(half + half % 2, model.config.n_layers, 2),
        }
        if which not in halves:
            raise ValueError(f"candidates must be 'low' or 'high', got {which!r}")
        layers = tuple(j for j in halves[which] if j or not model.config.tied)
        return cls(model, layers, **options)

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        return self.model.config

    def __call__(
        self,
        tokens: Any,
        mask: Any = None,
        *,
        edits: Mapping[str, Edit] | None = None,
        taps: TapsLike = (),
        cache: Cache | None = None,
        phase: str = "prefill",
        logits_at: Any = None,
    ) -> Output:
        """As `Transformer.__call__`.

        Raises:
          ValueError: no candidates, or one that is not there.
        """
        count = self.config.n_layers
        if not self.layers or not all(0 <= layer < count for layer in self.layers):
            raise ValueError(f"layers must lie in 0..{count - 1}, at least one, got {self.layers}")
        width = np.shape(tokens)[1]
        slots = jnp.arange(width)[None] if logits_at is None else jnp.asarray(logits_at)
        reduce = jax.tree_util.Partial(_read_off, slots)
        wanted = as_taps(taps) | {_EXITS: Tap("resid_pre", reduce)}
        out = self.model(
            tokens, mask, edits=edits, taps=wanted, cache=cache, phase=phase, logits_at=logits_at
        )
        found = dict(out.taps)
        exits = found.pop(_EXITS)[np.asarray(self.layers)]
        norm = self.model.final_norm
        if self.normed and norm is not None:
            exits = norm(exits, self.config)
        early = jnp.stack([self.model.logits_of(x) for x in exits])
        distance = divergence(out.logits[None], early)
        chosen = jnp.argmax(distance, axis=0)[None, ..., None]
        early = jnp.take_along_axis(early, chosen, axis=0)[0]
        return replace(out, logits=contrast(out.logits, early, 1.0, self.plausible), taps=found)


Model = Transformer | Contrasted | DoLa
"""What can generate."""


def contrast(
    logits: Array, other: Array, strength: Array | float, plausible: Array | float
) -> Array:
    """log p - strength log p', -inf where p < plausible max p; all [...,V] float32.

    Args:
      logits: of p, [...,V].
      other: of p', [...,V].
      strength: of the contrast.
      plausible: share of the largest probability that a token needs.
    """
    mine, theirs = jax.nn.log_softmax(logits), jax.nn.log_softmax(other)
    least = mine.max(axis=-1, keepdims=True) + jnp.log(plausible)
    return jnp.where(mine >= least, mine - strength * theirs, -jnp.inf)


def divergence(one: Array, other: Array) -> Array:
    """Jensen-Shannon divergence of the distributions of two logits [...,V], in nats, [...]."""
    p, q = jax.nn.log_softmax(one), jax.nn.log_softmax(other)
    middle = jnp.logaddexp(p, q) - jnp.log(2.0)
    parts = jnp.exp(p) * (p - middle) + jnp.exp(q) * (q - middle)
    return 0.5 * jnp.sum(parts, axis=-1)


def _read_off(slots: Array, value: Array, context: Context) -> Array:
    """The stream [B,T,D] at slots [B or 1,N]."""
    index = jnp.broadcast_to(slots[..., None], (value.shape[0], slots.shape[1], 1))
    return jnp.take_along_axis(value, index, axis=1)
