"""`jaxheads train` in two real processes over gloo, against the same run in one process."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file
from train_runs import (
    LORA,
    SCRATCH,
    Inputs,
    close,
    end,
    here,
    losses,
    results,
    start,
    start_two,
    steps_saved,
    train,
    until,
)

import jaxheads as jh
from jaxheads.model.parameters import flatten


class Reference(NamedTuple):
    """A run of one process on one device."""

    config: Path
    workdir: Path


def reference(inputs: Inputs, name: str, *arguments: object) -> Reference:
    found = Reference(inputs.config(*arguments), inputs.folder / name)
    assert here(config=found.config, workdir=found.workdir) == 0
    return found


@pytest.fixture(scope="module")
def lora(inputs: Inputs) -> Reference:
    return reference(inputs, "lora", LORA)


@pytest.fixture(scope="module")
def scratch(inputs: Inputs) -> Reference:
    return reference(inputs, "scratch", SCRATCH)


def same(workdir: Path, alone: Reference) -> None:
    """Losses, results and what was trained are those of the run alone, to 1e-5 (1e-4)."""
    close(losses(workdir), losses(alone.workdir))
    ours, theirs = results(workdir), results(alone.workdir)
    for name, variant in theirs["variants"].items():
        found = ours["variants"][name].pop("held_out")
        assert found == pytest.approx(variant.pop("held_out"), abs=1e-4)
    assert ours == theirs
    trained, expected = arrays(workdir), arrays(alone.workdir)
    assert list(trained) == list(expected)
    for name, values in expected.items():
        # Adam divides by the root of small numbers, which enlarges differences of rounding.
        np.testing.assert_allclose(trained[name], values, rtol=0, atol=1e-4, err_msg=name)


def arrays(workdir: Path) -> dict[str, np.ndarray]:
    """The edits or parameters that a run wrote."""
    if (workdir / "model").is_dir():
        model, _ = jh.load(workdir / "model")
        return {path: np.asarray(leaf) for path, leaf in flatten(model.params)}
    return load_file(workdir / "edits.safetensors")


def halfway(workdir: Path, target: Path, stage: str) -> Path:
    """A run as it was after its checkpoint of step 4 of 6."""
    shutil.copytree(workdir, target)
    for name in ("results.json", "edits.safetensors"):
        (target / name).unlink(missing_ok=True)
    for path in (target / "model", target / "checkpoints" / stage / "6"):
        shutil.rmtree(path, ignore_errors=True)
    assert steps_saved(target, stage) == [4]
    return target


FSDP = ("--mesh.data", 1, "--mesh.fsdp", 2)
TENSOR = ("--mesh.data", 1, "--mesh.tensor", 2)
AUTO = ("--mesh.mode", "auto")


@pytest.fixture(scope="module")
def by_two(inputs: Inputs, lora: Reference) -> Path:
    """The folder of the run of two processes, the model divided over both."""
    workdir = inputs.folder / "two"
    started = start_two(*FSDP, config=lora.config, workdir=workdir)
    (code, out, errors), (other, nothing, more) = map(end, started)
    assert (code, other) == (0, 0), (errors, more)
    assert f"edits in {workdir / 'edits.safetensors'}" in out and "lora" not in nothing
    assert (workdir / "lock").read_text().startswith(f"process {started[0].pid} on ")
    return workdir


def test_two_processes_learn_what_one_learns_and_only_the_first_writes(by_two, lora):
    same(by_two, lora)  # `losses` sees that every step is logged once
    names = {path.name for path in by_two.iterdir()}
    assert names == {path.name for path in lora.workdir.iterdir()}
    (checkpoint,) = by_two.glob("checkpoints/*/6/state")
    written = {path.name for path in checkpoint.glob("ocdbt.process_*")}
    assert written == {"ocdbt.process_0", "ocdbt.process_1"}  # each its own shards


def test_a_checkpoint_of_two_processes_is_resumed_by_one(by_two, lora, tmp_path):
    workdir = halfway(by_two, tmp_path / "run", "lora")
    assert here(config=lora.config, workdir=workdir) == 0
    same(workdir, lora)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(), FSDP, TENSOR, AUTO, (*FSDP, *AUTO), (*TENSOR, *AUTO)])
@pytest.mark.parametrize("name", ["lora", "scratch"])
def test_every_layout_over_two_processes_and_over_two_devices(request, tmp_path, name, layout):
    alone: Reference = request.getfixturevalue(name)
    for processes, devices in ((1, 2), (2, 1)):
        workdir = tmp_path / f"{processes}"
        train(*layout, processes=processes, devices=devices, config=alone.config, workdir=workdir)
        same(workdir, alone)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), [("lora", "lora"), ("scratch", "from-scratch")])
def test_a_checkpoint_goes_on_in_other_numbers_of_processes_and_layouts(
    request, tmp_path, name, stage
):
    alone: Reference = request.getfixturevalue(name)
    first = tmp_path / "first"
    train(*FSDP, processes=2, config=alone.config, workdir=first)
    where = {"alone": (1, 1, ()), "devices": (1, 2, TENSOR), "data": (2, 1, ()),
             "tensor": (2, 1, TENSOR), "four": (2, 2, (*FSDP, "--mesh.tensor", 2))}  # fmt: skip
    for kind, (processes, devices, layout) in where.items():
        workdir = halfway(first, tmp_path / kind, stage)
        train(*layout, processes=processes, devices=devices, config=alone.config, workdir=workdir)
        same(workdir, alone)


# What goes wrong.


@pytest.mark.slow
def test_processes_that_would_read_other_data_are_refused(inputs, tmp_path):
    """Before the first step they prove that their rows are the same and their parts disjoint."""
    config = inputs.config(LORA, (str(inputs.examples), "mine.jsonl"))
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, word in zip(folders, ("cat", "dog"), strict=True):
        folder.mkdir()
        line = json.dumps({"prompt": "the", "answer": f" {word}"})
        numbered = [json.dumps({"prompt": f"on {n}", "answer": " mat"}) for n in range(40)]
        (folder / "mine.jsonl").write_text("\n".join([*numbered, *[line] * 20]))
    found = [*map(end, start_two(config=config, workdir=tmp_path / "run", folders=folders))]
    for code, _, errors in found:
        assert code == 2 and "processes disagree on " in errors, errors
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_bad_settings_end_every_process(inputs, tmp_path):
    argv = ("--method.fit.batch-size", 3)
    found = [*map(end, start_two(*argv, config=inputs.config(LORA), workdir=tmp_path / "run"))]
    for code, _, errors in found:
        assert code == 2 and "batch size 3 is not a multiple of the 2 devices" in errors, errors
    assert not (tmp_path / "run").exists()


LONG = (("steps = 6", "steps = 500"), ("checkpoint_every = 2", "checkpoint_every = 20"))


@pytest.fixture(scope="module")
def long(inputs: Inputs) -> Reference:
    return reference(inputs, "long", LORA, *LONG)


def started_and_saved(long: Reference, workdir: Path) -> list:
    processes = start_two(*FSDP, config=long.config, workdir=workdir)
    assert until(lambda: bool(steps_saved(workdir, "lora")), processes[0]), end(processes[0])
    return processes


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_saves_and_stops_both(long, tmp_path, number):
    workdir = tmp_path / "run"
    processes = started_and_saved(long, workdir)
    processes[1].send_signal(number)
    for code, out, errors in map(end, processes):
        assert code == 143, (out, errors)
        assert out.count("the same command goes on from there") == 1
    assert steps_saved(workdir, "lora")[-1] == len(losses(workdir)) < 500
    assert here(config=long.config, workdir=workdir) == 0
    close(losses(workdir), losses(long.workdir))


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_both_go_on_together(long, tmp_path):
    workdir = tmp_path / "run"
    processes = started_and_saved(long, workdir)
    processes[0].kill()
    code, _, _ = end(processes[1])
    assert code not in (0, 2)
    train(*FSDP, processes=2, config=long.config, workdir=workdir)
    same(workdir, long)


@pytest.mark.slow
def test_a_run_in_use_by_two_processes_is_refused_to_one(long, tmp_path):
    workdir = tmp_path / "run"
    processes = started_and_saved(long, workdir)
    code, _, errors = end(start(config=long.config, workdir=workdir))
    assert code == 2 and f"in use by another run (process {processes[0].pid} on " in errors
    for process in processes:
        process.kill()
        process.wait()
