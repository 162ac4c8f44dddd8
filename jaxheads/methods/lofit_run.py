"""A whole LoFiT run in a folder: both stages, random controls, held-out results.

Writes config.json, metrics.jsonl, checkpoints/, importance.json, edits.safetensors and, last,
results.json. A run that was interrupted goes on from its newest checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxheads import tasks
from jaxheads.edits import Edits
from jaxheads.files import write_json
from jaxheads.methods.lofit import (
    Importance,
    Lofit,
    Offsets,
    evaluate,
    find_heads,
    head_sets,
    train_offsets,
)
from jaxheads.model import ModelConfig, Transformer
from jaxheads.model.batch import Batch
from jaxheads.model.config import DTYPES
from jaxheads.names import choose
from jaxheads.text import Tokenizer
from jaxheads.train import Checkpoints
from jaxheads.train.workdir import CONFIG, MetricsLog, check_claim, claim, read_json

RESULTS, IMPORTANCE, EDITS, METRICS = (
    "results.json", "importance.json", "edits.safetensors", "metrics.jsonl",
)  # fmt: skip
OnStage = Callable[[str, int, dict[str, float]], None]


@dataclass(frozen=True)
class Task:
    """What is learned.

    Attributes:
      name: of a task, a key of `jaxheads.tasks.TASKS`.
      count: examples in all.
      held_out: share of the groups of examples kept for measuring.
      length: tokens of a row; None for the longest example.
      options: of the task, e.g. {kind = "two_hop"}.
    """

    name: str = "counterfactual_capitals"
    count: int = 160
    held_out: float = 0.25
    length: int | None = None
    options: dict[str, str | int | float | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class LofitRun:
    """Everything that decides a run.

    Attributes:
      model: name or path.
      dtype: of parameters and activations.
      seed: of the examples, their order, the initial values and the random heads.
      batch_size: examples of a step.
      controls: draws of random heads to compare the chosen ones with.
      checkpoint_every: steps between checkpoints.
      task: what is learned.
      importance: stage 1, finding heads.
      offsets: stage 2, training offsets.
    """

    model: str = "smollm2-135m-instruct"
    dtype: str = "float32"
    seed: int = 0
    batch_size: int = 8
    controls: int = 3
    checkpoint_every: int = 10
    task: Task = field(default_factory=Task)
    importance: Importance = field(default_factory=Importance)
    offsets: Offsets = field(default_factory=Offsets)

    def __post_init__(self) -> None:
        choose("dtype", self.dtype, DTYPES)
        least = {
            "seed": (self.seed, 0),
            "batch_size": (self.batch_size, 1),
            "controls": (self.controls, 0),
            "checkpoint_every": (self.checkpoint_every, 1),
            "importance.steps": (self.importance.steps, 1),
            "offsets.steps": (self.offsets.steps, 1),
            "offsets.heads": (self.offsets.heads, 1),
        }
        for name, (value, minimum) in least.items():
            if value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}")

    @property
    def lofit(self) -> Lofit:
        """The settings of the method."""
        return Lofit(self.batch_size, self.seed, self.importance, self.offsets)

    @property
    def stages(self) -> dict[str, int]:
        """Steps of each stage, in order."""
        names = ["chosen", *(f"random {n}" for n in range(1, self.controls + 1))]
        return {"importance": self.importance.steps} | dict.fromkeys(names, self.offsets.steps)


def split_examples(config: LofitRun) -> tuple[list[tasks.Example], list[tasks.Example]]:
    """The train and the held-out examples.

    Raises:
      ValueError: an unknown task or option, a bad share, or fewer examples than a batch.
    """
    task = config.task
    examples = tasks.generate(task.name, task.count, config.seed, **task.options)
    train, held_out = tasks.split(examples, task.held_out, config.seed)
    if len(train) < config.batch_size:
        raise ValueError(
            f"batch_size {config.batch_size} is more than the {len(train)} training examples "
            f"that task.count {task.count} leaves"
        )
    return train, held_out


def finished(config: LofitRun, workdir: Path) -> dict[str, Any] | None:
    """The results, if the run is already complete in the folder; changes nothing.

    Raises:
      ValueError: the folder belongs to another run, or cannot be made.
    """
    check_claim(workdir, asdict(config))
    path = workdir / RESULTS
    return read_json(path) if path.is_file() else None


def run_lofit(
    config: LofitRun,
    model: Transformer,
    tokenizer: Tokenizer,
    workdir: Path,
    *,
    on_step: OnStage = lambda stage, step, metrics: None,
    on_evaluation: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Runs, or goes on with, everything; see the module.

    Args:
      config: the settings.
      model: the frozen model.
      tokenizer: its tokenizer.
      workdir: the folder; new, empty, or that of the same run.
      on_step: called with (stage, steps done, metrics).
      on_evaluation: called with the name of what is about to be measured.

    Returns:
      What results.json holds: "heads" and "held_out" by name ("frozen", "chosen",
      "random 1", ...), the number of examples, and the versions used.

    Raises:
      ValueError: settings that do not fit the model, or the folder of another run.
      NotFinite: the loss became NaN.
    """
    _check_heads(config, model.config)
    train, held_out = split_examples(config)
    batch, measured = (
        tasks.encode(side, tokenizer, length=config.task.length).batch for side in (train, held_out)
    )
    # Only now: settings that were wrong leave no folder behind.
    claim(workdir, asdict(config))
    log = MetricsLog(workdir / METRICS)

    def stage(name: str, work: Callable[..., Any]) -> Any:
        folder = workdir / "checkpoints" / name.replace(" ", "-")
        with Checkpoints(folder, every=config.checkpoint_every) as checkpoints:
            log.rewind(name, checkpoints.latest or 0)

            def record(step: int, metrics: dict[str, float]) -> None:
                log.append(name, step, metrics)
                on_step(name, step, metrics)

            on_step(name, checkpoints.latest or 0, {})
            return work(on_step=record, checkpoints=checkpoints)

    norms = stage("importance", partial(find_heads, model, batch, config.lofit))
    sets = head_sets(norms, config.offsets.heads, config.controls, config.seed)
    write_json(
        workdir / IMPORTANCE,
        {"axes": ["layer", "head"], "values": norms.tolist(), "chosen": sets["chosen"]},
    )
    edits: dict[str, Edits | None] = {"frozen": None}
    for name, heads in sets.items():
        edits[name] = stage(name, partial(train_offsets, model, batch, heads, config.lofit))
    chosen = edits["chosen"]
    assert chosen is not None
    chosen.save(workdir / EDITS)
    results = {
        "heads": sets,
        "held_out": _measure(model, measured, edits, on_evaluation),
        "examples": {"train": len(train), "held_out": len(held_out)},
        "environment": _environment(),
    }
    write_json(workdir / RESULTS, results)
    return results


def _measure(
    model: Transformer,
    batch: Batch,
    edits: dict[str, Edits | None],
    on_evaluation: Callable[[str], None],
) -> dict[str, dict[str, float]]:
    found = {}
    for name, change in edits.items():
        on_evaluation(name)
        found[name] = evaluate(model, batch, change)
    return found


def _check_heads(config: LofitRun, shape: ModelConfig) -> None:
    wanted = config.offsets.heads * (2 if config.controls else 1)
    heads = shape.n_layers * shape.n_heads
    if wanted > heads:
        raise ValueError(
            f"offsets.heads {config.offsets.heads}, and as many random ones beside them, are "
            f"more than the {heads} heads of the model"
        )


def _environment() -> dict[str, str]:
    import jaxheads

    versions = {"jaxheads": jaxheads.__version__, "jax": jax.__version__, "numpy": np.__version__}
    return versions | {"device": jax.devices()[0].device_kind}


def result_rows(results: dict[str, Any]) -> list[Sequence[Any]]:
    """Rows (name, loss, token accuracy, exact match) of the held-out results."""
    metrics = ("loss", "token_accuracy", "exact")
    return [(name, *(row[m] for m in metrics)) for name, row in results["held_out"].items()]


__all__ = [
    "CONFIG", "EDITS", "IMPORTANCE", "METRICS", "RESULTS", "LofitRun", "Task", "finished",
    "result_rows", "run_lofit", "split_examples",
]  # fmt: skip
