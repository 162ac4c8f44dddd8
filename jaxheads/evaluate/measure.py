"""`measure`: how well answers are predicted from what a policy kept of their contexts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.decode.policies import Policy
from jaxheads.evaluate.contexts import Contexts
from jaxheads.model.batch import Batch
from jaxheads.model.cache import Cache, empty_cache
from jaxheads.model.config import ModelConfig
from jaxheads.model.context import Edit
from jaxheads.model.transformer import Transformer

Array = jax.Array


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured of a policy on some rows.

    Attributes:
      loss: float64 [B], mean negative log-likelihood of each answer's tokens, in nats.
      exact: bool [B], whether greedy decoding gives the answer, token for token.
      nbytes: bytes of keys and values per row, in the arrays of the cache, those of the answer's
        slots included.
      full_nbytes: of a cache that keeps everything, for the same tokens.
    """

    loss: np.ndarray
    exact: np.ndarray
    nbytes: int
    full_nbytes: int

    @property
    def share(self) -> float:
        """Bytes over those of a full cache."""
        return self.nbytes / self.full_nbytes


def measure(
    model: Transformer,
    policy: Policy,
    contexts: Contexts,
    *,
    edits: Mapping[str, Edit] | None = None,
    rows: int = 4,
    chunk: int = 512,
    on_rows: Callable[[int], None] = lambda done: None,
) -> Measured:
    """Reads contexts with a policy, then scores their answers over what it kept.

    Answers are teacher forced, in one pass over the cache. Greedy decoding gives an answer exactly
    where each of its tokens is the most likely one after those before it, so that pass tells this
    as well. All passes have the same shapes: the last is filled up with rows that are not counted.

    Args:
      model: a causal language model.
      policy: how keys and values are kept.
      contexts: B rows.
      edits: what to change, in contexts and answers.
      rows: contexts that are read together.
      chunk: tokens of a context that are read at a time.
      on_rows: told how many rows are done.

    Raises:
      ValueError: contexts that with their answers exceed the model's context; rows or a chunk below
        1; and what the policy refuses.
    """
    count, width = len(contexts), contexts.prompts.shape[1] + contexts.answers.shape[1]
    if width > model.config.context_length:
        raise ValueError(
            f"contexts of {contexts.prompts.shape[1]} tokens and {contexts.answers.shape[1]} of "
            f"answers exceed the model's context of {model.config.context_length}"
        )
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    rows = min(rows, count)
    loss, exact, nbytes = np.zeros(count), np.zeros(count, bool), 0
    for first in range(0, count, rows):
        at = np.minimum(np.arange(first, first + rows), count - 1)
        prompts = contexts.prompts[at]
        read = policy.read(
            model,
            Batch(prompts, np.ones(prompts.shape, bool)),
            room=contexts.answers.shape[1],
            edits=edits,
            chunk=chunk,
        )
        nbytes = max(nbytes, read.cache.nbytes)
        answers, mask = contexts.answers[at], contexts.mask[at]
        found = jax.device_get(_scored(model, read.logits, read.cache, answers, mask, edits))
        last = min(first + rows, count)
        loss[first:last], exact[first:last] = (x[: last - first] for x in found)
        on_rows(last)
    return Measured(loss, exact, nbytes // rows, full_bytes(model.config, width))


def full_bytes(config: ModelConfig, size: int) -> int:
    """Bytes of the keys and values of `size` tokens of one row where nothing is dropped."""
    cache = jax.eval_shape(lambda: empty_cache(config, 1, size))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in (cache.k, cache.v))


@jax.jit
def _scored(
    model: Transformer, logits: Array, cache: Cache, ids: Any, mask: Any, edits: Any
) -> tuple[Array, Array]:
    """Loss and exact match [B] of answers [B,N]; `logits` [B,V] are of their first token."""
    out = model(ids[:, :-1], mask[:, :-1], cache=cache, phase="decode", edits=edits)
    every = jnp.concatenate([logits[:, None], out.logits], axis=1).astype(jnp.float32)
    of_ids = jnp.take_along_axis(jax.nn.log_softmax(every, axis=-1), ids[..., None], axis=-1)
    loss = -jnp.sum(jnp.where(mask, of_ids[..., 0], 0.0), axis=1) / jnp.sum(mask, axis=1)
    exact = jnp.all((jnp.argmax(every, axis=-1) == ids) | ~mask, axis=1)
    return loss, exact
