"""Sentence embeddings: what an encoder makes of a whole text, as one vector."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxheads.model.batch import Batch
from jaxheads.model.context import Edit
from jaxheads.model.transformer import Transformer

_EPSILON = 1e-12
"""Vectors shorter than this are not made longer."""


def sentence_embeddings(
    model: Transformer, batch: Batch, *, edits: Mapping[str, Edit] | None = None
) -> jax.Array:
    """The mean of the last residual stream over the real tokens, at unit length.

    This is what sentence-transformers computes for models such as all-MiniLM-L6-v2: special
    tokens count like any others, padding does not. Nothing is cut: sentence-transformers
    keeps the first 256 tokens of a text for that model, and the model itself takes 512.

    Source: Reimers and Gurevych (2019), section 3, the strategy MEAN; sentence-transformers,
    modules Pooling and Normalize.

    Args:
      model: a text model; its site `final` is pooled.
      batch: texts, e.g. `tokenizer(["one", "another"])`; tokens [B,T].
      edits: what to change.

    Returns:
      float32 [B,D], rows of Euclidean norm one; zeros for a row without a real token.

    Raises:
      ValueError: a model of images, something that is not a `Batch`, edits that do not fit,
        or a text that is longer than the model's context.
    """
    if not isinstance(batch, Batch):
        raise ValueError(f"batch must be a Batch, got {type(batch).__name__}")
    if model.config.image is not None:
        raise ValueError("sentence embeddings are of texts, but this model looks at images")
    final = model(batch, edits=edits, taps=("final",)).taps["final"].astype(jnp.float32)
    weight = jnp.asarray(batch.mask)[..., None].astype(jnp.float32)
    mean = (final * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1)
    # The square root is taken of what is not zero, or the gradient of a zero row were NaN.
    squares = jnp.maximum((mean * mean).sum(axis=-1, keepdims=True), _EPSILON**2)
    return mean / jnp.sqrt(squares)
