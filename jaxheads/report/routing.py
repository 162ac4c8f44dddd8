"""The page of a router: loads, layers, one sentence, and what heads specialise in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from jaxheads.report.figures import curves
from jaxheads.report.heatmaps import head_heatmap, heatmap
from jaxheads.report.page import Report, visible

if TYPE_CHECKING:
    from jaxheads.routing.view import RoutingView, Speciality

MOST_TOKENS, MOST_COLUMNS, MOST_HEADS = 60, 48, 20
"""Of the sentence: tokens and heads that are drawn. And heads whose tokens are listed."""


def routing_page(view: RoutingView, title: str) -> Report:
    """A page of its own.

    Args:
      view: of `jaxheads.routing.examine`.
      title: of the page.
    """
    layers, heads = view.load.shape
    return add_routing(Report(title, f"Routing of {layers} x {heads} heads"), view)


def add_routing(page: Report, view: RoutingView, name: str = "") -> Report:
    """Adds the sections of a router: loads, layers, a sentence, specialities, kinds of tokens.

    Args:
      page: to add to.
      view: of `jaxheads.routing.examine`.
      name: in front of the sections' headings, on a page of more than the router.
    """
    head, explained = f"{name}: " if name else "", _explained(view)
    for heading, add in (
        ("load of heads", _loads),
        ("routing by layer", _layers),
        ("a sentence", _sentence),
        ("what heads specialise in", _specialities),
        ("kinds of tokens", _kinds),
    ):
        text = f"{head}{heading}"
        page = add(page.section(text[:1].upper() + text[1:], explained[heading]), view)
    return page


def layer_rows(view: RoutingView) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Each layer as a table: columns and rows. Loads are of routed heads."""
    rows = []
    for layer, shared in enumerate(view.shared):
        loads = view.load[layer, ~shared]
        alike = view.overlap[layer] if layer < len(view.overlap) else np.full(2, np.nan)
        ends = [loads.min(), loads.max()] if loads.size else [np.nan, np.nan]
        cells = [*ends, view.entropy[layer], *alike]
        numbers = [float(cell) if np.isfinite(cell) else None for cell in cells]
        rows.append((layer, int(shared.sum()), int(view.top_k[layer]), *numbers))
    columns = ("layer", "shared", "K", "least load", "largest load", "entropy", "overlap", "chance")
    return columns, rows


def speciality_rows(
    view: RoutingView, most: int = MOST_HEADS
) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Heads whose highest lift is furthest beyond the shuffled ones, as a table.

    Args:
      view: of `jaxheads.routing.examine`.
      most: heads to list.
    """
    rows = [
        (
            f"{one.layer}.{one.head}",
            float(view.load[one.layer, one.head]),
            " ".join(f"“{visible(t.token)}” {t.lift:.1f} ({t.count})" for t in one.tokens),
            one.tokens[0].lift,
            max(one.shuffled),
        )
        for one in _furthest(view)[:most]
    ]
    return ("head", "load", "token, lift (count)", "highest lift", "shuffled"), rows


def speciality_headline(view: RoutingView) -> str:
    """How many heads have a token beyond chance, in one sentence."""
    found = view.specialities
    if not found:
        return f"No token occurs {view.minimum} times, or no head is on at some tokens only."
    beyond = sum(one.beyond > 0 for one in found)
    return (
        f"{beyond} of {len(found)} heads that choose have a token with a higher lift than any "
        f"token has in any of {len(found[0].shuffled)} shuffles; if tokens told nothing, about "
        f"{len(found) / (len(found[0].shuffled) + 1):.0f} would by chance."
    )


def _furthest(view: RoutingView) -> list[Speciality]:
    return sorted(view.specialities, key=lambda one: -one.beyond)


def _explained(view: RoutingView) -> dict[str, str]:
    layers, heads = view.load.shape
    on = view.load.sum() / layers
    return {
        "load of heads": (
            f"The share of {view.tokens:,} tokens at which each head is on; {on:.3g} of {heads} "
            "heads are on at a token, on average over layers. Shared heads are on at every token."
        ),
        "routing by layer": (
            "Entropy of the router's probabilities, next to that of a router that prefers "
            "nothing. Overlap: of the routed heads that are on at a token, the share whose index "
            "is on in the next layer too; chance is what independent layers with the same loads "
            "would give."
        ),
        "a sentence": (
            "The gate of each routed head at each token, 0 where the head is off. Layers are "
            "evenly spaced among those that choose."
        ),
        "what heads specialise in": (
            f"{speciality_headline(view)}\n\nLift is P(on | token) / P(on). Only tokens that occur "
            f"{view.minimum} times or more are counted. Shuffled: the tokens' identities are "
            "permuted over all places, so that a head cannot depend on them; its highest lift "
            "then is what the best of many tokens reaches by chance."
        ),
        "kinds of tokens": (
            "Kinds are told from the place of a token and its characters alone, and overlap. A "
            "difference means something where it is larger than any head's in any shuffle."
        ),
    }


def _loads(page: Report, view: RoutingView) -> Report:
    marked = [(int(layer), int(head)) for layer, head in np.argwhere(view.shared)]
    figure = head_heatmap(
        view.load, title="Load of every head", label="share of tokens", mark=marked
    )
    outlined = f" The {len(marked)} shared heads are outlined." if marked else ""
    page = page.figure(figure, f"Layers from the top, heads across.{outlined}")
    if np.all(np.isnan(view.gates) | (view.gates == 1)) or np.isnan(view.gates).all():
        return page
    figure = head_heatmap(view.gates, title="Mean gate where a head is on", label="gate")
    return page.figure(figure, "By what a head's output is multiplied at the tokens that use it.")


def _layers(page: Report, view: RoutingView) -> Report:
    routed = (~view.shared).sum(axis=1)
    layers = np.arange(len(routed))
    entropy = {
        "router": _finite(layers, np.where(routed > 0, view.entropy, np.nan)),
        "uniform": _finite(layers, np.log(np.where(routed > 0, routed, np.nan))),
    }
    overlap = {
        name: _finite(layers[:-1], view.overlap[:, column])
        for column, name in enumerate(("overlap with the next layer", "chance"))
    }
    for title, lines, unit, caption in (
        ("Entropy of the router", entropy, "nats", "Uniform is the most that is possible."),
        ("Overlap of neighbouring layers", overlap, "share of heads", "Heads are told by index."),
    ):
        lines = {name: line for name, line in lines.items() if len(line[0])}
        if lines:
            figure = curves(lines, title=title, xlabel="layer", ylabel=unit)
            page = page.figure(figure, caption)
    columns, rows = layer_rows(view)
    return page.table(columns, rows, "Every layer; loads are those of routed heads")


def _sentence(page: Report, view: RoutingView) -> Report:
    tokens = [f"{n} {visible(token)}" for n, token in enumerate(view.sentence.tokens)][:MOST_TOKENS]
    routed = ~view.shared
    choosing = np.flatnonzero((view.top_k > 0) & (view.top_k < routed.sum(axis=1)))
    if not len(choosing):
        return page
    count = min(len(choosing), max(1, MOST_COLUMNS // int(routed[choosing].sum(axis=1).max())))
    layers = choosing[np.linspace(0, len(choosing) - 1, count).round().astype(int)]
    heads = [(int(layer), int(head)) for layer in layers for head in np.flatnonzero(routed[layer])]
    figure = heatmap(
        np.stack([view.sentence.gates[layer, : len(tokens), head] for layer, head in heads], 1),
        title="Gates of routed heads in a sentence",
        label="gate",
        axes=("token", "head"),
        labels=(tokens, [f"{layer}.{head}" for layer, head in heads]),
    )
    names = ", ".join(map(str, layers))
    cut = f" The first {len(tokens)} tokens." if len(tokens) < len(view.sentence.tokens) else ""
    return page.figure(figure, f"The routed heads of layers {names}, written LAYER.HEAD.{cut}")


def _specialities(page: Report, view: RoutingView) -> Report:
    columns, rows = speciality_rows(view)
    if not rows:
        return page
    caption = f"The {len(rows)} heads whose highest lift is furthest beyond the shuffled ones"
    return page.table(columns, rows, caption)


def _kinds(page: Report, view: RoutingView) -> Report:
    off = view.category_load - view.load
    rows = []
    for kind, (name, count) in enumerate(zip(view.categories, view.category_tokens, strict=True)):
        if not count:
            continue
        most, least = (
            np.unravel_index(int(find(off[kind])), off[kind].shape)
            for find in (np.argmax, np.argmin)
        )
        cells: list[Any] = [name, int(count)]
        for place in (most, least):
            cells += [f"{place[0]}.{place[1]}", float(off[kind][place])]
        rows.append((*cells, float(view.category_chance[kind])))
    columns = (
        *("kind", "tokens", "most raised", "raised by", "most lowered", "lowered by"),
        "shuffled, at most",
    )
    page = page.table(columns, rows, "Load at the tokens of a kind, minus the load at all tokens")
    counted = np.flatnonzero(view.category_tokens > 0)
    spread = np.abs(off[counted]).max(axis=0)
    order = np.argsort(-spread, axis=None, kind="stable")[:MOST_HEADS]
    heads = sorted(divmod(int(place), off.shape[2]) for place in order if spread.flat[place] > 0)
    if not heads:
        return page
    figure = heatmap(
        np.array([[off[(kind, *head)] for kind in counted] for head in heads]),
        title="Load by kind of token",
        label="difference from the load at all tokens",
        axes=("head", "kind"),
        labels=(
            [f"{layer}.{head}" for layer, head in heads],
            [view.categories[k] for k in counted],
        ),
    )
    return page.figure(figure, f"The {len(heads)} heads that differ most between kinds.")


def _finite(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kept = np.isfinite(y)
    return x[kept], y[kept]
