"""`jaxheads report`: the HTML page of a training run, from the files of its folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jaxheads.cli.options import head_name, parse
from jaxheads.cli.terminal import say

if TYPE_CHECKING:
    from jaxheads.report import Report


def main(argv: list[str]) -> None:
    """Parses and runs."""
    parse(report, "report", argv)


def report(
    workdir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="WORKDIR")],
) -> None:
    """Write WORKDIR/report.html: curves, chosen heads, held-out results, settings.

    Example: jaxheads report runs/lofit

    A run that is still under way gets a page of what there is so far.

    Args:
        workdir: The folder of a `jaxheads train` run.
    """
    if not (workdir / "config.json").is_file():
        raise FileNotFoundError(f"{workdir} holds no training run: it has no config.json")
    from jaxheads.report import write

    path = workdir / "report.html"
    write(build_page(workdir), path)
    say(f"report in {path}")


def build_page(workdir: Path) -> Report:
    """The page of a run, complete or under way.

    Raises:
      ValueError: a file of the run cannot be read.
    """
    from jaxheads.methods.lofit_run import IMPORTANCE, METRICS, RESULTS
    from jaxheads.report import Report
    from jaxheads.train.config import flatten_config
    from jaxheads.train.workdir import read_json, read_metrics

    config = read_json(workdir / "config.json")
    files = {name: workdir / name for name in (IMPORTANCE, METRICS, RESULTS)}
    state = "" if files[RESULTS].is_file() else "This run is not complete. "
    page = Report(
        f"LoFiT on {config['task']['name']}",
        f"{state}{config['model']}, {config['offsets']['heads']} heads",
    )
    if files[RESULTS].is_file():
        page = _held_out(page, read_json(files[RESULTS]))
    if files[IMPORTANCE].is_file():
        page = _importance(page, read_json(files[IMPORTANCE]))
    rows = read_metrics(files[METRICS]) if files[METRICS].is_file() else []
    page = _curves(page, rows) if rows else page
    settings = {
        key: v if isinstance(v, str) else str(v) for key, v in flatten_config(config).items()
    }
    return page.section("Settings").facts(settings)


def _held_out(page: Report, results: dict[str, Any]) -> Report:
    from jaxheads.methods.lofit_run import result_rows
    from jaxheads.report import bars

    rows = result_rows(results)
    examples = results["examples"]
    page = page.section(
        "Held-out results",
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
    heads = {k: ", ".join(head_name(tuple(h)) for h in v) for k, v in results["heads"].items()}
    return page.table(
        columns, [(*row, heads.get(row[0])) for row in rows], "Frozen model, chosen heads, controls"
    )


def _importance(page: Report, importance: dict[str, Any]) -> Report:
    import numpy as np

    from jaxheads.report import head_heatmap

    figure = head_heatmap(
        np.asarray(importance["values"]),
        title="Importance of every head",
        label="norm of the learned scaling vector",
        mark=[tuple(head) for head in importance["chosen"]],
    )
    page = page.section("Heads", "Stage 1 learns one vector for each head; its norm ranks them.")
    return page.figure(figure, "Layers from the top, heads across; the chosen ones are outlined.")


def _curves(page: Report, rows: list[dict[str, Any]]) -> Report:
    from jaxheads.report import curves

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
    return page.section("Training").figure(figure, "Cross-entropy of the answers, by stage.")
