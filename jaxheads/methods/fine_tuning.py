"""Fine-tuning of the model's own parameters: all of them, or those that patterns choose.

What the other methods are measured against. Parameters are trained in float32; with `compute`
"bfloat16" activations and matrix products are bfloat16 (mixed precision: Micikevicius et al. 2018,
without loss scaling, which bfloat16 does not need).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxheads.edits import dropout
from jaxheads.methods.method import Data, Tuned
from jaxheads.methods.objective import fit_loss, rows_of
from jaxheads.model.config import DTYPES, ModelConfig
from jaxheads.model.layout import REMAT
from jaxheads.model.parameters import Tree
from jaxheads.model.transformer import Transformer
from jaxheads.names import choose
from jaxheads.train.fit import Fit
from jaxheads.train.optimizer import Optimizer
from jaxheads.train.select import merge, select
from jaxheads.train.step import Metrics

if TYPE_CHECKING:
    from jaxheads.train.job import Job

Array = jax.Array
NAME = "fine tuning"


@dataclass(frozen=True)
class FineTuning:
    """Settings.

    Attributes:
      patterns: which, as in `jaxheads.train.select`: "*" for all, "blocks/attn/*", ...
      compute: dtype of the activations; None for that of the model.
      dropout: probability with which an entry of what a branch adds is dropped in training.
      remat: what blocks keep for the backward pass, as in `Transformer`.
      chunk: tokens of a row unembedded at a time; None for all.
      fit: how parameters are trained.

    Raises:
      ValueError: an unknown `compute` or `remat`, or a dropout outside [0, 1).
    """

    patterns: tuple[str, ...] = ("*",)
    compute: str | None = None
    dropout: float = 0.0
    remat: str = "none"
    chunk: int | None = None
    fit: Fit = field(
        default_factory=lambda: Fit(
            steps=40, optimizer=Optimizer(learning_rate=3e-5, schedule="linear", clip=1.0)
        )
    )

    def __post_init__(self) -> None:
        choose("remat", self.remat, REMAT)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        if self.compute is not None:
            choose("compute", self.compute, DTYPES)

    def train(self, job: Job, model: Transformer, tokenizer: Any, data: Data) -> dict[str, Tuned]:
        """Trains the parameters chosen.

        Raises:
          ValueError: a pattern that chooses nothing.
        """
        chosen = select(model.params, self.patterns)
        config = model.config.replace(dtype=self.compute or model.config.dtype)
        rest = Rest(chosen.frozen, config, self.remat, self.chunk, dropout=self.dropout)
        start = in_float32(chosen.trainable)
        trained = job.fit(NAME, parameters_loss, start, rest, fit=self.fit, **rows_of(data))
        params = as_stored(trained, chosen.trainable)
        return {NAME: Tuned(params=params, trained=chosen.count)}


@struct.dataclass
class Rest:
    """What of a model is not trained.

    Attributes:
      params: the frozen leaves of its parameter tree.
      config: its config. Static, like all that follows.
      remat: as in `Transformer`.
      chunk: as in `fit_loss`.
      z_loss: as in `fit_loss`.
      dropout: as in `FineTuning`.
    """

    params: Tree
    config: ModelConfig = struct.field(pytree_node=False)
    remat: str = struct.field(pytree_node=False, default="none")
    chunk: int | None = struct.field(pytree_node=False, default=None)
    z_loss: float = struct.field(pytree_node=False, default=0.0)
    dropout: float = struct.field(pytree_node=False, default=0.0)

    def model(self, trainable: Tree) -> Transformer:
        """The whole model."""
        return Transformer(self.config, merge(trainable, self.params))


def parameters_loss(
    trainable: Tree, rest: Rest, item: Any, key: Array | None
) -> tuple[Array, Metrics]:
    """The loss of a model as a function of the parameters that are trained; see `fit_loss`."""
    model, edits = rest.model(trainable), None
    if rest.dropout and key is not None:
        edits = dropout(model.config, key, rest.dropout)
    return fit_loss(
        model, item, edits=edits, remat=rest.remat, chunk=rest.chunk, z_loss=rest.z_loss
    )


def in_float32(params: Tree) -> Tree:
    """The parameters as they are trained."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)


def as_stored(trained: Tree, before: Tree) -> Tree:
    """Trained parameters in the dtypes of the model that they came from."""
    return jax.tree.map(lambda new, old: new.astype(old.dtype), trained, before)
