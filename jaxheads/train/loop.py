"""The loop: steps on the device, metrics one step late, evaluations, checkpoints."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxheads.train.checkpoint import Checkpoints, Keep
from jaxheads.train.meter import Meter, Speed
from jaxheads.train.profile import Profile, annotation
from jaxheads.train.step import Metrics, Step, TrainState
from jaxheads.train.stopping import Stopping
from jaxheads.train.writers import Writer

INTERRUPTED = "interrupted"
NO_IMPROVEMENT = "no improvement"
STOPPING = "stopping"
"""The key of the evaluations' progress beside the config in a checkpoint."""
EVALUATION = "evaluation/"
"""What the measured metrics begin with in the log, beside those of the step."""


@dataclass(frozen=True)
class Loop:
    """Settings of the loop, the same for every stage of a run.

    Attributes:
      checkpoint_every: steps between checkpoints; the last step is always saved.
      keep_newest: how many of the newest checkpoints are kept.
      keep_every: checkpoints at multiples of this many steps are kept for good; None for none.
      evaluate_every: steps between evaluations; None evaluates after the last step only.
      best: the evaluation's metric by which a checkpoint is the best, which is kept and saved
        when measured; with "-" in front, larger is better. None for no such checkpoint.
      patience: evaluations without a better value of `best` after which training stops; None
        for never.
      log_every: steps between the steps whose metrics are read, written and shown. Those before
        an evaluation or a checkpoint are always.
      profile: (first, stop) steps to trace, counted from 0; None for none.
      guard_transfers: whether a step whose arguments are not on the device yet is an error.
    """

    checkpoint_every: int = 100
    keep_newest: int = 2
    keep_every: int | None = None
    evaluate_every: int | None = None
    best: str | None = None
    patience: int | None = None
    log_every: int = 1
    profile: tuple[int, int] | None = None
    guard_transfers: bool = True

    def __post_init__(self) -> None:
        for name in (
            "checkpoint_every", "keep_newest", "keep_every", "evaluate_every", "patience",
            "log_every",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.patience is not None and (self.best is None or self.evaluate_every is None):
            raise ValueError("patience needs best and evaluate_every: a metric measured on the way")
        if self.profile is not None and not 0 <= self.profile[0] < self.profile[1]:
            raise ValueError(
                f"profile must be [first, stop] steps with first < stop, got {list(self.profile)}"
            )

    @property
    def keep(self) -> Keep:
        """Which checkpoints stay."""
        return Keep(self.keep_newest, self.keep_every, self.best)

    def evaluates(self, step: int, steps: int) -> bool:
        """Whether there is an evaluation after this step."""
        every = self.evaluate_every
        return step == steps or (every is not None and step % every == 0)


class NotFinite(RuntimeError):
    """The loss or its gradient became NaN or infinite.

    Attributes:
      step: the step that could not be taken.
      loss: the loss when it was noticed.
      checkpoint: the step whose checkpoint holds the last good state, None without checkpoints.
    """

    def __init__(self, step: int, seen: int, loss: float, checkpoint: int | None) -> None:
        """Makes the message; `seen` is the step whose metrics showed it, at most `log_every` on."""
        self.step, self.loss, self.checkpoint = step, loss, checkpoint
        what = f"the loss is {loss} in step {step}"
        if math.isfinite(loss) or seen != step:
            what = f"the loss or its gradient is not finite in step {step} (loss {loss})"
        where = "no checkpoint was kept" if checkpoint is None else f"checkpoint {checkpoint}"
        super().__init__(f"{what}; the last good state: {where}")


@dataclass(frozen=True)
class StepReport:
    """What is known of a step, told while the next one runs.

    Attributes:
      stage: what is being trained.
      step: steps taken.
      steps: steps in all.
      metrics: of the step.
      measured: of the evaluation after it, empty without one.
      speed: None for the first step of this run of the program, which holds the compilation.
    """

    stage: str
    step: int
    steps: int
    metrics: Mapping[str, float]
    measured: Mapping[str, float]
    speed: Speed | None

    def row(self) -> dict[str, float]:
        """All numbers by name, as the log holds them."""
        speed = {} if self.speed is None else asdict(self.speed)
        speed.pop("seconds_left", None)
        return {
            **self.metrics,
            **{EVALUATION + name: value for name, value in self.measured.items()},
            **{name: value for name, value in speed.items() if value is not None},
        }


OnStep = Callable[[StepReport], None]


@dataclass(frozen=True)
class Outcome:
    """Where training ended.

    Attributes:
      state: the state there.
      stopped: None when all steps were taken, else `INTERRUPTED` or `NO_IMPROVEMENT`.
      best: the best value of `Loop.best`, None if there is none.
      best_step: the step where it was measured.
    """

    state: TrainState
    stopped: str | None = None
    best: float | None = None
    best_step: int | None = None


class Interrupts(Protocol):
    """Says when to stop; `jaxheads.train.signals.Signals` is one."""

    def should_stop(self, step: int) -> bool:
        """Whether to save and stop after this step; the same in every process."""


@dataclass(frozen=True)
class _Late:
    """Metrics that are still on the device, and whether all was finite so far."""

    step: int
    metrics: Metrics
    finite: jax.Array


class _Bad(Exception):
    """A step was not finite."""

    def __init__(self, step: int, loss: float) -> None:
        self.step, self.loss = step, loss


def run(
    state: TrainState,
    step: Step,
    frozen: Any,
    batches: Callable[[int], Iterator[Any]],
    *,
    stage: str,
    steps: int,
    batch_size: int,
    settings: Loop,
    config: Mapping[str, Any],
    checkpoints: Checkpoints | None = None,
    signals: Interrupts | None = None,
    writers: Sequence[Writer] = (),
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
    on_step: OnStep = lambda report: None,
    on_note: Callable[[str], None] = warnings.warn,
    meter: Meter | None = None,
    traces: Path | None = None,
) -> Outcome:
    """Trains one stage up to `steps`.

    Resuming, in this order:

    1. The newest intact checkpoint replaces `state`, and says how many examples were used and
       what the evaluations had found.
    2. Logs are cut after its step: what was logged later is done again.
    3. Batches begin at the first unused example.
    4. Nothing is done if all steps are taken, or patience had run out.

    After a step, in this order: its metrics are read once the next step has been started. At an
    evaluation, a checkpoint, an interruption or the end they are read at once, the evaluation is
    made, both are told to the writers, and then the state is saved: a log always holds what a
    checkpoint holds. An evaluation that is due is made even when the run is interrupted.

    Args:
      state: the state before the first step; its buffers are given up.
      step: as `make_step` returns it.
      frozen: passed to every step.
      batches: from the global number of the first example, the batches as arrays on the devices.
      stage: name of what is trained, for logs.
      steps: how many in all.
      batch_size: examples of a global batch.
      settings: of the loop.
      config: saved with every checkpoint.
      checkpoints: where to save; None saves nothing.
      signals: says when to stop.
      writers: where metrics go.
      evaluate: measures a state; the same values in every process.
      on_step: told of each logged step.
      on_note: told in a sentence what is odd about the checkpoint that is resumed: newer ones
        are torn, say.
      meter: what a step is, for its speed.
      traces: folder of the profile.

    Returns:
      The state at the end and why it ended.

    Raises:
      NotFinite: the loss or its gradient is; the state before that step is saved.
      ValueError: `best` or `profile` without what they need, or the batches end too early.
    """
    if settings.best is not None and evaluate is None:
        raise ValueError(f"best = {settings.best!r} needs an evaluation, and {stage!r} has none")
    profile = Profile(traces, settings.profile)
    meter = Meter() if meter is None else meter
    stopping = Stopping(settings.best, settings.patience)

    position = 0
    if checkpoints is not None and checkpoints.latest is not None:
        restored = checkpoints.restore(state)
        for note in restored.notes:
            on_note(note)
        state, position = restored.state, restored.position
        stopping = stopping.resumed(restored.config[STOPPING])
    done = int(state.step)
    for writer in writers:
        writer.rewind(stage, done)
    if done >= steps or stopping.done:
        return _outcome(state, NO_IMPROVEMENT if done < steps else None, stopping)

    def read(late: _Late) -> dict[str, float]:
        """The only place where the host waits for the device."""
        metrics, finite = jax.device_get((late.metrics, late.finite))
        values = {name: float(value) for name, value in metrics.items()}
        if not finite:
            raise _Bad(late.step, values["loss"])
        return values

    def tell(
        step: int, values: Mapping[str, float], speed: Speed | None, measured: Mapping[str, float]
    ) -> None:
        report = StepReport(stage, step, steps, values, measured, speed)
        for writer in writers:
            writer.append(stage, step, report.row())
        on_step(report)

    def save(state: TrainState, measured: Mapping[str, float]) -> int | None:
        if checkpoints is None:
            return None
        at = int(state.step)
        used = position + (at - first) * batch_size
        saved = {**config, STOPPING: stopping.to_json()}
        checkpoints.save(state, position=used, config=saved, metrics=measured or None, force=True)
        return at

    first, late, stopped = done, None, None
    feed = batches(position)
    guard = "disallow" if settings.guard_transfers else "allow"
    try:
        with profile:
            while done < steps and stopped is None:
                batch = next(feed, None)
                if batch is None:
                    raise ValueError(f"the batches of {stage!r} end after step {done} of {steps}")
                profile.before(done)
                with jax.transfer_guard(guard), annotation(done):
                    state, metrics = step(state, frozen, batch)
                profile.after(done, metrics)
                done += 1
                if late is not None:
                    values = read(late)
                    tell(late.step, values, meter.told(late.step, steps), {})
                    late = None

                if signals is not None and signals.should_stop(done):
                    stopped = INTERRUPTED
                ends = stopped is not None or done == steps
                measures = evaluate is not None and settings.evaluates(done, steps)
                saves = checkpoints is not None and (ends or checkpoints.due(done))
                if not (ends or measures or saves):
                    if done % settings.log_every == 0:
                        # A copy: the next step takes the state's own buffers.
                        late = _Late(done, metrics, jnp.copy(state.finite))
                    continue

                values, measured = read(_Late(done, metrics, state.finite)), {}
                speed = meter.told(done, steps)  # before the evaluation, which is no step
                if measures and evaluate is not None:
                    measured = dict(evaluate(state))
                    stopping = stopping.after(done, measured)
                    if stopping.done and not ends:
                        stopped, ends = NO_IMPROVEMENT, True
                tell(done, values, speed, measured)
                if ends or saves or stopping.best_step == done:
                    save(state, measured)
                meter.resume()
    except _Bad as bad:
        # A step that is not finite changes nothing, nor do those after it: this is the last good
        # state. It is saved as good, so that it can go on with other settings or other data.
        good = replace(state, finite=jnp.ones_like(state.finite))
        raise NotFinite(int(good.step) + 1, bad.step, bad.loss, save(good, {})) from None
    finally:
        if isinstance(feed, Generator):
            feed.close()  # Ends the threads that prepare batches.
    return _outcome(state, stopped, stopping)


def _outcome(state: TrainState, stopped: str | None, stopping: Stopping) -> Outcome:
    return Outcome(state, stopped, stopping.best, stopping.best_step)
