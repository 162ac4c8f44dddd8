"""Generation as a state machine: `start` reads the prompts, `advance` decodes some steps.

Everything that generates is made of these two: whole answers (`generate`), text as it comes
and stop strings (`jaxheads.decode.live`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxheads.decode.caches import cache_for, repeat_rows, repeated
from jaxheads.decode.checks import check_request
from jaxheads.decode.contrast import Model
from jaxheads.decode.policies import Policy
from jaxheads.decode.prefill import cache_of, prefill
from jaxheads.decode.reading import on_the_left
from jaxheads.decode.sampling import Sampler, sample
from jaxheads.model.batch import Batch
from jaxheads.model.cache import Cache
from jaxheads.model.context import Edit, Tap, TapsLike, as_taps
from jaxheads.model.layout import Axes, axes_of, lay, whole
from jaxheads.model.transformer import Output, Transformer

Array = jax.Array


@struct.dataclass
class Settings:
    """What stays the same from step to step.

    Attributes:
      edits: what to change.
      taps: what to hand back of every decode step.
      sampler: how the next token is chosen.
      stop: int32 [M], token ids after which a row ends.
      key: random key; step i draws with `fold_in(key, i)`.
    """

    edits: Mapping[str, Edit]
    taps: dict[str, Tap]
    sampler: Sampler
    stop: Array
    key: Array


@struct.dataclass
class Progress:
    """What a step changes.

    Attributes:
      step: int32 scalar, new tokens so far, of the rows that did not end.
      tokens: int32 [B,N], the new tokens.
      lengths: int32 [B], new tokens of each row.
      alive: bool [B], False where a row has ended.
      logprobs: float32 [B,N], see `Generated.logprobs`.
      seen: bool [B,V], tokens that occurred in the prompt or in the output.
      taps: what was tapped, stacked [N-1,...] over the passes that read a new token.
    """

    step: Array
    tokens: Array
    lengths: Array
    alive: Array
    logprobs: Array
    seen: Array
    taps: dict[str, Any]


@struct.dataclass
class State:
    """A generation under way: a pytree, with `samples` rows for each prompt.

    Attributes:
      settings: what stays; may be replaced between calls of `advance`, edits for example.
      progress: what changes.
      cache: keys and values of the prompts and of all new tokens but the newest.
      prompt_taps: what was tapped while the prompts were read.
    """

    settings: Settings
    progress: Progress
    cache: Cache
    prompt_taps: dict[str, Any]

    @property
    def done(self) -> Array:
        """bool scalar: whether all rows have ended or have N tokens."""
        return ~_unfinished(self.progress, self.progress.tokens.shape[1])


def start(
    model: Model,
    prompts: Batch | Array | np.ndarray,
    *,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    key: Array | None = None,
    stop: Sequence[int] = (),
    edits: Mapping[str, Edit] | None = None,
    taps: TapsLike = (),
    prompt_taps: TapsLike = (),
    samples: int = 1,
    prefix: Array | np.ndarray | None = None,
    chunk: int | None = None,
    cache: Cache | None = None,
    policy: Policy | None = None,
) -> State:
    """Reads prompts and chooses the first new token of each row.

    Compiled once for each shape of the prompts, structure of edits and taps, `samples`,
    `chunk` and `max_new_tokens`.

    Args:
      model: a causal language model.
      prompts: `Batch` or int [B,T]; rows of different lengths may be padded on either side.
      max_new_tokens: N, tokens to generate at most.
      sampler: how tokens are chosen; None for the most likely one.
      key: random key, required unless the sampler is greedy.
      stop: token ids after which a row ends.
      edits: as for `generate`, and so are those below.
      taps: of decode steps.
      prompt_taps: of the pass over the prompts.
      samples: rows for each prompt.
      prefix: int [B], first tokens that see one another.
      chunk: prompt tokens read at a time.
      cache: empty; consumed.
      policy: reads the prompts instead, and keeps of them what it keeps.

    Returns:
      The state after the first new token.

    Raises:
      ValueError: as `generate`.
    """
    batch = _as_batch(prompts)
    taps, prompt_taps = as_taps(taps), as_taps(prompt_taps)
    sampler = Sampler.of(model.config.vocab_size) if sampler is None else sampler
    check_request(
        model, batch, max_new_tokens=max_new_tokens, samples=samples, chunk=chunk, cache=cache,
        policy=policy, stop=stop, prompt_taps=prompt_taps, prefix=prefix,
    )  # fmt: skip
    if sampler.greedy:
        if samples > 1:
            raise ValueError(
                f"samples={samples} at temperature 0 would all be the same: expected a "
                "temperature above 0"
            )
        key = jax.random.key(0) if key is None else key
    elif key is None:
        raise ValueError("sampling with temperature > 0 needs a random key: pass key=")
    settings = Settings(
        {} if edits is None else edits, taps, sampler, jnp.asarray(list(stop), jnp.int32), key
    )
    found: dict[str, Any] = {}
    if policy is not None:
        assert isinstance(model, Transformer)
        size = {} if chunk is None else {"chunk": chunk}
        read = policy.read(model, on_the_left(batch), room=max_new_tokens, edits=edits, **size)
        logits, cache = read.logits, read.cache
    else:
        logits, found, cache = _read(
            model, batch, settings.edits, prompt_taps, cache, prefix, chunk=chunk,
            new=max_new_tokens,
        )  # fmt: skip
    if samples > 1:
        cache = _repeated(cache, samples)
    progress = _first(model, batch, settings, logits, cache, new=max_new_tokens, samples=samples)
    return State(settings, progress, cache, found)


def advance(model: Model, state: State, steps: int | Array) -> State:
    """Decodes at most `steps` more tokens of each row; fewer where all rows end before.

    However the steps are divided among calls, the tokens are the same. `steps` is a value:
    another number does not recompile.

    Args:
      model: the model that started.
      state: as `start` or `advance` made it. Its cache is consumed: the result's lies in its
        buffers.
      steps: int scalar.
    """
    if state.progress.tokens.shape[1] == 1:
        return state  # `start` chose it.
    # Only the cache is donated: should Ctrl-C come in the middle, the rest is still there.
    steps = jnp.asarray(steps, jnp.int32)
    progress, cache = _advance(model, state.settings, state.progress, state.cache, steps)
    return replace(state, progress=progress, cache=cache)


def _as_batch(prompts: Batch | Array | np.ndarray) -> Batch:
    if isinstance(prompts, Batch):
        return prompts
    if not hasattr(prompts, "shape"):
        prompts = np.asarray(prompts)
    return Batch(prompts, np.ones(prompts.shape, bool))


@partial(jax.jit, static_argnames=("chunk", "new"), donate_argnames="cache")
def _read(
    model: Model,
    batch: Batch,
    edits: Mapping[str, Edit],
    taps: dict[str, Tap],
    cache: Cache | None,
    prefix: Array | None,
    *,
    chunk: int | None,
    new: int,
) -> tuple[Array, dict[str, Any], Cache]:
    """Logits [B,V] of the first new token, what was tapped, and the cache."""
    tokens, mask = (whole(jnp.asarray(x), 1) for x in (batch.tokens, batch.mask))
    if cache is None:
        cache = cache_for(model, mask, tokens.shape[1] + new)
    return prefill(model, tokens, mask, cache, edits, taps, chunk, prefix)


_repeated = jax.jit(repeated, static_argnums=1)


@partial(jax.jit, static_argnames=("new", "samples"))
def _first(
    model: Model,
    batch: Batch,
    settings: Settings,
    logits: Array,
    cache: Cache,
    *,
    new: int,
    samples: int,
) -> Progress:
    """The first new token of each row, and room for the rest."""
    tokens, mask = (whole(jnp.asarray(x), 1) for x in (batch.tokens, batch.mask))
    logits = repeat_rows(whole(logits, 1), samples)
    count, rows = logits.shape[0], axes_of(logits)[0]

    def zeros(shape: tuple[int, ...], dtype: Any, axes: Axes) -> Array:
        return lay(jnp.zeros(shape, dtype), axes)

    progress = Progress(
        step=jnp.int32(0),
        tokens=zeros((count, new), jnp.int32, (rows, ())),
        lengths=zeros((count,), jnp.int32, (rows,)),
        alive=~zeros((count,), bool, (rows,)),
        logprobs=zeros((count, new), jnp.float32, (rows, ())),
        seen=repeat_rows(_occurring(tokens, mask, logits.shape[1]), samples),
        taps={},
    )
    progress = _append(settings, progress, logits)
    tapped = jax.eval_shape(lambda: _read_newest(model, settings, progress, cache).taps)
    taps = jax.tree.map(lambda x: zeros((new - 1, *x.shape), x.dtype, ((), *axes_of(x))), tapped)
    return replace(progress, taps=taps)


@partial(jax.jit, donate_argnames="cache")
def _advance(
    model: Model, settings: Settings, progress: Progress, cache: Cache, steps: Array
) -> tuple[Progress, Cache]:
    limit = jnp.minimum(progress.step + steps, progress.tokens.shape[1])

    def decode(carry: tuple[Progress, Cache]) -> tuple[Progress, Cache]:
        progress, cache = carry
        out = _read_newest(model, settings, progress, cache)
        taps = jax.tree.map(
            lambda held, new: held.at[progress.step - 1].set(new), progress.taps, out.taps
        )
        progress = replace(progress, taps=taps)
        return _append(settings, progress, whole(out.logits[:, 0], 1)), cache_of(out)

    return jax.lax.while_loop(lambda c: _unfinished(c[0], limit), decode, (progress, cache))


def _unfinished(progress: Progress, limit: Array | int) -> Array:
    return (progress.step < limit) & progress.alive.any()


def _read_newest(model: Model, settings: Settings, progress: Progress, cache: Cache) -> Output:
    """The pass over the newest token of each row. Rows that ended write padding."""
    newest = jax.lax.dynamic_slice_in_dim(progress.tokens, progress.step - 1, 1, axis=1)
    return model(
        newest, progress.alive[:, None], edits=settings.edits, taps=settings.taps, cache=cache,
        phase="decode",
    )  # fmt: skip


def _append(settings: Settings, progress: Progress, logits: Array) -> Progress:
    """Chooses the next token of each row from logits [B,V]."""
    step, alive = progress.step, progress.alive
    key = jax.random.fold_in(settings.key, step)
    new = sample(settings.sampler, logits, progress.seen, key)
    # A comparison instead of a gather: it is laid out over devices as its operands are.
    chosen = jnp.arange(logits.shape[1]) == new[:, None]
    logprob = jnp.where(chosen, logits, 0).sum(axis=1) - jax.nn.logsumexp(logits, axis=1)
    return replace(
        progress,
        step=step + 1,
        tokens=_written(progress.tokens, jnp.where(alive, new, 0), step),
        lengths=progress.lengths + alive,
        alive=alive & ~(new[:, None] == settings.stop).any(axis=1),
        logprobs=_written(progress.logprobs, jnp.where(alive, logprob, 0), step),
        seen=progress.seen | chosen,
    )


def _written(held: Array, column: Array, step: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(held, column[:, None], step, axis=1)


def _occurring(tokens: Array, mask: Array, vocab_size: int) -> Array:
    """bool [B,V]: the real tokens of each row."""

    def of_row(tokens: Array, mask: Array) -> Array:
        return jnp.zeros(vocab_size, bool).at[tokens].max(mask)

    return jax.vmap(of_row)(tokens, mask)
