"""`jaxheads routes`: which heads a router chooses, and at which tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from jaxheads.cli.options import Dtype, EditOptions, Model, load_model, parse
from jaxheads.cli.terminal import print_table, progress_bar, say
from jaxheads.files import check_target, write_json

if TYPE_CHECKING:
    from jaxheads.data import Rows, Source
    from jaxheads.routing import RoutingView
    from jaxheads.text import Tokenizer

_ROWS = 8
"""Rows that are run together."""


def main(argv: list[str]) -> None:
    """Parses and runs."""
    parse(routes, "routes", argv)


def routes(
    model: Model,
    edits: Path,
    text: str | None = None,
    source: str = "corpus:python-docs",
    split: str = "held_out",
    rows: int = 64,
    length: int = 128,
    minimum: int = 16,
    top: int = 10,
    seed: int = 0,
    json: Path | None = None,
    report: Path | None = None,
    dtype: Dtype | None = None,
) -> None:
    """Show which heads a router (mixture of heads) chooses, and at which tokens.

    Example: jaxheads routes runs/moh/model --edits runs/moh/edits.safetensors --report routes.html

    Args:
        model: A name, a directory or a .gguf file.
        edits: A file of edits with a Route, which `jaxheads train` or `Edits.save` wrote.
        text: A sentence to show token by token; default one that is shipped.
        source: Text over which loads are taken, such as text:PATH or jsonl:PATH.
        split: Of the source: held_out, train or all.
        rows: Most rows of it.
        length: Tokens of a row.
        minimum: Least occurrences of a token that a head may be said to specialise in.
        top: Heads to show in the table of specialities.
        seed: Of the shuffled tokens with which specialities are compared.
        json: Save the numbers here.
        report: Write an HTML page here.
        dtype: Of parameters and activations.
    """
    counts = {"--rows": rows, "--minimum": minimum, "--top": top}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if text is not None and not text.strip():
        raise ValueError(f"--text must be a sentence, got {text!r}")
    for path in (json, report):
        check_target(path)
    from jaxheads.data import open_source
    from jaxheads.routing import examine, in_batches
    from jaxheads.routing.examine import SENTENCE

    _check_router(edits)
    opened = open_source(source, split)
    if opened.kind == "images":
        raise ValueError(f"--source {source} holds images, expected text")
    loaded, tokenizer = load_model(model, dtype)
    routed = EditOptions(edits=edits).build(loaded.config)
    assert routed is not None
    packed = _packed(opened, tokenizer, length)
    with progress_bar() as progress:
        bar = progress.add_task("routing", total=math.ceil(min(rows, len(packed)) / _ROWS))
        view = examine(
            loaded,
            in_batches(packed, rows, min(_ROWS, rows)),
            routed,
            tokenizer,
            SENTENCE if text is None else text,
            minimum=minimum,
            seed=seed,
            on_batch=lambda done: progress.update(bar, completed=done),
        )
    _tell(view, top)
    settings = {
        **{"model": model, "edits": str(edits), "source": source, "split": split},
        **{"rows": min(rows, len(packed)), "length": length, "seed": seed},
    }
    if json:
        write_json(json, view.to_json() | {"settings": settings})
        say(f"numbers in {json}")
    if report:
        from jaxheads.report import Report, write
        from jaxheads.report.routing import add_routing

        page = Report(f"Routing of {model}", f"The heads that {edits} chooses").facts(settings)
        write(add_routing(page, view), report)
        say(f"report in {report}")


def _check_router(path: Path) -> None:
    """Finds mistakes in the file of edits before the model is read."""
    from jaxheads.edits import Edits
    from jaxheads.routing import find_route

    loaded = Edits.load(path)
    try:
        find_route(loaded.get("z"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _packed(source: Source, tokenizer: Tokenizer, length: int) -> Rows:
    from jaxheads.data import ArrayRows, Packing, pack_source

    packing = Packing(length=length, end=tokenizer.eos_id)
    with progress_bar() as progress:
        bar = progress.add_task("tokenising", total=len(source))
        batch, _ = pack_source(
            source, tokenizer, packing, lambda done, total: progress.update(bar, completed=done)
        )
    return ArrayRows(batch)


def _tell(view: RoutingView, top: int) -> None:
    from jaxheads.report.routing import layer_rows, speciality_headline, speciality_rows

    columns, rows = layer_rows(view)
    shown = [["–" if cell is None else cell for cell in row] for row in rows]
    print_table(f"routing over {view.tokens:,} tokens; loads are of routed heads", columns, shown)
    columns, rows = speciality_rows(view, top)
    if rows:
        print_table(speciality_headline(view), columns, rows)
    else:
        say(speciality_headline(view))
