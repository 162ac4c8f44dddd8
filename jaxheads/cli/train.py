"""`jaxheads train`: a run of a method from a TOML file, on one device or on many hosts."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import TYPE_CHECKING, Annotated, Any

import jax
import tyro

from jaxheads.cli.options import head_name, load_model, parse
from jaxheads.cli.terminal import print_table, say, stderr

if TYPE_CHECKING:
    from jaxheads.methods.run import Run


def main(argv: list[str]) -> None:
    """Parses and runs.

    The file is read first, so that its values are the defaults that the flags override and that
    --help shows.
    """
    from jaxheads.methods.registry import find_method
    from jaxheads.methods.run import read_run, run_type

    given = _config_of(argv)
    if given is None:
        file: Run = run_type("lofit")(find_method("lofit")())
    else:
        file = read_run(given, runlocal="--runlocal" in argv)

    def train(
        config: Path,
        workdir: str,
        settings: Annotated[Any, tyro.conf.arg(name="")] = file,
        runlocal: bool = False,
        distributed: str = "none",
        compile_only: bool = False,
        topology: str | None = None,
    ) -> None:
        """Train edits, heads or whole models: LoFiT, LoRA, fine-tuning and other methods.

        Example: jaxheads train --config configs/lofit_counterfactual.toml --workdir runs/lofit
        --method.offsets.optimizer.learning-rate 1e-2

        The same command again goes on where an interrupted run stopped. With --config given,
        --help shows its values.

        Args:
            config: A TOML file, such as configs/lofit_counterfactual.toml.
            workdir: Folder for checkpoints, metrics, what is trained and results.
            settings: Values that replace those of the file.
            runlocal: Take the smaller values of the file's table [runlocal].
            distributed: How to find the other processes: none, auto (TPU), slurm, or
                HOST:PORT,N,ID.
            compile_only: Compile the first stage, and report memory and communication per device.
            topology: Devices to compile for, such as v5e:4x4 or cpu:8; default those at hand.
        """
        if compile_only:
            # Before anything touches a device: what is compiled for may be elsewhere.
            jax.config.update("jax_platforms", "cpu")
            compile_for_report(settings, topology)
            return
        if topology is not None:
            raise ValueError("--topology goes with --compile-only")
        from jaxheads.train.distributed import Distributed, connect, disconnect

        connect(Distributed.parse(distributed, os.environ))
        run(settings, workdir)
        disconnect()  # Not after a failure: the others would be waited for.

    train.__annotations__["settings"] = Annotated[type(file), tyro.conf.arg(name="")]
    # The parser leaves arguments it has already taken out of the help that follows them.
    parse(train, "train", ["--help"] if {"-h", "--help"} & set(argv) else argv)


def _config_of(argv: list[str]) -> Path | None:
    """The value of --config, before anything else is parsed."""
    for flag, value in zip(argv, [*argv[1:], ""], strict=True):
        if flag == "--config" and value:
            return Path(value)
        if flag.startswith("--config="):
            return Path(flag.removeprefix("--config="))
    return None


def run(settings: Run, workdir: str | Path) -> None:
    """Runs with a progress bar and prints the results."""
    from jaxheads.cli.progress import training_progress
    from jaxheads.methods.run import check, finished, make_job, prepare_run, train
    from jaxheads.train.distributed import is_main
    from jaxheads.train.job import Interrupted
    from jaxheads.train.loop import NotFinite
    from jaxheads.train.mirror import Sender, mirrored
    from jaxheads.train.signals import Signals
    from jaxheads.train.workdir import check_claim, claim, hold, is_address, run_path
    from jaxheads.train.writers import check_writers, open_writers

    for name in ("absl", "asyncio"):
        # What fails in orbax's threads is raised here too; their logs would bury our one line.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    path = run_path(workdir)
    config = settings.to_json()
    check_claim(path, config)
    check_writers(settings.log)
    results = finished(path)
    if results is None:
        mesh = check(settings)
        ready = prepare_run(
            settings, lambda where: load_model(settings.model, settings.dtype, where), mesh
        )
        # Only now: settings that were wrong leave no folder behind.
        with hold(path) if is_main() else contextlib.nullcontext():
            if is_main():
                claim(path, config)
            with (
                mirrored(workdir, sends=is_main()) as folder,
                open_writers(folder, settings.log, config=config) as writers,
                Signals() as signals,
                training_progress() as show,
            ):
                if is_address(path) and is_main():
                    writers.append(Sender(folder, path))
                job = make_job(
                    settings, mesh, path, writers=writers, signals=signals, on_step=show,
                    on_note=_note,
                )  # fmt: skip
                try:
                    results = train(settings, ready, job, folder, path)
                except Interrupted as error:
                    say(f"{error}; the same command goes on from there")
                    # As if the signal had ended it: a cluster then starts the job again.
                    number = SIGINT if signals.reason == "SIGINT" else SIGTERM
                    raise SystemExit(128 + number) from None
                except NotFinite as error:
                    raise ValueError(
                        f"{error}; lower the learning rate. The metrics are in {path}"
                    ) from error
    else:
        say(f"{path} holds this run, complete")
    if is_main():
        show_results(results, path)


def _note(text: str) -> None:
    if jax.process_index() == 0:
        stderr().print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)


def show_results(results: dict[str, Any], workdir: Any) -> None:
    """Prints the table of variants, the chosen heads and where things are."""
    from jaxheads.methods.run import EDITS, MODEL, result_columns, result_rows

    examples = results["examples"]
    title = f"{results['method']}: {examples['train']} examples, {examples['held_out']} held out"
    print_table(title, result_columns(results), result_rows(results))
    heads = results["variants"][results["main"]]["heads"]
    if heads:
        shown = ", ".join(head_name(tuple(head)) for head in heads[:20])
        say(f"chosen heads: {shown}{', ...' if len(heads) > 20 else ''}")
    for name in (EDITS, MODEL):
        if (workdir / name).exists():
            say(f"{name.split('.')[0]} in {workdir / name}")
    say(f"`jaxheads report {workdir}` writes a page")


def compile_for_report(settings: Run, topology: str | None) -> None:
    """Prints what one step costs on one device of a topology."""
    from jaxheads.methods.compiling import compile_run

    report = compile_run(settings, topology)
    memory = report["memory"]
    say(f"{report['stage']}: one step on {report['devices']} devices, for each of them")
    rows = [(name, size / 2**30) for name, size in memory.items()]
    print_table("memory", ("part", "GiB"), rows)
    say(f"{report['flops'] / 1e12:.3g} TFLOP")
    found = [
        (kind, one["count"], one["bytes"] / 2**20) for kind, one in report["collectives"].items()
    ]
    if found:
        print_table("communication", ("collective", "times", "MiB"), found)
