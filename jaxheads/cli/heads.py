"""`jaxheads heads`: score every head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from jaxheads.cli.options import Dtype, Model, load_model, parse, parse_heads
from jaxheads.cli.terminal import print_table, progress_bar, say
from jaxheads.files import check_target, write_json, write_text
from jaxheads.methods.head_scores import SCORES, choose_scores, refused, score_heads

if TYPE_CHECKING:
    from rich.progress import TaskID

    from jaxheads.model import Transformer
    from jaxheads.sweep.named import NamedArray
    from jaxheads.text import Tokenizer

Rows = list[tuple[str, float]]


def main(argv: list[str]) -> None:
    """Parses and runs."""
    parse(heads, "heads", argv)


def heads(
    model: Model,
    score: tuple[str, ...] = ("retrieval",),
    count: int = 16,
    seed: int = 0,
    text: Path | None = None,
    top: int = 10,
    json: Path | None = None,
    csv: Path | None = None,
    report: Path | None = None,
    dtype: Dtype | None = None,
) -> None:
    """Score every head of a model and show the best.

    Example: jaxheads heads smollm2-135m-instruct --score induction sink --report heads.html

    Args:
        model: A name, a directory or a .gguf file.
        score: What is scored, one or several: retrieval (lookups in JSON); induction,
            previous, duplicate (random tokens twice); distance, entropy, evenness, sink
            (text); copying, successor (the weights alone); or all.
        count: Prompts, or rows of tokens, to average over.
        seed: Of the prompts.
        text: A file to read for the scores of text; default a paragraph that is shipped.
        top: Heads to show.
        json: Save the scores of all heads here.
        csv: Save them here as a table, one line for each head.
        report: Write an HTML page with a heatmap of each score here.
        dtype: Of parameters and activations.
    """
    for name, value in {"--count": count, "--top": top}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    chosen = choose_scores(score)
    for path in (json, csv, report):
        check_target(path)
    words = None if text is None else text.read_text("utf-8")
    loaded, tokenizer = load_model(model, dtype)
    for name, reason in refused(loaded, tokenizer, chosen).items():
        if name not in score:
            say(f"{name} left out: {reason}")
    found = _measure(loaded, tokenizer, score, count, seed, words)
    best = {name: _best(values, top) for name, values in found.items()}
    for name, rows in best.items():
        print_table(f"{name}: {SCORES[name].meaning}", ("head", SCORES[name].unit), rows)
    settings = {
        "model": model, "count": count, "seed": seed, "text": None if text is None else str(text)
    }  # fmt: skip
    if json:
        write_json(json, settings | {"axes": ["layer", "head"], "scores": _as_json(found)})
        say(f"scores in {json}")
    if csv:
        write_text(csv, _as_csv(found))
        say(f"scores in {csv}")
    if report:
        _write_report(report, settings, found, best)
        say(f"report in {report}")


def _measure(
    model: Transformer,
    tokenizer: Tokenizer,
    names: tuple[str, ...],
    count: int,
    seed: int,
    text: str | None,
) -> dict[str, NamedArray]:
    """The scores, with a progress bar for each probe."""
    with progress_bar() as progress:
        bars: dict[str, TaskID] = {}

        def show(probe: str, done: int, total: int) -> None:
            if probe not in bars:
                bars[probe] = progress.add_task(probe, total=total)
            progress.update(bars[probe], completed=done)

        return score_heads(
            model, tokenizer, names, count=count, seed=seed, text=text, on_progress=show
        )


def _best(values: NamedArray, top: int) -> Rows:
    return [(f"{layer}.{head}", value) for (layer, head), value in values.top(top, "highest")]


def _as_json(found: Mapping[str, NamedArray]) -> dict[str, dict]:
    return {
        name: {
            "meaning": SCORES[name].meaning,
            "unit": SCORES[name].unit,
            "values": array.values.tolist(),
            "info": dict(array.info),
        }
        for name, array in found.items()
    }


def _as_csv(found: Mapping[str, NamedArray]) -> str:
    """A line for each head: layer, head, and the scores."""
    lines = [",".join(("layer", "head", *found))]
    layers, per_layer = next(iter(found.values())).shape
    for layer in range(layers):
        for head in range(per_layer):
            values = (repr(float(array[layer, head])) for array in found.values())
            lines.append(",".join((str(layer), str(head), *values)))
    return "\n".join(lines) + "\n"


def _write_report(
    path: Path,
    settings: Mapping[str, object],
    found: Mapping[str, NamedArray],
    best: Mapping[str, Rows],
) -> None:
    from jaxheads.report import Report, head_heatmap, write

    page = Report(f"Heads of {settings['model']}", "What every head does, by its scores")
    page = page.facts({name: value for name, value in settings.items() if value is not None})
    for name, array in found.items():
        score, rows = SCORES[name], best[name]
        mark = parse_heads(",".join(head for head, _ in rows))
        facts = ", ".join(f"{key} {value:.4g}" for key, value in array.info.items())
        figure = head_heatmap(
            array.values,
            title=f"{name} of every head",
            label=score.unit,
            mark=mark,
        )
        page = (
            page.section(name.capitalize(), f"{score.meaning[0].upper()}{score.meaning[1:]}.")
            .figure(figure, f"Layers from the top, heads across{facts and '; ' + facts}.")
            .table(("head", score.unit), rows, f"The {len(rows)} highest, outlined above")
        )
    write(page, path)
