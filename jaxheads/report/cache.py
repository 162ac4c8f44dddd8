"""The page of `jaxheads cache`: quality against bytes, length and depth, which heads are full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxheads.report.drawing import drawing, legend, to_svg
from jaxheads.report.heatmaps import head_heatmap, heatmap
from jaxheads.report.page import Report

if TYPE_CHECKING:
    from jaxheads.evaluate import Group, Study

_MIB = 2**20
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_GREYS = ("#888888", "#222222")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_EXPLAINED = {
    "bytes": (
        "Loss of the answers, in nats per token, against the bytes of keys and values that are "
        "there when the answer is written, measured from the arrays, as a share of those of a "
        "full cache. Lower and further left is better. Grey: random sets of full heads, from the "
        "best of them to the worst, with their mean. +c: heads that stream keep what they drop "
        "as one token."
    ),
    "depth": (
        "Loss of the answers by the place in the context at which they are told, 0 first and 1 "
        "last. All caches of one budget share the colours."
    ),
    "heads": (
        "The score by which a method chooses the heads that keep the whole context; those that "
        "the budget allows are outlined."
    ),
}


def add_cache(page: Report, study: Study) -> Report:
    """Adds the sections of a comparison of caches.

    Args:
      page: to add to.
      study: of `jaxheads.evaluate.run_study`.
    """
    page = _curves(page.section("Quality against bytes", _EXPLAINED["bytes"]), study)
    if any(run.depths is not None for run in study.runs):
        page = _depths(page.section("By length and depth", _EXPLAINED["depth"]), study)
    if study.scores:
        page = _heads(page.section("Which heads are full", _EXPLAINED["heads"]), study)
    return page


def cache_rows(
    study: Study, task: str, length: int
) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """What was measured of one task at one length as a table: columns and rows.

    Losses are in nats per token. Random sets have three rows: their mean, and for each number the
    best and the worst of them.
    """
    rows = []
    for group in study.groups(task, length):
        variant, measured = group.one.variant, group.one.measured
        held = (variant.budget, measured.nbytes / _MIB, measured.share)
        if len(group.runs) == 1:
            rows.append((variant.name, *held, group.one.loss, group.one.exact))
            continue
        losses, exacts = group.losses, group.exacts
        for which, loss, exact in (
            ("mean", losses.mean(), exacts.mean()),
            ("best", losses.min(), exacts.max()),
            ("worst", losses.max(), exacts.min()),
        ):
            rows.append((f"{variant.name} {which}", *held, float(loss), float(exact)))
    return ("cache", "budget", "KV MiB", "share", "loss", "exact"), rows


def quality_curves(groups: Sequence[Group], title: str) -> str:
    """Draws loss against the share of bytes: a line for each method, a band for random sets.

    Args:
      groups: of one task and length.
      title: the figure's title.

    Returns:
      An `<svg>` element.
    """
    lines: dict[str, list[Group]] = {}
    for group in groups:
        lines.setdefault(_named(group), []).append(group)
    for line in lines.values():
        line.sort(key=lambda group: group.one.measured.share)
    named = [name for name in lines if name != "full"]
    with drawing(7.2, 4.2 + 0.06 * len(lines), title) as (figure, axes):
        handles = []
        if "full" in lines:
            loss = float(lines["full"][0].losses[0])
            handles.append(axes.axhline(loss, color="#444444", ls="--", lw=1.2))
        plain = drawn = 0
        for name in named:
            shares = [group.one.measured.share for group in lines[name]]
            means = [float(group.losses.mean()) for group in lines[name]]
            if len(lines[name][0].runs) > 1:
                low, high = ([f(g.losses) for g in lines[name]] for f in (np.min, np.max))
                grey = _GREYS[drawn % len(_GREYS)]
                axes.fill_between(shares, low, high, color=grey, alpha=0.25, lw=0, zorder=1)
                axes.vlines(shares, low, high, color=grey, lw=3, alpha=0.6, zorder=1)
                style: dict[str, Any] = {"color": grey, "marker": "_", "ls": ":"}
                drawn += 1
            else:
                style = {
                    "color": _COLOURS[plain % len(_COLOURS)],
                    "marker": _MARKERS[plain % len(_MARKERS)],
                    "ls": "-" if plain < len(_COLOURS) else "--",
                }
                plain += 1
            handles += axes.plot(shares, means, lw=1.8, ms=5, **style)
        axes.set_xlabel("bytes of keys and values, share of a full cache")
        axes.set_ylabel("loss (nats per token)")
        axes.grid(color="#e4e4e4")
        axes.set_axisbelow(True)
        legend(figure, handles, (["full"] if "full" in lines else []) + named, 7.2)
        return to_svg(figure, title)


def _curves(page: Report, study: Study) -> Report:
    for task in study.plan.tasks:
        for length in study.plan.lengths:
            svg = quality_curves(study.groups(task, length), f"{task} at {length:,} tokens")
            page = page.figure(svg, f"{study.plan.count} rows.")
            columns, rows = cache_rows(study, task, length)
            caption = f"{task}, contexts of {length:,} tokens; bytes are of one row"
            page = page.table(columns, rows, caption)
    return page


def _depths(page: Report, study: Study) -> Report:
    for task in study.plan.tasks:
        groups = study.groups(task)
        depths = groups[0].one.depths
        if depths is None:
            continue
        across = np.unique(depths)
        for budget in study.plan.budgets:
            shown = [
                group
                for group in groups
                if group.one.variant.method == "full" or group.one.variant.budget == budget
            ]
            shown.sort(key=lambda group: _order(groups, group))
            table = [[group.loss_at(depth) for depth in across] for group in shown]
            figure = heatmap(
                np.array(table),
                title=f"{task} by length and depth, budget {budget:.0%}",
                label="loss (nats per token)",
                axes=("cache and length", "depth"),
                labels=(
                    [f"{g.one.length} {g.one.variant.name}" for g in shown],
                    [f"{depth:.2g}" for depth in across],
                ),
            )
            page = page.figure(figure, "Random: the mean of all sets.")
    return page


def _heads(page: Report, study: Study) -> Report:
    length = max(study.plan.lengths)
    for (variant, at), full in study.full_heads.items():
        if variant.draw is not None or at != length:
            continue
        heads = [(int(layer), int(head)) for layer, head in np.argwhere(full)]
        figure = head_heatmap(
            study.scores[variant.method],
            title=f"{variant.name}: key/value heads",
            label="score",
            mark=heads,
        )
        page = page.figure(
            figure,
            f"{len(heads)} of {full.size} key/value heads are full at a budget of "
            f"{variant.budget:.0%} of {length:,} tokens.",
        )
    return page


def _named(group: Group) -> str:
    count = len(group.runs)
    name = group.one.variant.name
    return f"{name} ({count} sets)" if count > 1 else name


def _order(groups: Sequence[Group], group: Group) -> tuple[int, int]:
    """Lengths of one method together, methods as they came."""
    names = list(dict.fromkeys(each.one.variant.name for each in groups))
    return names.index(group.one.variant.name), group.one.length
