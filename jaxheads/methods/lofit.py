"""LoFiT: localised fine-tuning of attention heads.

Source: Yin, Ye and Durrett (2024), "LoFiT: Localized Fine-tuning on LLM Representations"; its
released code for what the paper leaves open. Two stages, both on frozen weights:

1. importance: z'_h = (1 + A_h) * z_h with a vector A_h of size Dh for every head, trained with
   loss + l1 * sum |A|; heads are ranked by the Euclidean norm of A_h.
2. offsets: A is thrown away; z'_h = z_h + v_h is trained for the K best heads only.

Both start at N(0, 1e-3), act at every token, and use AdamW (no weight decay, the Hugging Face
trainer's default) with a learning rate that falls linearly to zero. Published settings for
Llama-2-7B: stage 1 learning rate 5e-3 and l1 5e-4 to 5e-3, stage 2 learning rate 1e-2 with K = 32
of 1024 heads, batch 8, 5 epochs. The loss is the cross-entropy of the answer tokens. The offsets
fold into the bias of the output projection (`jaxheads.fold`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxheads.edits import Affine, Edits
from jaxheads.methods.retrieval_heads import Head, random_heads, top_heads
from jaxheads.metrics import answer_scores, next_token_loss
from jaxheads.model.batch import Answers, Batch
from jaxheads.model.config import ModelConfig
from jaxheads.model.transformer import Transformer
from jaxheads.train import Checkpoints, TrainState, batches, make_step, run, start
from jaxheads.train.loop import OnStep
from jaxheads.train.step import Step

Array = jax.Array
INITIAL_STD = 1e-3


@dataclass(frozen=True)
class Importance:
    """Stage 1, finding heads.

    Attributes:
      steps: optimizer steps.
      learning_rate: peak, falling linearly to zero.
      l1: weight of the sum of |A|.
    """

    steps: int = 30
    learning_rate: float = 5e-3
    l1: float = 1e-3


@dataclass(frozen=True)
class Offsets:
    """Stage 2, training offsets.

    Attributes:
      steps: optimizer steps.
      learning_rate: peak, falling linearly to zero.
      heads: K, heads that get an offset.
    """

    steps: int = 40
    learning_rate: float = 1e-2
    heads: int = 14


@dataclass(frozen=True)
class Lofit:
    """Settings of both stages.

    Attributes:
      batch_size: examples of a step.
      seed: of the initial values and of the order of examples.
      importance: stage 1.
      offsets: stage 2.
    """

    batch_size: int = 8
    seed: int = 0
    importance: Importance = field(default_factory=Importance)
    offsets: Offsets = field(default_factory=Offsets)


def find_heads(
    model: Transformer,
    batch: Batch,
    settings: Lofit,
    *,
    on_step: OnStep = lambda step, metrics: None,
    checkpoints: Checkpoints | None = None,
) -> np.ndarray:
    """Stage 1.

    Args:
      model: the frozen model.
      batch: all training examples, with their answers as targets.
      settings: see `Lofit`.
      on_step: called with (steps done, metrics).
      checkpoints: where to save the run and resume it from.

    Returns:
      float32 [L,H]: the norm of A_h of each head.
    """
    stage = settings.importance
    factors = initial_factors(model.config, jax.random.key(settings.seed))
    state = _train(
        _importance_loss, {"edits": factors, "l1": stage.l1}, model, batch, settings, stage,
        on_step=on_step, checkpoints=checkpoints,
    )  # fmt: skip
    learned: Any = state.trainable["z"]
    change = learned.scale[:, 0, 0] - 1
    return np.asarray(jnp.linalg.norm(change, axis=-1))


def initial_factors(config: ModelConfig, key: Array) -> Edits:
    """1 + A at `z`, with A drawn from N(0, 1e-3)."""
    shape = (config.n_layers, 1, 1, config.n_heads, config.head_dim)
    return Edits(z=Affine(scale=1 + INITIAL_STD * jax.random.normal(key, shape)))


def train_offsets(
    model: Transformer,
    batch: Batch,
    heads: Sequence[Head],
    settings: Lofit,
    *,
    on_step: OnStep = lambda step, metrics: None,
    checkpoints: Checkpoints | None = None,
) -> Edits:
    """Stage 2: trains one offset of size Dh for each of `heads`; arguments as in `find_heads`.

    Returns:
      Edits whose only content is the offset [L,1,1,H,Dh] at `z`, zero at all other heads.
    """
    key = jax.random.fold_in(jax.random.key(settings.seed), 1)
    values = INITIAL_STD * jax.random.normal(key, (len(heads), model.config.head_dim))
    where = jnp.asarray(heads, jnp.int32)
    state = _train(
        _offsets_loss, {"edits": values, "heads": where}, model, batch, settings,
        settings.offsets, on_step=on_step, checkpoints=checkpoints,
    )  # fmt: skip
    return place_offsets(model.config, where, state.trainable)


def place_offsets(config: ModelConfig, heads: Array, values: Array) -> Edits:
    """Offsets [K,Dh] at heads int [K,2] as edits; differentiable in the values."""
    shape = (config.n_layers, 1, 1, config.n_heads, config.head_dim)
    zeros = jnp.zeros(shape, values.dtype)
    return Edits(z=Affine(offset=zeros.at[heads[:, 0], 0, 0, heads[:, 1]].set(values)))


def _importance_loss(factors: Edits, frozen: Any, data: Any) -> tuple[Array, dict[str, Array]]:
    task = next_token_loss(frozen["model"], *data, edits=factors)
    scale: Any = factors["z"]
    return task + frozen["l1"] * jnp.sum(jnp.abs(scale.scale - 1)), {"task_loss": task}


def _offsets_loss(values: Array, frozen: Any, data: Any) -> tuple[Array, dict[str, Array]]:
    edits = place_offsets(frozen["model"].config, frozen["heads"], values)
    task = next_token_loss(frozen["model"], *data, edits=edits)
    return task, {"task_loss": task}


def _train(
    loss: Callable[..., Any],
    parts: dict[str, Any],
    model: Transformer,
    batch: Batch,
    settings: Lofit,
    stage: Importance | Offsets,
    *,
    on_step: OnStep,
    checkpoints: Checkpoints | None,
) -> TrainState:
    optimizer, step = _stage(loss, stage.learning_rate, stage.steps)
    data = batches((batch, batch.answers()), settings.batch_size, settings.seed)
    frozen = {"model": model} | {name: part for name, part in parts.items() if name != "edits"}
    state = start(parts["edits"], optimizer)
    return run(
        state, step, frozen, data, steps=stage.steps, on_step=on_step, checkpoints=checkpoints
    )


@functools.cache
def _stage(
    loss: Callable[..., Any], learning_rate: float, steps: int
) -> tuple[optax.GradientTransformation, Step]:
    """The optimizer and the step of a stage; kept, so that one program serves all head sets."""
    schedule = optax.linear_schedule(learning_rate, 0.0, steps)
    optimizer = optax.adamw(schedule, weight_decay=0.0)
    return optimizer, make_step(loss, optimizer)


def evaluate(
    model: Transformer, batch: Batch, edits: Edits | None = None, batch_size: int = 64
) -> dict[str, float]:
    """Mean loss, token accuracy and exact match of the answers, over all rows of a batch."""
    answers = batch.answers()
    totals: dict[str, float] = {}
    rows = batch.tokens.shape[0]
    for first in range(0, rows, batch_size):
        part = slice(first, first + batch_size)
        chosen = jax.tree.map(lambda leaf, part=part: leaf[part], (batch, answers))
        found = jax.device_get(_scores(model, *chosen, edits))
        for name, value in found.items():
            totals[name] = totals.get(name, 0.0) + float(np.sum(value))
    return {name: total / rows for name, total in totals.items()}


@jax.jit
def _scores(
    model: Transformer, batch: Batch, answers: Answers, edits: Edits | None
) -> dict[str, Array]:
    return answer_scores(model, batch, answers, edits=edits)


def head_sets(importance: np.ndarray, count: int, draws: int, seed: int) -> dict[str, list[Head]]:
    """The best heads of stage 1 ("chosen") and random controls that exclude them."""
    chosen = top_heads(importance, count)
    shape = (importance.shape[0], importance.shape[1])
    controls = random_heads(shape, count, draws, seed, chosen)
    return {"chosen": chosen} | {f"random {n}": heads for n, heads in enumerate(controls, 1)}
