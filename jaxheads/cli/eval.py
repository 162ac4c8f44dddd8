"""`jaxheads eval`: a model on a task, with and without edits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxheads.cli.options import Dtype, Edit, EditOptions, Model, load_model, parse
from jaxheads.cli.terminal import print_table, progress_bar, say
from jaxheads.files import check_target, write_json

METRICS = ("loss", "token_accuracy", "exact")
"""What is measured: nats per answer token, share of tokens right, share of answers right."""


def main(argv: list[str]) -> None:
    """Parses and runs."""
    parse(evaluate, "eval", argv)


def evaluate(
    model: Model,
    task: str,
    edit: Edit = EditOptions(),  # noqa: B008 - frozen
    count: int = 64,
    seed: int = 0,
    option: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")
    ] = (),
    json: Path | None = None,
    dtype: Dtype | None = None,
) -> None:
    """Measure a model on a task, with and without edits.

    Example: jaxheads eval smollm2-135m-instruct --task counterfactual_capitals
    --option kind=two_hop --mask 18.6,17.3

    Answers are teacher forced; loss is in nats per answer token, token_accuracy the share of
    answer tokens that are the likeliest, exact the share of answers all of whose tokens are.

    Args:
        model: A name, a directory or a .gguf file.
        task: counterfactual_capitals, ioi, lookup, needle or true_capitals.
        edit: What to change.
        count: Examples.
        seed: Of the examples.
        option: An option of the task, such as kind=two_hop; may be given several times.
        json: Save the results here.
        dtype: Of parameters and activations.
    """
    edit.check()
    check_target(json)
    from jaxheads import tasks
    from jaxheads.methods.lofit import evaluate as measure

    # A wrong name or option is told before the model is read.
    examples = tasks.generate(task, count, seed, **parse_options(option))
    loaded, tokenizer = load_model(model, dtype)
    edits = edit.build(loaded.config)
    batch = tasks.encode(examples, tokenizer).batch
    runs = {"unedited": None} if edits is None else {"unedited": None, "edited": edits}
    results = {}
    with progress_bar() as progress:
        for name, change in progress.track(runs.items(), description=task):
            results[name] = measure(loaded, batch, change)
    rows = [(name, *(found[metric] for metric in METRICS)) for name, found in results.items()]
    print_table(f"{task}, {count} examples", ("model", *METRICS), rows)
    if json:
        asked = {"model": model, "task": task, "count": count, "seed": seed}
        given = {"options": parse_options(option), "mask": edit.mask, "how": edit.how}
        file = {"edits": str(edit.edits) if edit.edits else None}
        write_json(json, asked | given | file | {"results": results})
        say(f"results in {json}")


def parse_options(words: tuple[str, ...]) -> dict[str, Any]:
    """KEY=VALUE words as a dict; a value that reads as a number or truth value is one.

    Raises:
      ValueError: a word without "=", or a key given twice.
    """
    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise ValueError(f"--option {word!r} is not KEY=VALUE, such as kind=two_hop")
        if key in options:
            raise ValueError(f"--option {key!r} is given twice")
        options[key] = _value(value)
    return options


def _value(text: str) -> bool | int | float | str:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
