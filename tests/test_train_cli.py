"""`jaxheads train` as a user meets it: what it refuses, how it stops, how it goes on."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from train_runs import (
    LORA,
    SCRATCH,
    Inputs,
    end,
    here,
    logged,
    losses,
    mid_save,
    parameters,
    results,
    several,
    start,
    steps_saved,
    until,
)


@pytest.fixture(scope="module")
def whole(inputs: Inputs) -> tuple[Path, Path]:
    """Config and folder of a run from beginning to end, which tests leave alone."""
    config, workdir = inputs.config(), inputs.folder / "whole"
    assert here(config=config, workdir=workdir) == 0
    return config, workdir


@pytest.fixture
def copy(whole: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of its folder."""
    return Path(shutil.copytree(whole[1], tmp_path / "run"))


def refused(capsys: pytest.CaptureFixture[str], *argv: object, config: Path, workdir: Path) -> str:
    """The one line with which the command ends."""
    capsys.readouterr()
    code = here(*argv, config=config, workdir=workdir)
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (code, lines)
    return lines[0]


# What is refused before anything is loaded: the model of these runs is absent.


BARE = ("options = { held_out = 0.25 }", "")


@pytest.mark.parametrize(
    ("change", "argv", "message"),
    [
        ((), ("--mesh.tensor", 2), "the mesh tensor=2 needs 2 devices, but there are only 1"),
        (("jsonl:", "jsnol:"), (), r"unknown kind of data.* 'jsnol'\. Did you mean 'jsonl'"),
        (BARE, ("--data.source", "corpus:python-doc"), r"unknown corpus .* mean 'python-docs'"),
        ((), ("--data.source", "task:capitls"), r"unknown task 'capitls'\. Did you mean"),
        (BARE, ("--data.source", "tfds:no_such_set"), "no_such_set"),
        ((), ("--data.source", "jsonl:absent.jsonl"), "there is no file absent.jsonl"),
        ((), ("--data.train", "trian"), r"unknown split 'trian'\. Did you mean 'train'"),
        (("held_out = 0.25", "held_uot = 0.25"), (), "'held_uot'.* Did you mean 'held_out'"),
        (("held_out = 0.25", "held_out = 1.5"), (), "held_out must lie strictly between 0 and 1"),
        (('"lora"', '"lroa"'), (), r"config\d+.toml: unknown method 'lroa'\. Did you mean 'lora'"),
        (("rank", "rnak"), (), r"unknown key 'method.rnak'\. Did you mean 'method.rank'"),
        (("rank = 2", 'rank = "2"'), (), "method.rank must be an integer, got '2'"),
        (('name = "lora"\n', ""), (), r"a table \[method\] with a name is missing"),
        (("[method]", "[method"), (), r"config\d+.toml is not TOML"),
        (("batch_size = 4", "batch_size = 4\naccumulate = 3"), (), "multiple of accumulate 3"),
        (("1e-2", '1e-2, schedule = "cosin"'), (), r"'cosin'\. Did you mean 'cosine'"),
        ((), ("--log", "tensorbord"), r"unknown writer 'tensorbord'\. Did you mean 'tensorboard'"),
        ((), ("--topology", "cpu:8"), "--topology goes with --compile-only"),
        ((), ("--distributed", "slrum"), r"unknown form of --distributed 'slrum'\. Did you mean"),
        ((), ("--runlocal",), r"config\d+.toml has no table \[runlocal\]"),
        ((), (), "absent"),  # and at last the model itself
    ],
)
def test_bad_settings_are_told_in_one_line_and_leave_nothing(
    inputs, tmp_path, capsys, change, argv, message
):
    absent = (str(inputs.model), str(inputs.folder / "absent"))
    config = inputs.config(LORA, absent, *[change] if change else [])
    line = refused(capsys, *argv, config=config, workdir=tmp_path / "run")
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


def test_a_bad_value_of_a_flag_is_told_by_the_parser(inputs, tmp_path, capsys):
    config, workdir = inputs.config(LORA), tmp_path / "run"
    assert here("--mesh.mode", "atuo", config=config, workdir=workdir) == 2
    assert "unknown mesh mode 'atuo'. Did you mean 'auto'" in capsys.readouterr().err
    assert here("--method.rank", "two", config=config, workdir=workdir) == 2
    assert "--method.rank" in capsys.readouterr().err
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("number", "bad", "message"),
    [
        (3, "", "the line is empty, expected a JSON object"),
        (2, '{"prompt": "a", "answer"', r"not JSON: .* \(column \d+\)"),
        (4, '{"prompt": "a"}', "no field 'answer'"),
        (5, '{"prompt": "a", "answer": 3}', "answer must be a text that is not empty, got 3"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(inputs, tmp_path, capsys, number, bad, message):
    lines = inputs.examples.read_text().splitlines()
    lines[number - 1] = bad
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(lines))
    argv = ("--data.source", f"jsonl:{file}")
    line = refused(capsys, *argv, config=inputs.config(LORA), workdir=tmp_path / "run")
    assert re.search(rf"bad\.jsonl:{number}: {message}", line), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--data.length", 33), "rows of 33 tokens are longer than the context of the model, 32"),
        (
            ("--method.fit.batch-size", 4000),
            r"batch_size must lie in 1\.\.\d+ \(rows of the data\), got 4000",
        ),
        (("--method.shape.d-model", 15), "d_model 15 is not divisible by n_heads 2"),
    ],
)
def test_what_does_not_fit_the_data_or_the_model_leaves_nothing(
    inputs, tmp_path, capsys, argv, message
):
    line = refused(capsys, *argv, config=inputs.config(), workdir=tmp_path / "run")
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_two_devices_leaves_nothing(inputs, tmp_path):
    cases = {
        ("--method.fit.batch-size", 3): r"batch size 3 is not a multiple of the 2 devices",
        ("--mesh.data", 4): r"the mesh data=4 needs 4 devices, but there are only 2",
        ("--mesh.data", 1): r"the mesh .* uses 1 of 2 devices",
        ("--mesh.data", 1, "--mesh.tensor", 2, "--method.vocabulary", 271): r"271",
        ("--sharding", "atn/q", "-, -, tensor, -"): r"sharding rule 'atn/q' matches nothing; near",
        ("--sharding", "attn/q", "-, -, tnesor, -"): r"'tnesor'\. Did you mean 'tensor'",
        ("--sharding", "attn/q", "-, data"): r"attn/q.* is for 2 dimensions",
    }
    told = several(*cases, config=inputs.config(), workdir=tmp_path / "run", devices=2)
    for (code, _, errors), message in zip(told, cases.values(), strict=True):
        lines = [line for line in errors.splitlines() if line]
        assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (code, lines)
        assert re.search(message, lines[0]), lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("form", "stage", "mesh"),
    [
        (LORA, "lora", ()),
        pytest.param(SCRATCH, "from scratch", ("--mesh.data", 4, "--mesh.tensor", 2),
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_step_is_compiled_for_devices_that_are_not_here(inputs, tmp_path, form, stage, mesh):
    config, workdir = inputs.config(form, ("batch_size = 4", "batch_size = 8")), tmp_path / "run"
    argv = ("--compile-only", "--topology", "cpu:8", *mesh)
    ((code, out, errors),) = several(argv, config=config, workdir=workdir, devices=1)
    assert code == 0, errors
    assert f"{stage}: one step on 8 devices, for each of them" in out
    assert re.search(r"arguments +0\.\d+", out) and re.search(r"total +0\.\d+", out)
    assert "all-reduce" in out  # of the gradient
    assert not workdir.exists()


def test_help_shows_the_values_of_the_file(inputs, capsys):
    config = inputs.config(
        LORA, ("rank = 2", "rank = 12"), ("[loop]", "[mesh]\nmode = 'auto'\n[loop]")
    )
    assert here("--help", config=config, workdir=Path("absent")) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(r"--method\.rank INT .*?\(default: 12\)", out)
    assert re.search(r"--mesh\.mode STR .*?\(default: auto\)", out)
    assert "Example: jaxheads train" in out


def test_folders_that_are_no_run(inputs, tmp_path, capsys):
    config = inputs.config()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    line = refused(capsys, config=config, workdir=tmp_path / "mine")
    assert "mine is not empty and holds no run: choose another --workdir" in line
    line = refused(capsys, config=config, workdir=tmp_path / "mine" / "notes.txt" / "run")
    assert "cannot write" in line
    assert [*(tmp_path / "mine").iterdir()] == [tmp_path / "mine" / "notes.txt"]


def test_a_folder_of_which_a_kill_left_only_the_beginning_is_taken(whole, tmp_path):
    (tmp_path / "lock").touch()
    (tmp_path / ".config.json.123.tmp").write_text('{"model')
    assert here(config=whole[0], workdir=tmp_path) == 0
    assert losses(tmp_path) == losses(whole[1])


# A run that is there.


def test_a_complete_run_is_shown_and_not_run_again(whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole[1].rglob("*")}
    assert here(config=whole[0], workdir=whole[1]) == 0
    assert "whole holds this run, complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in whole[1].rglob("*")} == before


def test_changed_settings_are_refused_by_name(whole, copy, capsys):
    argv = ("--method.fit.steps", 7, "--seed", 1)
    line = refused(capsys, *argv, config=whole[0], workdir=copy)
    assert "holds a run with other settings: method.fit.steps is 6 there and 7 here" in line
    assert "seed is 0 there and 1 here. Choose another --workdir" in line
    assert losses(copy) == losses(whole[1])


def test_the_checkpoint_of_another_model_is_refused_by_its_arrays(
    inputs, whole, copy, tmp_path, capsys
):
    other = tmp_path / "other"
    other.mkdir()
    config = inputs.config(SCRATCH, ("d_mlp = 32", "d_mlp = 48"))
    told = json.loads((copy / "config.json").read_text())
    told["method"]["shape"]["d_mlp"] = 48
    (other / "config.json").write_text(json.dumps(told))
    shutil.copytree(copy / "checkpoints", other / "checkpoints")
    line = refused(capsys, config=config, workdir=other)
    assert "is of another model, method or optimizer" in line
    assert "blocks/mlp/down is float32[2, 32, 16] there and float32[2, 48, 16] here" in line
    assert steps_saved(other) == steps_saved(whole[1])


def test_a_torn_checkpoint_is_told_and_the_intact_one_before_it_is_used(whole, copy, capsys):
    (copy / "results.json").unlink()
    shutil.rmtree(copy / "model")
    for path in copy.glob("checkpoints/*/6/state/ocdbt.process_0/d/*"):
        path.write_bytes(b"")
    assert here(config=whole[0], workdir=copy) == 0
    told = capsys.readouterr().err
    assert re.search(r"^note: checkpoint 6 is torn \(.*\); going on from 4, which is intact$",
                     told, re.MULTILINE), told  # fmt: skip
    assert losses(copy) == losses(whole[1])
    assert parameters(copy) == parameters(whole[1])
    assert results(copy) == results(whole[1])


def test_killed_between_the_model_and_the_results_it_ends_the_same(whole, copy):
    (copy / "results.json").unlink()
    assert here(config=whole[0], workdir=copy) == 0
    assert parameters(copy) == parameters(whole[1])
    assert results(copy) == results(whole[1])


def test_a_loss_that_is_not_finite_ends_with_the_last_good_checkpoint(inputs, tmp_path, capsys):
    argv = ("--method.fit.optimizer.learning-rate", 1e30)
    line = refused(capsys, *argv, config=inputs.config(), workdir=tmp_path / "run")
    found = re.search(
        r"not finite in step (\d) .*; the last good state: checkpoint (\d); lower", line
    )
    assert found and int(found[1]) == int(found[2]) + 1, line
    assert steps_saved(tmp_path / "run")[-1] == int(found[2])
    assert list(losses(tmp_path / "run")) == [*range(1, int(found[1]))]


# Stopping and going on.

LONG = (("steps = 6", "steps = 1500"), ("checkpoint_every = 2", "checkpoint_every = 400"))


@pytest.fixture(scope="module")
def long(inputs: Inputs) -> tuple[Path, Path]:
    """As `whole`, with so many steps that a signal comes between two of them."""
    config, workdir = inputs.config(SCRATCH, *LONG), inputs.folder / "long"
    assert here(config=config, workdir=workdir) == 0
    return config, workdir


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_a_signal_saves_and_the_same_command_goes_on(long, tmp_path, capsys, number, code):
    config, workdir = long[0], tmp_path / "run"
    process = start(config=config, workdir=workdir)
    assert until(lambda: logged(workdir) > 20, process), end(process)
    # A second run meanwhile is refused, and harms nothing.
    process.send_signal(signal.SIGSTOP)
    line = refused(capsys, config=config, workdir=workdir)
    assert f"run is in use by another run (process {process.pid} on " in line
    process.send_signal(signal.SIGCONT)
    process.send_signal(number)
    ended, out, errors = end(process)
    found = re.fullmatch(
        r"interrupted in 'from scratch' after step (\d+); the same command goes on from there\n",
        out,
    )
    assert ended == code and found and not errors, (ended, out, errors)
    done = int(found[1])
    assert 20 < done < 1500 and steps_saved(workdir)[-1] == done == len(losses(workdir))
    assert here(config=config, workdir=workdir) == 0
    assert losses(workdir) == losses(long[1])
    assert parameters(workdir) == parameters(long[1])


@pytest.mark.slow
def test_killed_while_saving_it_ends_bit_for_bit_the_same(long, tmp_path):
    config, workdir = long[0], tmp_path / "run"
    process = start(config=config, workdir=workdir)
    assert until(lambda: mid_save(workdir), process), end(process)
    process.kill()
    end(process)
    assert not (workdir / "results.json").exists()
    assert here(config=config, workdir=workdir) == 0
    assert losses(workdir) == losses(long[1])
    assert parameters(workdir) == parameters(long[1])
    assert results(workdir) == results(long[1])


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_bit_for_bit_the_same(long, tmp_path):
    """Also while starting, saving, measuring or writing the model: whenever the time comes."""
    config, workdir = long[0], tmp_path / "run"
    rng = np.random.default_rng(0)
    for number in range(6):
        process = start(config=config, workdir=workdir)
        before = logged(workdir)
        until(lambda before=before: logged(workdir) not in (0, before), process)
        time.sleep(rng.uniform(0, 0.6 if number < 5 else 3))
        process.kill()
        process.communicate()
        if (workdir / "config.json").exists() and steps_saved(workdir):
            # Not more is lost than the steps since the last checkpoint, or the one being written.
            assert len(losses(workdir)) - steps_saved(workdir)[-1] <= 2 * 400
    assert here(config=config, workdir=workdir) == 0
    assert losses(workdir) == losses(long[1])
    assert parameters(workdir) == parameters(long[1])
    assert results(workdir) == results(long[1])


@pytest.mark.slow
def test_edits_are_the_same_file_after_a_kill(inputs, tmp_path):
    config = inputs.config(LORA, *LONG)
    assert here(config=config, workdir=tmp_path / "whole") == 0
    process = start(config=config, workdir=tmp_path / "run")
    assert until(lambda: bool(steps_saved(tmp_path / "run", "lora")), process), end(process)
    process.kill()
    process.communicate()
    assert here(config=config, workdir=tmp_path / "run") == 0
    files = [(tmp_path / name / "edits.safetensors").read_bytes() for name in ("whole", "run")]
    assert files[0] == files[1]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_a_full_disk_names_what_is_intact_and_the_run_goes_on_when_there_is_room(long, tmp_path):
    """No file may grow above 16 kB from the first checkpoint on."""
    config, workdir = long[0], tmp_path / "run"
    process = start("--loop.log-every", 400, config=config, workdir=workdir)
    assert until(lambda: bool(steps_saved(workdir)), process), end(process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 14, resource.RLIM_INFINITY))
    code, _, errors = end(process)
    # Tensorstore's threads may print a few lines of their own before.
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    told = r"File too large: checkpoint (800|1200|1500) could not be written into .*"
    assert re.search(told + r"The newest complete checkpoint is intact: it is step \d+$", line), (
        line
    )
    assert code == 2 and errors.endswith(line + "\n") and errors.count("Error:") < 20, errors
    assert here("--loop.log-every", 400, config=config, workdir=workdir) == 0
    assert parameters(workdir) == parameters(long[1])
