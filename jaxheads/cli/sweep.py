"""`jaxheads sweep`: what happens to a metric when each head, or part, is changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jaxheads.cli.options import Dtype, Model, load_model, parse
from jaxheads.cli.prompts import (
    MetricName,
    PromptOptions,
    Prompts,
    batches,
    make_metric,
    refuse_metric,
)
from jaxheads.cli.terminal import print_table, progress_bar, say
from jaxheads.files import check_target
from jaxheads.names import choose

if TYPE_CHECKING:
    from jaxheads.model import Transformer
    from jaxheads.sweep.metrics import Metric
    from jaxheads.sweep.named import NamedArray
    from jaxheads.tasks import Example, Pairs
    from jaxheads.text import Tokenizer

    Run = Callable[[Pairs, Metric, Callable[[int, int], None]], NamedArray]

What = Literal["ablate", "patch", "path", "attribution"]
DEFAULTS: dict[str, dict[str, Any]] = {
    "ablate": {"how": "zero"},
    "patch": {"site": "z", "over": ("layer", "head"), "direction": "denoise"},
    "path": {"receivers": ("logits",), "senders": "heads", "mlps": "recomputed"},
    "attribution": {
        "site": "z", "over": ("layer", "head"), "direction": "denoise", "steps": 0, "exact": False,
    },
}  # fmt: skip
"""The options that go with each kind of change, and what they are if not given."""


@dataclass(frozen=True)
class ChangeOptions:
    """What is changed, one part at a time. Each option is for the kinds named in front of it."""

    what: What = "ablate"
    """ablate: remove each head. patch: give each part its value of the other run. path: let
    receivers see each sender's corrupted value. attribution: estimate patch by gradients."""
    how: Literal["zero", "mean", "resample", "uniform"] | None = None
    """ablate: what becomes of a head's output: zero (default), its mean over the prompts, its
    value on the corrupted prompt, or what it is with uniform attention."""
    site: str | None = None
    """patch, attribution: where; default z, the output of each head."""
    over: tuple[str, ...] | None = None
    """patch, attribution: what is told apart, of layer, head, position and neurons; default
    layer head."""
    direction: Literal["denoise", "noise"] | None = None
    """patch, attribution: clean values into the corrupted run (denoise, default), or corrupted
    values into the clean run."""
    steps: int | None = None
    """attribution: points of integrated gradients in each layer; default 0, one gradient."""
    exact: bool = False
    """attribution: run patch too and tell how well the estimate agrees."""
    receivers: tuple[str, ...] | None = None
    """path: logits (default), or queries, keys and values such as 23.0.q; keys and values are
    named by key/value head."""
    senders: Literal["heads", "mlps", "both"] | None = None
    """path: who sends; default heads."""
    mlps: Literal["recomputed", "frozen"] | None = None
    """path: whether MLPs on the way are recomputed (default) or keep their clean values."""

    def settings(self) -> dict[str, Any]:
        """The options that count, defaults filled in.

        Raises:
          ValueError: an option of another kind of change, an unknown site, axis or receiver,
            or steps below 0.
        """
        known = DEFAULTS[self.what]
        options = asdict(self).items()
        given = {name: value for name, value in options if value is not None and value is not False}
        for name in given:
            if name != "what" and name not in known:
                fit = [kind for kind, options in DEFAULTS.items() if name in options]
                raise ValueError(
                    f"--{name} is for --what {' or '.join(fit)}, not for --what {self.what}"
                )
        chosen = {"what": self.what} | known | given
        if "site" in chosen:
            _check_part(chosen["site"], chosen["over"])
        if chosen.get("steps", 0) < 0:
            raise ValueError(f"--steps must be at least 0, got {chosen['steps']}")
        if "receivers" in chosen:
            _check_receivers(chosen["receivers"])
        return chosen


Change = Annotated[ChangeOptions, tyro.conf.arg(name="")]


def main(argv: list[str]) -> None:
    """Parses and runs."""
    parse(sweep, "sweep", argv)


def sweep(
    model: Model,
    change: Change = ChangeOptions(),
    prompts: Prompts = PromptOptions(),  # noqa: B008 - frozen
    metric: MetricName = "logit-difference",
    top: int = 10,
    json: Path | None = None,
    csv: Path | None = None,
    report: Path | None = None,
    dtype: Dtype | None = None,
) -> None:
    """Change every head of a model, one at a time, and measure what that does.

    Example: jaxheads sweep smollm2-135m-instruct --task ioi --what patch --over layer head
    position --option template=went --report sweep.html

    Args:
        model: A name, a directory or a .gguf file.
        change: What is changed.
        prompts: Which prompts.
        metric: What is measured after each prompt: right minus wrong answer in logits,
            probability, loss or rank of the right answer, or the divergence (KL) from the
            unchanged model.
        top: Entries to show, those of greatest magnitude.
        json: Save all entries and the settings here.
        csv: Save all entries here, one line for each.
        report: Write an HTML page with heatmaps here.
        dtype: Of parameters and activations.
    """
    if top < 1:
        raise ValueError(f"--top must be at least 1, got {top}")
    asked = change.settings()
    if change.what == "attribution":
        flat = asked["direction"] == "noise" and not asked["steps"]
        refuse_metric(metric, flat=flat, by="--what attribution")
    for path in (json, csv, report):
        check_target(path)
    given = prompts.read()
    loaded, tokenizer = load_model(model, dtype)
    aligned = "position" in asked.get("over", ())
    examples, pairs = given.encode(tokenizer, aligned=aligned)
    found = _run(loaded, pairs, asked, metric, prompts.rows)
    facts = {"model": model, **prompts.facts(), "count": len(examples), **asked}
    if aligned:
        facts["tokens"] = _position_names(pairs, tokenizer)
    found = replace(found, info={**found.info, **facts})
    _tell(found, top)
    if json:
        found.to_json(json)
        say(f"results in {json}")
    if csv:
        found.to_csv(csv)
        say(f"results in {csv}")
    if report:
        _write_report(report, found, examples, top)
        say(f"report in {report}")


def _run(
    model: Transformer, pairs: Pairs, asked: dict[str, Any], metric: MetricName, rows: int
) -> NamedArray:
    """The sweep, in batches of rows with a progress bar, averaged over prompts."""
    parts = batches(pairs, rows)
    found = _averaged(model, parts, _runner(model, parts, asked), metric, asked["what"])
    found = replace(found, info={**found.info, **_other_run(model, parts, asked, metric)})
    if asked.get("exact"):
        from jaxheads.sweep.agreement import agreement

        exactly = _runner(model, parts, {**asked, "what": "patch"})
        exact = _averaged(model, parts, exactly, metric, "patch")
        found = replace(found, info={**found.info, "agreement": agreement(found, exact).as_dict()})
    return found


def _runner(model: Transformer, parts: Sequence[Pairs], asked: dict[str, Any]) -> Run:
    """What measures one batch."""
    from jaxheads.sweep.patching import patch
    from jaxheads.sweep.sweep import ablate_heads

    what = asked["what"]
    place = {name: asked[name] for name in ("site", "over", "direction") if name in asked}
    if what == "ablate":
        from jaxheads.taps import mean_activation

        how, means = asked["how"], None
        if how == "mean":  # Of all prompts, not of a batch.
            means = mean_activation(model, [part.clean for part in parts])
        return lambda part, metric, show: ablate_heads(
            model, part.clean, metric, how, means=means,
            source=part.corrupted if how == "resample" else None, on_progress=show,
        )  # fmt: skip
    if what == "patch":
        return lambda part, metric, show: patch(
            model, part.clean, part.corrupted, metric, **place, on_progress=show
        )
    if what == "path":
        from jaxheads.sweep.paths import path_patch

        return lambda part, metric, show: path_patch(
            model, part.clean, part.corrupted, metric, asked["receivers"],
            senders=asked["senders"], mlps=asked["mlps"], on_progress=show,
        )  # fmt: skip
    from jaxheads.sweep.attribution import attribution_patching

    return lambda part, metric, show: attribution_patching(
        model, part.clean, part.corrupted, metric, **place, steps=asked["steps"]
    )


def _averaged(
    model: Transformer, parts: Sequence[Pairs], run: Run, metric: MetricName, title: str
) -> NamedArray:
    """Runs each batch; the mean over all prompts."""
    import numpy as np

    sizes = [len(part.answer_slot) for part in parts]
    found, done = [], 0
    with progress_bar() as progress:
        bar = progress.add_task(title, total=None)

        def show(step: int, steps: int) -> None:
            progress.update(bar, completed=step, total=steps)

        for part, size in zip(parts, sizes, strict=True):
            name = f"{title}, prompts {done + 1} to {done + size} of {sum(sizes)}"
            progress.reset(bar, total=None, description=name)
            found.append(run(part, make_metric(metric, model, part), show))
            done += size
    weighted = [(one, n / done) for one, n in zip(found, sizes, strict=True)]
    values = np.sum([one.values * weight for one, weight in weighted], axis=0)
    unedited = sum(one.info["unedited"] * weight for one, weight in weighted)
    return replace(found[0], values=values, info={**found[0].info, "unedited": unedited})


def _other_run(
    model: Transformer, parts: Sequence[Pairs], asked: dict[str, Any], metric: MetricName
) -> dict[str, float]:
    """The metric of the run that lends its values, for kinds of change that have one."""
    from jaxheads.sweep.engine import run_prefix

    if asked["what"] == "ablate":
        return {}
    clean = asked.get("direction", "noise") == "denoise"
    total = 0.0
    for part in parts:
        batch = part.clean if clean else part.corrupted
        made = make_metric(metric, model, part)
        total += float(run_prefix(model, batch, made, windowed=False).metric.sum())
    return {"source": total / sum(len(part.answer_slot) for part in parts)}


def _position_names(pairs: Pairs, tokenizer: Tokenizer) -> list[str]:
    """The token at each position of the first prompt, with "…" where other prompts differ."""
    tokens = pairs.clean.tokens
    same = (tokens == tokens[:1]).all(axis=0)
    pieces = tokenizer.pieces(tokens[0])
    return [piece if alike else f"{piece}…" for piece, alike in zip(pieces, same, strict=True)]


def _tell(found: NamedArray, top: int) -> None:
    from jaxheads.report.sweep import best_rows, headline

    columns, rows = best_rows(found, top)
    say(headline(found))
    print_table(found.name, columns, rows)
    if "agreement" in found.info:
        print_table("agreement with patch", ("", "value"), found.info["agreement"].items())


def _write_report(path: Path, found: NamedArray, examples: Sequence[Example], top: int) -> None:
    from jaxheads.report import write
    from jaxheads.report.sweep import sweep_page

    write(sweep_page(found, examples, top), path)


def _check_part(site: str, over: Sequence[str]) -> None:
    """Raises ValueError for a site that cannot be patched, or axes that it does not have."""
    from jaxheads.sites import SITES
    from jaxheads.sweep.axes import check_axes

    choose("site", site, [name for name, spec in SITES.items() if spec.stacked])
    check_axes(over, site)


def _check_receivers(receivers: Sequence[str]) -> None:
    """Raises ValueError for what is no receiver; whether a model has it is seen later."""
    from jaxheads.sweep.receivers import LOGITS, Receiver

    for name in receivers:
        if name != LOGITS:
            Receiver.parse(name)
