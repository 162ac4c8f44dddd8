"""Profiling: a few steps of a run traced for xprof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

STEP = "train"
"""Name of a step in the trace; xprof groups by it."""


class Profile:
    """Traces the steps of a window with `jax.profiler`. Use as a context manager.

    The trace is `FOLDER/plugins/profile/<time>/<host>.xplane.pb`; `xprof FOLDER` shows it.
    """

    def __init__(self, folder: Path | None, window: tuple[int, int] | None) -> None:
        """Prepares; nothing is traced yet.

        Args:
          folder: where traces go.
          window: (first, stop): the steps first, ..., stop - 1 are traced, counted as
            TrainState.step is before them (the first step of a run is 0). None traces nothing.

        Raises:
          ValueError: a window without a folder.
        """
        if window is not None and folder is None:
            raise ValueError(f"profile = {list(window)} needs a folder for the trace")
        self._folder = folder
        self._window = window or (0, 0)
        self._tracing = False

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Starts to trace where the window begins, or where a resumed run enters it."""
        if self._tracing or not self._window[0] <= step < self._window[1]:
            return
        options = jax.profiler.ProfileOptions()
        # Python's own frames swamp the trace and slow the steps it is to show.
        options.python_tracer_level = 0
        jax.profiler.start_trace(str(self._folder), profiler_options=options)
        self._tracing = True

    def after(self, step: int, results: Any) -> None:
        """Stops after the last step of the window, once the device has finished it."""
        if self._tracing and step + 1 >= self._window[1]:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()


def annotation(step: int) -> jax.profiler.StepTraceAnnotation:
    """Marks a step for the profiler; costs nothing while nothing is traced."""
    return jax.profiler.StepTraceAnnotation(STEP, step_num=step)
