"""Bigram subnetworks: the few weights with which a language model predicts like a bigram table.

Source: Chang and Bergen (2025), "Bigram Subnetworks: Mapping to Next Tokens in Transformer Language
Models"; its released code; Savarese, Silva and Maire (2020) for continuous sparsification.

Every weight of attention and MLPs (not embeddings, norms or biases) is multiplied by a mask
m = sigmoid(beta * s). The weights are frozen, s starts at 0, beta starts at 1 and grows by 1.001 at
every step. The loss is

    CE(p(. | x_t), model) + (lambda / n) * sum m

over all positions, with p the bigram distribution of the training text and n the number of masks.
In the end a weight is kept where s > 0.

Published settings: AdamW with learning rate 5e-5 and weight decay 0.01, 32 sequences of 128 tokens,
at most 15,000 steps, lambda from 0 to 1000. Less than 0.2 % of the weights are kept, most of them
in the first MLP.

Decisions:

- beta needs the number of the step: it is a leaf of what is trained, which an optimizer of its own
  counts up (`CountingOptimizer`), so the loss stays a pure function of its arguments.
- p backs off to single tokens by Witten and Bell's (1991) rule: a token seen c(v) times, with d(v)
  different successors, has p(w | v) = (c(v, w) + d(v) u(w)) / (c(v) + d(v)), where u is the add-one
  estimate over single tokens. Only the `width` commonest successors of a token are kept, the rest
  of the mass goes to u, so [V,V] never exists.
- The reference stops when fewer weights are undecided, 0.1 < m < 0.9, than 1 % of those above 0.9;
  here both shares are metrics ("undecided", "kept") and the number of steps is fixed.
- k and v of a key/value head count for each query head that reads them (`head_shares`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from jaxheads.methods.method import TextData, Tuned
from jaxheads.methods.objective import rows_of
from jaxheads.model.batch import Batch
from jaxheads.model.parameters import Tree
from jaxheads.model.transformer import Transformer
from jaxheads.tasks import Tokenizer
from jaxheads.train.fit import Fit
from jaxheads.train.optimizer import Optimizer
from jaxheads.train.rules import Rule

if TYPE_CHECKING:
    from jaxheads.methods.method import TaskData
    from jaxheads.train.job import Job

Array = jax.Array
NAME = "bigram"
MASKED = {"attn": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}
"""The weights that get masks, by their place in `params["blocks"]`."""


@dataclass(frozen=True)
class BigramMasks:
    """Settings.

    Attributes:
      sparsity: lambda, weight of the mean mask.
      growth: factor on beta per step.
      width: successors kept of each token.
      controls: draws of random masks, as many weights of each matrix.
      fit: of the masks.
    """

    sparsity: float = 10.0
    growth: float = 1.001
    width: int = 256
    controls: int = 5
    fit: Fit = field(
        default_factory=lambda: Fit(
            steps=15_000,
            batch_size=32,
            optimizer=Optimizer(name="adamw", learning_rate=5e-5, weight_decay=0.01),
        )
    )

    def __post_init__(self) -> None:
        for name, least in (("sparsity", 0), ("growth", 1), ("width", 1), ("controls", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def train(
        self, job: Job, model: Transformer, tokenizer: Tokenizer, data: TaskData | TextData
    ) -> dict[str, Tuned]:
        """Trains the masks on texts.

        Returns:
          "bigram", the model with the kept weights only; "complement", with the others only; and
          "random 1", ... (as many weights of each matrix of each layer, drawn at random). The
          weights left out are zero.

        Raises:
          ValueError: the data are examples of a task.
        """
        if not isinstance(data, TextData):
            raise ValueError(
                "bigram masks are trained on text, such as data.source = 'corpus:python-docs', "
                "and not on examples with answers"
            )
        table = count_bigrams(data.train, model.config.vocab_size, self.width)
        start = {"scores": initial_scores(model), "step": jnp.float32(0)}
        frozen = {
            "model": model,
            "table": table,
            "sparsity": jnp.float32(self.sparsity),
            "growth": jnp.float32(self.growth),
        }
        job = replace(job, rules=(*job.rules, Rule(r"table/\w+", None)))
        fit = replace(self.fit, optimizer=CountingOptimizer(**asdict(self.fit.optimizer)))
        rows = rows_of(data)
        scores = job.fit(NAME, bigram_loss, start, frozen, fit=fit, **rows)["scores"]
        kept = jax.tree.map(lambda s: s > 0, scores)
        masks = {NAME: kept, "complement": jax.tree.map(jnp.logical_not, kept)}
        for n in range(1, self.controls + 1):
            key = jax.random.fold_in(jax.random.key(job.seed), n)
            masks[f"random {n}"] = shuffled(kept, key)
        count = sum(leaf.size for leaf in jax.tree.leaves(scores))
        return {
            name: Tuned(
                params={"blocks": masked(model, mask)},
                trained=count,
                scores=head_shares(mask),
            )
            for name, mask in masks.items()
        }


@dataclass(frozen=True)
class CountingOptimizer(Optimizer):
    """An optimizer for {"scores": ..., "step": float32 []} that adds 1 to "step" at every step."""

    def build(self, steps: int, mask: Any = None) -> optax.GradientTransformation:
        """The transformation; see `Optimizer.build`."""
        assert mask is None, "all masks are trained"
        count = optax.GradientTransformation(
            lambda params: optax.EmptyState(),
            lambda gradient, state, params=None: (jax.tree.map(jnp.ones_like, gradient), state),
        )
        parts = {"scores": super().build(steps), "step": count}
        return optax.partition(parts, {"scores": "scores", "step": "step"})


@struct.dataclass
class Bigrams:
    """A bigram distribution p(w | v), sparse.

    p(w | v) = sum_c shares[r, c] * [ids[r, c] = w] + rest[r] * unigram[w], with r = row[v].

    Attributes:
      row: int32 [V], the row of each token in the next three; 0 for tokens never followed.
      ids: int32 [R,C], its commonest successors.
      shares: float32 [R,C], their probabilities without the back-off; 0 where there are fewer.
      rest: float32 [R], probability that goes to the distribution of single tokens.
      unigram: float32 [V], that distribution.
    """

    row: Array
    ids: Array
    shares: Array
    rest: Array
    unigram: Array


def count_bigrams(rows: Any, vocab_size: int, width: int = 256, chunk: int = 256) -> Bigrams:
    """Counts pairs of neighbouring tokens of texts, on the host.

    Args:
      rows: `len(rows)` texts, which `rows[indices]` gives as `Batch`es [N,T].
      vocab_size: V.
      width: C, successors kept of each token.
      chunk: texts read at a time.

    Raises:
      ValueError: there is no pair.
    """
    pairs, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    unigram = np.ones(vocab_size, np.int64)
    for tokens, mask, followed in _texts(rows, chunk):
        unigram += np.bincount(tokens[mask], minlength=vocab_size)
        found = (tokens[:, :-1].astype(np.int64) * vocab_size + tokens[:, 1:])[followed]
        pairs, place = np.unique(np.concatenate([pairs, found]), return_inverse=True)
        counts = np.bincount(place, np.concatenate([counts, np.ones(len(found))])).astype(np.int64)
    if not len(pairs):
        raise ValueError("the texts hold no two neighbouring tokens: there are no bigrams to count")
    first, second = np.divmod(pairs, vocab_size)
    # By token, then the commonest successor first.
    order = np.lexsort((second, -counts, first))
    first, second, counts = first[order], second[order], counts[order]
    seen, begin, different = np.unique(first, return_index=True, return_counts=True)
    rank = np.arange(len(first)) - np.repeat(begin, different)
    at = np.repeat(np.arange(1, len(seen) + 1), different)
    total = np.add.reduceat(counts, begin) + different
    columns = min(width, int(different.max()))
    keep = rank < columns
    ids = np.zeros((len(seen) + 1, columns), np.int32)
    shares = np.zeros((len(seen) + 1, columns))
    ids[at[keep], rank[keep]] = second[keep]
    shares[at[keep], rank[keep]] = (counts / np.repeat(total, different))[keep]
    row = np.zeros(vocab_size, np.int32)
    row[seen] = np.arange(1, len(seen) + 1)
    return Bigrams(
        row=jnp.asarray(row),
        ids=jnp.asarray(ids),
        shares=jnp.asarray(shares, jnp.float32),
        rest=jnp.asarray(1 - shares.sum(axis=1), jnp.float32),
        unigram=jnp.asarray(unigram / unigram.sum(), jnp.float32),
    )


def _texts(rows: Any, chunk: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Tokens [N,T], which are real [N,T], and which are followed by one of their text [N,T-1]."""
    for first in range(0, len(rows), chunk):
        batch: Batch = rows[np.arange(first, min(first + chunk, len(rows)))]
        followed = np.asarray(replace(batch, targets=None).target_mask)[:, 1:]
        yield np.asarray(batch.tokens), np.asarray(batch.mask), followed


def bigram_probability(table: Bigrams, tokens: Array, following: Array) -> Array:
    """p(following | tokens), float32, for int arrays of one shape."""
    row = table.row[tokens]
    same = table.ids[row] == following[..., None]
    return jnp.sum(table.shares[row], -1, where=same) + table.rest[row] * table.unigram[following]


def bigram_cross_entropy(table: Bigrams, tokens: Array, logits: Array) -> Array:
    """-sum_w p(w | tokens) log softmax(logits)[w] in nats: [B,T] of [B,T] and [B,T,V]."""
    row = table.row[tokens]
    of_successors = jnp.take_along_axis(logits, table.ids[row], axis=-1)
    expected = jnp.sum(table.shares[row] * of_successors, axis=-1)
    expected += table.rest[row] * (logits @ table.unigram)
    return jax.nn.logsumexp(logits, axis=-1) - expected


def initial_scores(model: Transformer) -> Tree:
    """s = 0 for every weight that gets a mask, float32, nested as in `params["blocks"]`."""
    blocks = model.params["blocks"]
    return {
        part: {name: jnp.zeros(blocks[part][name].shape) for name in names if name in blocks[part]}
        for part, names in MASKED.items()
    }


def masked(model: Transformer, masks: Mapping[str, Any]) -> Tree:
    """The weights times their masks, in a nested dict like `params["blocks"]`."""
    blocks = model.params["blocks"]
    return {
        part: {
            name: blocks[part][name] * m.astype(blocks[part][name].dtype)
            for name, m in group.items()
        }
        for part, group in masks.items()
    }


def subnetwork(model: Transformer, masks: Mapping[str, Any]) -> Transformer:
    """The model with masked weights; differentiable in the masks."""
    params = model.params
    found = masked(model, masks)
    blocks = {
        name: leaf | found.get(name, {}) if isinstance(leaf, dict) else leaf
        for name, leaf in params["blocks"].items()
    }
    return Transformer(model.config, params | {"blocks": blocks})


def bigram_loss(
    trained: Any, frozen: Any, batch: Batch, key: Array | None
) -> tuple[Array, dict[str, Array]]:
    """The loss of the module's docstring, in nats per position.

    Args:
      trained: "scores", s as `initial_scores` gives them; "step", steps taken, float32 [].
      frozen: "model", "table" (`Bigrams`), "sparsity" (lambda) and "growth" (of beta per step).
      batch: texts.
      key: not used.
    """
    del key
    beta = frozen["growth"] ** jax.lax.stop_gradient(trained["step"])
    masks = jax.tree.map(lambda s: jax.nn.sigmoid(beta * s), trained["scores"])
    leaves = jax.tree.leaves(masks)
    count = sum(leaf.size for leaf in leaves)

    def share(test: Any) -> Array:
        return (
            sum((jnp.sum(test(leaf), dtype=jnp.float32) for leaf in leaves), jnp.float32(0)) / count
        )

    task, positions = _mean_cross_entropy(
        subnetwork(frozen["model"], masks), frozen["table"], batch
    )
    mean = share(lambda m: m)
    metrics = {
        "bigram_loss": task,
        "mean_mask": mean,
        "kept": share(lambda m: m > 0.9),
        "undecided": share(lambda m: (m > 0.1) & (m < 0.9)),
        "weight": positions,
    }
    return task + frozen["sparsity"] * mean, metrics


def _mean_cross_entropy(model: Transformer, table: Bigrams, batch: Batch) -> tuple[Array, Array]:
    losses = bigram_cross_entropy(table, jnp.asarray(batch.tokens), model(batch).logits)
    # Every real token predicts something, the last of a text too.
    mask = jnp.asarray(batch.mask)
    count = mask.sum().astype(jnp.float32)
    return jnp.sum(losses, where=mask) / jnp.maximum(count, 1), count


@jax.jit
def bigram_scores(model: Transformer, table: Bigrams, batch: Batch) -> dict[str, Array]:
    """How much a model predicts like the table.

    Returns:
      float32 [] each: "cross_entropy" of the table's distribution in nats, over all tokens; and
      "correlation", Pearson's r of the surprisals of each text's actual next tokens.
    """
    logits, tokens = model(batch).logits, jnp.asarray(batch.tokens)
    mask = jnp.asarray(batch.mask)
    losses = bigram_cross_entropy(table, tokens, logits)
    following, counted = tokens[:, 1:], jnp.asarray(batch.target_mask)[:, 1:]
    ours = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], following)
    theirs = -jnp.log(bigram_probability(table, tokens[:, :-1], following))
    ours, theirs = (x - jnp.mean(x, where=counted) for x in (ours, theirs))
    product, *squares = (jnp.sum(x, where=counted) for x in (ours * theirs, ours**2, theirs**2))
    return {
        "cross_entropy": jnp.sum(losses, where=mask) / mask.sum(),
        "correlation": product / jnp.sqrt(squares[0] * squares[1]),
    }


def shuffled(masks: Mapping[str, Any], key: Array) -> Tree:
    """Masks of as many weights in each matrix of each layer, drawn at random."""
    leaves, tree = jax.tree.flatten(dict(masks))

    def shuffle(index: int, leaf: Array) -> Array:
        keys = jax.random.split(jax.random.fold_in(key, index), len(leaf))
        flat = jax.vmap(jax.random.permutation)(keys, leaf.reshape(len(leaf), -1))
        return flat.reshape(leaf.shape)

    return jax.tree.unflatten(tree, [shuffle(i, leaf) for i, leaf in enumerate(leaves)])


def block_shares(masks: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Share of the weights that are kept, float64 [L] of each part ("attn", "mlp")."""
    found = {}
    for part, group in masks.items():
        kept = [np.asarray(m).reshape(len(m), -1) for m in group.values()]
        found[part] = np.concatenate(kept, axis=1).mean(axis=1)
    return found


def head_shares(masks: Mapping[str, Any]) -> np.ndarray:
    """Share of each query head's weights that are kept, float64 [L,H].

    Its q and o, and k and v of the key/value head that it reads.
    """
    attention = {name: np.asarray(mask, np.float64) for name, mask in masks["attn"].items()}
    q, o = attention["q"].sum((1, 3)), attention["o"].sum((2, 3))
    group = q.shape[1] // attention["k"].shape[2]
    kv = sum(np.repeat(attention[name].sum((1, 3)), group, axis=1) for name in ("k", "v"))
    size = 4 * math.prod(attention["q"].shape[i] for i in (1, 3))
    shares: np.ndarray = (q + o + kv) / size
    return shares
