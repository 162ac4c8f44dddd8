"""What a training run shows: a bar on a terminal, now and then a line in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from jaxheads.cli.terminal import stderr

if TYPE_CHECKING:
    from jaxheads.train.loop import OnStep, StepReport

LINE_EVERY = 30.0
"""Seconds between lines where there is no terminal, as in the log of a cluster's job."""


@contextmanager
def training_progress(clock: Callable[[], float] = time.monotonic) -> Iterator[OnStep]:
    """Shows the steps of a run, stage after stage.

    Args:
      clock: seconds.

    Yields:
      What `jaxheads.train.run` takes as `on_step`.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = stderr()
    if not console.is_terminal:
        yield _lines(clock)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("starting", total=None, told="")

        def show(report: StepReport) -> None:
            progress.update(
                bar,
                description=report.stage,
                completed=report.step,
                total=report.steps,
                told=describe(report),
            )

        yield show


def _lines(clock: Callable[[], float]) -> OnStep:
    last = clock()

    def show(report: StepReport) -> None:
        nonlocal last
        if clock() - last >= LINE_EVERY:
            last = clock()
            line = f"{report.stage} {report.step}/{report.steps} {describe(report)}"
            stderr().print(line, markup=False, highlight=False, soft_wrap=True)

    return show


def describe(report: StepReport) -> str:
    """Loss, what an evaluation found, speed and time left, in one line."""
    parts = [f"loss {report.metrics['loss']:.4g}"]
    parts += [f"{name} {value:.4g}" for name, value in report.measured.items()]
    speed = report.speed
    if speed is not None:
        if speed.tokens_per_second is not None:
            parts.append(f"{_short(speed.tokens_per_second)} tokens/s")
        if speed.mfu is not None:
            parts.append(f"{speed.mfu:.1%} MFU")
        parts.append(f"{_duration(speed.seconds_left)} left")
    return " · ".join(parts)


def _short(value: float) -> str:
    """Three digits and a thousand or a million: 12.3k."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
