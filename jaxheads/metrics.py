"""Losses and metrics of a model on a batch, each differentiable in the edits.

Every function takes `edits=` and is pure: wrap it in `jax.jit`, `grad` or `vmap` as needed.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.model.batch import Answers, Batch
from jaxheads.model.context import Edit
from jaxheads.model.transformer import Transformer
from jaxheads.token_scores import mean, token_scores

Array = jax.Array
Edits = Mapping[str, Edit]


def next_token_loss(
    model: Transformer,
    batch: Batch,
    answers: Answers | None = None,
    *,
    edits: Edits | None = None,
) -> Array:
    """Mean negative log-likelihood of the batch's target tokens, in nats per token."""
    scores, counted = token_scores(model, batch, answers, edits=edits)
    return mean(scores.loss, counted)


def perplexity(model: Transformer, batch: Batch, *, edits: Edits | None = None) -> Array:
    """exp of `next_token_loss`."""
    return jnp.exp(next_token_loss(model, batch, edits=edits))


def logit_difference(
    model: Transformer,
    batch: Batch,
    answers: Array | np.ndarray,
    wrong: Array | np.ndarray,
    *,
    edits: Edits | None = None,
) -> Array:
    """Logit of the answer minus logit of the wrong answer after each prompt.

    Args:
      model: the model.
      batch: prompts; the logits are read at each row's last real token.
      answers: int [B], token ids.
      wrong: int [B], token ids.
      edits: what to change.

    Returns:
      float32 [B], in logits.

    Raises:
      ValueError: `answers` or `wrong` is not one id of the vocabulary per row.
    """
    rows = jnp.arange(batch.tokens.shape[0])
    for name, ids in (("answers", answers), ("wrong", wrong)):
        if jnp.shape(ids) != rows.shape:
            raise ValueError(
                f"{name} has shape {jnp.shape(ids)}, expected one id per row, {rows.shape}"
            )
        if not isinstance(ids, jax.core.Tracer):
            wild = [int(i) for i in np.asarray(ids) if not 0 <= i < model.config.vocab_size]
            if wild:
                raise ValueError(
                    f"{name} holds token id {wild[0]}, outside the vocabulary of "
                    f"{model.config.vocab_size}"
                )
    logits = last_logits(model, batch, edits=edits)

    def read(ids: Array | np.ndarray) -> Array:
        # Under a trace, an id outside the vocabulary reads as NaN, not as some other token.
        inside = jnp.where(jnp.asarray(ids) < 0, logits.shape[1], ids)
        return logits.at[rows, inside].get(mode="fill", fill_value=jnp.nan)

    return read(answers) - read(wrong)


def last_logits(model: Transformer, batch: Batch, *, edits: Edits | None = None) -> Array:
    """Logits [B,V] after each row's last real token; the rest is not unembedded."""
    mask = jnp.asarray(batch.mask)
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return model(batch, edits=edits, logits_at=last[:, None]).logits[:, 0]


def answer_scores(
    model: Transformer,
    batch: Batch,
    answers: Answers | None = None,
    *,
    edits: Edits | None = None,
) -> dict[str, Array]:
    """How well each row's target tokens are predicted, teacher forced.

    Args are those of `token_scores`.

    Returns:
      float32 [B] each: "loss", mean nats per target token; "token_accuracy", share of
      target tokens that are the most likely one; "exact", 1 where all of them are. NaN in
      a row without targets.
    """
    scores, counted = token_scores(model, batch, answers, edits=edits)
    count = counted.sum(axis=1)
    right = jnp.sum(scores.right, axis=1, where=counted)
    return {
        "loss": jnp.sum(scores.loss, axis=1, where=counted) / count,
        "token_accuracy": right / count,
        "exact": jnp.where(count > 0, right == count, jnp.nan),
    }
