"""ITI: inference-time intervention along the directions that tell true from false.

Source: Li, Patel, Viégas, Pfister and Wattenberg (2023), "Inference-Time Intervention: Eliciting
Truthful Answers from a Language Model"; its released code for what the paper leaves open.

1. values: z of every head at the last token of true and of false statements.
2. probes: one logistic regression per head. Heads are ranked by accuracy on held-back statements.
3. directions: theta_h of unit length, the difference of the mean over true and the mean over false
   statements ("mass_mean"), the probe's own weight ("probe"), or a random one ("random"); sigma_h
   is the standard deviation of z_h . theta_h over the statements.
4. intervention: z_h += alpha * sigma_h * theta_h for the K best heads, at the last token of the
   prompt and at every token generated after it.

Published settings, Llama-7B: K = 48 of 1024 heads, alpha = 15, probes without penalty search
(scikit-learn's default, C = 1), 20 % of the training questions for ranking the heads.

What the reference does differently:

- sigma is taken over another set of activations (an answer followed by an unrelated question); here
  over the statements themselves.
- Its flag for random directions draws random heads instead. Here both controls exist.
- Its script that bakes the offsets into the weights stores them, in the coordinates of z, as the
  bias of the output projection, whose coordinates are those of the residual stream; the map through
  W_O is commented out. `jaxheads.fold` does it, and a test holds that.

Where it acts: a variant's edits are offsets at every token, and `Tuned.acts` says that they belong
at the tokens that predict an answer's ("answers"), which `placed` does for answers scored under
teacher forcing. `when_generating` does it for `jaxheads.generate`; the two are one computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads import tasks
from jaxheads.edits import Edits, offset_heads
from jaxheads.methods.measure import readable
from jaxheads.methods.method import Tuned
from jaxheads.methods.retrieval_heads import Head, random_heads, top_heads
from jaxheads.model.batch import Batch
from jaxheads.model.config import ModelConfig
from jaxheads.model.context import Tap
from jaxheads.model.layout import whole
from jaxheads.model.transformer import Transformer
from jaxheads.names import choose
from jaxheads.taps import last_token
from jaxheads.tasks import Example

if TYPE_CHECKING:
    from jaxheads.methods.method import TaskData
    from jaxheads.train.job import Job

Array = jax.Array
NAME = "iti"
DIRECTIONS = ("mass_mean", "probe", "random")
NEWTON_STEPS = 30


@dataclass(frozen=True)
class ITI:
    """Settings.

    Attributes:
      heads: K, heads that are shifted.
      alpha: strength, in standard deviations along the direction.
      direction: "mass_mean", "probe" or "random".
      validation: share of the training groups that ranks the heads.
      c: inverse of the probes' L2 penalty, as in scikit-learn.
      controls: draws of random heads, and of random directions, to compare with.
    """

    heads: int = 48
    alpha: float = 15.0
    direction: str = "mass_mean"
    validation: float = 0.2
    c: float = 1.0
    controls: int = 5

    def __post_init__(self) -> None:
        choose("direction", self.direction, DIRECTIONS)
        if self.heads < 1:
            raise ValueError(f"heads must be at least 1, got {self.heads}")
        if not self.c > 0:
            raise ValueError(f"c must be above 0, got {self.c}")
        if self.controls < 0:
            raise ValueError(f"controls must be at least 0, got {self.controls}")

    def train(
        self, job: Job, model: Transformer, tokenizer: tasks.Tokenizer, data: TaskData
    ) -> dict[str, Tuned]:
        """Finds heads and their directions from the training examples.

        Returns:
          "iti"; "random 1", ... (other heads along their own directions) and
          "random direction 1", ... (the same heads, shifted as far another way).

        Raises:
          ValueError: an example without a wrong answer, more heads than the model has, or too
            few groups of examples to hold some back.
        """
        config = model.config
        fitted, held_back = tasks.split(data.train, self.validation, job.seed)
        values, labels = statement_values(job, model, tokenizer, fitted)
        check, truth = statement_values(job, model, tokenizer, held_back)
        weight, bias = fit_probes(values, labels, self.c)
        accuracy = probe_accuracy(check, truth, weight, bias)
        chosen = top_heads(accuracy, self.heads)
        every, marks = np.concatenate([values, check], 1), np.concatenate([labels, truth])
        shape = (self.controls + 1, config.n_layers, config.n_heads, config.head_dim)
        random = unit(jax.random.normal(jax.random.key(job.seed), shape))
        theta = {"mass_mean": mass_mean(every, marks), "probe": unit(weight), "random": random[0]}
        towards = theta[self.direction]
        size = self.alpha * spread(every, towards)[..., None]
        tuned = {NAME: replace(shifted(config, chosen, size * towards), scores=accuracy)}
        others = random_heads(shape[1:3], self.heads, self.controls, job.seed, chosen)
        for n, heads in enumerate(others, 1):
            tuned[f"random {n}"] = shifted(config, heads, size * towards)
            tuned[f"random direction {n}"] = shifted(config, chosen, size * random[n])
        return tuned


def shifted(config: ModelConfig, heads: Sequence[Head], offset: Array | np.ndarray) -> Tuned:
    """Offsets [L,H,Dh] at chosen heads only, at the tokens that predict an answer's."""
    keep = np.zeros((config.n_layers, config.n_heads, 1), np.float32)
    keep[tuple(np.asarray(heads).T)] = 1
    edits = offset_heads(config, keep * offset)
    trained = len(heads) * config.head_dim
    return Tuned(edits=edits, heads=list(heads), trained=trained, acts="answers")


def statement_values(
    job: Job, model: Transformer, tokenizer: tasks.Tokenizer, examples: Sequence[Example]
) -> tuple[np.ndarray, np.ndarray]:
    """Values of the heads at the last token of each prompt with its right and its wrong answer.

    Returns:
      z float32 [L,2N,H,Dh] and labels bool [2N], N true statements before N false ones.

    Raises:
      ValueError: an example without a wrong answer.
    """
    for index, example in enumerate(examples):
        if example.wrong is None:
            raise ValueError(f"example {index} has no wrong answer: {example.prompt!r}")
    # Only what `encode` reads is kept: the lists of answers no longer hold the answer.
    said = [Example(e.prompt, e.answer) for e in examples]
    said += [replace(true, answer=e.wrong or "") for true, e in zip(said, examples, strict=True)]
    values = last_values(job, model, tasks.encode(said, tokenizer).batch)
    return values, np.arange(len(said)) < len(examples)


def last_values(job: Job, model: Transformer, batch: Batch, batch_size: int = 32) -> np.ndarray:
    """z of every head at each row's last real token.

    Args:
      job: the devices.
      model: the model.
      batch: all rows, numpy arrays [N,T].
      batch_size: rows at a time, a multiple of what the mesh divides rows by.

    Returns:
      float32 [L,N,H,Dh] on the host.
    """
    rows, (host, hosts) = batch.tokens.shape[0], job.slice
    share = batch_size // hosts
    parts = []
    with job.devices():
        model = job.place(model)
        for first in range(0, rows, batch_size):
            # The last part repeats the last row, so that all have one shape.
            taken = np.minimum(np.arange(first, first + batch_size), rows - 1)
            mine = taken[host * share : (host + 1) * share]
            given = job.send(jax.tree.map(lambda leaf, mine=mine: leaf[mine], batch))
            parts.append(np.asarray(readable(_last_values(model, given)))[:, : rows - first])
    return np.concatenate(parts, axis=1)


@jax.jit
def _last_values(model: Transformer, batch: Batch) -> Array:
    taps = {"last": Tap("z", last_token)}
    # Unembedded at one slot only: the logits are not wanted.
    last = model(batch, taps=taps, logits_at=jnp.zeros_like(batch.tokens[:, :1])).taps["last"]
    return whole(whole(last, 1), 2).astype(jnp.float32)


@jax.jit
def fit_probes(
    values: Array | np.ndarray, labels: Array | np.ndarray, c: float | Array = 1.0
) -> tuple[Array, Array]:
    """One logistic regression per head, all heads at once.

    Minimises |w|^2 / 2 + c * sum_n log(1 + exp(-y_n (w . z_n + b))) with y_n = +1 or -1, which is
    scikit-learn's objective (the intercept is not penalised), by Newton's method with a line
    search.

    Args:
      values: float32 [L,N,H,Dh].
      labels: bool [N].
      c: inverse of the penalty.

    Returns:
      Weights float32 [L,H,Dh] and intercepts float32 [L,H].
    """
    signs = jnp.where(labels, 1.0, -1.0)

    def layer(x: Array) -> tuple[Array, Array]:
        return jax.vmap(lambda head: _newton(head, signs, c), in_axes=1)(x)

    # One layer at a time: the Hessians of all heads need not exist together.
    with jax.default_matmul_precision("float32"):
        weight, bias = jax.lax.map(layer, jnp.asarray(values, jnp.float32))
    return weight, bias


def _newton(x: Array, signs: Array, c: float | Array) -> tuple[Array, Array]:
    """The regression of one head: x [N,Dh], signs [N]."""
    # Centring moves the free intercept only, and keeps float32 exact enough.
    middle = x.mean(axis=0)
    rows = jnp.concatenate([x - middle, jnp.ones((len(x), 1))], axis=1)
    penalty = jnp.ones(rows.shape[1]).at[-1].set(0.0)
    strides = jnp.append(0.5 ** jnp.arange(10), 0.0)

    def loss(w: Array) -> Array:
        return jnp.sum(penalty * w**2) / 2 + c * jnp.sum(jax.nn.softplus(-signs * (rows @ w)))

    def step(_: Any, w: Array) -> Array:
        wrong = jax.nn.sigmoid(-signs * (rows @ w))
        slope = penalty * w - c * (signs * wrong) @ rows
        curve = jnp.diag(penalty + 1e-6) + c * (rows.T * (wrong * (1 - wrong))) @ rows
        tried = w - strides[:, None] * jnp.linalg.solve(curve, slope)
        return tried[jnp.argmin(jax.vmap(loss)(tried))]

    w = jax.lax.fori_loop(0, NEWTON_STEPS, step, jnp.zeros(rows.shape[1]))
    return w[:-1], w[-1] - w[:-1] @ middle


def probe_accuracy(
    values: Array | np.ndarray,
    labels: Array | np.ndarray,
    weight: Array | np.ndarray,
    bias: Array | np.ndarray,
) -> np.ndarray:
    """Share of statements [L,N,H,Dh] that each head's probe tells right, float32 [L,H]."""
    score = (
        np.einsum("lnhd,lhd->lnh", np.asarray(values), np.asarray(weight))
        + np.asarray(bias)[:, None]
    )
    return ((score > 0) == np.asarray(labels)[:, None]).mean(axis=1, dtype=np.float32)


def mass_mean(values: Array | np.ndarray, labels: Array | np.ndarray) -> Array:
    """Unit vectors [L,H,Dh] from the mean over false to the mean over true statements."""
    values, labels = np.asarray(values), np.asarray(labels)
    return unit(values[:, labels].mean(axis=1) - values[:, ~labels].mean(axis=1))


def unit(vectors: Array | np.ndarray) -> Array:
    """Vectors at length 1 along the last axis; a zero vector stays zero."""
    array = jnp.asarray(vectors)
    length = jnp.linalg.norm(array, axis=-1, keepdims=True)
    return array / jnp.where(length > 0, length, 1)


def spread(values: Array | np.ndarray, direction: Array | np.ndarray) -> Array:
    """sigma [L,H]: standard deviation of z along each head's direction, over all statements."""
    return jnp.std(jnp.einsum("lnhd,lhd->lnh", values, direction), axis=1)


def when_generating(edits: Edits, prompts: Batch) -> Edits:
    """The edits at each prompt's last token and at every token generated after it."""
    mask = np.asarray(prompts.mask)
    last = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
    return edits.when(np.arange(mask.shape[1]) == last[:, None]) | edits.when("decode")
