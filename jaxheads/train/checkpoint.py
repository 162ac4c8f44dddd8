"""Checkpoints of a training run: orbax behind one small class."""

from __future__ import annotations

import contextlib
import errno
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

import jaxheads
from jaxheads.train.partial import RUN, STATE, read_newest, saveable
from jaxheads.train.step import TrainState
from jaxheads.train.workdir import run_path

_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_TIMEOUT = 3600
"""Seconds that one save may take; orbax's own limit of 600 is short for a slow disk."""


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay; one that any of the three asks for stays.

    Attributes:
      newest: how many of the newest.
      every: those of steps that are multiples of this, for good; None: no more.
      best: the one with the smallest value of this metric, or, with "-" in front of the name,
        the largest; checkpoints saved without it take no part. None: no more.
    """

    newest: int = 2
    every: int | None = None
    best: str | None = None

    def __post_init__(self) -> None:
        """Refuses counts below 1 and an empty name, with a ValueError."""
        if self.newest < 1:
            raise ValueError(f"newest must be at least 1 checkpoint, got {self.newest}")
        if self.every is not None and self.every < 1:
            raise ValueError(f"every must be at least 1 step, got {self.every}")
        if self.best is not None and not self.best.removeprefix("-"):
            raise ValueError(f"best must be the name of a metric, got {self.best!r}")

    def score(self, metrics: Mapping[str, float] | None) -> float:
        """How good a checkpoint is, larger is better; -inf without the metric."""
        if self.best is None:
            return -math.inf
        value = (metrics or {}).get(self.best.removeprefix("-"), math.nan)
        score = value if self.best.startswith("-") else -value
        return -math.inf if math.isnan(score) else score

    def policy(self) -> checkpoint_managers.PreservationPolicy:
        """The same for orbax."""
        policies: list[Any] = [checkpoint_managers.LatestN(self.newest)]
        if self.every is not None:
            policies.append(checkpoint_managers.EveryNSteps(self.every))
        if self.best is not None:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=self.score, n=1, keep_checkpoints_without_metrics=False
                )
            )
        return checkpoint_managers.AnyPreservationPolicy(policies)


@dataclass(frozen=True)
class Restored:
    """A checkpoint that was read.

    Attributes:
      state: with the structure, shapes, dtypes and shardings that were asked for.
      position: global number of the next training example.
      config: the settings it was saved with.
      step: whose it is.
      version: of the jaxheads that wrote it.
      skipped: (step, reason) of newer checkpoints that are torn.
    """

    state: TrainState
    position: int
    config: dict[str, Any]
    step: int
    version: str
    skipped: tuple[tuple[int, str], ...]

    @property
    def notes(self) -> list[str]:
        """What a reader of the log should know, one sentence each."""
        notes = [
            f"checkpoint {step} is torn ({reason}); going on from {self.step}, which is intact"
            for step, reason in self.skipped
        ]
        if self.version != jaxheads.__version__:
            notes.append(
                f"checkpoint {self.step} was written by jaxheads {self.version}, "
                f"this is {jaxheads.__version__}"
            )
        return notes


class Checkpoints:
    """The checkpoints in one folder.

    A step is listed only once its checkpoint is complete: a run killed while saving goes on
    from the one before. Older checkpoints are deleted only after a newer one is complete. Use as
    a context manager; leaving it waits for a save under way. With several processes, all call
    everything, and each writes its own shards.
    """

    def __init__(self, folder: str | os.PathLike[str], *, every: int, keep: Keep = Keep()) -> None:
        """Opens or makes the folder.

        Args:
          folder: local, or an address such as gs://bucket/run/checkpoints (as a string).
          every: steps between checkpoints.
          keep: which of them stay.

        Raises:
          ValueError: `every` below 1.
        """
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        self.folder = epath.Path(run_path(folder))
        self._keep = keep
        options = ocp.CheckpointManagerOptions(
            save_decision_policy=checkpoint_managers.FixedIntervalPolicy(every),
            preservation_policy=keep.policy(),
            cleanup_tmp_directories=True,  # left by a run that was killed
            async_options=ocp.AsyncOptions(timeout_secs=_TIMEOUT),
        )
        self._manager = _Manager(self.folder, options=options, item_names=(STATE, RUN))
        self._writing: int | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            with self._reporting():
                self._manager.close()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(str(failure))

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Step of the best checkpoint by the metric of `Keep.best`; None where none has it."""
        self._settle()
        scores = {
            step: self._keep.score(self._manager.metrics(step))
            for step in self._manager.all_steps()
        }
        rated = [step for step, score in scores.items() if score > -math.inf]
        return max(rated, key=lambda step: (scores[step], step), default=None)

    def due(self, step: int) -> bool:
        """Whether `save` would write a checkpoint at this step.

        Raises:
          OSError: the save before has failed for want of space.
        """
        if self._writing is not None and not self._manager.is_saving_in_progress():
            self._settle()
        return self._manager.should_save(step)

    def save(
        self,
        state: TrainState,
        *,
        position: int,
        config: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        force: bool = False,
    ) -> None:
        """Saves if the step is due, or in any case with `force`.

        Returns once the arrays have left the devices; the files are written meanwhile. A step
        that is saved already is not saved again.

        Args:
          state: what the step returned.
          position: global number of the next training example.
          config: settings, as JSON holds them.
          metrics: of this state, e.g. on held-out data.
          force: save also between two due steps.

        Raises:
          OSError: no space for this checkpoint or the one before; the message names the newest
            complete one.
        """
        step = int(state.step)
        if step in self._manager.all_steps() or not (force or self.due(step)):
            return
        run = {
            "position": int(position),
            "config": dict(config),
            "version": jaxheads.__version__,
            "metrics": None if metrics is None else {k: float(v) for k, v in metrics.items()},
        }
        items = {STATE: ocp.args.StandardSave(saveable(state)), RUN: ocp.args.JsonSave(run)}
        self._settle()
        self._writing = step
        with self._reporting():
            arguments = ocp.args.Composite(**items)
            self._manager.save(step, args=arguments, metrics=run["metrics"], force=True)

    def wait(self) -> None:
        """Waits until the save under way is complete; raises as `save`."""
        self._settle()

    def restore(self, target: TrainState) -> Restored:
        """The newest intact checkpoint.

        Torn ones that are newer are moved to "<step>.torn", so that their steps can be saved
        again.

        Args:
          target: a state of arrays or `jax.ShapeDtypeStruct`s, whose structure, shapes, dtypes
            and shardings the result takes; the mesh may be another than the one it was saved on.

        Raises:
          FileNotFoundError: there is no checkpoint, or none that is intact.
          ValueError: the newest intact one is of another model, method or optimizer; the message
            names the first arrays that differ.
        """
        self._settle()
        steps = sorted(self._manager.all_steps(), reverse=True)
        state, run, step, torn = read_newest(self.folder, steps, target)
        self._set_aside([step for step, _ in torn])
        return Restored(state, run["position"], run["config"], step, run["version"], tuple(torn))

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                aside = self.folder / f"{step}.torn"
                if aside.exists():
                    aside.rmtree()
                (self.folder / str(step)).rename(aside)
        multihost_utils.sync_global_devices("torn checkpoints are set aside")
        self._manager.reload()

    def _settle(self) -> None:
        """Waits for the save under way, if any."""
        with self._reporting():
            self._manager.wait_until_finished()
        self._writing = None

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Says of a full disk which checkpoint failed, and which is the newest complete one."""
        try:
            yield
        except Exception as error:
            number = _no_space(error)
            step, self._writing = self._writing, None
            self._manager.reload()
            if number is None:
                raise
            newest = "there is none" if self.latest is None else f"it is step {self.latest}"
            raise OSError(
                number,
                f"{os.strerror(number)}: checkpoint {step} could not be written into "
                f"{self.folder}. The newest complete checkpoint is intact: {newest}",
            ) from error


class _Manager(ocp.CheckpointManager):
    """Orbax's, with the metrics in the item of the run, and preemption left to `Signals`."""

    def metrics(self, step: int) -> dict[str, float] | None:
        """Metrics saved with a step; None if there are none or they cannot be read."""
        try:
            return ocp.JsonCheckpointHandler().restore(self.directory / str(step) / RUN)["metrics"]
        except (OSError, ValueError, KeyError):
            return None  # torn, which `restore` tells; opening the folder must not fail of it

    def reached_preemption(self, step: int) -> bool:
        """Never: `Signals` asks, once a step, and all processes must ask equally often."""
        return False


def _no_space(error: BaseException | None) -> int | None:
    """The errno, if an error or its cause is that no more can be written."""
    while error is not None:
        for number in _FULL:
            if isinstance(error, OSError) and error.errno == number:
                return number
            # Tensorstore gives a ValueError with the number in its text.
            if f"os_error_code='{number}'" in str(error):
                return number
        error = error.__cause__ or error.__context__
    return None
