"""Checkpoints of a training run: orbax behind one small class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jaxheads.train.step import TrainState


class Checkpoints:
    """The checkpoints in one folder.

    A step is listed only once its checkpoint is complete: a run killed while saving goes on
    from the one before. Use as a context manager; leaving it waits for a save under way.
    """

    def __init__(self, folder: str | Path, *, every: int, keep: int = 2) -> None:
        """Opens or makes the folder.

        Args:
          folder: where.
          every: steps between checkpoints.
          keep: how many of the newest are kept.
        """
        options = ocp.CheckpointManagerOptions(
            save_decision_policy=checkpoint_managers.FixedIntervalPolicy(every),
            preservation_policy=checkpoint_managers.LatestN(keep),
        )
        self._manager = ocp.CheckpointManager(
            Path(folder).absolute(), options=options, item_names=("state", "config")
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def due(self, step: int) -> bool:
        """Whether `save` would write a checkpoint at this step."""
        return self._manager.should_save(step)

    def save(self, state: TrainState, config: dict[str, Any], *, force: bool = False) -> None:
        """Saves if the step is due, or in any case with `force`; returns before it is written."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), config=ocp.args.JsonSave(config)
        )
        self._manager.save(step, args=items, force=force)

    def config(self) -> dict[str, Any]:
        """The config saved with the newest checkpoint."""
        items = ocp.args.Composite(config=ocp.args.JsonRestore())
        return self._manager.restore(self.latest, args=items)["config"]

    def restore(self, target: TrainState) -> TrainState:
        """The newest state, with the shapes, dtypes and shardings of `target`.

        Raises:
          FileNotFoundError: there is no checkpoint.
        """
        if self.latest is None:
            raise FileNotFoundError(f"no complete checkpoint in {self._manager.directory}")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self._manager.restore(self.latest, args=items)["state"]
