"""Metrics of a sweep: functions of the logits at chosen slots, one number for each row.

A metric is a pytree that says what it reads (`slots`, and `tokens` unless it needs the whole
vocabulary) and maps those logits to float32 [B]. So a sweep unembeds nothing else. Any
function of the logits [B,V] after each row's last token is a metric too; see `as_metric`.

Axes: B rows, N slots read in each row, V vocabulary, M tokens read, A right answers, W wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxheads.model.batch import Batch
from jaxheads.model.transformer import Transformer

Array = jax.Array
Ids = Array | np.ndarray
NONE = -1
"""Fills up rows that have fewer answers than others."""


class Metric(Protocol):
    """What a sweep measures.

    Attributes:
      slots: int32 [B,N], the slots whose logits are read.
      tokens: int32 [B,M], the tokens whose logits are read; None for all of them.
      unit: of the values, for tables and figures.
    """

    @property
    def slots(self) -> Any:
        """Int32 [B,N]."""

    @property
    def tokens(self) -> Any:
        """Int32 [B,M] or None."""

    @property
    def unit(self) -> str:
        """One word or two."""

    def __call__(self, logits: Array) -> Array:
        """Maps logits, float32 [B,N,V] or [B,N,M], to one number per row [B]."""
        ...


AnyMetric = Metric | Callable[[Array], Array]


def last_slots(batch: Batch) -> np.ndarray:
    """int32 [B,1], the slot of each row's last real token. On the host."""
    mask = np.asarray(batch.mask)
    return (mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)).astype(np.int32)[:, None]


@struct.dataclass
class LogitDifference:
    """Mean logit of the right answers minus mean logit of the wrong ones, in logits.

    Without wrong answers it is the mean logit of the right ones. A weighted sum of logits:
    linear in them, so first-order methods meet no other bend than the model's own.
    """

    slots: Ids
    tokens: Ids
    weights: Ids
    unit: str = struct.field(pytree_node=False, default="logits")

    @classmethod
    def of(cls, batch: Batch, answers: Ids, wrong: Ids | None = None) -> LogitDifference:
        """After each row's last real token.

        Args:
          batch: prompts.
          answers: int [B] or [B,A], right answers; -1 fills up rows with fewer.
          wrong: int [B] or [B,W], likewise; None for no contrast.

        Raises:
          ValueError: another shape, a row without an answer.
        """
        right = _ids("answers", answers, batch)
        ids, weights = right, _means(right)
        if wrong is not None:
            others = _ids("wrong", wrong, batch)
            ids = np.concatenate([right, others], axis=1)
            weights = np.concatenate([weights, -_means(others)], axis=1)
        return cls(last_slots(batch), np.maximum(ids, 0), weights)

    def __call__(self, logits: Array) -> Array:
        """[B,1,M] -> [B]."""
        return jnp.sum(logits[:, 0] * self.weights, axis=-1)


@struct.dataclass
class _OfAnswers:
    """Right and wrong answers after each row's last real token, the whole vocabulary read.

    Attributes:
      slots: int32 [B,1].
      answers: int32 [B,A], -1 where a row has fewer.
      wrong: int32 [B,W], or None.
    """

    slots: Ids
    answers: Ids
    wrong: Ids | None = None
    tokens: None = None

    @classmethod
    def of(cls, batch: Batch, answers: Ids, wrong: Ids | None = None) -> Self:
        """After each row's last real token.

        Args and errors as for `LogitDifference.of`.
        """
        others = None if wrong is None else _ids("wrong", wrong, batch)
        return cls(last_slots(batch), _ids("answers", answers, batch), others)


@struct.dataclass
class Probability(_OfAnswers):
    """Probability of the right answers together, minus that of the wrong ones if given."""

    unit: str = struct.field(pytree_node=False, default="probability")

    def __call__(self, logits: Array) -> Array:
        """[B,1,V] -> [B]."""
        chances = jax.nn.softmax(logits[:, 0], axis=-1)
        right = jnp.sum(_take(chances, self.answers, 0.0), axis=-1)
        if self.wrong is None:
            return right
        return right - jnp.sum(_take(chances, self.wrong, 0.0), axis=-1)


@struct.dataclass
class AnswerLoss(_OfAnswers):
    """Negative log-likelihood of the right answers together, in nats."""

    unit: str = struct.field(pytree_node=False, default="nats")

    def __call__(self, logits: Array) -> Array:
        """[B,1,V] -> [B]."""
        scores = jax.nn.log_softmax(logits[:, 0], axis=-1)
        return -jax.nn.logsumexp(_take(scores, self.answers, -jnp.inf), axis=-1)


@struct.dataclass
class Rank(_OfAnswers):
    """How many tokens are more likely than the best right answer: 0 is the top.

    It has no derivative, so it serves sweeps only.
    """

    unit: str = struct.field(pytree_node=False, default="rank")

    def __call__(self, logits: Array) -> Array:
        """[B,1,V] -> [B]."""
        best = jnp.max(_take(logits[:, 0], self.answers, -jnp.inf), axis=-1, keepdims=True)
        return jnp.sum(logits[:, 0] > best, axis=-1).astype(jnp.float32)


@struct.dataclass
class TokenLoss:
    """Mean negative log-likelihood of each row's target tokens, in nats per token."""

    slots: Ids
    ids: Ids
    mask: Ids
    tokens: None = None
    unit: str = struct.field(pytree_node=False, default="nats per token")

    @classmethod
    def of(cls, batch: Batch) -> TokenLoss:
        """Of the batch's targets: `batch.targets`, or every token that follows a real one.

        Raises:
          ValueError: a row without a target.
        """
        answers = batch.answers()
        counts = np.asarray(answers.mask).sum(axis=1)
        if not counts.all():
            raise ValueError(f"row {int(counts.argmin())} of the batch has no target token")
        return cls(answers.slots, answers.ids, answers.mask)

    def __call__(self, logits: Array) -> Array:
        """[B,N,V] -> [B]."""
        scores = jax.nn.log_softmax(logits, axis=-1)
        found = -jnp.take_along_axis(scores, self.ids[..., None], axis=-1)[..., 0]
        mask = jnp.asarray(self.mask)
        return jnp.sum(found, axis=1, where=mask) / mask.sum(axis=1)


@struct.dataclass
class Divergence:
    """KL divergence from the unedited model, KL(p_unedited || p_edited), in nats per slot."""

    slots: Ids
    reference: Ids
    tokens: None = None
    unit: str = struct.field(pytree_node=False, default="nats")

    @classmethod
    def of(cls, model: Transformer, batch: Batch, slots: Ids | None = None) -> Divergence:
        """From `model` on `batch`, at slots [B,N] (default each row's last real token)."""
        slots = last_slots(batch) if slots is None else np.asarray(slots, np.int32)
        logits = model(batch, logits_at=slots).logits
        return cls(slots, jax.nn.log_softmax(logits, axis=-1))

    def __call__(self, logits: Array) -> Array:
        """[B,N,V] -> [B]."""
        scores = jax.nn.log_softmax(logits, axis=-1)
        terms = jnp.exp(self.reference) * (self.reference - scores)
        return jnp.maximum(terms.sum(axis=-1), 0).mean(axis=-1)


@struct.dataclass
class OfLogits:
    """Any function of the logits [B,V] after each row's last real token."""

    slots: Ids
    function: Callable[[Array], Array] = struct.field(pytree_node=False)
    tokens: None = None
    unit: str = struct.field(pytree_node=False, default="metric")

    def __call__(self, logits: Array) -> Array:
        """[B,1,V] -> [B]."""
        return self.function(logits[:, 0])


def as_metric(model: Transformer, batch: Batch, metric: AnyMetric) -> Metric:
    """The metric, checked against the batch; a plain function is wrapped in `OfLogits`.

    Args:
      model: the model whose logits it will read.
      batch: the prompts.
      metric: a `Metric`, or a function from logits float32 [B,V] to [B].

    Raises:
      ValueError: the model has no logits for each token; the metric reads slots or tokens that
        are not there, or does not return one float per row.
    """
    config = model.config
    if config.head not in ("lm", "mlm") or config.image is not None:
        raise ValueError(
            f"a sweep needs logits at every token, but this model's head is {config.head!r}"
        )
    rows, width = np.shape(batch.tokens)
    made: Any = metric if hasattr(metric, "slots") else OfLogits(last_slots(batch), metric)
    slots = np.asarray(made.slots)
    if slots.ndim != 2 or slots.shape[0] != rows or not slots.shape[1]:
        raise ValueError(
            f"{name_of(metric)} reads slots of shape {slots.shape}, expected [B,N] with B={rows}"
        )
    real = np.asarray(batch.mask)
    if slots.min() < 0 or slots.max() >= width:
        raise ValueError(f"{name_of(metric)} reads slot {slots.max()} of rows of {width} slots")
    counted = np.take_along_axis(real, slots, axis=1)
    if not (counted | (slots == 0)).all():  # 0 fills up rows that have fewer targets
        row, index = np.argwhere(~counted)[0]
        raise ValueError(
            f"{name_of(metric)} reads slot {slots[row, index]} of row {row}, which is padding"
        )
    size = config.vocab_size
    if made.tokens is not None:
        tokens = np.asarray(made.tokens)
        if tokens.ndim != 2 or tokens.shape[0] != rows:
            raise ValueError(f"{name_of(metric)} reads tokens of shape {tokens.shape}, not [B,M]")
        if tokens.min() < 0 or tokens.max() >= size:
            wild = tokens.min() if tokens.min() < 0 else tokens.max()
            raise ValueError(
                f"{name_of(metric)} reads token id {wild}, outside the vocabulary of {size}"
            )
        size = tokens.shape[1]
    logits = jax.ShapeDtypeStruct((*slots.shape, size), jnp.float32)
    found = jax.eval_shape(made, logits)
    if getattr(found, "shape", None) != (rows,) or not jnp.issubdtype(found.dtype, jnp.floating):
        raise ValueError(
            f"{name_of(metric)} must return one float per row, float [B] with B={rows}, got "
            f"{getattr(found, 'dtype', type(found).__name__)} of shape "
            f"{getattr(found, 'shape', None)}"
        )
    return made


def read_tokens(logits: Array, metric: Metric) -> Array:
    """Of logits [B,N,V] those that the metric reads."""
    if metric.tokens is None:
        return logits
    return jnp.take_along_axis(logits, jnp.asarray(metric.tokens)[:, None], axis=2)


def name_of(metric: Any) -> str:
    """How errors and results name a metric."""
    metric = metric.function if isinstance(metric, OfLogits) else metric
    return getattr(metric, "__name__", None) or type(metric).__name__


def _ids(name: str, ids: Ids, batch: Batch) -> np.ndarray:
    rows = np.shape(batch.tokens)[0]
    array = np.asarray(ids)
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or array.shape[0] != rows or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{name} must be token ids [B] or [B,A] with B={rows}, got {array.dtype} of shape "
            f"{np.shape(ids)}"
        )
    if not (array >= 0).any(axis=1).all():
        row = int(np.argmin((array >= 0).any(axis=1)))
        raise ValueError(f"{name} names no token for row {row}: {array[row].tolist()}")
    return array.astype(np.int32)


def _means(ids: np.ndarray) -> np.ndarray:
    """Weights that average over the tokens of each row that are there."""
    there = ids >= 0
    return (there / there.sum(axis=1, keepdims=True)).astype(np.float32)


def _take(values: Array, ids: Ids, missing: float) -> Array:
    """values [B,V] at ids [B,A], `missing` where an id fills up."""
    ids = jnp.asarray(ids)
    taken = jnp.take_along_axis(values, jnp.maximum(ids, 0), axis=-1)
    return jnp.where(ids < 0, missing, taken)
