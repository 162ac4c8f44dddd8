"""`Job`: one run's devices, folder and loop; `Job.fit` trains one stage of it."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxheads.data import Batches, Rows, prove_disjoint
from jaxheads.model.batch import Batch
from jaxheads.train.checkpoint import Checkpoints
from jaxheads.train.fit import Fit
from jaxheads.train.loop import INTERRUPTED, Interrupts, Loop, OnStep, run
from jaxheads.train.mesh import BATCH_AXES, check_fit
from jaxheads.train.meter import Meter
from jaxheads.train.rules import Rule, check_unsharded, check_used, shardings
from jaxheads.train.step import Loss, Step, TrainState, make_step, start
from jaxheads.train.writers import Writer


class Interrupted(RuntimeError):
    """The run was asked to stop, and saved."""


@dataclass(frozen=True)
class Job:
    """Where and how the stages of a run are trained.

    Attributes:
      seed: of initial values, the order of examples and dropout.
      mesh: the devices, from `make_mesh`; None for one.
      rules: sharding rules in front of the default ones.
      loop: settings of the loop.
      folder: where checkpoints and traces go; None keeps nothing.
      config: settings of the run, saved with every checkpoint.
      writers: where metrics go.
      signals: says when to stop.
      on_step: told of each logged step.
      on_note: told in a sentence what is odd about a checkpoint that is resumed.
      meter: from (trainable, frozen, rows, batch size) to what a step costs, for its speed.
    """

    seed: int = 0
    mesh: jax.sharding.Mesh | None = None
    rules: tuple[Rule, ...] = ()
    loop: Loop = field(default_factory=Loop)
    folder: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    writers: Sequence[Writer] = ()
    signals: Interrupts | None = None
    on_step: OnStep = lambda report: None
    on_note: Callable[[str], None] = warnings.warn
    meter: Callable[[Any, Any, Rows, int], Meter] | None = None

    def fit(
        self,
        name: str,
        loss: Loss,
        trainable: Any,
        frozen: Any,
        rows: Rows,
        fit: Fit,
        *,
        held_out: Rows | None = None,
        mask: Any = None,
    ) -> Any:
        """Trains one stage; goes on from its newest checkpoint, and is skipped if complete.

        Args:
          name: of the stage; its folder of checkpoints and its lines in the log.
          loss: a function at module level: stages with the same loss and settings share one
            compiled program.
          trainable: the pytree to train; copied, so it stays intact.
          frozen: passed to the loss beside it.
          rows: the examples; an item is what the loss takes as a batch.
          fit: steps, batch size and optimizer.
          held_out: examples on which the loss and its metrics are measured as `loop` says.
          mask: what of the trainable is trained, as `Selection.mask`; None for all.

        Returns:
          What was trained, or its average if `fit.average` is given, placed as on the mesh.

        Raises:
          Interrupted: a signal came; the state is saved.
          NotFinite: the loss or its gradient is; the last good state is saved.
          ValueError: examples, batch and mesh do not fit each other.
        """
        host, hosts = self.slice
        check_fit(self.mesh, batch_size=fit.batch_size, accumulate=fit.accumulate)
        batches = Batches(rows, fit.batch_size, seed=self.seed, host=host, hosts=hosts)
        optimizer = fit.optimizer.build(fit.steps, mask)
        with self.devices():
            frozen = self.place(frozen)
            copied = self.place(trainable, copy=True)
            begin = functools.partial(start, optimizer=optimizer, average=fit.average is not None)
            shapes = jax.eval_shape(begin, copied)
            if self.mesh is not None:
                check_used(self.rules, (shapes, frozen))
                check_unsharded(
                    (shapes, frozen), self._shardings((shapes, frozen)), rules=self.rules
                )
            # The optimizer's state is born where it belongs: it may not fit on one device.
            state = jax.jit(begin, out_shardings=self._shardings(shapes))(copied)
            prove_disjoint(batches, 0, hosts=hosts)
            meter = None
            if self.meter is not None:
                meter = self.meter(copied, frozen, rows, fit.batch_size)
            with self._checkpoints(name) as checkpoints:
                outcome = run(
                    state,
                    _step(loss, fit, self.seed, mask is not None, optimizer=_Unhashed(optimizer)),
                    frozen,
                    lambda position: self.feed(batches.iterate(position)),
                    stage=name,
                    steps=fit.steps,
                    batch_size=fit.batch_size,
                    settings=self.loop,
                    config=self.config,
                    checkpoints=checkpoints,
                    signals=self.signals,
                    writers=self.writers,
                    evaluate=self._evaluation(loss, frozen, held_out, fit.batch_size),
                    on_step=self.on_step,
                    on_note=self.on_note,
                    meter=meter,
                    traces=None if self.folder is None else self.folder / "traces",
                )
        if outcome.stopped == INTERRUPTED:
            raise Interrupted(f"interrupted in {name!r} after step {int(outcome.state.step)}")
        return outcome.state.trainable if fit.average is None else outcome.state.average

    @property
    def slice(self) -> tuple[int, int]:
        """Which slice of a batch's rows this host reads, and how many slices there are.

        Hosts that share rows, because "tensor" or "sequence" runs across them, read the same.

        Raises:
          ValueError: the rows of this host's devices are not next to each other.
        """
        if self.mesh is None:
            return 0, 1
        axes = tuple(axis for axis in BATCH_AXES if axis in self.mesh.shape)
        rows = math.prod(self.mesh.shape[axis] for axis in axes)
        where = NamedSharding(self.mesh, PartitionSpec(axes))
        indices = where.addressable_devices_indices_map((rows,)).values()
        mine = {index[0].start or 0 for index in indices if index is not None}
        first, count = min(mine), len(mine)
        if first % count or mine != set(range(first, first + count)):
            raise ValueError(
                f"the devices of this host hold rows {sorted(mine)} of {rows}, which are no slice "
                "of a batch: order the mesh so that each host has neighbouring rows"
            )
        return first // count, rows // count

    def place(self, tree: Any, *, copy: bool = False) -> Any:
        """A pytree of arrays on the devices, divided by the rules.

        Args:
          tree: arrays, whole or already placed; other leaves are left alone.
          copy: whether the result shares no memory with `tree`.
        """
        if self.mesh is None:
            return jax.tree.map(lambda leaf: jnp.array(leaf, copy=copy), tree)
        where = self._shardings(tree)
        return jax.tree.map(
            lambda leaf, sharding: jax.device_put(leaf, sharding, may_alias=not copy), tree, where
        )

    def feed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Batches of this host as global arrays; the next is sent while one is used."""
        waiting: list[Any] = []
        for batch in batches:
            waiting.append(self.send(batch))
            if len(waiting) > 1:
                yield waiting.pop(0)
        yield from waiting

    def send(self, batch: Any) -> Any:
        """One host's rows of a batch as global arrays: rows over "data" and "fsdp".

        The tokens of a `Batch` are divided over "sequence" too.
        """
        if self.mesh is None:
            return jax.device_put(batch)
        return jax.tree.map(
            lambda leaf, where: jax.make_array_from_process_local_data(where, np.asarray(leaf)),
            batch,
            self._rows_over(batch, self.mesh),
        )

    def shapes(self, batch: Any) -> Any:
        """What `send` would make of all rows of a batch, without the values."""
        if self.mesh is None:
            return jax.eval_shape(lambda tree: tree, batch)
        return jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            batch,
            self._rows_over(batch, self.mesh),
        )

    @staticmethod
    def _rows_over(batch: Any, mesh: jax.sharding.Mesh) -> Any:
        rows = tuple(axis for axis in BATCH_AXES if axis in mesh.shape)
        tokens = "sequence" if "sequence" in mesh.shape else None

        def over(part: Any) -> Any:
            spec = PartitionSpec(rows, tokens) if isinstance(part, Batch) else PartitionSpec(rows)
            return jax.tree.map(lambda leaf: NamedSharding(mesh, spec), part)

        return jax.tree.map(over, batch, is_leaf=lambda part: isinstance(part, Batch))

    def devices(self) -> contextlib.AbstractContextManager[Any]:
        """A `with` block in which arrays may lie on the mesh."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _shardings(self, tree: Any) -> Any:
        return None if self.mesh is None else shardings(tree, self.mesh, self.rules)

    @contextlib.contextmanager
    def _checkpoints(self, name: str) -> Iterator[Checkpoints | None]:
        if self.folder is None:
            yield None
            return
        loop = self.loop
        folder = self.folder / "checkpoints" / name.replace(" ", "-")
        with Checkpoints(folder, every=loop.checkpoint_every, keep=loop.keep) as checkpoints:
            yield checkpoints

    def _evaluation(
        self, loss: Loss, frozen: Any, rows: Rows | None, batch_size: int
    ) -> Callable[[TrainState], dict[str, float]] | None:
        if rows is None:
            return None
        host, hosts = self.slice
        share = batch_size // hosts

        def evaluate(state: TrainState) -> dict[str, float]:
            trained = state.trainable if state.average is None else state.average
            totals: dict[str, float] = {}
            weights = 0.0
            for first in range(0, len(rows), batch_size):
                # The last part wraps round to the first rows, so that one program serves all.
                mine = (first + host * share + np.arange(share)) % len(rows)
                value, metrics = _score(loss)(trained, frozen, self.send(rows[mine]))
                found = {k: float(v) for k, v in jax.device_get({"loss": value} | metrics).items()}
                weight = found.pop("weight", 1.0)
                weights += weight
                for metric, number in found.items():
                    totals[metric] = totals.get(metric, 0.0) + weight * number
            return {metric: total / weights for metric, total in totals.items()}

        return evaluate


@dataclass(frozen=True)
class _Unhashed:
    """A value that does not tell cached programs apart."""

    value: Any

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Unhashed)


@functools.lru_cache(maxsize=8)
def _step(loss: Loss, fit: Fit, seed: int, masked: bool, *, optimizer: _Unhashed) -> Step:
    """The step of a stage; kept, so that one program serves all that differ in arrays only."""
    return make_step(
        loss, optimizer.value, seed=seed, accumulate=fit.accumulate, average=fit.average
    )


@functools.lru_cache(maxsize=8)
def _score(loss: Loss) -> Callable[..., Any]:
    """The loss without randomness, compiled."""
    return jax.jit(lambda trained, frozen, batch: loss(trained, frozen, batch, None))
