"""`Fit`: how long one stage is trained, on how much at a time, by what optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxheads.train.optimizer import Optimizer


@dataclass(frozen=True)
class Fit:
    """Settings of one stage of training.

    Attributes:
      steps: optimizer steps.
      batch_size: examples of a step, over all devices.
      accumulate: parts into which a step's examples are divided, one after another; their
        gradients are averaged. Takes less memory and gives the same step.
      average: decay rate per step of the moving average of what is trained, which then is the
        result; None for no average.
      optimizer: see `Optimizer`.
    """

    steps: int = 100
    batch_size: int = 8
    accumulate: int = 1
    average: float | None = None
    optimizer: Optimizer = field(default_factory=Optimizer)

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that make no run."""
        for name in ("steps", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}"
            )
        if self.average is not None and not 0 < self.average < 1:
            raise ValueError(f"average must lie strictly between 0 and 1, got {self.average}")
        self.optimizer.rate(self.steps)
