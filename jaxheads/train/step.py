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
Loss = Callable[[Any, Any, Any, Array | None], tuple[Array, Metrics]]
"""(trainable, frozen, batch, key) -> (scalar loss, further scalar metrics).

The key is None where nothing is random: when a state is measured. The metric "weight", where there
is one, is the number of targets that the loss is a mean over.
"""


@struct.dataclass
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: int32 scalar, steps taken.
      trainable: the pytree that is trained.
      optimizer: the optimizer's state for it.
      average: the exponential moving average of `trainable`, or None.
      finite: bool scalar, False once a loss or gradient was not finite. Nothing changes from
        then on, so that the state stays the last good one.
    """

    step: Array
    trainable: Any
    optimizer: Any
    average: Any
    finite: Array


def start(
    trainable: Any, optimizer: optax.GradientTransformation, *, average: bool = False
) -> TrainState:
    """The state before the first step; `average` says whether one is kept."""
    copy = jax.tree.map(jnp.copy, trainable) if average else None
    return TrainState(jnp.int32(0), trainable, optimizer.init(trainable), copy, jnp.array(True))


Step = Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    seed: int = 0,
    accumulate: int = 1,
    average: float | None = None,
) -> Step:
    """A jitted step (state, frozen, batch) -> (state, metrics).

    The state is donated: use the returned one. Metrics are scalars on the device: "loss",
    "gradient_norm" and those of the loss. Nothing is done where the loss or the gradient is
    not finite, nor in any later step; see `TrainState.finite`.

    Args:
      loss: what is made small. Its key is drawn from (seed, step).
      optimizer: an optax transformation.
      seed: of the keys.
      accumulate: the batch is cut into this many parts of equal rows, whose losses, metrics and
        gradients are averaged, each part counting by its metric "weight" (1 without one). So
        the step equals that of the whole batch for a loss that is a mean over these targets
        and uses no key. It does not for a loss that multiplies means, as the load-balance
        loss of `RoutingPenalty` does: it becomes a mean over parts of products of each
        part's own means. A mean over anything else than the targets, as a router's z-loss
        over tokens, differs as far as targets per token do; and each part has its own key.
      average: decay of the exponential moving average, in (0, 1); None for no average.

    Raises:
      ValueError: `accumulate` below 1, or rows that it does not divide (when traced).
    """
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}")
    gradient_of = jax.value_and_grad(loss, has_aux=True)

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if accumulate == 1:
            (value, metrics), gradient = gradient_of(state.trainable, frozen, batch, key)
        else:
            parts = jax.tree.map(lambda leaf: _split(leaf, accumulate), batch)
            value, metrics, gradient = _accumulated(
                lambda part, key: gradient_of(state.trainable, frozen, part, key), parts, key
            )
        norm = optax.tree.norm(gradient)
        finite = state.finite & jnp.isfinite(value) & jnp.isfinite(norm)

        def update(state: TrainState) -> TrainState:
            updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.trainable)
            trainable = optax.apply_updates(state.trainable, updates)
            moved = state.average
            if average is not None:
                moved = jax.tree.map(
                    lambda old, new: (average * old + (1 - average) * new).astype(old.dtype),
                    state.average, trainable,
                )  # fmt: skip
            return TrainState(state.step + 1, trainable, optimizer_state, moved, state.finite)

        # A choice between whole states would keep a second copy of them.
        kept = jax.lax.cond(finite, update, lambda state: state, state)
        metrics = {"loss": value, "gradient_norm": norm} | metrics
        return kept.replace(finite=finite), metrics

    return jax.jit(step, donate_argnums=0)


def _split(leaf: Array, parts: int) -> Array:
    """[B,...] -> [parts,B/parts,...]; each part has rows of every device."""
    rows = leaf.shape[0]
    if rows % parts:
        raise ValueError(f"accumulate={parts} does not divide the {rows} rows of a batch")
    # Rows n, n + parts, n + 2 parts, ...: a part of consecutive rows would lie on few devices.
    cut = leaf.reshape(rows // parts, parts, *leaf.shape[1:])
    return jnp.swapaxes(cut, 0, 1)


def _accumulated(
    gradient_of: Callable[[Any, Array], Any], parts: Any, key: Array
) -> tuple[Array, Metrics, Any]:
    """Weighted means over the parts of loss, metrics and gradient, one part at a time."""
    count = len(jax.tree.leaves(parts)[0])
    keys = jax.random.split(key, count)
    shapes = jax.eval_shape(gradient_of, jax.tree.map(lambda leaf: leaf[0], parts), keys[0])
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, jnp.float32, out_sharding=leaf.sharding), shapes
    )

    def add(total: Any, part: Any) -> tuple[Any, None]:
        found = gradient_of(*part)
        weight = jnp.float32(found[0][1].get("weight", 1))
        sums, weights = total
        return (jax.tree.map(lambda t, x: t + weight * x, sums, found), weights + weight), None

    (sums, weights), _ = jax.lax.scan(add, (zeros, jnp.float32(0)), (parts, keys))
    mean = jax.tree.map(
        lambda total, like: (total / jnp.maximum(weights, 1e-30)).astype(like.dtype), sums, shapes
    )
    (value, metrics), gradient = mean
    if "weight" in metrics:
        metrics["weight"] = weights
    return value, metrics, gradient
