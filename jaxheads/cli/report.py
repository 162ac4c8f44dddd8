"""`jaxheads report`: the HTML page of a training run, from the files of its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from jaxheads.cli.options import parse
from jaxheads.cli.terminal import say


def main(argv: list[str]) -> None:
    """Parses and runs."""
    parse(report, "report", argv)


def report(
    workdir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="WORKDIR")],
) -> None:
    """Write WORKDIR/report.html: held-out results, heads, curves, settings.

    Example: jaxheads report runs/lofit

    A run that is still under way gets a page of what there is so far.

    Args:
        workdir: The folder of a `jaxheads train` run.
    """
    if not (workdir / "config.json").is_file():
        raise FileNotFoundError(f"{workdir} holds no training run: it has no config.json")
    from jaxheads.report import write
    from jaxheads.report.run import run_page

    path = workdir / "report.html"
    write(run_page(workdir), path)
    say(f"report in {path}")
