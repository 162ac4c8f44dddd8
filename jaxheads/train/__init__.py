"""Training: a pure step over any pytree, batches by step, checkpoints."""

from jaxheads.train.checkpoint import Checkpoints
from jaxheads.train.data import batches
from jaxheads.train.loop import NotFinite, OnStep, run
from jaxheads.train.step import TrainState, make_step, start

__all__ = [
    "Checkpoints",
    "NotFinite",
    "OnStep",
    "TrainState",
    "batches",
    "make_step",
    "run",
    "start",
]
