"""Settings from TOML files, and the folder of a run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from jaxheads.methods.data import open_splits
from jaxheads.methods.lofit import Lofit
from jaxheads.methods.run import Run, read_run
from jaxheads.train.config import flatten_config
from jaxheads.train.workdir import MetricsLog, claim, read_metrics

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_there_are_configs() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
@pytest.mark.parametrize("runlocal", [False, True])
def test_every_config_loads_and_has_its_examples(path: Path, runlocal: bool) -> None:
    run = read_run(path, runlocal=runlocal)
    train, held_out = open_splits(run.data, run.seed)
    assert len(held_out) > 0
    flat = flatten_config(run)
    if train.kind == "examples":
        assert len(train) >= max([1, *(v for k, v in flat.items() if k.endswith("batch_size"))])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_says_how_to_run_it(path: Path) -> None:
    header = "".join(line for line in path.open() if line.startswith("#"))
    for word in (f"jaxheads train --config configs/{path.name}", "Expected:", "Runtime:"):
        assert word in header
    short, full = (flatten_config(read_run(path, runlocal=small)) for small in (True, False))
    changed = {name for name in full if short[name] != full[name]}
    assert changed
    steps = {name for name in full if name.endswith(".steps")}
    assert all(short[name] < full[name] for name in steps)


LOFIT = '\n[method]\nname = "lofit"\n'


def test_values_replace_defaults_and_runlocal_replaces_values(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        seed = 3
        [data]
        options = { count = 50, kind = "two_hop" }
        [method]
        name = "lofit"
        [method.offsets.optimizer]
        learning_rate = 1
        [runlocal]
        data.options.count = 20
        """,
    )
    full = read_run(path)
    rate = full.method.offsets.optimizer.learning_rate
    assert (full.seed, full.data.options["count"], rate) == (3, 50, 1.0)
    assert type(rate) is float
    assert full.method.importance == Lofit().importance
    short = read_run(path, runlocal=True)
    assert short.data == dataclasses.replace(full.data, options={"count": 20, "kind": "two_hop"})
    assert short.seed == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[method.ofsets]\nsteps = 3",
            r"key 'method.ofsets'. Did you mean 'method.offsets'",
        ),
        (
            "[method.offsets]\nstep = 3",
            r"offsets.step'. Did you mean 'method.offsets.steps'",
        ),
        ("[runlocal]\ndata.lenght = 3", r"unknown key 'data.lenght'. Did you mean 'data.length'"),
        ("[method.offsets]\nsteps = 'ten'", r"method.offsets.steps must be an integer, got 'ten'"),
        ("[method.offsets]\nsteps = true", r"method.offsets.steps must be an integer, got True"),
        ("seed = 1.5", r"seed must be an integer, got 1.5"),
        ("model = 3", r"model must be a string, got 3"),
        ("data = 3", r"data must be a table, got 3"),
        ("[data.options]\nkind = [1]", r"data.options.kind must .* got \[1\]"),
        ("[method.offsets]\nbatch_size = 0", r"batch_size must be at least 1, got 0"),
        ("dtype = 'float23'", r"unknown dtype 'float23'. Did you mean 'float32'"),
        ("seed = = 1", r"is not TOML"),
        ("runlocal = 3", r"runlocal must be a table"),
    ],
)
def test_mistakes_are_named_with_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text + LOFIT)
    with pytest.raises(ValueError, match=message) as error:
        read_run(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed = 1", r"a table \[method\] with a name is missing"),
        ('[method]\nname = "lofti"', r"unknown method 'lofti'. Did you mean 'lofit'"),
    ],
)
def test_a_file_names_its_method(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_run(written(tmp_path, text))


def test_a_file_without_a_short_run_has_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no table"):
        read_run(written(tmp_path, f"seed = 1{LOFIT}"), runlocal=True)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.toml"):
        read_run(tmp_path / "absent.toml")


def test_a_folder_is_claimed_once(tmp_path: Path) -> None:
    config = Run(method=Lofit()).to_json()
    claim(tmp_path / "run", config)
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == config
    claim(tmp_path / "run", config)
    other = Run(method=Lofit(), seed=7).to_json()
    with pytest.raises(ValueError, match="seed is 0 there and 7 here"):
        claim(tmp_path / "run", other)
    with pytest.raises(ValueError, match="holds no run"):
        claim(tmp_path, config)


def test_the_log_goes_back_to_a_step(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for stage in ("a", "b"):
        for step in (1, 2, 3):
            log.append(stage, step, {"loss": 0.5})
    with log.path.open("a") as file:
        file.write('{"stage": "b", "st')
    log.rewind("b", 1)
    steps = [(row["stage"], row["step"]) for row in read_metrics(log.path)]
    assert steps == [("a", 1), ("a", 2), ("a", 3), ("b", 1)]
    log.append("b", 2, {"loss": 0.25})
    assert read_metrics(log.path)[-1] == {"stage": "b", "step": 2, "loss": 0.25}


def test_dotted_names() -> None:
    flat = flatten_config(Run(method=Lofit(heads=3)))
    assert flat["method.heads"] == 3
    assert flat["method.offsets.optimizer.schedule"] == "linear"
