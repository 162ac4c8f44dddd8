"""Where every head attends: scores read off attention maps, on random tokens and on text.

On random tokens r repeated once (S tokens, then the same S again) nothing is left of language,
only copying by match or by position. Means over the second half (Olsson et al. 2022,
"In-context Learning and Induction Heads"):

* induction: attention to the token after the earlier occurrence, A[t, t-S+1];
* previous: attention to the token before, A[t, t-1];
* duplicate: attention to the earlier occurrence itself, A[t, t-S].

On text, means over all queries t but padding and the first of each row, which can only attend
to itself:

* distance: sum_s A[t,s] |t-s|, how far back the head looks, in tokens (Li et al. 2025,
  "Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm", the span d of a head);
* entropy: -sum_s A[t,s] log A[t,s], in nats;
* evenness: that entropy divided by the log of the number of keys that t sees, so that heads of
  long and short rows, of full layers and of those with a window compare: 1 is uniform
  attention, 0 is attention to one key (and the value where t sees only one);
* sink: attention to the first token of the row, A[t,0] (Xiao et al. 2024, "Efficient Streaming
  Language Models with Attention Sinks").

Known numbers, SmolLM2-135M-Instruct. S = 64: induction 18.6 .91, 17.3 .79, 17.4 .74, 18.7 .62,
17.5 .58; previous 16.0 .89, 11.1 .85; duplicate 14.3 .70, 8.0 .68.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.model.batch import Batch, pack
from jaxheads.model.config import ModelConfig
from jaxheads.model.context import Context, Tap
from jaxheads.model.transformer import Transformer
from jaxheads.sweep.named import NamedArray
from jaxheads.taps import counted_tokens
from jaxheads.tasks.checks import at_least
from jaxheads.tasks.repeats import repeated_tokens

Array = jax.Array
REPEAT_SCORES = ("induction", "previous", "duplicate")
TEXT_SCORES = ("distance", "entropy", "evenness", "sink")


def by_head(
    name: str, values: Any, config: ModelConfig, info: Mapping[str, Any] | None = None
) -> NamedArray:
    """One number per head, [L,H], with its axes named."""
    return NamedArray(
        name,
        np.asarray(values, np.float32),
        ("layer", "head"),
        (tuple(range(config.n_layers)), tuple(range(config.n_heads))),
        dict(info or {}),
    )


def repeat_scores(
    model: Transformer,
    *,
    count: int = 16,
    length: int = 64,
    seed: int = 0,
    first_id: int = 0,
    batch_size: int = 4,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, NamedArray]:
    """Induction, previous-token and duplicate-token score of every head.

    Args:
      model: the model.
      count: rows of random tokens.
      length: S, tokens before the repeat.
      seed: of the tokens.
      first_id: the token in front of each row, the attention sink; BOS where there is one.
      batch_size: rows of one forward pass.
      on_progress: called as (rows done, rows in all).

    Returns:
      float32 [L,H] between 0 and 1 for each of `REPEAT_SCORES`.

    Raises:
      ValueError: rows that do not fit the model's context or vocabulary, or a count, a
        length or a batch size below 1.
    """
    at_least("batch_size", batch_size, 1)
    if 1 + 2 * length > model.config.context_length:
        raise ValueError(
            f"two times {length} tokens and one in front exceed the model's context of "
            f"{model.config.context_length}"
        )
    tokens = repeated_tokens(
        count, length=length, seed=seed, vocab_size=model.config.vocab_size, first_id=first_id
    )
    total = np.zeros(())
    for start in range(0, count, batch_size):
        rows = tokens[start : start + batch_size]
        total = total + np.asarray(_of_repeats(model, rows, length)) * len(rows)
        on_progress(start + len(rows), count)
    info = {"rows": count, "length": length, "seed": seed}
    return {
        name: by_head(name, total[:, index] / count, model.config, info)
        for index, name in enumerate(REPEAT_SCORES)
    }


def text_scores(
    model: Transformer,
    batches: Iterable[Batch],
    on_progress: Callable[[int], None] = lambda rows: None,
) -> dict[str, NamedArray]:
    """Attention distance, entropy, evenness and sink share of every head on text.

    Each query counts once, whichever row it stands in and however that row is padded. Memory
    is that of one layer's maps.

    Args:
      model: a model of tokens, causal or not.
      batches: text, as `text_rows` or a tokenizer makes it; batches of one shape share one
        compiled program. Put the model's first token in front of each row: what stands
        first takes the sink's attention, whatever it is.
      on_progress: called with the rows done.

    Returns:
      float32 [L,H] for each of `TEXT_SCORES`: tokens; nats; and two shares between 0 and 1.
      `info["queries"]` is how many queries were averaged.

    Raises:
      ValueError: no batch, or no row of two or more tokens.
    """
    total, queries, rows = np.zeros(()), 0, 0
    for batch in batches:
        sums, counted = _of_text(model, batch)
        total, queries = total + np.asarray(sums, np.float64), queries + int(counted)
        rows += len(batch.tokens)
        on_progress(rows)
    if not queries:
        raise ValueError("no queries to score: expected text with rows of two or more tokens")
    info = {"rows": rows, "queries": queries}
    return {
        name: by_head(name, total[:, index] / queries, model.config, info)
        for index, name in enumerate(TEXT_SCORES)
    }


def text_rows(
    ids: Iterable[int], *, length: int = 256, first_id: int | None = None, batch_size: int = 4
) -> list[Batch]:
    """Cuts the tokens of a text into rows, batched in one shape.

    Args:
      ids: the text's tokens, without one in front.
      length: tokens of a row, the one in front included; the last row is padded.
      first_id: the token to put in front of each row; None for none.
      batch_size: rows of a batch; rows of padding alone fill up the last.

    Raises:
      ValueError: no tokens, a length below 2, or a batch size below 1.
    """
    at_least("length", length, 2)
    at_least("batch_size", batch_size, 1)
    front = [] if first_id is None else [first_id]
    ids, step = list(ids), length - len(front)
    rows = [[*front, *ids[start : start + step]] for start in range(0, len(ids), step)]
    if not rows:
        raise ValueError("the text has no tokens, expected at least one")
    packed = pack(rows, length=min(length, max(map(len, rows))))
    size = min(batch_size, len(rows))
    filler = ((0, -len(rows) % size), (0, 0))
    tokens, mask = np.pad(packed.tokens, filler), np.pad(packed.mask, filler)
    return [
        Batch(tokens[start : start + size], mask[start : start + size])
        for start in range(0, len(tokens), size)
    ]


@partial(jax.jit, static_argnames="length")
def _of_repeats(model: Transformer, tokens: Array, length: int) -> Array:
    """float32 [L,3,H], the means of `REPEAT_SCORES`."""
    back = {"induction": length - 1, "previous": 1, "duplicate": length}

    def reduce(pattern: Array, _: Context) -> Array:
        """Runs inside the layer scan: [B,H,T,S] -> [3,H]."""
        means = [
            # Column i of the diagonal is the query i + steps; the last `length` are the repeat.
            jnp.diagonal(pattern, -back[name], axis1=2, axis2=3)[..., -length:].mean((0, 2))
            for name in REPEAT_SCORES
        ]
        return jnp.stack(means)

    nothing = jnp.zeros((tokens.shape[0], 0), jnp.int32)
    return model(tokens, taps={"scores": Tap("pattern", reduce)}, logits_at=nothing).taps["scores"]


@jax.jit
def _of_text(model: Transformer, batch: Batch) -> tuple[Array, Array]:
    """Sums over queries, float32 [L,4,H], of `TEXT_SCORES`, and the number of queries."""
    taps = {
        "sums": Tap("pattern", _query_sums),
        "queries": Tap("embed", lambda _, context: counted_tokens(context).sum()),
    }
    nothing = jnp.zeros((batch.tokens.shape[0], 0), jnp.int32)
    found = model(batch, taps=taps, logits_at=nothing).taps
    return found["sums"], found["queries"]


def _query_sums(pattern: Array, context: Context) -> Array:
    """Runs inside the layer scan: [B,H,T,S] -> [4,H]."""
    pattern = pattern.astype(jnp.float32)
    places = context.positions  # Of queries and, without a cache, of keys.
    steps = jnp.abs(places[:, :, None] - places[:, None, :]).astype(jnp.float32)
    first = (context.token_mask & (places == 0)).astype(jnp.float32)
    distance = jnp.einsum("bhts,bts->bht", pattern, steps)
    entropy = jax.scipy.special.entr(pattern).sum(-1)
    # A query that sees one key has no entropy: any divisor but log 1 gives the 0 it should.
    keys = jnp.broadcast_to(context.visible, (*pattern.shape[:1], 1, *pattern.shape[2:])).sum(-1)
    evenness = entropy / jnp.log(jnp.maximum(keys, 2))
    sink = jnp.einsum("bhts,bs->bht", pattern, first)
    scores = jnp.stack([distance, entropy, evenness, sink])
    return jnp.einsum("nbht,bt->nh", scores, counted_tokens(context).astype(jnp.float32))
