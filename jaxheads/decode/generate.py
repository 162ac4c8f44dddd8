"""Generation with edits: one jitted prefill and a jitted `while_loop` of decode steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxheads.decode.sampling import Sampler, sample
from jaxheads.model.batch import Batch
from jaxheads.model.cache import KVCache, empty_cache
from jaxheads.model.checks import check_tokens
from jaxheads.model.context import Edit
from jaxheads.model.transformer import Transformer

Array = jax.Array


@struct.dataclass
class Generated:
    """New tokens of each row.

    Attributes:
      tokens: int32 [B,N], the generated ids; entries past `lengths` mean nothing.
      lengths: int32 [B], generated tokens of each row, its stop token included.
    """

    tokens: Array
    lengths: Array

    def rows(self) -> list[list[int]]:
        """The ids of each row as plain lists."""
        tokens, lengths = np.asarray(self.tokens), np.asarray(self.lengths)
        return [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]


def generate(
    model: Transformer,
    prompts: Batch | Array | np.ndarray,
    *,
    max_new_tokens: int,
    edits: Mapping[str, Edit] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Array | None = None,
    stop: Sequence[int] = (),
) -> Generated:
    """Continues prompts.

    Edits act in the prefill over the prompt and in every decode step alike, unless they are
    restricted with `when=`. Compiled once per shape of the prompts and structure of the
    edits; the values of edits and of the sampling options do not recompile.

    Args:
      model: the model.
      prompts: `Batch` or int [B,T]; rows of different lengths may be padded on either side.
      max_new_tokens: N, tokens to generate at most.
      edits: what to change.
      temperature: 0 takes the most likely token; otherwise logits are divided by it.
      top_k: sample among the k most likely tokens only.
      top_p: sample among the fewest tokens whose probability reaches p only.
      key: random key, required when temperature > 0.
      stop: token ids after which a row ends.

    Raises:
      ValueError: an option out of range, no key to sample with, prompts that with their
        continuation exceed the model's context.
    """
    if isinstance(prompts, Batch):
        batch = prompts
    else:
        batch = Batch(jnp.asarray(prompts), jnp.ones(prompts.shape, bool))
    check_tokens(model.config, batch.tokens, batch.mask)
    if not isinstance(batch.mask, jax.core.Tracer) and not np.asarray(batch.mask).any(1).all():
        raise ValueError("a prompt is empty: every row needs at least one real token")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    total = batch.tokens.shape[1] + max_new_tokens
    if total > model.config.context_length:
        raise ValueError(
            f"{batch.tokens.shape[1]} prompt tokens and {max_new_tokens} new ones exceed the "
            f"model's context of {model.config.context_length}"
        )
    sampler = Sampler.of(temperature, top_k, top_p, model.config.vocab_size)
    if key is None:
        if temperature > 0:
            raise ValueError("sampling with temperature > 0 needs a random key: pass key=")
        key = jax.random.key(0)
    return _generate(
        model,
        batch,
        {} if edits is None else edits,
        sampler,
        key,
        jnp.asarray(list(stop), jnp.int32),
        max_new_tokens=max_new_tokens,
    )


@partial(jax.jit, static_argnames="max_new_tokens")
def _generate(
    model: Transformer,
    batch: Batch,
    edits: Mapping[str, Edit],
    sampler: Sampler,
    key: Array,
    stop: Array,
    *,
    max_new_tokens: int,
) -> Generated:
    rows, width = batch.tokens.shape
    mask = jnp.asarray(batch.mask)
    last = width - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    cache = empty_cache(model.config, rows, width + max_new_tokens)
    out = model(batch, edits=edits, cache=cache, logits_at=last[:, None])

    def choose_next(logits: Array, step: Array) -> Array:
        return sample(sampler, logits[:, 0], jax.random.fold_in(key, step))

    State = tuple[Array, Array, Array, Array, KVCache | None]

    def unfinished(state: State) -> Array:
        step, _, lengths, _, _ = state
        return (step < max_new_tokens) & jnp.any(lengths == step)

    def decode(state: State) -> State:
        step, tokens, lengths, current, cache = state
        out = model(
            current[:, None], (lengths == step)[:, None], edits=edits, cache=cache, phase="decode"
        )
        new = choose_next(out.logits, step)
        return (*_append(step, tokens, lengths, current, new), new, out.cache)

    def _append(
        step: Array, tokens: Array, lengths: Array, current: Array, new: Array
    ) -> tuple[Array, Array, Array]:
        alive = (lengths == step) & ~jnp.isin(current, stop)
        tokens = tokens.at[:, step].set(jnp.where(alive, new, 0))
        return step + 1, tokens, lengths + alive

    first = choose_next(out.logits, jnp.int32(0))
    tokens = jnp.zeros((rows, max_new_tokens), jnp.int32).at[:, 0].set(first)
    state = (jnp.int32(1), tokens, jnp.ones(rows, jnp.int32), first, out.cache)
    _, tokens, lengths, _, _ = jax.lax.while_loop(unfinished, decode, state)
    return Generated(tokens, lengths)
