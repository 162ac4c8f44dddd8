"""Settings from TOML files, and the folder of a run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from jaxheads import tasks
from jaxheads.methods.lofit_run import LofitRun, split_examples
from jaxheads.train.config import flatten_config, read_config
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
    config = read_config(path, LofitRun, runlocal=runlocal)
    train, held_out = split_examples(config)
    assert len(train) >= config.batch_size and held_out
    assert config.task.name in tasks.TASKS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_says_how_to_run_it(path: Path) -> None:
    header = "".join(line for line in path.open() if line.startswith("#"))
    for word in (f"jaxheads train configs/{path.name}", "Expected:", "Runtime:"):
        assert word in header
    short, full = (read_config(path, LofitRun, runlocal=small) for small in (True, False))
    assert sum(short.stages.values()) < sum(full.stages.values())


def test_values_replace_defaults_and_runlocal_replaces_values(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        seed = 3
        [task]
        count = 50
        options = { kind = "two_hop" }
        [offsets]
        learning_rate = 1
        [runlocal]
        task.count = 20
        """,
    )
    full = read_config(path, LofitRun)
    assert (full.seed, full.task.count, full.offsets.learning_rate) == (3, 50, 1.0)
    assert type(full.offsets.learning_rate) is float
    assert full.offsets.steps == LofitRun().offsets.steps
    short = read_config(path, LofitRun, runlocal=True)
    assert short.task == dataclasses.replace(full.task, count=20)
    assert short.seed == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[ofsets]\nsteps = 3", r"unknown key 'ofsets'. Did you mean 'offsets'"),
        ("[offsets]\nstep = 3", r"unknown key 'offsets.step'. Did you mean 'offsets.steps'"),
        ("[runlocal]\ntask.cuont = 3", r"unknown key 'task.cuont'. Did you mean 'task.count'"),
        ("[offsets]\nsteps = 'ten'", r"offsets.steps must be an integer, got 'ten'"),
        ("[offsets]\nsteps = true", r"offsets.steps must be an integer, got True"),
        ("seed = 1.5", r"seed must be an integer, got 1.5"),
        ("model = 3", r"model must be a string, got 3"),
        ("task = 3", r"task must be a table, got 3"),
        ("[task.options]\nkind = [1]", r"task.options.kind must be .* got \[1\]"),
        ("batch_size = 0", r"batch_size must be at least 1, got 0"),
        ("dtype = 'float23'", r"unknown dtype 'float23'. Did you mean 'float32'"),
        ("seed = = 1", r"is not TOML"),
        ("runlocal = 3", r"runlocal must be a table"),
    ],
)
def test_mistakes_are_named_with_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=message) as error:
        read_config(path, LofitRun)
    assert str(path) in str(error.value)


def test_a_file_without_a_short_run_has_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no table"):
        read_config(written(tmp_path, "seed = 1"), LofitRun, runlocal=True)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.toml"):
        read_config(tmp_path / "absent.toml", LofitRun)


def test_a_batch_larger_than_the_data_is_refused_early() -> None:
    task = dataclasses.replace(LofitRun().task, count=30)
    with pytest.raises(ValueError, match=r"batch_size 64 .* task.count 30"):
        split_examples(dataclasses.replace(LofitRun(), batch_size=64, task=task))


def test_a_folder_is_claimed_once(tmp_path: Path) -> None:
    config = dataclasses.asdict(LofitRun())
    claim(tmp_path / "run", config)
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == config
    claim(tmp_path / "run", config)
    other = dataclasses.asdict(dataclasses.replace(LofitRun(), seed=7))
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
    flat = flatten_config(LofitRun())
    assert flat["offsets.heads"] == LofitRun().offsets.heads
    assert flat["task.name"] == LofitRun().task.name
