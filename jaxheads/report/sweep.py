"""The page of a sweep: heatmaps of what every part does, and the entries that stand out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxheads.report.figures import curves
from jaxheads.report.heatmaps import heatmap
from jaxheads.report.page import Report, visible

if TYPE_CHECKING:
    from jaxheads.sweep.named import Label, NamedArray
    from jaxheads.tasks import Example

MOST_ROWS = 12
"""Heads that are shown over positions, and prompts that are listed."""
_ABLATED = {
    "zero": "zero",
    "mean": "its mean over all prompts",
    "resample": "its value on the corrupted prompt",
    "uniform": "what it is with equal attention to every visible token",
}
_ESTIMATE = (
    " These are first-order estimates from gradients (attribution patching), not runs of the "
    "model with the part patched."
)


def headline(found: NamedArray) -> str:
    """The metric of the runs between which a sweep moves, in one line."""
    info = found.info
    name = f"{info['metric']} {info['unedited']:.4f} unedited"
    if "source" not in info:
        return f"{name}, over {info['count']} prompts"
    own, other = _runs(info)
    return (
        f"{info['metric']} {info['unedited']:.4f} in the {own} run, {info['source']:.4f} in the "
        f"{other} one, over {info['count']} prompts"
    )


def best_rows(found: NamedArray, top: int) -> tuple[list[str], list[list[Any]]]:
    """The entries of greatest magnitude as a table: columns and rows.

    Layer and head make one name, such as 18.6, an MLP m18. Positions come with their token.
    Where two runs lend and take values, the last column is the share of their difference.

    Args:
      found: of `jaxheads sweep`, whose `info` says what was done.
      top: how many.
    """
    tokens, difference = found.info.get("tokens"), _difference(found.info)
    part = _part_name(found)
    others = [axis for axis in found.axes if axis not in ("layer", "head", "sender")]
    columns = [part]
    for axis in others:
        columns += [axis, "token"] if axis == "position" and tokens else [axis]
    columns += ["change"] + ["share of difference"] * bool(difference)
    rows = []
    for labels, value in found.top(top):
        at = dict(zip(found.axes, labels, strict=True))
        row: list[Any] = [_name(part, at)]
        for axis in others:
            row.append(at[axis])
            if axis == "position" and tokens:
                row.append(visible(tokens[int(at[axis])]))
        rows.append([*row, value] + ([value / difference] if difference else []))
    return columns, rows


def sweep_page(found: NamedArray, examples: Sequence[Example], top: int) -> Report:
    """The page of a sweep.

    Args:
      found: of `jaxheads sweep`, whose `info` says what was done.
      examples: the prompts.
      top: how many entries the table has.
    """
    info = found.info
    page = Report(f"Sweep of {info['model']}", _TITLES[info["what"]]).facts(_facts(info))
    columns, rows = best_rows(found, top)
    page = page.section("Effects", _explained(info))
    page = _overview(page, found, top)
    page = page.table(columns, rows, f"The {len(rows)} entries of greatest magnitude")
    page = _detail(page, found)
    if "agreement" in info:
        text = (
            "The same parts patched for real, next to the estimates: correlation, correlation of "
            f"ranks, errors in the metric's unit, and the share of the {info['agreement']['top']} "
            "greatest that both have."
        )
        facts = {name.replace("_", " "): value for name, value in info["agreement"].items()}
        page = page.section("Agreement with patching", text).facts(facts)
    return prompts_section(page, examples)


def unit(found: NamedArray) -> str:
    """The unit that a name ends with, in brackets."""
    return found.name.rpartition("(")[2].partition(")")[0]


def prompts_section(page: Report, examples: Sequence[Example]) -> Report:
    """Lists the first prompts with their answers."""
    shown = examples[:MOST_ROWS]
    more = "" if len(shown) == len(examples) else f"The first {len(shown)} of {len(examples)}."
    rows = [(e.prompt, e.answer, e.wrong, e.corrupted) for e in shown]
    columns = ("clean prompt", "right answer", "wrong answer", "corrupted prompt")
    return page.section("Prompts", more).table(columns, rows, "Clean and corrupted prompts")


_TITLES = {
    "ablate": "Every head removed, one at a time",
    "patch": "Every part given its value of another run, one at a time",
    "path": "Every sender corrupted, seen by the receivers alone",
    "attribution": "Every part's effect, estimated by gradients",
}
_HIDDEN = (
    "tokens", "agreement", "model", "source", "unedited", "exact", "metric", "what", "over",
)  # fmt: skip


def _facts(info: Mapping[str, Any]) -> dict[str, Any]:
    facts = {"change": info["what"], "metric": info["metric"]}
    if "source" in info:
        own, other = _runs(info)
        facts |= {f"{own} run": info["unedited"], f"{other} run": info["source"]}
    else:
        facts["unedited"] = info["unedited"]
    for name, value in info.items():
        if name not in _HIDDEN:
            facts[name] = value if isinstance(value, str | int | float) else ", ".join(value)
    return facts


def _explained(info: Mapping[str, Any]) -> str:
    """What was done, and how to read the numbers."""
    what = info["what"]
    if what == "ablate":
        done = f"Each head's output is replaced by {_ABLATED[info['how']]}"
    elif what == "path":
        done = (
            f"Each sender takes its value of the corrupted run, and only {info['receivers']} sees "
            f"it: other heads keep their clean values, MLPs are {info['mlps']}"
        )
    else:
        own, other = _runs(info)
        done = f"Each part of {info['site']} in the {own} run takes its value of the {other} run"
    text = f"{done}. The number is by how much {info['metric']} changes, averaged over prompts."
    if _difference(info):
        text += f" The whole difference between the two runs is {_difference(info):.4g}."
    return text + _ESTIMATE * (what == "attribution")


def _overview(page: Report, found: NamedArray, top: int) -> Report:
    """Layers against the second axis; of further axes, the entry of greatest magnitude."""
    title = _TITLES[found.info["what"]]
    found = _layers_first(found)
    if len(found.axes) == 1:
        line = (np.asarray(found.labels[0], float), found.values)
        figure = curves(
            {found.axes[0]: line}, title=title, xlabel="layer", ylabel=f"change ({unit(found)})"
        )
        return page.figure(figure, "The change at each layer.")
    values, rest = _largest(found.values), found.axes[2:]
    order = np.argsort(-np.abs(np.nan_to_num(values)), axis=None)[:top]
    mark = [divmod(int(place), values.shape[1]) for place in order]
    figure = heatmap(
        values,
        title=title,
        label=f"change ({unit(found)})",
        axes=(found.axes[0], found.axes[1]),
        labels=(found.labels[0], _labels(found, 1)),
        mark=mark,
    )
    of_rest = f" Of each, the greatest change over {' and '.join(rest)}." if rest else ""
    caption = f"Blue raises the metric, red lowers it; the {len(mark)} greatest are outlined."
    return page.figure(figure, caption + of_rest)


def _detail(page: Report, found: NamedArray) -> Report:
    """With three axes or more: the parts that do most, against the third."""
    found = _layers_first(found)
    if len(found.axes) < 3:
        return page
    values, part = _largest(found.values, 3), _part_name(found)
    size = np.abs(np.nan_to_num(values)).max(axis=2)
    best = np.argsort(-size, axis=None, kind="stable")[:MOST_ROWS]
    places = sorted(divmod(int(place), size.shape[1]) for place in best)
    axes = found.axes[:2]
    names = [
        _name(part, {a: found.labels[i][p] for i, (a, p) in enumerate(zip(axes, at, strict=True))})
        if axes[1] in ("head", "sender")
        else f"{found.labels[0][at[0]]}, {axes[1]} {found.labels[1][at[1]]}"
        for at in places
    ]
    third = found.axes[2]
    figure = heatmap(
        np.stack([values[at] for at in places]),
        title=f"The {len(places)} that do most, by {third}",
        label=f"change ({unit(found)})",
        axes=(part, third),
        labels=(names, _labels(found, 2)),
    )
    return page.section(f"By {third}", _token_note(found, third)).figure(
        figure, "Blue raises the metric, red lowers it."
    )


def _token_note(found: NamedArray, axis: str) -> str:
    if axis != "position" or "tokens" not in found.info:
        return ""
    return "Tokens are those of the first prompt, with … where other prompts have another there."


def _layers_first(found: NamedArray) -> NamedArray:
    """The same with its axes in the order in which they are drawn."""
    from jaxheads.sweep.named import NamedArray

    wanted = [a for a in ("layer", "head", "sender", "position", "neurons") if a in found.axes]
    order = [found.axes.index(axis) for axis in wanted]
    labels = tuple(found.labels[i] for i in order)
    return NamedArray(found.name, found.values.transpose(order), tuple(wanted), labels, found.info)


def _largest(values: np.ndarray, keep: int = 2) -> np.ndarray:
    """Of all axes but the first `keep`, the entry of greatest magnitude."""
    flat = values.reshape(*values.shape[:keep], -1)
    place = np.abs(np.nan_to_num(flat)).argmax(axis=-1)
    return np.take_along_axis(flat, place[..., None], axis=-1)[..., 0]


def _labels(found: NamedArray, axis: int) -> list[Label]:
    """Labels to draw; positions with their token."""
    tokens = found.info.get("tokens")
    if found.axes[axis] != "position" or not tokens:
        return list(found.labels[axis])
    return [f"{label} {visible(tokens[int(label)])}" for label in found.labels[axis]]


def _part_name(found: NamedArray) -> str:
    """What layer and head together are called."""
    axes, info = found.axes, found.info
    if "sender" in axes or info.get("senders") == "mlps":
        return "sender"
    if "head" not in axes:
        return "layer"
    from jaxheads.sites import find_site

    shared = "site" in info and find_site(info["site"]).head_axis == "K"
    return "key/value head" if shared else "head"


def _name(part: str, at: Mapping[str, Label]) -> str:
    second = at.get("head", at.get("sender"))
    if part == "layer":
        return str(at["layer"])
    return f"m{at['layer']}" if second in (None, "mlp") else f"{at['layer']}.{second}"


def _runs(info: Mapping[str, Any]) -> tuple[str, str]:
    """Which run is changed, and which lends its values."""
    return ("corrupted", "clean") if info.get("direction") == "denoise" else ("clean", "corrupted")


def _difference(info: Mapping[str, Any]) -> float:
    """The metric of the lending run minus that of the run changed; 0 if there is none."""
    found = info["source"] - info["unedited"] if "source" in info else 0.0
    return found if abs(found) > 1e-6 else 0.0
