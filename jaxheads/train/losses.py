"""The loss of a language model in training.

Source: Chowdhery et al. (2022), PaLM, section 5, for the z-loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxheads.model.batch import Answers, Batch
from jaxheads.model.context import Edit, Tap
from jaxheads.model.transformer import Transformer
from jaxheads.token_scores import mean, token_scores

Array = jax.Array
Metrics = dict[str, Array]
Edits = Mapping[str, Edit]


class Penalty(Protocol):
    """A term of a loss made of what happens inside the model."""

    @property
    def taps(self) -> Mapping[str, Tap]:
        """What is read, as the model takes it."""

    def __call__(self, tapped: Mapping[str, Any]) -> tuple[Array, Metrics]:
        """Returns the term, weighted, and further scalar metrics."""


def language_loss(
    model: Transformer,
    batch: Batch,
    answers: Answers | None = None,
    *,
    edits: Edits | None = None,
    z_loss: float = 0.0,
    chunk: int | None = None,
    remat: str = "none",
    penalty: Penalty | None = None,
) -> tuple[Array, Metrics]:
    """Mean negative log-likelihood of the batch's target tokens, with an optional z-loss.

    loss = mean(-log p(target)) + z_loss * mean(log(Z)^2), means over targets; Z is the sum of
    exp of the logits. The second term keeps log Z near 0.

    Args:
      model: the model.
      batch: as for `token_scores`, and so are `answers`, `edits`, `chunk` and `remat`.
      answers: the same.
      edits: the same.
      chunk: the same.
      remat: the same.
      z_loss: weight of the second term; PaLM takes 1e-4.
      penalty: a further term, of what it taps in the same pass.

    Returns:
      The loss, float32 [], in nats per target (0 without targets), and the metrics "weight",
      the number of targets; "token_accuracy", the share of targets that are the most likely
      token; where there is one, "z_loss", the second term; and with a penalty its metrics and
      "task_loss", the loss without it.

    Raises:
      ValueError: a negative z_loss; what `token_scores` refuses.
    """
    if z_loss < 0 or not math.isfinite(z_loss):
        raise ValueError(f"z_loss must be at least 0, got {z_loss}")
    taps = () if penalty is None else penalty.taps
    scores, counted = token_scores(
        model, batch, answers, edits=edits, chunk=chunk, remat=remat, taps=taps
    )
    weight = jnp.sum(counted, dtype=jnp.float32)
    loss = mean(scores.loss, counted)
    metrics = {"weight": weight, "token_accuracy": mean(scores.right, counted)}
    if z_loss:
        metrics["z_loss"] = z_loss * mean(jnp.square(scores.log_z), counted)
        loss = loss + metrics["z_loss"]
    if penalty is not None:
        value, more = penalty(scores.tapped)
        metrics |= more | {"task_loss": loss}
        loss = loss + value
    return loss, jax.lax.stop_gradient(metrics)
