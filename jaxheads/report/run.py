"""The page of a training run, complete or under way, from the files of its folder."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxheads.methods.registry import find_method
from jaxheads.methods.run import (
    EXAMINATION,
    FROZEN,
    RESULTS,
    SCORES,
    result_columns,
    result_rows,
)
from jaxheads.names import choose
from jaxheads.report import Report, bars, curves, head_heatmap
from jaxheads.report.images import image_grid
from jaxheads.report.routing import add_routing
from jaxheads.routing import RoutingView
from jaxheads.train.config import flatten_config
from jaxheads.train.loop import EVALUATION
from jaxheads.train.workdir import CONFIG, read_json, read_metrics
from jaxheads.train.writers import METRICS

SCORE_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "bigram": "share of the head's weights kept",
        "duo_attention": "gate of the key/value head",
        "head_gating": "gate",
        "iti": "accuracy of the head's probe",
        "lofit": "norm of the learned scaling vector",
        "precise_heads": "fall of right minus wrong logit without the head",
        "soft_injection": "alpha, the share mixed in",
    }
)
"""What scores.json holds, by method."""

_IMAGES = "images:"
"""What the source of a run on images begins with."""
_MOST_HEADS, _MOST_POINTS = 32, 1000
_LOSSES = ("task_loss", "bigram_loss", "loss")
"""Names of a stage's loss; the first that is logged has no penalty added."""

Row = Mapping[str, Any]


def run_page(workdir: Path) -> Report:
    """The page of a run, complete or under way.

    Raises:
      ValueError: a file of the run cannot be read, or an earlier version wrote it.
    """
    config = _config(workdir)
    method = config["method"]["name"]
    state = "" if (workdir / RESULTS).is_file() else "This run is not complete. "
    model = config.get("model", "a new model")
    page = Report(f"{method} on {config['data']['source']}", f"{state}{model}")
    return add_run(page, workdir)


def add_run(page: Report, workdir: Path, name: str = "") -> Report:
    """Adds the sections of a run: held-out results, heads, what the method looked at besides,
    training, settings, environment.

    Args:
      page: to add to.
      workdir: the run's folder; of files that are not there yet, the sections are left out.
      name: in front of the sections' headings, on a page of more than the run.

    Raises:
      ValueError: as `run_page`.
    """
    config = _config(workdir)
    head = f"{name}: " if name else ""
    results = read_json(workdir / RESULTS) if (workdir / RESULTS).is_file() else None
    images = str(config["data"]["source"]).startswith(_IMAGES)
    if results is not None:
        page = _held_out(page, f"{head}held-out results", results, images)
        if (workdir / SCORES).is_file():
            scores = read_json(workdir / SCORES)
            page = _heads(page, f"{head}heads", config["method"]["name"], scores, results)
        if (workdir / EXAMINATION).is_file():
            page = _examined(page, name, workdir / EXAMINATION)
    rows = read_metrics(workdir / METRICS) if (workdir / METRICS).is_file() else []
    if rows:
        page = _training(page, f"{head}training", rows)
    settings = {k: _shown(v) for k, v in flatten_config(config).items() if v not in (None, [])}
    page = page.section(_upper(f"{head}settings")).facts(settings)
    if results is None:
        return page
    facts = results["environment"] | {"seconds of training": results["seconds"]}
    return page.section(_upper(f"{head}environment")).facts(facts)


def _config(workdir: Path) -> dict[str, Any]:
    config = read_json(workdir / CONFIG)
    if not isinstance(config.get("method"), dict):
        raise ValueError(f"{workdir / CONFIG} names no method: another version wrote this run")
    if hasattr(find_method(config["method"]["name"]), "create"):
        del config["model"]  # Not read by a method that makes its own.
    return config


def _held_out(page: Report, heading: str, results: Row, images: bool) -> Report:
    variants, examples = results["variants"], results["examples"]
    metrics = variants[FROZEN]["held_out"]
    answers = "exact" in metrics
    kind = "images" if images else "examples" if answers else "rows of text"
    page = page.section(
        _upper(heading),
        f"{examples['held_out']:,} {kind} that no variant was trained on; {examples['train']:,} "
        "were for training. The frozen model is the one before training.",
    )
    token = "answer token" if answers else "token"
    loss = f"nats per {'image' if images else token}"
    units = {
        # A model of images that classifies none predicts pixels or noise.
        "loss": "mean squared error" if images and "accuracy" not in metrics else loss,
        "token_accuracy": f"share of {token}s",
        "exact": "share of answers",
        "accuracy": "share of images",
        "class_accuracy": "share of samples of the class asked for",
        "frechet_distance": "between samples and held-out images",
    }
    for metric in metrics:
        groups = _draws({name: row["held_out"][metric] for name, row in variants.items()})
        title, unit = f"{_words(metric)}, held out", units.get(metric, metric)
        page = page.figure(bars(groups, title=title, ylabel=unit), f"{title}.{_dots(groups)}")
    for source in variants[FROZEN]["neighbours"]:
        groups = _draws({n: row["neighbours"][source]["loss"] for n, row in variants.items()})
        figure = bars(groups, title=f"Loss on {source}", ylabel="nats per token")
        text = f"Loss on {source}, on which nothing was trained: what training broke or helped."
        page = page.figure(figure, text + _dots(groups))
    columns, rows = result_columns(results), result_rows(results)
    if any(row["heads"] for row in variants.values()):
        columns = (*columns, "heads")
        rows = [(*row, _head_list(variants[row[0]]["heads"])) for row in rows]
    return page.table(columns, rows, "Frozen model, trained variants and controls")


def _heads(page: Report, heading: str, method: str, scores: Row, results: Row) -> Report:
    chosen = results["variants"][results["main"]]["heads"] or []
    figure = head_heatmap(
        np.asarray(scores["values"], float),
        title="Score of every head",
        label=SCORE_NAMES.get(method, "score"),
        mark=[(layer, index) for layer, index in chosen],
    )
    outlined = f" The {len(chosen)} chosen heads are outlined." if chosen else ""
    return page.section(_upper(heading)).figure(
        figure, f"Layers from the top, heads across.{outlined}"
    )


def _examined(page: Report, name: str, path: Path) -> Report:
    """What the method looked at besides: a router, or images that were made."""
    raw = read_json(path)
    try:
        kind = choose("kind of examination", str(raw.get("kind")), _EXAMINED)
        return _EXAMINED[kind](page, raw, name)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _routing(page: Report, raw: Row, name: str) -> Report:
    return add_routing(page, RoutingView.from_json(raw), name)


def _samples(page: Report, raw: Row, name: str) -> Report:
    images = np.asarray(raw["images"], float)
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    figure = image_grid(images, raw["classes"], title="Images made of noise")
    page = page.section(_upper(f"{name}: samples" if name else "samples"))
    return page.figure(figure, "Each row: images of the class that was asked for.")


_EXAMINED: Mapping[str, Callable[[Report, Row, str], Report]] = MappingProxyType(
    {"routing": _routing, "samples": _samples}
)
"""What adds the sections of examination.json, by its "kind"."""


def _training(page: Report, heading: str, rows: Sequence[Row]) -> Report:
    stages: dict[str, list[Row]] = {}
    for row in rows:
        stages.setdefault(row["stage"], []).append(row)
    page = page.section(_upper(heading), "Stages in the order in which they were trained.")
    measured = [EVALUATION + name for name in _LOSSES]
    timed = any("tokens_per_second" in row for row in rows)
    speed = ("tokens_per_second", "tokens per second") if timed else ("seconds", "seconds per step")
    for title, names, ylabel, caption in (
        ("Loss while training", _LOSSES, "loss", "Of each step's batch, without penalties."),
        ("Held-out loss while training", measured, "loss",
         "Of the held-out side, measured on the way, without penalties."),
        ("Speed", speed[:1], speed[1], "A mean over the last steps."),
    ):  # fmt: skip
        lines = {name: _line(found, names) for name, found in stages.items()}
        # A single point is no curve; the table below has it.
        lines = {name: line for name, line in lines.items() if len(line[0]) > 1}
        if lines:
            figure = curves(lines, title=title, xlabel="step", ylabel=ylabel)
            page = page.figure(figure, caption)
    return page.table(*_stage_table(stages), "Stages: the last step that was logged")


def _stage_table(
    stages: Mapping[str, Sequence[Row]],
) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Headings and rows; a column that no stage has is left out."""
    table: dict[str, list[Any]] = {
        name: []
        for name in ("stage", "step", "loss", "held-out loss", "seconds a step", "tokens/s", "MFU")
    }
    for stage, rows in stages.items():
        last = _line(rows, _LOSSES)[1][-1:], _line(rows, [EVALUATION + n for n in _LOSSES])[1][-1:]
        speeds = [_line(rows, (name,))[1] for name in ("seconds", "tokens_per_second", "mfu")]
        cells = [stage, rows[-1]["step"], *(found[0] if found else None for found in last)]
        cells += [statistics.median(found) if found else None for found in speeds]
        for column, cell in zip(table.values(), cells, strict=True):
            column.append(cell)
    kept = {name: cells for name, cells in table.items() if any(c is not None for c in cells)}
    return tuple(kept), list(zip(*kept.values(), strict=True))


def _line(rows: Sequence[Row], names: Sequence[str]) -> tuple[list[int], list[float]]:
    """Steps and finite values of the first of `names` that was logged, thinned."""
    name = next((name for name in names if any(name in row for row in rows)), names[0])
    points = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    every = np.unique(np.linspace(0, len(points) - 1, _MOST_POINTS).round().astype(int))
    chosen = [points[i] for i in every] if len(points) > _MOST_POINTS else points
    return [step for step, _ in chosen], [value for _, value in chosen]


def _draws(values: Mapping[str, float]) -> dict[str, list[float]]:
    """Draws of one control, whose names differ in a last number, under one name."""
    groups: dict[str, list[float]] = {}
    for name, value in values.items():
        groups.setdefault(re.sub(r" \d+$", "", name), []).append(value)
    return groups


def _dots(groups: Mapping[str, Sequence[float]]) -> str:
    several = any(len(values) > 1 for values in groups.values())
    return " A dot for each draw of a control." if several else ""


def _head_list(heads: Iterable[Sequence[int]] | None) -> str | None:
    if heads is None:
        return None
    names = [f"{layer}.{head}" for layer, head in heads]
    more = f", and {len(names) - _MOST_HEADS} more" if len(names) > _MOST_HEADS else ""
    return ", ".join(names[:_MOST_HEADS]) + more


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _words(name: str) -> str:
    return _upper(name.replace("_", " "))


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
