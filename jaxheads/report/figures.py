"""Figures of heads: functions from numpy arrays to an SVG (or HTML) string.

Heatmaps stand in `heatmaps`, circuits in `circuit`.

Blue is positive, red is negative and pale is near zero in every figure, a pair that
readers with any common colour blindness can tell apart and that prints well. The
same input gives the same bytes, whatever the reader's matplotlib settings are.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jaxheads.report.drawing import (
    WIDEST,
    drawing,
    exact_text,
    legend,
    log_axis,
    real_numbers,
    same_length,
    shade,
    to_svg,
    wrap,
)
from jaxheads.report.page import visible, visible_text

# Okabe and Ito's colour-blind-safe palette, without the yellow that print loses.
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_LINES = ("-", "--", "-.", ":")


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
    draws = {k: real_numbers(title, f"group {k!r}", v, "[N]") for k, v in groups.items()}
    if not draws:
        raise ValueError(f"figure {title!r}: expected at least one group, got none")
    if baseline is not None and not math.isfinite(baseline):
        raise ValueError(f"figure {title!r}: expected a finite baseline, got {baseline}")
    each = min(max(0.45, 5.0 / len(draws)), 1.5)
    crowded = each < 0.8
    width = min(max(each * len(draws) + 1.2, 4.4), WIDEST)
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
        xs = real_numbers(title, f"x of {name!r}", x, "[N]")
        ys = real_numbers(title, f"y of {name!r}", y, "[N]")
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
    values = real_numbers(title, "weights", weights, "[T]")
    same_length(title, tokens, len(values), f"weights of shape {values.shape}")
    exact, top = exact_text(weights), np.abs(values).max() or 1.0
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
