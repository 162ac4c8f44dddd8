"""Small states of training and folders of their checkpoints, shared by the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxheads.train.checkpoint import Checkpoints, Keep
from jaxheads.train.step import TrainState

MANY = Keep(newest=9)


def state(step: int, value: float = 1.0) -> TrainState:
    """Every kind of leaf: nested, in a tuple, of five dtypes, of no element, absent."""
    key = jax.random.fold_in(jax.random.key(0), step)
    trainable = {
        "z": {"offset": value * jax.random.normal(key, (40, 20)), "none": jnp.zeros((0, 3))},
        "kernel": jnp.full((3, 4), value, jnp.bfloat16),
    }
    optimizer = (jnp.full(3, step, jnp.uint8), [jnp.ones(2) * step], optax.EmptyState())
    return TrainState(jnp.int32(step), trainable, optimizer, None, jnp.array(step != 2))


def saved(folder: Path, *steps: int, keep: Keep = MANY, **metrics: list[float]) -> Path:
    """A folder with checkpoints of these steps, each metric given step by step."""
    with Checkpoints(folder, every=1, keep=keep) as checkpoints:
        for n, step in enumerate(steps):
            found = {name: values[n] for name, values in metrics.items()}
            checkpoints.save(
                state(step), position=8 * step, config={"at": step}, metrics=found or None
            )
    return folder


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def restored(folder: Path, target: TrainState | None = None) -> Any:
    with Checkpoints(folder, every=1, keep=MANY) as checkpoints:
        return checkpoints.restore(state(0) if target is None else target)
