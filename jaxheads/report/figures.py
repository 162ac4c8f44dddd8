"""Figures of heads: functions from numpy arrays to an SVG (or HTML) string.

Blue is positive, red is negative and pale is near zero in every figure, a pair that
readers with any common colour blindness can tell apart and that prints well. The
same input gives the same bytes, whatever the reader's matplotlib settings are.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from jaxheads.report.drawing import (
    Cell,
    cell_colours,
    colour_scale,
    drawing,
    grid,
    legend,
    log_axis,
    shade,
    ticks,
    to_svg,
    wrap,
)
from jaxheads.report.page import visible, visible_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colour-blind-safe palette, without the yellow that print loses.
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_LINES = ("-", "--", "-.", ":")
_WIDEST = 9.4  # inches; the page's text column
_PITCH = 0.125  # inches between neighbouring token labels that can still be read


def head_heatmap(
    values: ArrayLike,
    *,
    title: str,
    label: str,
    mark: Sequence[tuple[int, int]] = (),
) -> str:
    """Draws one number per head: layers down (0 at the top), heads across.

    The colour scale is symmetric about zero where values have both signs, starts at
    zero where they have one, and starts at their own minimum where they all lie
    within a factor of two. Each cell tells its exact value when pointed at.

    Args:
      values: [L,H], any real dtype. NaN means not measured: a grey, struck-out cell.
      title: the figure's title; errors name it.
      label: what the values are, with their unit.
      mark: (layer, head) pairs to outline.

    Returns:
      An `<svg>` element.

    Raises:
      ValueError: `values` is not [L,H], is empty, infinite or NaN throughout, or
        `mark` names a head that is not there.
    """
    table = _numbers(title, "values", values, "[L,H]", allow_nan=True)
    layers, heads = table.shape
    if np.isnan(table).all():
        raise ValueError(f"figure {title!r}: every one of the {table.size} values is NaN")
    for layer, head in mark:
        if not (0 <= layer < layers and 0 <= head < heads):
            raise ValueError(
                f"figure {title!r}: cannot mark head ({layer}, {head}): expected a layer below "
                f"{layers} and a head below {heads}"
            )
    scale, exact = colour_scale(table), _exact(values)
    cells = [
        Cell(row, column, 1, colour, f"layer {row}, head {column}: {exact[row, column]}")
        for (row, column), colour in np.ndenumerate(cell_colours(scale, table))
    ]
    wide = min(max(0.34 * heads, 2.6), _WIDEST - 1.6)
    high = min(max(0.2 * layers, 1.6), 12.0)

    def decorate(axes: Axes) -> None:
        from matplotlib.patches import Rectangle

        axes.set_xlabel("head" + " (grey: not measured)" * bool(np.isnan(table).any()))
        axes.set_ylabel("layer")
        axes.set_xticks(ticks(heads, wide, 0.26))
        axes.set_yticks(ticks(layers, high, 0.19))
        for layer, head in mark:
            # Black on white, so that the outline shows on pale and dark cells alike.
            for colour, line in (("white", 3.6), ("black", 1.8)):
                box = Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, ec=colour, lw=line)
                box.set(zorder=3, clip_on=False)
                axes.add_patch(box)

    return grid(title, label, (layers, heads), (wide, high), scale, cells, decorate)


def attention_pattern(pattern: ArrayLike, tokens: Sequence[str], *, title: str) -> str:
    """Draws one head's attention weights, queries down and keys across.

    Up to 60 tokens are all labelled; of more, every second (third, ...) is. Where
    everything right of the diagonal is exactly zero the pattern is causal and that
    triangle stays blank.

    Args:
      pattern: [T,S], any real dtype. Queries are the last T of the S tokens (all of
        them where T = S; fewer when decoding on top of a cache).
      tokens: S strings. Characters that cannot be seen are shown by a sign.
      title: the figure's title; errors name it.

    Returns:
      An `<svg>` element.

    Raises:
      ValueError: `pattern` is not [T,S] with T at most S, is empty or not finite, or
        there are not S tokens.
    """
    table = _numbers(title, "pattern", pattern, "[T,S]")
    queries, keys = table.shape
    if queries > keys:
        raise ValueError(
            f"figure {title!r}: expected a pattern [T,S] with T at most S, got shape {table.shape}"
        )
    _same_length(title, tokens, keys, f"a pattern of shape {table.shape}")
    labels = [_short(visible(token)) for token in tokens]
    scale, faint, first = (
        colour_scale(table, from_zero=True),
        0.004 * np.abs(table).max(),
        keys - queries,
    )
    causal = not table[np.triu_indices(queries, 1 + first, keys)].any()
    colours, pale = cell_colours(scale, table), str(cell_colours(scale, np.zeros((1, 1)))[0, 0])
    cells = []
    for row, name in enumerate(labels[first:]):
        end = first + row + 1 if causal else keys
        # One pale strip for all the zeros of a row, then what can be told from it.
        cells.append(Cell(row, 0, end, pale, f"{name}: 0"))
        for column in np.flatnonzero(np.abs(table[row]) > faint).tolist():
            tip = f"{name} → {labels[column]}: {table[row, column]:.4g}"
            cells.append(Cell(row, column, 1, colours[row, column], tip))
    pitch = min(max(_PITCH, min(0.4, 4.2 / keys)), (_WIDEST - 1.9) / keys)
    wide, high = max(pitch * keys, 2.2), max(pitch * queries, 1.2)

    def decorate(axes: Axes) -> None:
        size = 9 if pitch > 0.16 else 7.5
        columns, rows = ticks(keys, wide, 0.12), ticks(queries, high, 0.12)
        axes.set_xlabel("key (attended to)")
        axes.set_ylabel("query (attends)")
        axes.set_xticks(columns, [labels[i] for i in columns], rotation=90, fontsize=size)
        axes.set_yticks(rows, [labels[first + i] for i in rows], fontsize=size)

    return grid(title, "weight", (queries, keys), (wide, high), scale, cells, decorate)


def bars(
    groups: Mapping[str, Sequence[float]],
    *,
    title: str,
    ylabel: str,
    baseline: float | None = None,
) -> str:
    """Draws one bar per label, as high as the mean, with a dot for each draw.

    Args:
      groups: label -> its values, one for each draw (seed, random control). A label
        with several shows them as dots and says how many there are.
      title: the figure's title; errors name it.
      ylabel: what the values are, with their unit.
      baseline: a value to draw across as a dashed line.

    Returns:
      An `<svg>` element.

    Raises:
      ValueError: there are no groups, or a group is empty, not a list of numbers or
        not finite, or the baseline is not finite.
    """
    draws = {k: _numbers(title, f"group {k!r}", v, "[N]") for k, v in groups.items()}
    if not draws:
        raise ValueError(f"figure {title!r}: expected at least one group, got none")
    if baseline is not None and not math.isfinite(baseline):
        raise ValueError(f"figure {title!r}: expected a finite baseline, got {baseline}")
    each = min(max(0.45, 5.0 / len(draws)), 1.5)
    crowded = each < 0.8
    width = min(max(each * len(draws) + 1.2, 4.4), _WIDEST)
    with drawing(width, 4.8 if crowded else 3.8, title) as (figure, axes):
        names = []
        for place, (name, values) in enumerate(draws.items()):
            mean = float(values.mean())
            axes.bar(place, mean, width=0.66, color="#8fbbdc", zorder=2)
            if len(values) > 1:
                # Spread evenly, not at random: the same values give the same figure.
                spread = np.linspace(-0.2, 0.2, len(values))
                axes.plot(
                    place + spread, values, "o", ms=4.5, color="#123c63", mec="white", mew=0.5
                )
            up = mean >= 0
            edge = max(mean, values.max()) if up else min(mean, values.min())
            axes.annotate(
                f"{mean:.3g}".replace("-", "−"),
                (place, edge),
                xytext=(0, 5 if up else -5),
                textcoords="offset points",
                ha="center",
                va="bottom" if up else "top",
                fontsize=9,
                # Keeps the number readable where the baseline runs through it.
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
                zorder=4,
            )
            count = f" (n = {len(values)})" if len(values) > 1 else ""
            text = visible_text(name)
            short = textwrap.shorten(text, 28, placeholder="…") if crowded else text
            names.append(short + count if crowded else wrap(text + count, each - 0.1, 10))
        turned: dict[str, Any] = (
            {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
        )
        axes.set_xticks(range(len(names)), names, **turned)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.axhline(0, color="#444444", lw=0.8, zorder=3)
        axes.margins(y=0.14)
        axes.set_ylabel(visible_text(ylabel))
        axes.tick_params(axis="x", length=0)
        axes.grid(axis="y", color="#e4e4e4", zorder=0)
        if baseline is not None:
            line = axes.axhline(baseline, color="#d55e00", ls="--", lw=1.5, zorder=3)
            legend(figure, [line], [f"baseline {baseline:.4g}"], width)
        return to_svg(figure, title)


def curves(
    lines: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    log_y: bool = False,
) -> str:
    """Draws named curves; colour and line style both tell them apart.

    Args:
      lines: name -> (x [N], y [N]).
      title: the figure's title; errors name it.
      xlabel: what x is, with its unit.
      ylabel: what y is, with its unit.
      log_y: a logarithmic y axis.

    Returns:
      An `<svg>` element.

    Raises:
      ValueError: there are no curves, x and y differ in length, are not [N], are
        empty or not finite, or `log_y` meets a value that is not positive.
    """
    if not lines:
        raise ValueError(f"figure {title!r}: expected at least one curve, got none")
    data = {}
    for name, (x, y) in lines.items():
        xs = _numbers(title, f"x of {name!r}", x, "[N]")
        ys = _numbers(title, f"y of {name!r}", y, "[N]")
        if xs.shape != ys.shape:
            raise ValueError(
                f"figure {title!r}: expected x and y of {name!r} of one shape [N], got "
                f"{xs.shape} and {ys.shape}"
            )
        if log_y and ys.min() <= 0:
            raise ValueError(
                f"figure {title!r}: log_y expects positive values, got {ys.min()} in {name!r}"
            )
        data[name] = (xs, ys)
    with drawing(7.2, 4.0 + 0.1 * len(data), title) as (figure, axes):
        drawn = []
        for index, (xs, ys) in enumerate(data.values()):
            drawn += axes.plot(
                xs,
                ys,
                color=_PALETTE[index % len(_PALETTE)],
                ls=_LINES[(index // 2 if len(data) > 4 else index) % len(_LINES)],
                lw=1.8,
                marker="o" if len(xs) <= 25 else None,
                ms=3.5,
            )
        if log_y:
            log_axis(axes, [ys for _, ys in data.values()])
        if all((xs == xs.round()).all() for xs, _ in data.values()):
            axes.locator_params(axis="x", integer=True)
        axes.set_xlabel(visible_text(xlabel))
        axes.set_ylabel(visible_text(ylabel))
        axes.grid(color="#e4e4e4")
        axes.set_axisbelow(True)
        if len(data) > 1:
            legend(figure, drawn, [visible_text(name) for name in data], 7.2)
        return to_svg(figure, title)


def token_strip(
    tokens: Sequence[str], weights: ArrayLike, *, title: str = "", label: str = "weight"
) -> str:
    """Shows a text with each token shaded by its weight, as an HTML fragment.

    The darkest shade is the largest magnitude; blue is positive, red is negative.
    Pointing at a token tells its position and its exact weight. The fragment brings
    its own style, so it also shows well in a notebook.

    Args:
      tokens: T strings, not escaped. Characters that cannot be seen are shown by a
        sign, and a line break after each newline.
      weights: [T], any real dtype.
      title: a line above the text; errors name it.
      label: what the weights are.

    Returns:
      A `<div>` element.

    Raises:
      ValueError: `weights` is not [T], empty or not finite, or there are not T tokens.
    """
    values = _numbers(title, "weights", weights, "[T]")
    _same_length(title, tokens, len(values), f"weights of shape {values.shape}")
    exact, top = _exact(weights), np.abs(values).max() or 1.0
    spans = []
    for place, (token, value) in enumerate(zip(tokens, values, strict=True)):
        tip = html.escape(f"{place}: {visible(token)}\n{visible_text(label)} {exact[place]}")
        # A place to break the line at: tokens without one between them make one word.
        after = "<br>" * min(token.count("\n"), 2) or "<wbr>"
        spans.append(
            f'<span title="{tip}" style="{shade(value / top)};padding:2px 1px;border-radius:3px;'
            f'unicode-bidi:isolate">{html.escape(visible(token))}</span>{after}'
        )
    heading = f'<div style="font-weight:600">{html.escape(visible_text(title))}</div>'
    return (
        '<div class="token-strip" style="background:#fff;color:#111;padding:10px 12px;'
        'border-radius:8px;line-height:1.9;overflow-wrap:anywhere">'
        f"{heading if title else ''}{''.join(spans)}</div>"
    )


def _short(token: str) -> str:
    return token if len(token) <= 14 else token[:13] + "…"


def _same_length(title: str, tokens: Sequence[str], expected: int, what: str) -> None:
    if len(tokens) != expected:
        raise ValueError(
            f"figure {title!r}: expected {expected} tokens for {what}, got {len(tokens)}"
        )


def _numbers(
    title: str, name: str, values: ArrayLike, shape: str, *, allow_nan: bool = False
) -> np.ndarray:
    """`values` as float64, checked for rank, emptiness and finiteness."""
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"figure {title!r}: expected {name} to be real numbers {shape}: {error}"
        ) from error
    if array.ndim != shape.count(",") + 1 or not array.size:
        raise ValueError(
            f"figure {title!r}: expected {name} of shape {shape}, got shape {array.shape}"
        )
    wrong = np.argwhere(np.isinf(array) if allow_nan else ~np.isfinite(array))
    if len(wrong):
        place = tuple(wrong[0].tolist())
        raise ValueError(
            f"figure {title!r}: expected finite {name}, got {array[place]} at {list(place)} "
            f"({len(wrong)} of {array.size} values)"
        )
    return array


def _exact(values: ArrayLike) -> np.ndarray:
    """Each value as the shortest text that reads back as the same number."""
    array = np.asarray(values)
    return np.array([str(v) for v in array.ravel()], object).reshape(array.shape)
