"""`jaxheads train`: a LoFiT run from a TOML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxheads.cli.options import head_name, load_model, parse
from jaxheads.cli.terminal import print_table, progress_bar, say
from jaxheads.methods.lofit_run import (
    EDITS,
    LofitRun,
    finished,
    result_rows,
    run_lofit,
    split_examples,
)
from jaxheads.train import NotFinite
from jaxheads.train.config import read_config

COLUMNS = ("held out", "loss", "token accuracy", "exact match")


def main(argv: list[str]) -> None:
    """Parses and runs.

    The file comes first on the line, so that its values are the defaults that the flags
    override and that --help shows.
    """
    given = Path(argv[0]) if argv and not argv[0].startswith("-") else None
    small = "--runlocal" in argv
    file = LofitRun() if given is None else read_config(given, LofitRun, runlocal=small)

    def train(
        config: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CONFIG")],
        workdir: Path,
        settings: Annotated[LofitRun, tyro.conf.arg(name="")] = file,
        runlocal: bool = False,
    ) -> None:
        """Find the heads that a task needs and train offsets for them (LoFiT).

        Example: jaxheads train configs/lofit_counterfactual.toml --workdir runs/lofit
        --offsets.learning-rate 1e-2

        The same command again goes on where an interrupted run stopped. Put CONFIG first:
        `jaxheads train CONFIG --help` shows its values.

        Args:
            config: A TOML file, such as configs/lofit_counterfactual.toml.
            workdir: Folder for checkpoints, metrics, edits and results.
            settings: Values that replace those of the file.
            runlocal: Take the smaller values of the file's table [runlocal].
        """
        if config != given:
            raise ValueError(f"CONFIG comes first: jaxheads train {config} ...")
        run(settings, workdir)

    # The parser leaves arguments it has already taken out of the help that follows them.
    parse(train, "train", ["--help"] if {"-h", "--help"} & set(argv) else argv)


def run(config: LofitRun, workdir: Path) -> None:
    """Runs with a progress bar and prints the results."""
    split_examples(config)  # Tells mistakes in the task before anything is made or read.
    results = finished(config, workdir)
    if results is None:
        model, tokenizer = load_model(config.model, config.dtype)
        try:
            with progress_bar() as progress:
                show = _Shown(config, progress)
                results = run_lofit(
                    config, model, tokenizer, workdir,
                    on_step=show.step, on_evaluation=show.evaluation,
                )  # fmt: skip
        except NotFinite as error:
            raise ValueError(
                f"{error}; lower the learning rate. The metrics are in {workdir}"
            ) from error
    else:
        say(f"{workdir} holds this run, complete")
    examples = results["examples"]
    title = f"{config.task.name}: {examples['train']} examples, {examples['held_out']} held out"
    print_table(title, COLUMNS, result_rows(results))
    say(f"chosen heads: {', '.join(head_name(tuple(h)) for h in results['heads']['chosen'])}")
    say(f"edits in {workdir / EDITS}; `jaxheads report {workdir}` writes a page")


class _Shown:
    """One bar over all stages."""

    def __init__(self, config: LofitRun, progress: Any) -> None:
        self._progress = progress
        self._before, done = {}, 0
        for name, steps in config.stages.items():
            self._before[name], done = done, done + steps
        self._bar = progress.add_task("starting", total=done)

    def step(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        loss = f" loss {metrics['task_loss']:.3f}" if metrics else ""
        self._progress.update(
            self._bar, completed=self._before[stage] + step, description=f"{stage}{loss}"
        )

    def evaluation(self, name: str) -> None:
        self._progress.update(self._bar, description=f"measuring {name}")
