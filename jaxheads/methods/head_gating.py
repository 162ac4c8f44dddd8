"""Causal head gating: which heads a task needs, which harm it, which do not matter.

Source: Nam et al. (2025), "Causal Head Gating: A Framework for Interpreting Roles of Attention
Heads in Transformers"; its released code for the settings.

Every head's output is multiplied by a gate G = sigmoid(g). Three fits of

    loss(G) - w * mean(clip(g, -4, 4)),

of which the first, w = 0, starts at g = logit(U(0, 1)) and the others at its result: w = +0.1 opens
every gate that the task does not need closed (G+, "retain"), w = -0.1 closes every gate that it
does not need open (G-, "remove"). Then

    facilitation = G-, interference = 1 - G+, irrelevance = G+ * (1 - G-).

Published settings: Adam with learning rate 1.0, gradient clipped to norm 1.0, batch 32, 500 steps.

What the reference does differently: it fits several gate matrices at once, from different starts,
for an estimate of the variance; here one run fits one, and `job.seed` starts another. The formulas
of the three scores were taken from a description of the paper, not from its code.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.edits import Affine, Edits
from jaxheads.methods.method import Tuned
from jaxheads.methods.objective import fit_loss, rows_of
from jaxheads.model.batch import Answers, Batch
from jaxheads.model.transformer import Transformer
from jaxheads.tasks import Tokenizer
from jaxheads.train.fit import Fit
from jaxheads.train.optimizer import Optimizer
from jaxheads.train.rules import Rule

if TYPE_CHECKING:
    from jaxheads.methods.method import TaskData, TextData
    from jaxheads.train.job import Job

Array = jax.Array
NAME = "head_gating"
CLIP = 4.0
NEEDED = 0.5


@dataclass(frozen=True)
class HeadGating:
    """Settings.

    Attributes:
      weight: size of w in the second and the third fit.
      controls: draws of the gates of "remove" dealt to other heads.
      fit: of each of the three fits.
    """

    weight: float = 0.1
    controls: int = 5
    fit: Fit = field(
        default_factory=lambda: Fit(
            steps=500,
            batch_size=32,
            optimizer=Optimizer(name="adam", learning_rate=1.0, clip=1.0),
        )
    )

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"weight must be above 0, got {self.weight}")
        if self.controls < 0:
            raise ValueError(f"controls must be at least 0, got {self.controls}")

    def train(
        self, job: Job, model: Transformer, tokenizer: Tokenizer, data: TaskData | TextData
    ) -> dict[str, Tuned]:
        """Fits the gates three times, on answers of a task or on all tokens of texts.

        Returns:
          "head_gating", the gates G- of the heads that the task needs; "retain", G+; "start", the
          gates of the first fit; and "random 1", ... (G- dealt to the heads anew).
        """
        rows = rows_of(data)
        job = replace(job, rules=(*job.rules, Rule("gates", None)))
        shape = (model.config.n_layers, model.config.n_heads)

        def fit(name: str, logits: Array, weight: float) -> Array:
            frozen = {"model": model, "weight": jnp.float32(weight)}
            start = {"gates": logits}
            fitted = job.fit(name, gating_loss, start, frozen, fit=self.fit, **rows)
            found: Array = fitted["gates"]
            return found

        start = fit("start", initial_gates(shape, jax.random.key(job.seed)), 0.0)
        logits = {
            NAME: fit("remove", start, -self.weight),
            "retain": fit("retain", start, self.weight),
            "start": start,
        }
        gates = {name: jax.nn.sigmoid(g) for name, g in logits.items()}
        removed = gates[NAME]
        for n in range(1, self.controls + 1):
            key = jax.random.fold_in(jax.random.key(job.seed), n)
            gates[f"random {n}"] = jax.random.permutation(key, removed.ravel()).reshape(shape)
        return {
            name: Tuned(
                edits=gated(g),
                heads=needed(np.asarray(g)),
                trained=removed.size,
                scores=np.asarray(g),
            )
            for name, g in gates.items()
        }


def initial_gates(shape: tuple[int, int], key: Array) -> Array:
    """g = logit(U(0, 1)), float32 [L,H]."""
    return jax.scipy.special.logit(jax.random.uniform(key, shape, minval=1e-4, maxval=1 - 1e-4))


def gated(gates: Array) -> Edits:
    """G [L,H] * z; differentiable in the gates."""
    return Edits(z=Affine(scale=gates[:, None, None, :, None]))


def gating_loss(
    trained: dict[str, Array], frozen: Any, data: Batch | tuple[Batch, Answers], key: Array | None
) -> tuple[Array, dict[str, Array]]:
    """The loss of the targets in nats per token, minus w times the mean of the clipped logits.

    Args:
      trained: g [L,H] as "gates".
      frozen: "model", and w as "weight".
      data: a batch, or a batch with its answers.
      key: not used.
    """
    del key
    logits = trained["gates"]
    gates = jax.nn.sigmoid(logits)
    task, metrics = fit_loss(frozen["model"], data, edits=gated(gates))
    pull = frozen["weight"] * jnp.mean(jnp.clip(logits, -CLIP, CLIP))
    return task - pull, metrics | {"task_loss": task, "mean_gate": gates.mean()}


def roles(retained: Array | np.ndarray, removed: Array | np.ndarray) -> dict[str, np.ndarray]:
    """What each head is to the task, each [L,H] between 0 and 1.

    Args:
      retained: G+ [L,H].
      removed: G- [L,H].

    Returns:
      "facilitation" (needed), "interference" (better closed), "irrelevance" (either way).

    Raises:
      ValueError: the shapes differ.
    """
    kept, left = np.asarray(retained), np.asarray(removed)
    if kept.shape != left.shape:
        raise ValueError(f"retained has shape {kept.shape}, removed {left.shape}: expected one")
    return {"facilitation": left, "interference": 1 - kept, "irrelevance": kept * (1 - left)}


def needed(gates: np.ndarray) -> list[tuple[int, int]]:
    """Heads whose gate [L,H] is more open than closed, the most open first."""
    order = np.argsort(-gates, axis=None, kind="stable")
    pairs = [(int(i) // gates.shape[1], int(i) % gates.shape[1]) for i in order]
    return [pair for pair in pairs if gates[pair] > NEEDED]
