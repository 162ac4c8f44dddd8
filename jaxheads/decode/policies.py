"""How a prompt's keys and values are kept: score, kinds and cache joined to one value each.

A policy reads a prompt and hands back a cache that takes `room` more tokens. `Full` keeps all;
`HeadWise` keeps all in some heads and a short context in the others, chosen beforehand; `Selected`
lets each head keep some tokens, chosen by the prompt; `Chunks` lets each query see some.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.decode.chunk_cache import ChunkCache
from jaxheads.decode.head_cache import HeadCache
from jaxheads.decode.kept import compress
from jaxheads.decode.kinds import HeadKinds
from jaxheads.decode.reading import Read, read, watch
from jaxheads.decode.select import adakv, h2o, of_groups, snapkv, task_kv
from jaxheads.model.batch import Batch
from jaxheads.model.cache import KVCache, empty_cache
from jaxheads.model.context import Edit
from jaxheads.model.transformer import Transformer
from jaxheads.names import choose

Array = jax.Array
Edits = Mapping[str, Edit] | None


class Policy(Protocol):
    """Reads prompts, and keeps of them what it keeps."""

    def read(
        self, model: Transformer, batch: Batch, *, room: int, edits: Edits = None, chunk: int = 512
    ) -> Read:
        """Reads prompts that end together.

        Args:
          model: the model.
          batch: padded on the left.
          room: tokens that can follow.
          edits: what to change.
          chunk: tokens read at a time.
        """
        ...


@dataclass(frozen=True)
class Full:
    """Every head keeps every token."""

    def read(
        self, model: Transformer, batch: Batch, *, room: int, edits: Edits = None, chunk: int = 512
    ) -> Read:
        """As `Policy.read`."""
        rows, length = np.shape(batch.tokens)
        cache = empty_cache(model.config, rows, length + room)
        return read(model, batch, cache, edits=edits, chunk=chunk)


@dataclass(frozen=True)
class HeadWise:
    """Some heads keep every token, the others sinks and recent ones.

    Attributes:
      kinds: which, and how.
    """

    kinds: HeadKinds

    def read(
        self, model: Transformer, batch: Batch, *, room: int, edits: Edits = None, chunk: int = 512
    ) -> Read:
        """As `Policy.read`."""
        rows, length = np.shape(batch.tokens)
        cache = HeadCache.empty(model.config, self.kinds, rows, length + room)
        return read(model, batch, cache, edits=edits, chunk=chunk)


@dataclass(frozen=True)
class Chunks:
    """LongHeads: every query of a head sees a few chunks of the text, see `ChunkCache`.

    Attributes:
      width: tokens of a chunk.
      chunks: how many a query sees.
    """

    width: int = 256
    chunks: int = 16

    def read(
        self, model: Transformer, batch: Batch, *, room: int, edits: Edits = None, chunk: int = 512
    ) -> Read:
        """As `Policy.read`; at most a chunk's tokens are read at a time.

        Raises:
          ValueError: rows of different lengths.
        """
        if not np.asarray(batch.mask).all():
            raise ValueError("chunks need prompts of one length, without padding")
        rows, length = np.shape(batch.tokens)
        cache = ChunkCache.empty(
            model.config, rows, length + room, width=self.width, chunks=self.chunks
        )
        return read(model, batch, cache, edits=edits, chunk=min(chunk, self.width))


@dataclass(frozen=True)
class Selection:
    """How tokens are selected.

    Attributes:
      choose: from attention [L,B,K,S], mask and tokens per head to bool [L,B,K,S].
      window: last tokens whose attention counts; None for all.
      values: whether `choose` reads the cached values too, after the attention.
    """

    choose: Callable[..., Array]
    window: int | None = 32
    values: bool = False


SELECTIONS = {
    "snapkv": Selection(snapkv),
    "h2o": Selection(h2o, window=None),
    "adakv": Selection(adakv),
    "task_kv": Selection(task_kv, values=True),
}


@dataclass(frozen=True)
class Selected:
    """Every head keeps the tokens of the prompt that a rule selects.

    Attributes:
      rule: one of `SELECTIONS`.
      budget: share of a prompt's tokens that heads keep on average, in (0, 1]; or
      tokens: their number.
      bits: 8 stores keys and values as int8; None as they are.
      options: of the rule.

    Raises:
      ValueError: an unknown rule, both or neither of budget and tokens, or one out of range.
    """

    rule: str
    budget: float | None = None
    tokens: int | None = None
    bits: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        choose("rule", self.rule, SELECTIONS)
        if (self.budget is None) == (self.tokens is None):
            raise ValueError(f"give one of budget and tokens, got {self.budget} and {self.tokens}")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ValueError(f"budget must lie in (0, 1], got {self.budget}")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}")
        if self.bits not in (None, 8):
            raise ValueError(f"bits must be 8 or None, got {self.bits}")

    def read(
        self, model: Transformer, batch: Batch, *, room: int, edits: Edits = None, chunk: int = 512
    ) -> Read:
        """As `Policy.read`.

        Raises:
          ValueError: fewer tokens to keep than the last ones that the rule always keeps.
        """
        selection = SELECTIONS[self.rule]
        real = np.asarray(batch.mask).sum(axis=1)
        kept = real if self.tokens is not None else np.floor(real * (self.budget or 1)).astype(int)
        kept = np.minimum(kept, real if self.tokens is None else self.tokens)
        always = self.options.get("window", selection.window) if not selection.values else 1
        short = kept < np.minimum(always or 1, real)
        if short.any():
            raise ValueError(
                f"{self.rule} would keep {kept[short][0]} of {real[short][0]} tokens, fewer than "
                f"the last {always} that every head keeps"
            )
        found, received = watch(model, batch, window=selection.window, edits=edits, chunk=chunk)
        cache = found.cache
        assert isinstance(cache, KVCache)
        keep = _kept(
            cache, received, jnp.asarray(kept, jnp.int32),
            rule=self.rule, options=tuple(sorted(self.options.items())),
        )  # fmt: skip
        return Read(found.logits, compress(cache, keep, room=room, bits=self.bits))


@partial(jax.jit, static_argnames=("rule", "options"))
def _kept(
    cache: KVCache, received: Array, kept: Array, *, rule: str, options: tuple[tuple[str, Any], ...]
) -> Array:
    selection = SELECTIONS[rule]
    attention = of_groups(received, cache.k.shape[2])
    values = (cache.v,) if selection.values else ()
    return selection.choose(attention, *values, cache.mask, kept, **dict(options))
