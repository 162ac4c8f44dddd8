"""The training step: a pure function (state, batch) -> (state, metrics).

What is trained is any pytree; everything else (the model, say) is frozen and passed in as an
argument, so it is never copied into the compiled program and never updated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

Array = jax.Array
Metrics = dict[str, Array]
Loss = Callable[[Any, Any, Any], tuple[Array, Metrics]]
"""(trainable, frozen, batch) -> (scalar loss, further metrics)."""


@struct.dataclass
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: int32 scalar, steps taken.
      trainable: the pytree that is trained.
      optimizer: the optimizer's state for it.
    """

    step: Array
    trainable: Any
    optimizer: Any


def start(trainable: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.int32(0), trainable, optimizer.init(trainable))


Step = Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]


def make_step(loss: Loss, optimizer: optax.GradientTransformation) -> Step:
    """A jitted step (state, frozen, batch) -> (state, metrics).

    The state is donated: use the returned one. Metrics are scalars on the device: "loss",
    "gradient_norm" and those of the loss.
    """

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, Metrics]:
        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(
            state.trainable, frozen, batch
        )
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {"loss": value, "gradient_norm": optax.tree.norm(gradient)} | metrics
        return TrainState(state.step + 1, trainable, optimizer_state), metrics

    return jax.jit(step, donate_argnums=0)
