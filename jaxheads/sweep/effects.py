"""`effects`: runs points and gives the change of the metric by each as a named array."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxheads.model.batch import Batch
from jaxheads.model.transformer import Transformer
from jaxheads.sweep.engine import Progress, run_points, run_prefix
from jaxheads.sweep.metrics import Metric, name_of
from jaxheads.sweep.named import Label, NamedArray
from jaxheads.sweep.nans import refuse_nans
from jaxheads.sweep.points import Points


def effects(
    model: Transformer,
    batch: Batch,
    metric: Metric,
    points: Points,
    axes: tuple[str, ...],
    labels: tuple[tuple[Label, ...], ...],
    shape: tuple[int, ...],
    places: np.ndarray,
    rows: bool,
    budget: int,
    mesh: jax.sharding.Mesh | None,
    on_progress: Progress,
    unchanged: np.ndarray | None = None,
    **info: Any,
) -> NamedArray:
    """Runs points and puts their effects where they belong.

    Args:
      model: the model.
      batch: the prompts.
      metric: as `as_metric` checked it.
      points: the edits.
      axes: names of the axes of the result.
      labels: their labels.
      shape: their lengths.
      places: int [N], the place of each point in the flattened result; others are NaN.
      rows: whether every row of the batch has an entry, on a last axis.
      budget: bytes, as in `run_points`.
      mesh: as in `run_points`.
      on_progress: as in `run_points`.
      unchanged: places where the effect is zero by what the edit is.
      **info: facts to note beside "metric" and "unedited".

    Raises:
      ValueError: a budget too small for one point, or NaN.
    """
    if len(points):
        found, unedited = run_points(
            model, batch, metric, points, budget=budget, mesh=mesh, on_progress=on_progress
        )
    else:
        unedited = np.asarray(run_prefix(model, batch, metric, windowed=False).metric)
        found = np.zeros((0, len(unedited)), np.float32)
    refuse_nans(model, batch, metric, points, found, unedited)
    values = np.full((int(np.prod(shape)), len(unedited)), np.nan, np.float32)
    values[places] = found - unedited
    if unchanged is not None:
        values[unchanged] = 0
    values = values.reshape(*shape, -1)
    if rows:
        axes, labels = (*axes, "row"), (*labels, tuple(range(len(unedited))))
    else:
        values = values.mean(axis=-1)
    info = {"metric": name_of(metric), "unedited": float(unedited.mean()), **info}
    return NamedArray(f"change of {name_of(metric)} ({metric.unit})", values, axes, labels, info)


def normalised_by(
    found: NamedArray, model: Transformer, source: Batch, metric: Metric
) -> NamedArray:
    """Effects as shares of the difference between the metrics of two runs.

    Args:
      found: effects on the unedited run.
      model: the model.
      source: the prompts of the other run.
      metric: what is measured.

    Raises:
      ValueError: the metric is the same in both runs.
    """
    other = np.asarray(run_prefix(model, source, metric, windowed=False).metric)
    whole = float(other.mean()) - found.info["unedited"]
    if not abs(whole) > 1e-6:
        raise ValueError(
            f"cannot normalise: the metric is {found.info['unedited']:.6g} in both runs"
        )
    info = {**found.info, "source": float(other.mean())}
    name = f"share of the difference in {found.info['metric']} between the runs"
    return replace(found, name=name, values=found.values / whole, info=info)
