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

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.edits import Affine, Edits, head_mask, offset_heads, scale_heads
from jaxheads.methods.measure import readable
from jaxheads.methods.method import Data, Tuned
from jaxheads.methods.objective import fit_loss, rows_of
from jaxheads.methods.retrieval_heads import Head, random_heads, top_heads
from jaxheads.metrics import answer_scores
from jaxheads.model.batch import Answers, Batch
from jaxheads.model.config import ModelConfig
from jaxheads.model.transformer import Transformer
from jaxheads.train.fit import Fit
from jaxheads.train.optimizer import Optimizer
from jaxheads.train.step import Metrics

if TYPE_CHECKING:
    from jaxheads.train.job import Job

Array = jax.Array
NAME = "lofit"
INITIAL_STD = 1e-3


def _falling(steps: int, learning_rate: float) -> Fit:
    return Fit(steps=steps, optimizer=Optimizer(learning_rate=learning_rate, schedule="linear"))


@dataclass(frozen=True)
class Lofit:
    """Settings of both stages.

    Attributes:
      heads: K, heads that get an offset.
      l1: weight of the sum of |A| in stage 1.
      controls: draws of K random heads, none of them chosen, to compare with.
      importance: stage 1, finding heads.
      offsets: stage 2, training offsets.

    Raises:
      ValueError: numbers below their least.
    """

    heads: int = 14
    l1: float = 1e-3
    controls: int = 5
    importance: Fit = field(default_factory=lambda: _falling(30, 5e-3))
    offsets: Fit = field(default_factory=lambda: _falling(40, 1e-2))

    def __post_init__(self) -> None:
        for name, least in (("heads", 1), ("l1", 0), ("controls", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def train(self, job: Job, model: Transformer, tokenizer: Any, data: Data) -> dict[str, Tuned]:
        """Both stages, and offsets for random heads.

        Returns:
          "lofit" and "random 1", ..., each with its heads and their offsets at `z`.

        Raises:
          ValueError: more heads asked for than there are.
        """
        count = model.config.n_layers * model.config.n_heads
        if self.heads * (2 if self.controls else 1) > count:
            raise ValueError(
                f"heads {self.heads}, and as many random ones beside them, are more than the "
                f"{count} heads of the model"
            )
        norms = self.find_heads(job, model, data)
        sets = head_sets(norms, self.heads, self.controls, job.seed)
        tuned = {name: self.tune(job, name, model, data, heads) for name, heads in sets.items()}
        return tuned | {NAME: replace(tuned[NAME], scores=norms)}

    def find_heads(self, job: Job, model: Transformer, data: Data) -> np.ndarray:
        """Stage 1: the norm of A_h of each head, float32 [L,H]."""
        factors = initial_factors(model.config, jax.random.key(job.seed))
        frozen = {"model": model, "l1": jnp.float32(self.l1)}
        learned = job.fit(
            "importance", importance_loss, factors, frozen, fit=self.importance, **rows_of(data)
        )
        change = np.asarray(readable(learned)["z"].scale)[:, 0, 0] - 1
        return np.linalg.norm(change, axis=-1)

    def tune(
        self,
        job: Job,
        name: str,
        model: Transformer,
        data: Data,
        heads: Sequence[Head],
    ) -> Tuned:
        """Stage 2: one offset of size Dh for each of `heads`, as the stage `name` of the job."""
        config = model.config
        values = initial_offsets(config, jax.random.fold_in(jax.random.key(job.seed), 1))
        keep = scale_heads(config, head_mask(config, heads).astype(np.float32))
        frozen = {"model": model, "keep": keep}
        trained = job.fit(name, offsets_loss, values, frozen, fit=self.offsets, **rows_of(data))
        edits = keep_offsets(trained, keep)
        return Tuned(edits=edits, heads=list(heads), trained=len(heads) * config.head_dim)


def initial_factors(config: ModelConfig, key: Array) -> Edits:
    """1 + A at `z`, with A drawn from N(0, 1e-3)."""
    shape = (config.n_layers, 1, 1, config.n_heads, config.head_dim)
    return Edits(z=Affine(scale=1 + INITIAL_STD * jax.random.normal(key, shape)))


def initial_offsets(config: ModelConfig, key: Array) -> Edits:
    """v at `z`, drawn from N(0, 1e-3)."""
    shape = (config.n_layers, config.n_heads, config.head_dim)
    return offset_heads(config, INITIAL_STD * jax.random.normal(key, shape))


def keep_offsets(offsets: Edits, keep: Edits) -> Edits:
    """The offsets of the heads that are kept, 1 in the scale of `keep`, and zero elsewhere.

    Both are edits of `z`, so that they are divided over a mesh as heads are; and one program
    serves all sets of heads.
    """
    values: Any = offsets["z"]
    mask: Any = keep["z"]
    return Edits(z=Affine(offset=values.offset * mask.scale))


def importance_loss(
    factors: Edits, frozen: Any, item: Any, key: Array | None
) -> tuple[Array, Metrics]:
    """Stage 1: task loss + l1 * sum |A|; the metric "task_loss" is the first term."""
    task, metrics = fit_loss(frozen["model"], item, edits=factors)
    scale: Any = factors["z"]
    penalty = frozen["l1"] * jnp.sum(jnp.abs(scale.scale - 1))
    return task + penalty, metrics | {"task_loss": task}


def offsets_loss(values: Edits, frozen: Any, item: Any, key: Array | None) -> tuple[Array, Metrics]:
    """Stage 2: the task loss with the offsets of the heads that are kept."""
    return fit_loss(frozen["model"], item, edits=keep_offsets(values, frozen["keep"]))


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
    """The best heads of stage 1 ("lofit") and random controls that exclude them."""
    chosen = top_heads(importance, count)
    shape = (importance.shape[0], importance.shape[1])
    controls = random_heads(shape, count, draws, seed, chosen)
    return {NAME: chosen} | {f"random {n}": heads for n, heads in enumerate(controls, 1)}
