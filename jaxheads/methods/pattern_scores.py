"""Heads known by where they attend: induction, previous token, duplicate token.

Source: Olsson et al. (2022), "In-context Learning and Induction Heads". On random tokens r
repeated once (S tokens, then the same S again), the scores are means over the second half of

* induction: attention to the token after the earlier occurrence, A[t, t-S+1];
* previous: attention to the token before, A[t, t-1];
* duplicate: attention to the earlier occurrence itself, A[t, t-S].

Random tokens tell nothing of language, so only copying by position or by match remains.

Known numbers, SmolLM2-135M-Instruct with S = 64: induction 18.6 .91, 17.3 .79, 17.4 .74,
18.7 .62, 17.5 .58; previous 16.0 .89, 11.1 .85; duplicate 14.3 .70, 8.0 .68.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.model.context import Context, Tap
from jaxheads.model.transformer import Transformer
from jaxheads.tasks.repeats import repeated_tokens

Array = jax.Array
PATTERNS = ("induction", "previous", "duplicate")


def pattern_scores(
    model: Transformer,
    *,
    count: int = 16,
    length: int = 64,
    seed: int = 0,
    first_id: int = 0,
    batch_size: int = 4,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, np.ndarray]:
    """Scores of every head.

    Args:
      model: the model.
      count: rows of random tokens.
      length: S, tokens before the repeat.
      seed: of the tokens.
      first_id: the token in front of each row, the attention sink; BOS where there is one.
      batch_size: rows of one forward pass.
      on_progress: called as (rows done, rows in all).

    Returns:
      float32 [L,H] between 0 and 1 for each of `PATTERNS`.

    Raises:
      ValueError: rows that do not fit the model's context or vocabulary, or a count or
        length below 1.
    """
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
        total = total + np.asarray(_scores(model, rows, length)) * len(rows)
        on_progress(start + len(rows), count)
    means = (total / count).astype(np.float32)
    return {name: means[:, index] for index, name in enumerate(PATTERNS)}


@partial(jax.jit, static_argnames="length")
def _scores(model: Transformer, tokens: Array, length: int) -> Array:
    """float32 [L,3,H], the means of `PATTERNS`."""
    back = {"induction": length - 1, "previous": 1, "duplicate": length}

    def reduce(pattern: Array, _: Context) -> Array:
        """Runs inside the layer scan: [B,H,T,S] -> [3,H]."""
        means = [
            # Column i of the diagonal is the query i + steps; the last `length` are the repeat.
            jnp.diagonal(pattern, -back[name], axis1=2, axis2=3)[..., -length:].mean((0, 2))
            for name in PATTERNS
        ]
        return jnp.stack(means)

    nothing = jnp.zeros((tokens.shape[0], 0), jnp.int32)
    return model(tokens, taps={"scores": Tap("pattern", reduce)}, logits_at=nothing).taps["scores"]
