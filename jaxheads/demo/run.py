"""The demonstration: find retrieval heads, mask them, tune heads with LoFiT, save, report.

Everything is real: SmolLM2-135M-Instruct, its retrieval heads against random ones, LoFiT on
imagined capitals against random heads and the frozen model on held-out facts, and the tuned
model saved twice, reloaded and compared.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import jaxheads as jh
from jaxheads import tasks
from jaxheads.demo.page import build_report, summary
from jaxheads.files import write_json
from jaxheads.methods import retrieval_heads
from jaxheads.methods.data import DataSettings, open_splits
from jaxheads.methods.lofit import Lofit
from jaxheads.methods.run import EDITS, Run, finished, make_job, prepare_run, train
from jaxheads.report import write
from jaxheads.text import Tokenizer, sample_text
from jaxheads.train.fit import Fit
from jaxheads.train.loop import Loop
from jaxheads.train.optimizer import Optimizer
from jaxheads.train.workdir import check_claim, claim, hold, read_json
from jaxheads.train.writers import open_writers

MODEL = "smollm2-135m-instruct"
MASKED_SHARE = 0.05
DRAWS = 5


def _fit(learning_rate: float) -> Fit:
    return Fit(steps=24, optimizer=Optimizer(learning_rate=learning_rate, schedule="linear"))


METHOD = Lofit(controls=DRAWS, importance=_fit(5e-3), offsets=_fit(1e-2))
LOFIT = Run(
    method=METHOD,
    model=MODEL,
    data=DataSettings(
        source="task:counterfactual_capitals", options={"count": 120, "kind": "two_facts"}
    ),
    loop=Loop(checkpoint_every=10),
)
SENTENCES = (
    "When Mary and John went to the store, John gave a drink to Mary. "
    "When Mary and John went to the park, John gave a flower to Mary."
)


@dataclass(frozen=True)
class Demo:
    """What the stages share: where results go and how progress is shown."""

    out: Path
    seed: int
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        """A progress bar; yields what advances it, and records the stage's seconds."""
        bar = self.progress.add_task(name, total=total)
        begun = time.perf_counter()
        yield lambda *_: self.progress.advance(bar)
        self.progress.update(bar, completed=total)
        self.seconds[name] = time.perf_counter() - begun


def run_demo(out: Path, seed: int = 0, console: Console | None = None) -> dict[str, Any]:
    """Runs the demonstration and writes its results.

    Args:
      out: folder for results.json, report.html, lofit/ (the training run with its edits),
        checkpoint/ and export/ (the tuned model); made if needed. A folder with other
        contents is refused.
      seed: of prompts, splits, random heads and training.
      console: where progress and the table of results go; default the terminal.

    Returns:
      The results, as written to results.json.

    Raises:
      ValueError: `out` holds something other than an earlier demonstration.
      OSError: `out` cannot be written.
    """
    console = console or Console()
    _claim(out)
    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        demo = Demo(out, seed, progress)
        model, tokenizer = _load(demo)
        found = _retrieval(demo, model, tokenizer)
        tuned = _lofit(demo, model, tokenizer)
        saved = _save_and_reload(demo, model, tokenizer)
        pictures = _patterns(demo, model, tokenizer, found["top"][0])
        results = {"model": MODEL, "seed": seed, "retrieval": found, "lofit": tuned} | saved
        results["seconds"] = demo.seconds
        with demo.stage("write the report", 1) as advance:
            write(build_report(results, pictures, out / "lofit"), out / "report.html")
            advance()
    write_json(out / "results.json", results)
    console.print(_table(results))
    for name in ("report.html", "results.json", "lofit", "checkpoint", "export"):
        console.print(f"  {out / name}", highlight=False)
    return results


def _claim(out: Path) -> None:
    """Makes `out` ready, or says why not, before any work.

    A demonstration that was stopped goes on with its tuning; a complete one begins anew.
    """
    path = out / "results.json"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not path.is_file():
            raise ValueError(f"{out} is not empty and holds no earlier demonstration")
        complete = not read_json(path).get("unfinished", False)
        for name in ("checkpoint", "export", *(["lofit"] if complete else [])):
            shutil.rmtree(out / name, ignore_errors=True)
    write_json(path, {"model": MODEL, "unfinished": True})


def _load(demo: Demo) -> tuple[jh.Transformer, Tokenizer]:
    with demo.stage("load the model", 1) as advance:
        model, tokenizer = jh.load(MODEL)
        advance()
    return model, tokenizer


def _retrieval(demo: Demo, model: jh.Transformer, tokenizer: Tokenizer) -> dict[str, Any]:
    """Scores all heads on lookups; masks the best and random ones on other lookups."""
    examples = tasks.lookup(10, seed=demo.seed)
    length = tasks.encode(examples, tokenizer).batch.tokens.shape[1]
    with demo.stage("find retrieval heads", 1) as advance:
        scored = tasks.encode(examples[:5], tokenizer, length=length)
        scores = retrieval_heads.retrieval_scores(model, scored)
        advance()
    count = round(MASKED_SHARE * scores.size)
    top = retrieval_heads.top_heads(scores, count)
    with demo.stage("mask retrieval and random heads", DRAWS + 2) as advance:
        held_out = tasks.encode(examples[5:], tokenizer, length=length)
        experiment = retrieval_heads.masking_experiment(
            model,
            held_out,
            top,
            text=tokenizer(sample_text()),
            draws=DRAWS,
            seed=demo.seed,
            on_progress=advance,
        )
    return {"scores": scores.tolist(), "top": top, "masking": experiment["runs"]}


def _lofit(demo: Demo, model: jh.Transformer, tokenizer: Tokenizer) -> dict[str, Any]:
    """Both stages of LoFiT, and as many random heads trained just as long."""
    run, workdir = replace(LOFIT, seed=demo.seed), demo.out / "lofit"
    steps = METHOD.importance.steps + (1 + METHOD.controls) * METHOD.offsets.steps
    with demo.stage("tune heads (LoFiT)", steps) as advance:
        check_claim(workdir, run.to_json())
        results = finished(workdir)
        if results is not None:
            return results
        ready = prepare_run(run, lambda where: (model, tokenizer))
        with hold(workdir):
            claim(workdir, run.to_json())
            with open_writers(workdir) as writers:
                job = make_job(run, None, workdir, writers=writers, on_step=advance)
                return train(run, ready, job, workdir)


def _save_and_reload(demo: Demo, model: jh.Transformer, tokenizer: Tokenizer) -> dict[str, Any]:
    """Saves the tuned model as checkpoint and export; reloads both and compares their logits."""
    out = demo.out
    edits = jh.Edits.load(out / "lofit" / EDITS)
    _, held_out = open_splits(LOFIT.data, demo.seed)
    few = tasks.encode(held_out.examples()[:8], tokenizer).batch
    real = few.mask[..., None]
    expected = model(few, edits=edits).logits

    def difference(other: jh.Transformer) -> float:
        gap = jnp.abs(other(few).logits - expected)
        return float(jnp.max(gap, where=real, initial=0))

    with demo.stage("save, export, reload", 4) as advance:
        folded = jh.fold(model, edits)
        jh.save(folded, tokenizer, out / "checkpoint")
        advance()
        jh.export(folded, out / "export", tokenizer=tokenizer)
        advance()
        agreement = {"checkpoint": difference(jh.load(out / "checkpoint")[0])}
        advance()
        agreement["export"] = difference(jh.load(out / "export")[0])
        advance()
    scale = float(jnp.max(jnp.abs(expected), where=real, initial=0))
    return {"agreement": agreement, "logit_scale": scale}


def _patterns(
    demo: Demo, model: jh.Transformer, tokenizer: Tokenizer, head: retrieval_heads.Head
) -> dict[str, Any]:
    """What the best retrieval head looks at, over real tokens."""
    layer, index = head
    prompt = tasks.lookup(1, seed=demo.seed, pairs=3, shots=0, values="hex")[0]
    pictures = {}
    with demo.stage("draw the best head", 2) as advance:
        for name, text in (("lookup", prompt.prompt), ("sentences", SENTENCES)):
            ids = tokenizer.encode(text)
            found = model(np.asarray([ids]), taps="pattern").taps["pattern"]
            pattern = np.asarray(found[layer, 0, index])
            pictures[name] = {"tokens": tokenizer.pieces(ids), "pattern": pattern}
            advance()
    return {"head": head} | pictures


def _table(results: dict[str, Any]) -> Table:
    table = Table(title=f"{results['model']}: chosen heads against {DRAWS} random draws")
    for column in ("", "unedited", "chosen heads", "random heads"):
        table.add_column(column, justify="left" if not column else "right")
    for row in summary(results):
        table.add_row(*row)
    for name, value in results["agreement"].items():
        table.add_row(f"largest logit difference, {name}", "", f"{value:.1e}", "")
    table.add_row("seconds in all", "", f"{sum(results['seconds'].values()):.0f}", "")
    return table
