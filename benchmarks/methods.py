"""Trained methods compared on one task: what each trains, gains, and costs elsewhere.

python benchmarks/methods.py [--seeds 3] [--only lofit lora] [--json FILE]

Every method learns to answer from an imagined fact (`counterfactual_capitals`, two facts) on the
same split of each seed, with the same number of steps and examples. Measured on the held-out
questions, on a neighbouring task nobody was trained on (the true capitals, nothing imagined) and on
plain text (the held-out Python documentation). Seconds are CPU seconds of all cores, of the method
without its controls.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import jaxheads as jh
from jaxheads import tasks
from jaxheads.methods.data import DataSettings, encode_splits, open_splits
from jaxheads.methods.fine_tuning import FineTuning
from jaxheads.methods.iti import ITI
from jaxheads.methods.lofit import Lofit
from jaxheads.methods.lora import Lora
from jaxheads.methods.measure import measure
from jaxheads.methods.method import TaskData, Tuned
from jaxheads.methods.precise_heads import PreciseHeads
from jaxheads.methods.soft_injection import SoftInjection
from jaxheads.train import Fit, Job, Optimizer

DATA = DataSettings(options={"count": 160, "held_out": 0.25, "kind": "two_facts"}, length=36)
NEAR = DataSettings(source="task:true_capitals", options={"count": 72, "held_out": 0.5})
TEXT = DataSettings(source="corpus:python-docs", length=128, limit=16)
STEPS = 24
SHOTS = 10


def fit(learning_rate: float, **changes: Any) -> Fit:
    adam = Optimizer(learning_rate=learning_rate, schedule="linear", **changes)
    return Fit(steps=STEPS, batch_size=8, optimizer=adam)


METHODS: dict[str, Any] = {
    "iti": ITI(heads=14, alpha=8.0, controls=2),
    "soft_injection": SoftInjection(
        prompts=16, shots=5, validate_every=8, controls=1,
        fit=Fit(steps=STEPS, batch_size=8, optimizer=Optimizer(name="adam", learning_rate=0.2)),
    ),
    "lofit": Lofit(controls=2, importance=fit(5e-3), offsets=fit(1e-2)),
    "precise_heads": PreciseHeads(
        score="ablation", examples=8, controls=1, fit=fit(3e-4, clip=1.0)
    ),
    "lora": Lora(fit=fit(2e-3, clip=1.0)),
    "fine_tuning": FineTuning(fit=fit(3e-5, clip=1.0)),
}  # fmt: skip


def few_shot(data: TaskData, tokenizer: Any, seed: int) -> TaskData:
    """The held-out questions after ten answered ones of the training side."""
    rng = np.random.default_rng(seed)
    shown = [data.train[i] for i in rng.choice(len(data.train), SHOTS, replace=False)]
    prefix = "".join(f"{one.prompt}{one.answer}\n\n" for one in shown)
    asked = [
        dataclasses.replace(one, prompt=prefix + one.prompt, needle=None) for one in data.held_out
    ]
    return dataclasses.replace(data, held_out_batch=tasks.encode(asked, tokenizer).batch)


class TimedJob(Job):
    """A job that counts the seconds of its controls."""

    def fit(self, name: str, *arguments: Any, **named: Any) -> Any:
        begin = time.process_time()
        trained = super().fit(name, *arguments, **named)
        if name.startswith("random"):
            SPENT.append(time.process_time() - begin)
        return trained


SPENT: list[float] = []


def rows(
    model: Any, tokenizer: Any, seed: int, only: list[str], done: set[str]
) -> Iterator[dict[str, Any]]:
    """One row for each variant of each method that is not done, with this seed."""
    job = TimedJob(seed=seed)
    sides = {
        name: encode_splits(settings, open_splits(settings, seed), tokenizer)
        for name, settings in {"task": DATA, "near": NEAR, "text": TEXT}.items()
    }

    def row(method: str, variant: str, tuned: Tuned, seconds: float, task: Any) -> dict[str, Any]:
        found = measure(job, model, task, tuned, batch_size=8)
        near, text = (measure(job, model, sides[name], tuned, 8) for name in ("near", "text"))
        return {
            "method": method, "variant": variant, "seed": seed, "trained": tuned.trained,
            "loss": found["loss"], "exact": found["exact"],
            "near loss": near["loss"], "near exact": near["exact"], "text loss": text["loss"],
            "seconds": seconds,
        }  # fmt: skip

    if "frozen" not in done:
        yield row("frozen", "frozen", Tuned(), 0.0, sides["task"])
    if (prompt := f"{SHOTS}-shot prompt") not in done:
        shots = few_shot(sides["task"], tokenizer, seed)
        yield row(prompt, "prompt", Tuned(), 0.0, shots)
    for name in only:
        if name in done:
            continue
        SPENT.clear()
        begin = time.process_time()
        tuned = METHODS[name].train(job, model, tokenizer, sides["task"])
        seconds = time.process_time() - begin - sum(SPENT)
        for variant, one in tuned.items():
            label = variant.rstrip("0123456789 ")
            yield row(name, label, one, seconds, sides["task"])


def summary(found: list[dict[str, Any]]) -> list[list[str]]:
    """Mean and standard deviation over seeds and draws of each variant."""
    lines = []
    for key in dict.fromkeys((r["method"], r["variant"]) for r in found):
        same = [r for r in found if (r["method"], r["variant"]) == key]
        cells = [f"{key[0]}: {key[1]}" if key[0] != key[1] else key[0], f"{same[0]['trained']:,}"]
        for name, digits in (
            ("loss", 2), ("exact", 2), ("near loss", 2), ("near exact", 2), ("text loss", 3),
        ):  # fmt: skip
            values = np.array([r[name] for r in same])
            cells.append(f"{values.mean():.{digits}f} ± {values.std():.{digits}f}")
        lines.append([*cells, f"{np.median([r['seconds'] for r in same]):.0f}", str(len(same))])
    return lines


COLUMNS = (
    "method", "trained", "held-out loss", "right", "true capitals loss", "right", "text loss",
    "CPU seconds", "runs",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--json", type=Path, help="results; what is in it is not done again")
    arguments = parser.parse_args()
    console = Console()
    model, tokenizer = jh.load("smollm2-135m-instruct")
    found: list[dict[str, Any]] = []
    if arguments.json and arguments.json.is_file():
        found = json.loads(arguments.json.read_text())  # goes on where it was stopped
    for seed in range(arguments.seeds):
        done = {row["method"] for row in found if row["seed"] == seed}
        for row in rows(model, tokenizer, seed, arguments.only, done):
            found.append(row)
            console.print(row, highlight=False)
            if arguments.json:
                arguments.json.write_text(json.dumps(found, indent=1))
    table = Table(*COLUMNS)
    for line in summary(found):
        table.add_row(*line)
    console.print(table)


if __name__ == "__main__":
    main()
