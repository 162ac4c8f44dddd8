"""The page of a LoFiT run, from the files of its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxheads.methods.lofit_run import CONFIG, IMPORTANCE, METRICS, RESULTS, result_rows
from jaxheads.report import Report, bars, curves, head_heatmap
from jaxheads.train.config import flatten_config
from jaxheads.train.workdir import read_json, read_metrics


def lofit_page(workdir: Path) -> Report:
    """The page of a run, complete or under way.

    Raises:
      ValueError: a file of the run cannot be read.
    """
    config = read_json(workdir / CONFIG)
    state = "" if (workdir / RESULTS).is_file() else "This run is not complete. "
    title = f"LoFiT on {config['task']['name']}"
    page = Report(title, f"{state}{config['model']}, {config['offsets']['heads']} heads")
    return add_lofit(page, workdir)


def add_lofit(page: Report, workdir: Path) -> Report:
    """Adds the sections of a run: held-out results, heads, training, settings."""
    config = read_json(workdir / CONFIG)
    files = {name: workdir / name for name in (IMPORTANCE, METRICS, RESULTS)}
    if files[RESULTS].is_file():
        page = _held_out(page, read_json(files[RESULTS]))
    if files[IMPORTANCE].is_file():
        page = _importance(page, read_json(files[IMPORTANCE]))
    rows = read_metrics(files[METRICS]) if files[METRICS].is_file() else []
    page = _curves(page, rows) if rows else page
    settings = {
        key: v if isinstance(v, str) else str(v) for key, v in flatten_config(config).items()
    }
    return page.section("LoFiT: settings").facts(settings)


def _held_out(page: Report, results: dict[str, Any]) -> Report:
    rows = result_rows(results)
    examples = results["examples"]
    page = page.section(
        "LoFiT: held-out results",
        f"{examples['held_out']} examples that share no group with the {examples['train']} "
        "trained on. Random controls train as many offsets at heads drawn at random.",
    )
    for column, (name, unit) in enumerate(
        {"Loss": "nats per answer token", "Exact match": "share of answers"}.items()
    ):
        groups: dict[str, list[float]] = {}
        for row in rows:
            kind = "random heads" if row[0].startswith("random") else f"{row[0]}"
            groups.setdefault(kind, []).append(row[1 if column == 0 else 3])
        figure = bars(groups, title=f"{name} on held-out examples", ylabel=unit)
        page = page.figure(figure, f"{name}; a dot for each random draw.")
    columns = ("model", "loss", "token accuracy", "exact match", "heads")
    heads = {
        k: ", ".join(f"{layer}.{head}" for layer, head in v) for k, v in results["heads"].items()
    }
    return page.table(
        columns, [(*row, heads.get(row[0])) for row in rows], "Frozen model, chosen heads, controls"
    )


def _importance(page: Report, importance: dict[str, Any]) -> Report:
    figure = head_heatmap(
        np.asarray(importance["values"]),
        title="Importance of every head",
        label="norm of the learned scaling vector",
        mark=[tuple(head) for head in importance["chosen"]],
    )
    page = page.section(
        "LoFiT: heads", "Stage 1 learns one vector for each head; its norm ranks them."
    )
    return page.figure(figure, "Layers from the top, heads across; the chosen ones are outlined.")


def _curves(page: Report, rows: list[dict[str, Any]]) -> Report:
    stages: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        stages.setdefault(row["stage"], []).append((row["step"], row["task_loss"]))
    lines = {name: tuple(zip(*points, strict=True)) for name, points in stages.items()}
    figure = curves(
        lines,  # type: ignore[arg-type]
        title="Loss while training",
        xlabel="step",
        ylabel="nats per answer token",
    )
    return page.section("LoFiT: training").figure(figure, "Cross-entropy of the answers, by stage.")
