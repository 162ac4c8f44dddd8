"""`jaxheads cache`: what is lost when key/value heads keep less of the context."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jaxheads.cli.options import Dtype, Model, load_model, parse
from jaxheads.cli.terminal import print_table, progress_bar, say
from jaxheads.files import check_target, write_json

if TYPE_CHECKING:
    import numpy as np
    from rich.progress import TaskID

    from jaxheads.evaluate import Plan, Study
    from jaxheads.model import Transformer
    from jaxheads.text import Tokenizer


def main(argv: list[str]) -> None:
    """Parses and runs."""
    parse(cache, "cache", argv)


def cache(
    model: Model,
    method: tuple[str, ...] = ("razor",),
    budget: tuple[float, ...] = (0.25,),
    length: tuple[int, ...] = (512,),
    task: tuple[str, ...] = ("needle", "copy"),
    count: int = 10,
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0),
    controls: int = 5,
    sinks: int = 4,
    recent: int = 32,
    compensate: bool = False,
    bits: Literal[8] | None = None,
    prefill: Literal["streaming", "dense"] = "streaming",
    scores: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="METHOD=FILE")
    ] = (),
    source: str = "corpus:python-docs",
    split: str = "held_out",
    seed: int = 0,
    rows: int = 4,
    chunk: int = 512,
    json: Path | None = None,
    report: Path | None = None,
    dtype: Dtype | None = None,
) -> None:
    """Compare key/value caches that keep less of the context, at equal budgets.

    Example: jaxheads cache smollm2-135m-instruct --method razor snapkv --budget 0.25 0.5
    --report cache.html

    A full cache is always measured, and with head-wise methods random sets of as many full heads.
    Answers are teacher forced over what a cache kept of their contexts; exact is the share of
    answers that greedy decoding would give.

    Args:
        model: A name, a directory or a .gguf file.
        method: One or several. Heads are full by scores: razor, duo (needs --scores), induction,
            retrieval, random. Tokens are chosen: snapkv, h2o, adakv, task_kv. Others: streaming,
            long_heads (every token is kept, a query sees few).
        budget: Shares of the tokens of a full cache that are kept, in (0, 1].
        length: Tokens of contexts.
        task: needle, passkey, hops (a lookup over two facts), copy (random tokens), text.
        count: Rows of each task at each length.
        depths: Places in a context at which needles and copied spans stand, from 0 to 1.
        controls: Random sets of heads.
        sinks: First tokens that heads keep which are not full.
        recent: Last tokens that they keep.
        compensate: They keep what they drop as one token; razor's always do.
        bits: 8 stores keys and values as int8.
        prefill: dense lets them see all of a chunk while the context is read.
        scores: Scores of heads instead of measured ones, METHOD=FILE: a JSON list [L][K], the
            scores.json of a training run or what --json wrote; may be given several times.
        source: Text for the task text, such as text:PATH or jsonl:PATH.
        split: Of the source: held_out, train or all.
        seed: Of rows, scores and random sets.
        rows: Contexts that are read together.
        chunk: Tokens that are read at a time.
        json: Save the numbers here.
        report: Write an HTML page here.
        dtype: Of parameters and activations.
    """
    for path in (json, report):
        check_target(path)
    from jaxheads.evaluate import KindOptions, Plan
    from jaxheads.evaluate.scores import load_scores

    plan = Plan(
        methods=method,
        budgets=budget,
        lengths=length,
        tasks=task,
        count=count,
        depths=depths,
        controls=controls,
        options=KindOptions(sinks, recent, compensate, bits, prefill),
        seed=seed,
        rows=rows,
        chunk=chunk,
    )
    given = {name: load_scores(path, name) for name, path in _files(scores).items()}
    plan.check_scores(given)
    text = _text(source, split) if "text" in task else ""
    loaded, tokenizer = load_model(model, dtype)
    study = _run(loaded, tokenizer, plan, given, text)
    if json:
        write_json(json, {"model": model, "source": source, "split": split} | study.to_json())
        say(f"numbers in {json}")
    _tell(study)
    if report:
        from jaxheads.report import Report, write
        from jaxheads.report.cache import add_cache

        page = Report(
            f"Key/value caches of {model}", "What is lost when heads keep less of the context"
        )
        write(add_cache(page.facts(_settings(model, study.plan)), study), report)
        say(f"report in {report}")


def _run(
    model: Transformer,
    tokenizer: Tokenizer,
    plan: Plan,
    scores: Mapping[str, np.ndarray],
    text: str,
) -> Study:
    """The study, with a progress bar for scores and one for rows."""
    from jaxheads.evaluate import run_study

    with progress_bar() as progress:
        bars: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=total)
            progress.update(bars[what], completed=done)

        return run_study(model, tokenizer, plan, scores=scores, text=text, on_progress=show)


def _files(words: tuple[str, ...]) -> dict[str, Path]:
    """METHOD=FILE words.

    Raises:
      ValueError: a word without "=", or a method given twice.
    """
    files: dict[str, Path] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not (name and equals and path):
            raise ValueError(
                f"--scores {word!r} is not METHOD=FILE, such as duo=runs/duo/scores.json"
            )
        if name in files:
            raise ValueError(f"--scores of {name!r} are given twice")
        files[name] = Path(path)
    return files


def _text(source: str, split: str) -> str:
    from jaxheads.data import open_source

    opened = open_source(source, split)
    if opened.kind != "text":
        raise ValueError(f"--source {source} holds {opened.kind}, expected text")
    return "\n\n".join(opened.texts())


def _settings(model: str, plan: Plan) -> dict[str, Any]:
    options = plan.options
    lists = {
        name: ", ".join(str(value) for value in getattr(plan, name))
        for name in ("methods", "budgets", "lengths", "tasks", "depths")
    }
    numbers = {name: getattr(plan, name) for name in ("count", "controls", "seed", "chunk")}
    kinds = {name: getattr(options, name) for name in ("sinks", "recent", "compensate", "prefill")}
    stored = "8 bits" if options.bits else "as activations"
    return {"model": model} | lists | numbers | kinds | {"keys and values": stored}


def _tell(study: Study) -> None:
    from jaxheads.report.cache import cache_rows

    for task in study.plan.tasks:
        for length in study.plan.lengths:
            title = f"{task}: {study.plan.count} contexts of {length:,} tokens"
            print_table(title, *cache_rows(study, task, length))
