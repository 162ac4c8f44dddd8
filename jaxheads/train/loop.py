"""The loop: steps, metrics one step late, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxheads.train.checkpoint import Checkpoints
from jaxheads.train.step import Metrics, Step, TrainState

OnStep = Callable[[int, dict[str, float]], None]


class NotFinite(RuntimeError):
    """The loss became NaN or infinite."""


def run(
    state: TrainState,
    step: Step,
    frozen: Any,
    data: Sequence[Any],
    *,
    steps: int,
    on_step: OnStep = lambda step, metrics: None,
    checkpoints: Checkpoints | None = None,
    config: dict[str, Any] | None = None,
) -> TrainState:
    """Trains from `state.step` up to `steps`.

    Args:
      state: where to begin; with `checkpoints`, the newest one there is taken instead.
      step: as `make_step` returns it.
      frozen: passed to every step.
      data: `data[n]` is the batch of step n.
      steps: total number of steps.
      on_step: called with (steps done, metrics), while the next step already runs.
      checkpoints: where to save; also the last step is.
      config: saved with every checkpoint.

    Returns:
      The state after the last step.

    Raises:
      NotFinite: the loss is NaN or infinite; the last checkpoint before it is intact.
    """
    if checkpoints is not None and checkpoints.latest is not None:
        state = checkpoints.restore(state)
    late: tuple[int, Metrics] | None = None
    for index in range(int(state.step), steps):
        state, metrics = step(state, frozen, data[index])
        if late is not None:
            _report(*late, on_step)
        late = (index + 1, metrics)
        if checkpoints is not None and index + 1 < steps and checkpoints.due(index + 1):
            # Told before it is saved: a step that a checkpoint holds is never missing in the log.
            _report(*late, on_step)
            late = None
            checkpoints.save(state, config or {})
    if late is not None:
        _report(*late, on_step)
    if checkpoints is not None:
        checkpoints.save(state, config or {}, force=True)
    return state


def _report(index: int, metrics: Metrics, on_step: OnStep) -> None:
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not math.isfinite(values["loss"]):
        raise NotFinite(f"the loss is {values['loss']} after step {index}")
    on_step(index, values)
