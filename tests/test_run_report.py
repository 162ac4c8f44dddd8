"""The page of a training run: complete, under way, with and without heads."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_lora import task_data
from tiny import tiny_model

from jaxheads.files import write_json
from jaxheads.methods.data import DataSettings
from jaxheads.methods.from_scratch import FromScratch
from jaxheads.methods.lofit import Lofit
from jaxheads.methods.registry import METHODS
from jaxheads.methods.run import RESULTS, SCORES, Prepared, Run, make_job, train
from jaxheads.report import Report, render
from jaxheads.report.run import SCORE_NAMES, add_run, run_page
from jaxheads.train.fit import Fit
from jaxheads.train.loop import Loop
from jaxheads.train.workdir import claim, read_json
from jaxheads.train.writers import open_writers

STAGE = Fit(steps=4, batch_size=4)
LOFIT = Run(
    method=Lofit(heads=2, controls=2, importance=STAGE, offsets=STAGE),
    loop=Loop(evaluate_every=2),
    neighbours=("task:true_capitals",),
)
HEADS = {"lofit": [[2, 1], [0, 5]], "random 1": [[1, 1], [2, 4]], "random 2": [[0, 0], [0, 1]]}


def real_run(workdir: Path) -> Path:
    """LoFiT on a tiny model."""
    data = dataclasses.replace(task_data(), train=[None] * 6, held_out=[None] * 2)
    ready = Prepared(tiny_model(), None, data, {"task:true_capitals": data})  # type: ignore[arg-type]
    claim(workdir, LOFIT.to_json())
    with open_writers(workdir) as writers:
        train(LOFIT, ready, make_job(LOFIT, None, workdir, writers=writers), workdir)
    return workdir


def choosing_run(workdir: Path, *, complete: bool = True) -> Path:
    """The folder that such a run leaves, whole or after the first stage."""
    stages = {"importance": 4, **dict.fromkeys(HEADS, 4)} if complete else {"importance": 3}
    rows: list[dict[str, Any]] = []
    for stage, steps in stages.items():
        for step in range(1, steps + 1):
            held_out = {"evaluation/loss": 2.0 / step} if step % 2 == 0 else {}
            rows.append({"stage": stage, "step": step, "loss": 3.0 / step, **held_out})
    variants = {
        name: {
            "held_out": {"loss": loss, "token_accuracy": 0.5, "exact": 0.25},
            "neighbours": {"task:true_capitals": {"loss": 1.0, "token_accuracy": 0.5}},
            "trained": 16 * (name != "frozen"),
            "heads": HEADS.get(name),
        }
        for name, loss in zip(["frozen", *HEADS], [4.125, 1.5, 2.5, 3.5], strict=True)
    }
    results = {
        "method": "lofit", "main": "lofit", "examples": {"train": 6, "held_out": 2},
        "variants": variants, "seconds": 1.5, "environment": {"jax": "0"},
    }  # fmt: skip
    scores = np.random.default_rng(0).normal(size=(3, 6)).tolist()
    files: dict[str, Any] = {
        RESULTS: results,
        SCORES: {"axes": ["layer", "head"], "values": scores},
    }
    return written(workdir, LOFIT, rows, files if complete else {})


def written(workdir: Path, run: Run, rows: list[dict[str, Any]], files: dict[str, Any]) -> Path:
    claim(workdir, run.to_json())
    with open_writers(workdir) as (log, *_):
        for row in rows:
            log.append(row.pop("stage"), row.pop("step"), row)
    for name, value in files.items():
        write_json(workdir / name, value)
    return workdir


def headings(page: str) -> list[str]:
    return re.findall(r"<h2[^>]*>([^<]*)<", page)


def table(page: str, number: int) -> list[list[str]]:
    """Cells of a table, its headings first."""
    body = re.findall(r"<table>(.*?)</table>", page, re.DOTALL)[number]
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    return [re.findall(r"<t[dh][^>]*>([^<]*)<", row) for row in rows]


@pytest.mark.parametrize("make", [choosing_run, pytest.param(real_run, marks=pytest.mark.slow)])
def test_a_run_that_chooses_heads(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    make(tmp_path / "run")
    page = render(run_page(tmp_path / "run"))
    results = read_json(tmp_path / "run" / RESULTS)
    assert "not complete" not in page
    assert "<h1>lofit on task:counterfactual_capitals</h1>" in page
    assert headings(page) == ["Held-out results", "Heads", "Training", "Settings", "Environment"]
    found = table(page, 0)
    assert found[0][:2] == ["variant", "trained"] and found[0][-1] == "heads"
    assert [row[0] for row in found[1:]] == ["frozen", "lofit", "random 1", "random 2"]
    for row in found[2:]:
        heads = results["variants"][row[0]]["heads"]
        assert row[-1] == ", ".join(f"{layer}.{head}" for layer, head in heads)
    frozen = results["variants"]["frozen"]
    loss = float(found[1][found[0].index("loss")])
    assert loss == pytest.approx(frozen["held_out"]["loss"], rel=1e-3)
    # Both draws are in one bar, of each metric and of the neighbour.
    assert page.count("random (n = 2)") == len(frozen["held_out"]) + 1
    assert "Loss on task:true_capitals" in page
    values = np.asarray(read_json(tmp_path / "run" / SCORES)["values"])
    layer, head = results["variants"]["lofit"]["heads"][0]
    assert f"layer {layer}, head {head}: {values[layer, head]}" in page
    assert SCORE_NAMES["lofit"] in page and "The 2 chosen heads are outlined" in page
    assert "method.offsets.steps" in page and "seconds of training" in page
    assert "method.offsets.average" not in page  # not set
    stages = table(page, 1)
    assert [row[:2] for row in stages[1:]] == [
        [name, "4"] for name in ("importance", "lofit", "random 1", "random 2")
    ]


def test_a_run_under_way_has_curves_of_what_there_is(tmp_path: Path) -> None:
    page = render(run_page(choosing_run(tmp_path / "run", complete=False)))
    assert "This run is not complete." in page
    assert headings(page) == ["Training", "Settings"]
    assert "Loss while training" in page and "Held-out loss while training" not in page
    (_, row) = table(page, 0)
    assert row[:2] == ["importance", "3"]


def test_a_run_that_has_only_begun_has_its_settings(tmp_path: Path) -> None:
    claim(tmp_path / "run", LOFIT.to_json())
    page = render(run_page(tmp_path / "run"))
    assert headings(page) == ["Settings"] and "not complete" in page


def text_run(workdir: Path, rows: list[dict[str, Any]]) -> Path:
    """The folder of a language model from scratch, as `train` leaves it."""
    settings = Run(method=FromScratch(), data=DataSettings(source="corpus:python-docs"))
    variants = {
        name: {
            "held_out": {"loss": loss, "token_accuracy": 0.5}, "neighbours": {},
            "trained": 1000, "heads": None,
        }
        for name, loss in {"frozen": 6.0, "from scratch": 3.0}.items()
    }  # fmt: skip
    results = {
        "method": "from_scratch", "main": "from scratch", "variants": variants,
        "examples": {"train": 2000, "held_out": 300}, "seconds": 1.5,
        "environment": {"jax": "0"},
    }  # fmt: skip
    return written(
        workdir, settings, [{"stage": "from scratch"} | row for row in rows], {RESULTS: results}
    )


def test_a_run_without_heads_and_scores(tmp_path: Path) -> None:
    rows = [
        {"step": step, "loss": 6.0 / step, "seconds": 0.5, "tokens_per_second": 2000.0, "mfu": 0.25}
        for step in range(1, 6)
    ]
    for row in rows[1::2]:
        row["evaluation/loss"] = 4.0
    page = render(run_page(text_run(tmp_path / "run", rows)))
    assert "a new model" in page and "smollm2" not in page and "300 rows of text" in page
    assert headings(page) == ["Held-out results", "Training", "Settings", "Environment"]
    assert table(page, 0)[0] == ["variant", "trained", "loss", "token accuracy"]
    for title in ("Loss while training", "Held-out loss while training", "Speed"):
        assert title in page
    stages = table(page, 1)
    assert stages[0] == ["stage", "step", "loss", "held-out loss", "seconds a step", "tokens/s",
                         "MFU"]  # fmt: skip
    assert [float(cell.replace(",", "")) for cell in stages[1][2:]] == [1.2, 4, 0.5, 2000, 0.25]


def test_long_logs_are_thinned_and_values_that_are_not_finite_left_out(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 1.0 / step} for step in range(1, 5001)]
    rows[3]["loss"] = float("nan")
    page = render(run_page(text_run(tmp_path / "run", rows)))
    assert len(page) < 400_000
    assert table(page, 1)[1][1] == "5000"


def test_a_run_on_a_page_of_more(tmp_path: Path) -> None:
    claim(tmp_path / "run", LOFIT.to_json())
    page = render(add_run(Report("All").section("Before"), tmp_path / "run", "LoFiT"))
    assert headings(page) == ["Before", "LoFiT: settings"]


def test_folders_that_are_no_runs_of_methods_are_named(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model": "m", "task": {"name": "ioi"}})
    with pytest.raises(ValueError, match=r"config\.json names no method"):
        run_page(tmp_path)


def test_scores_are_named_for_methods_that_exist() -> None:
    assert set(SCORE_NAMES) <= set(METHODS)
