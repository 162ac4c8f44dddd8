"""The demonstration's report: one page of figures and tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxheads.methods.lofit import NAME
from jaxheads.methods.run import FROZEN
from jaxheads.report import Report, attention_pattern, bars, head_heatmap, token_strip
from jaxheads.report.run import add_run

COLUMNS = ("", "unedited", "chosen heads", "random heads")


def summary(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of (what, unedited, chosen heads, range of the random heads)."""
    masking = {row["name"]: row for row in results["retrieval"]["masking"]}
    tuned = {name: row["held_out"] for name, row in results["lofit"]["variants"].items()}
    rows = []
    for what, runs, plain, chosen, key in (
        ("answer loss, heads masked", masking, "clean", "chosen", "answer_loss"),
        ("answer accuracy, heads masked", masking, "clean", "chosen", "answer_accuracy"),
        ("plain-text loss, heads masked", masking, "clean", "chosen", "text_loss"),
        ("held-out loss, LoFiT", tuned, FROZEN, NAME, "loss"),
        ("held-out exact match, LoFiT", tuned, FROZEN, NAME, "exact"),
    ):
        random = [row[key] for name, row in runs.items() if name.startswith("random")]
        controls = f"{min(random):.3f} to {max(random):.3f}"
        rows.append((what, f"{runs[plain][key]:.3f}", f"{runs[chosen][key]:.3f}", controls))
    return rows


def build_report(results: dict[str, Any], pictures: dict[str, Any], lofit: Path) -> Report:
    """The page, from the results, the attention of the best head and the folder of the run."""
    report = Report("Heads that retrieve, heads that learn", results["model"])
    report = report.section(
        "Results",
        "Each line compares the unedited model, an edit of chosen heads, and the same edit of "
        "as many random heads (range over the draws). Losses are in nats per token.",
    ).table(COLUMNS, summary(results), "Chosen heads against random heads")
    report = _retrieval(report, results["retrieval"], pictures)
    report = add_run(report, lofit, "LoFiT")
    rows = [(name, f"{gap:.1e}") for name, gap in results["agreement"].items()]
    report = report.section(
        "Saved and loaded again",
        "The tuned model was written in two ways and read back; the table gives the largest "
        f"difference of any logit (their scale is {results['logit_scale']:.1f}). The checkpoint "
        "and the export hold the offsets folded into the bias of the output projection.",
    ).table(("read back from", "largest difference"), rows, "Agreement with the live edit")
    times = [(name, seconds) for name, seconds in results["seconds"].items()]
    return report.section("Time").table(("stage", "seconds"), times, "Wall-clock time by stage")


def _retrieval(report: Report, found: dict[str, Any], pictures: dict[str, Any]) -> Report:
    scores = np.asarray(found["scores"])
    top = [tuple(head) for head in found["top"]]
    many = int((scores >= 0.1).sum())
    report = report.section(
        "Retrieval heads",
        f"{many} of {scores.size} heads copy at least a tenth of an answer's distinct tokens "
        f"straight from a JSON object ({len(top)} best outlined). Masking gives a head uniform "
        "attention; it was measured on prompts that were not used to find the heads.",
    )
    report = report.figure(
        head_heatmap(scores, title="Retrieval score", label="share of tokens copied", mark=top),
        "Retrieval score of every head.",
    )
    groups = _groups(found["masking"], "answer_loss", "clean")
    report = report.figure(
        bars(groups, title="Answer loss with heads masked", ylabel="nats per token"),
        f"Loss of the answers when {len(top)} heads attend uniformly. Each dot is one draw.",
    )
    groups = _groups(found["masking"], "text_loss", "clean")
    report = report.figure(
        bars(groups, title="Plain-text loss with heads masked", ylabel="nats per token"),
        "The same masks on a paragraph of plain English.",
    )
    layer, head = pictures["head"]
    sentences, lookup = pictures["sentences"], pictures["lookup"]
    title = f"Attention of head {layer}.{head}"
    report = report.figure(
        attention_pattern(sentences["pattern"], sentences["tokens"], title=title),
        "Rows are queries, columns the keys they read. On repeated text the head reads the token "
        "that followed the query's token before.",
    )
    strip = token_strip(
        lookup["tokens"],
        lookup["pattern"][-1],
        title=f"Where head {layer}.{head} looks before it answers",
        label="attention weight",
    )
    return report.html(strip)


def _groups(runs: Sequence[dict[str, Any]], key: str, plain: str) -> dict[str, list[float]]:
    """Values by bar: the unedited model, the chosen heads, all random draws."""
    value = {run["name"]: run[key] for run in runs}
    random = [number for name, number in value.items() if name.startswith("random")]
    return {"unedited": [value[plain]], "chosen": [value["chosen"]], "random": random}
