"""Where metrics go: JSON lines always, TensorBoard and Weights & Biases if asked for."""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import jax

from jaxheads.files import write_text
from jaxheads.names import choose
from jaxheads.train.config import flatten_config
from jaxheads.train.workdir import MetricsLog

METRICS = "metrics.jsonl"
EXTRAS: Mapping[str, str] = MappingProxyType({"tensorboard": "tensorboardX", "wandb": "wandb"})
"""Optional writers: the name of each, which is also that of its extra, and its module."""


class Writer(Protocol):
    """Takes the metrics of each logged step."""

    def append(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the step; a step is told once in each run of the program, in order."""

    def rewind(self, stage: str, step: int) -> None:
        """Drops what was told of a stage after `step`; called before its first `append`."""

    def close(self) -> None:
        """Writes what is left."""


class JsonLines(MetricsLog):
    """metrics.jsonl, one line for each logged step of each stage."""

    def close(self) -> None:
        """Nothing is left: every line is written at once."""


class TensorBoard:
    """Event files, a folder for each stage; a rewound stage hides the steps after."""

    def __init__(self, folder: Path) -> None:
        """Opens nothing yet.

        Args:
          folder: of the event files; `tensorboard --logdir FOLDER` shows them.
        """
        self._folder = folder
        self._stages: dict[str, Any] = {}

    def append(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a step."""
        for name, value in metrics.items():
            self._stages[stage].add_scalar(name, value, step)

    def rewind(self, stage: str, step: int) -> None:
        """Opens the stage; steps after `step` in older files are not shown any more."""
        module = importlib.import_module(EXTRAS["tensorboard"])
        folder = self._folder / stage.replace(" ", "_")
        # Files are named by the second; a run that goes on at once must not write over the first.
        self._stages[stage] = module.SummaryWriter(
            logdir=str(folder), purge_step=step + 1, filename_suffix=f".{step}.{os.getpid()}"
        )

    def close(self) -> None:
        """Closes the event files."""
        for writer in self._stages.values():
            writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases, the same one when a run of ours goes on.

    Each stage has its own axis of steps. What was once sent cannot be dropped: the steps after the
    checkpoint from which a killed run goes on are there twice. Mode, entity and the like are taken
    from wandb's own environment variables, such as WANDB_MODE=offline.
    """

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        """Begins or continues the run; raises as `wandb.init`.

        Args:
          folder: of the local files and of the id of the run.
          project: the project it belongs to.
          name: how it is shown.
          config: its settings.
        """
        wandb = importlib.import_module(EXTRAS["wandb"])
        path = folder / "wandb_id"
        if not path.is_file():
            write_text(path, secrets.token_hex(4))
        self._run = wandb.init(
            project=project,
            name=name,
            dir=str(folder),
            id=path.read_text(encoding="utf-8"),
            resume="allow",
            config=flatten_config(config),
        )

    def append(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a step."""
        named = {f"{stage}/{name}": value for name, value in metrics.items()}
        self._run.log({f"{stage}/step": step, **named})

    def rewind(self, stage: str, step: int) -> None:
        """Declares the stage's own axis of steps."""
        self._run.define_metric(f"{stage}/step")
        self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def close(self) -> None:
        """Sends what is left."""
        self._run.finish()


def check_writers(names: Sequence[str]) -> None:
    """Refuses writers that this installation does not have.

    Raises:
      ValueError: an unknown name, or one whose package is missing (the message says which extra
        to install).
    """
    for name in names:
        module = EXTRAS[choose("writer", name, EXTRAS)]
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(
                f"the writer {name!r} needs {module}: pip install 'jaxheads[{name}]' ({error})"
            ) from error


@contextmanager
def open_writers(
    workdir: Path,
    names: Sequence[str] = (),
    *,
    config: Mapping[str, Any] | None = None,
    project: str = "jaxheads",
) -> Iterator[list[Writer]]:
    """The writers of a run; closed on leaving.

    Args:
      workdir: the run's folder, which exists; its name is that of the run at Weights & Biases.
      names: any of "tensorboard" and "wandb"; metrics.jsonl is always written.
      config: settings, for Weights & Biases.
      project: the project there.

    Yields:
      The writers; none in any process but the first, which has the same metrics as all.

    Raises:
      ValueError: as `check_writers`.
    """
    check_writers(names)
    if jax.process_index() != 0:
        yield []
        return
    makers: Mapping[str, Callable[[], Writer]] = {
        "tensorboard": lambda: TensorBoard(workdir / "tensorboard"),
        "wandb": lambda: WeightsAndBiases(workdir, project, workdir.name, config or {}),
    }
    with ExitStack() as stack:
        writers: list[Writer] = [JsonLines(workdir / METRICS)]
        for name in names:
            writers.append(makers[name]())
            stack.callback(writers[-1].close)
        yield writers
