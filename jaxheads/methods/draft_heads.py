"""Draft heads for speculative decoding: Hydra, Hydra++ and Medusa on the same hidden states.

Sources: see `jaxheads.decode.draft`. The model is frozen and read once: its normalised last states
and its most likely next tokens are kept, and the heads are trained on them. The loss of a head is
the cross-entropy with what the model itself says at the token that the head guesses (Hydra++'s
teacher loss), given the text before. Published: Medusa learning rate 1e-3 with a cosine, Hydra++
5e-4, batch 32, weight decay 0.1, ten epochs of ShareGPT; tokens a step with Vicuna-7B and trees of
63 nodes: Medusa 2.58, Hydra 3.04, Hydra++ 3.70.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxheads.data.rows import ArrayRows
from jaxheads.decode.draft import KINDS, DraftHeads, Ends
from jaxheads.decode.speculative import speculate
from jaxheads.methods.measure import in_parts, readable
from jaxheads.methods.method import Data, TextData, Tuned
from jaxheads.model.batch import Batch
from jaxheads.model.layout import whole
from jaxheads.model.parameters import Tree
from jaxheads.model.transformer import Transformer
from jaxheads.names import choose
from jaxheads.train.fit import Fit
from jaxheads.train.optimizer import Optimizer
from jaxheads.train.step import Metrics

if TYPE_CHECKING:
    from jaxheads.data.rows import Rows
    from jaxheads.train.job import Job

Array = jax.Array
ROWS = 8
"""Rows that the model reads at a time, where it is measured and where states are made."""


@struct.dataclass
class States:
    """What a model says about rows of text.

    Attributes:
      batch: the text, [N,T].
      hidden: [N,T,D], the normalised last stream.
      ids: int32 [N,T,K], the most likely next tokens, the first one first.
      shares: float32 [N,T,K], their probabilities.
    """

    batch: Batch
    hidden: Array
    ids: Array
    shares: Array


@dataclass(frozen=True)
class DraftTraining:
    """Settings.

    Attributes:
      kinds: which heads are trained, of `KINDS`; the first is the method's own, the others are
        its controls.
      heads: draft heads of each.
      vocabulary: tokens that are drafted, those which the model most often says about the
        training text; None for all.
      top: K, likely next tokens that are learned from.
      prompts: held-out rows that are continued to count tokens a step.
      prompt_length: their tokens.
      new_tokens: tokens generated of each.
      fit: how all are trained.

    Raises:
      ValueError: an unknown or repeated kind, a number below 1.
    """

    kinds: tuple[str, ...] = ("hydra", "medusa")
    heads: int = 3
    vocabulary: int | None = 8192
    top: int = 16
    prompts: int = 4
    prompt_length: int = 32
    new_tokens: int = 48
    fit: Fit = field(
        default_factory=lambda: Fit(
            steps=400,
            optimizer=Optimizer(learning_rate=1e-3, schedule="cosine", warmup=20, end=0.1),
        )
    )

    def __post_init__(self) -> None:
        for kind in self.kinds:
            choose("kind", kind, KINDS)
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"kinds must differ, at least one, got {self.kinds}")
        for name in ("heads", "vocabulary", "top", "prompts", "prompt_length", "new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def train(self, job: Job, model: Transformer, tokenizer: Any, data: Data) -> dict[str, Tuned]:
        """Trains each kind.

        Returns:
          By kind; `Tuned.beside` is what `DraftHeads.of` takes.

        Raises:
          ValueError: data that is no running text, rows too short for the heads, a vocabulary
            larger than the model's.
        """
        text = self._text(data, model)
        sides = (text.train, text.held_out)
        train, held_out = (states_of(job, model, rows, self.top) for rows in sides)
        vocabulary = None
        if self.vocabulary is not None:
            vocabulary = frequent_tokens(train, self.vocabulary, model.config.vocab_size)
        tuned = {}
        for kind in self.kinds:
            key = jax.random.key(job.seed)
            heads = DraftHeads.new(model.config, kind, self.heads, key, vocabulary=vocabulary)
            start, frozen = _divided(model, heads)
            trained = job.fit(
                kind, draft_loss, start, frozen, rows=ArrayRows(train), fit=self.fit,
                held_out=ArrayRows(held_out),
            )  # fmt: skip
            beside = trained | ({} if vocabulary is None else {"vocabulary": vocabulary})
            count = sum(leaf.size for leaf in jax.tree.leaves(start))
            tuned[kind] = Tuned(trained=count, beside=beside)
        return tuned

    def measure(
        self, job: Job, model: Transformer, data: Data, tuned: Tuned | None = None
    ) -> dict[str, float]:
        """How well heads guess; of a variant without heads, untrained ones of Medusa's kind.

        Returns:
          "loss", mean over heads, nats; "accuracy_1", ..., the share of held-out tokens at which
          the guess of each head is the model's own; "tokens_per_step" of greedy decoding from
          held-out prompts with the default tree of `speculate`, and "kept_1", ..., the share of
          its steps in which the draft of each head was kept.
        """
        text = self._text(data, model)
        if tuned is None or tuned.beside is None:
            heads = DraftHeads.new(model.config, "medusa", self.heads, jax.random.key(0))
        else:
            heads = DraftHeads.of(readable(tuned.beside), model.config)
        states = states_of(job, model, text.held_out, self.top)
        trained, frozen = _divided(model, heads)
        found = _mean_scores(trained, frozen, states)
        rows = text.held_out[np.arange(min(self.prompts, len(text.held_out)))]
        prompts = Batch(*(x[:, : self.prompt_length] for x in (rows.tokens, rows.mask)))
        made = speculate(model, heads, prompts, max_new_tokens=self.new_tokens)
        kept = {f"kept_{i}": float(share) for i, share in enumerate(made.acceptance, 1)}
        return found | kept | {"tokens_per_step": made.tokens_per_step}

    def _text(self, data: Data, model: Transformer) -> TextData:
        if not isinstance(data, TextData):
            raise ValueError("draft heads learn from running text, such as corpus:python-docs")
        length = data.train[np.arange(1)].tokens.shape[1]
        if length < self.heads + 2:
            raise ValueError(f"rows of {length} tokens are too short for {self.heads} draft heads")
        most = model.config.vocab_size
        if self.vocabulary is not None and self.vocabulary > most:
            raise ValueError(f"vocabulary {self.vocabulary} is more than the model's {most} tokens")
        return data


def states_of(job: Job, model: Transformer, rows: Rows, top: int) -> States:
    """What a model says about all rows: numpy arrays, on the host.

    They take N T (D + 2K) numbers of 4 bytes: 2.5 kB a token of SmolLM2.
    """
    batch = rows[np.arange(len(rows))]
    found = in_parts(job, _reading(top), model, None, batch, ROWS)
    return States(batch, *found)


def frequent_tokens(states: States, count: int, vocab_size: int) -> Array:
    """int32 [M], ascending: the tokens that the model most often says next.

    Ties, and tokens that it never says, go by id: in a BPE vocabulary small ids are frequent.
    """
    said = np.bincount(states.ids[..., 0].ravel(), minlength=vocab_size)
    return jnp.asarray(np.sort(np.argsort(-said, kind="stable")[:count]), jnp.int32)


def draft_loss(
    params: Tree, frozen: Any, states: States, key: Array | None
) -> tuple[Array, Metrics]:
    """Mean over heads of the cross-entropy with the model's own distribution.

    Args:
      params: `DraftHeads.params` without the vocabulary.
      frozen: "ends", `Ends`; "index", int32 [V], the place of each token among those that are
        drafted, -1 for none.
      states: rows; the first of `ids` are the targets of accuracy.
      key: not used.

    Returns:
      The loss in nats, of the likely tokens that are kept and drafted; "accuracy_1", ...; and
      "weight", the number of guesses of the last head.
    """
    ends, index = frozen["ends"], frozen["index"]
    heads = DraftHeads.of(params, ends.config)
    batch, hidden = states.batch, states.hidden
    block = heads.block(ends.config)
    if block is not None:
        mask, segments = jax.tree.map(jnp.asarray, (batch.mask, batch.segments))
        context, _ = block.begin(mask, None, "prefill", {}, {}, segments)
        hidden = block.run(hidden, context, {}, None)[0]
    vectors, length = ends.vectors(batch.tokens), batch.tokens.shape[1]
    losses, metrics = [], {}
    for number, head in enumerate(heads.heads, 1):
        # Head i reads tokens t+1 to t+i and says what the model says at t+i.
        size = length - number
        before = [vectors[:, first : first + size] for first in range(1, number + 1)]
        logits = ends.logits(head(hidden[:, :size], jnp.stack(before, axis=2)))
        valid = batch.mask[:, :size] & batch.mask[:, number:]
        if batch.segments is not None:
            valid &= batch.segments[:, :size] == batch.segments[:, number:]
        ids = index[states.ids[:, number:]]
        shares = jnp.where(ids >= 0, states.shares[:, number:], 0)
        said = jnp.take_along_axis(logits, jnp.maximum(ids, 0), axis=-1)
        surprise = jax.nn.logsumexp(logits, axis=-1, keepdims=True) - said
        right = jnp.argmax(logits, axis=-1) == ids[..., 0]
        weight = jnp.sum(valid, dtype=jnp.float32)
        total = jnp.where(valid, jnp.sum(shares * surprise, axis=-1), 0).sum()
        losses.append(total / jnp.maximum(weight, 1))
        metrics[f"accuracy_{number}"] = jnp.sum(valid & right) / jnp.maximum(weight, 1)
    return jnp.mean(jnp.stack(losses)), jax.lax.stop_gradient(metrics | {"weight": weight})


def _divided(model: Transformer, heads: DraftHeads) -> tuple[Tree, dict[str, Any]]:
    """What of heads is trained, and what the loss takes beside it."""
    params, vocabulary = dict(heads.params), heads.vocabulary
    params.pop("vocabulary", None)
    size = model.config.vocab_size
    index = jnp.arange(size, dtype=jnp.int32)
    if vocabulary is not None:
        index = jnp.full(size, -1, jnp.int32).at[vocabulary].set(jnp.arange(len(vocabulary)))
    return params, {"ends": Ends.of(model, vocabulary), "index": index}


def _mean_scores(params: Tree, frozen: Mapping[str, Any], states: States) -> dict[str, float]:
    """The loss and its metrics over all rows."""
    rows, count = ArrayRows(states), len(states.hidden)
    totals: dict[str, float] = {}
    weights = 0.0
    for first in range(0, count, ROWS):
        taken = np.arange(first, min(first + ROWS, count))
        loss, metrics = _score(params, frozen, rows[taken])
        found = {"loss": loss} | metrics
        weight = float(found.pop("weight"))
        weights += weight
        for name, value in found.items():
            totals[name] = totals.get(name, 0.0) + weight * float(value)
    return {name: value / weights for name, value in totals.items()}


@functools.cache
def _reading(top: int) -> Callable[..., tuple[Array, Array, Array]]:
    """What a model says about rows, compiled."""

    @jax.jit
    def read(model: Transformer, edits: None, rows: Batch) -> tuple[Array, Array, Array]:
        out = model(rows, taps="final")
        logits = whole(out.logits, 2)
        values, ids = jax.lax.top_k(logits, top)
        shares = jnp.exp(values - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
        return out.taps["final"], ids, shares

    return read


@jax.jit
def _score(params: Tree, frozen: Any, states: States) -> tuple[Array, Metrics]:
    return draft_loss(params, frozen, states, None)
