"""Training: a pure step over any pytree, on one device or many hosts, in a loop that resumes."""

from jaxheads.train.checkpoint import Checkpoints, Keep
from jaxheads.train.fit import Fit
from jaxheads.train.job import Interrupted, Job
from jaxheads.train.loop import Loop, NotFinite, OnStep, StepReport, run
from jaxheads.train.losses import language_loss
from jaxheads.train.mesh import Mesh, make_mesh
from jaxheads.train.optimizer import Optimizer
from jaxheads.train.select import Selection, merge, only, select
from jaxheads.train.step import TrainState, make_step, start

__all__ = [
    "Checkpoints",
    "Fit",
    "Interrupted",
    "Job",
    "Keep",
    "Loop",
    "Mesh",
    "NotFinite",
    "OnStep",
    "Optimizer",
    "Selection",
    "StepReport",
    "TrainState",
    "language_loss",
    "make_mesh",
    "make_step",
    "merge",
    "only",
    "run",
    "select",
    "start",
]
