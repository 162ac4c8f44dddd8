"""Being told to stop: SIGTERM, Ctrl-C, or the preemption of any machine of a cluster."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Signals:
    """Turns the first signal into a flag that the loop reads between two steps.

    `with Signals() as signals:` and, once after each step, `signals.should_stop(step)`. The first
    SIGINT (Ctrl-C) or SIGTERM sets the flag, so that the loop can save and leave; a second SIGINT
    raises KeyboardInterrupt at once. The handlers that were there before come back on leaving.
    Only the main thread can handle signals: elsewhere, nothing is installed.

    Under `jax.distributed`, JAX itself receives SIGTERM and tells all processes, and they agree
    on one step after which all stop: the next that none has begun. SIGINT on any of them is
    handed on as such a notice. It takes a few seconds, or steps if those are longer.

    Attributes:
      stop: whether to stop. Under `jax.distributed` read `should_stop` instead, on which all
        processes agree.
      reason: why, in words; empty before.
    """

    def __init__(self) -> None:
        self.stop = False
        self.reason = ""
        self._interrupts = 0
        self._asked = 0
        self._together = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        """Installs the handlers.

        Raises:
          ValueError: `jax.distributed` runs without its preemption service.
        """
        self._together = jax.distributed.is_initialized()
        if self._together:
            try:
                multihost_utils.reached_preemption_sync_point(0)
            except RuntimeError as error:
                raise ValueError(
                    "jax_enable_preemption_service is off: several processes need it to agree on "
                    "the step after which they stop"
                ) from error
        if threading.current_thread() is threading.main_thread():
            # Python's handler of SIGTERM would take the place of that of JAX's service.
            numbers = [signal.SIGINT] if self._together else [signal.SIGINT, signal.SIGTERM]
            self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def should_stop(self, step: int) -> bool:
        """Whether to save and leave now.

        Every process calls it once after each step.

        Args:
          step: steps done, for `reason`.

        Returns:
          From the agreed step on True, on all processes alike.
        """
        if self._together and not self.stop:
            # Counted here: the steps of a run with several stages begin again at 0, and a count
            # that falls would pass the agreed one by.
            self._asked += 1
            if multihost_utils.reached_preemption_sync_point(self._asked):
                self.stop = True
                self.reason = f"a process was told to stop; all stop after step {step}"
        return self.stop

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        if self._together:
            signal.raise_signal(signal.SIGTERM)
            return
        self.stop = True
        self.reason = self.reason or signal.Signals(number).name
