"""Early stopping: the best value of a measured metric, and how long ago it was."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from jaxheads.names import choose


@dataclass(frozen=True)
class Stopping:
    """What the evaluations so far say. A value: an evaluation makes the next one.

    It is saved with every checkpoint, not read off the log: all processes of a run restore the
    checkpoint, only one of them has the log.

    Attributes:
      metric: name of the metric; with "-" in front, larger is better. None for no metric, and
        then nothing is ever the best.
      patience: evaluations without improvement after which training stops; None for never.
      best: the best value so far, None before the first finite one.
      best_step: the step at which it was measured.
      waited: evaluations since then.
    """

    metric: str | None = None
    patience: int | None = None
    best: float | None = None
    best_step: int | None = None
    waited: int = 0

    @property
    def done(self) -> bool:
        """Whether to stop now."""
        return self.patience is not None and self.waited >= self.patience

    def after(self, step: int, measured: Mapping[str, float]) -> Stopping:
        """What is known once more was measured; NaN is never an improvement.

        Args:
          step: steps taken.
          measured: the values of the evaluation by name.

        Returns:
          The same with `best`, `best_step` and `waited` brought up to date.

        Raises:
          ValueError: the evaluation has no such metric.
        """
        if self.metric is None:
            return self
        name = self.metric.removeprefix("-")
        value = measured[choose("metric of the evaluation", name, measured)]
        sign = 1 if name == self.metric else -1
        if math.isnan(value) or (self.best is not None and sign * value >= sign * self.best):
            return replace(self, waited=self.waited + 1)
        return replace(self, best=value, best_step=step, waited=0)

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: not the patience, which may be changed on resuming."""
        return {key: value for key, value in asdict(self).items() if key != "patience"}

    def resumed(self, saved: Mapping[str, Any]) -> Stopping:
        """The same settings with the progress that `to_json` saved, if for the same metric."""
        return replace(self, **saved) if saved.get("metric") == self.metric else self
