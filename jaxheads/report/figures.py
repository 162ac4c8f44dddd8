"""Figures of heads: functions from numpy arrays to an SVG (or HTML) string.

Blue is positive, red is negative and pale is near zero in every figure, a pair that
readers with any common colour blindness can tell apart and that prints well. The
same input gives the same bytes, whatever the reader's matplotlib settings are.
"""

from __future__ import annotations

import contextlib
import html
import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jaxheads.report.page import visible, visible_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

# Okabe and Ito's colour-blind-safe palette, without the yellow that print loses.
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_LINES = ("-", "--", "-.", ":")
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "jaxheads",
    # Text stays text: searchable, and scripts the drawing font lacks still show.
    "svg.fonttype": "none",
    # A token with a dollar sign is a token, not a formula.
    "text.parse_math": False,
    "figure.dpi": 72,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
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
    scale, exact = _scale(table), _exact(values)
    cells = [
        _Cell(row, column, 1, colour, f"layer {row}, head {column}: {exact[row, column]}")
        for (row, column), colour in np.ndenumerate(_colours(scale, table))
    ]
    wide = min(max(0.34 * heads, 2.6), _WIDEST - 1.6)
    high = min(max(0.2 * layers, 1.6), 12.0)

    def decorate(axes: Axes) -> None:
        from matplotlib.patches import Rectangle

        axes.set_xlabel("head" + " (grey: not measured)" * bool(np.isnan(table).any()))
        axes.set_ylabel("layer")
        axes.set_xticks(_ticks(heads, wide, 0.26))
        axes.set_yticks(_ticks(layers, high, 0.19))
        for layer, head in mark:
            # Black on white, so that the outline shows on pale and dark cells alike.
            for colour, line in (("white", 3.6), ("black", 1.8)):
                box = Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, ec=colour, lw=line)
                box.set(zorder=3, clip_on=False)
                axes.add_patch(box)

    return _grid(title, label, (layers, heads), (wide, high), scale, cells, decorate)


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
    scale, faint, first = _scale(table, from_zero=True), 0.004 * np.abs(table).max(), keys - queries
    causal = not table[np.triu_indices(queries, 1 + first, keys)].any()
    colours, pale = _colours(scale, table), str(_colours(scale, np.zeros((1, 1)))[0, 0])
    cells = []
    for row, name in enumerate(labels[first:]):
        end = first + row + 1 if causal else keys
        # One pale strip for all the zeros of a row, then what can be told from it.
        cells.append(_Cell(row, 0, end, pale, f"{name}: 0"))
        for column in np.flatnonzero(np.abs(table[row]) > faint).tolist():
            tip = f"{name} → {labels[column]}: {table[row, column]:.4g}"
            cells.append(_Cell(row, column, 1, colours[row, column], tip))
    pitch = min(max(_PITCH, min(0.4, 4.2 / keys)), (_WIDEST - 1.9) / keys)
    wide, high = max(pitch * keys, 2.2), max(pitch * queries, 1.2)

    def decorate(axes: Axes) -> None:
        size = 9 if pitch > 0.16 else 7.5
        columns, rows = _ticks(keys, wide, 0.12), _ticks(queries, high, 0.12)
        axes.set_xlabel("key (attended to)")
        axes.set_ylabel("query (attends)")
        axes.set_xticks(columns, [labels[i] for i in columns], rotation=90, fontsize=size)
        axes.set_yticks(rows, [labels[first + i] for i in rows], fontsize=size)

    return _grid(title, "weight", (queries, keys), (wide, high), scale, cells, decorate)


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
    with _drawing(width, 4.8 if crowded else 3.8, title) as (figure, axes):
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
            names.append(short + count if crowded else _wrap(text + count, each - 0.1, 10))
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
            _legend(figure, [line], [f"baseline {baseline:.4g}"], width)
        return _svg(figure, title)


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
    with _drawing(7.2, 4.0 + 0.1 * len(data), title) as (figure, axes):
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
            _log_axis(axes, [ys for _, ys in data.values()])
        if all((xs == xs.round()).all() for xs, _ in data.values()):
            axes.locator_params(axis="x", integer=True)
        axes.set_xlabel(visible_text(xlabel))
        axes.set_ylabel(visible_text(ylabel))
        axes.grid(color="#e4e4e4")
        axes.set_axisbelow(True)
        if len(data) > 1:
            _legend(figure, drawn, [visible_text(name) for name in data], 7.2)
        return _svg(figure, title)


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
            f'<span title="{tip}" style="{_shade(value / top)};padding:2px 1px;border-radius:3px;'
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


def _scale(table: np.ndarray, *, from_zero: bool = False) -> ScalarMappable:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    low, high = float(np.nanmin(table)), float(np.nanmax(table))
    top = max(-low, high)
    if low < 0 < high:
        return ScalarMappable(Normalize(-top, top), "RdBu")
    # Values within a factor of two would all look alike on a scale from zero.
    close = not from_zero and low < high and min(abs(low), abs(high)) > top / 2
    if low < 0:
        return ScalarMappable(Normalize(low, high if close else 0.0), "Reds_r")
    return ScalarMappable(Normalize(low if close else 0.0, high or 1.0), "Blues")


def _colours(scale: ScalarMappable, table: np.ndarray) -> np.ndarray:
    """Each value's colour as #rrggbb; empty where it is NaN."""
    rgb = (scale.to_rgba(table)[..., :3] * 255).round().astype(int)
    packed = (rgb << (16, 8, 0)).sum(-1)
    names = [f"#{n:06x}" for n in packed.ravel().tolist()]
    return np.where(np.isnan(table), "", np.array(names).reshape(table.shape))


def _shade(fraction: float) -> str:
    """CSS colours for a fraction in [-1,1]: white to blue, or to red below zero."""
    full = (8, 81, 156) if fraction >= 0 else (165, 15, 21)
    colour = [round(255 + (c - 255) * abs(fraction)) for c in full]
    linear = [((c / 255 + 0.055) / 1.055) ** 2.4 if c > 10 else c / 3295 for c in colour]
    # WCAG: above this luminance black text has the better contrast.
    bright = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.179
    hexadecimal = "".join(f"{c:02x}" for c in colour)
    return f"background:#{hexadecimal};color:{'#111' if bright else '#fff'}"


@contextlib.contextmanager
def _drawing(
    width: float, height: float, title: str, *, least: float | None = None
) -> Iterator[tuple[Figure, Axes]]:
    """A fresh figure of one panel, with the house style while it is drawn.

    The title is wrapped to `least` inches, by default the figure's width.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        # The reader's browser has the glyphs; only their measured width is a guess.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(width, height), layout="constrained")
        lines = _wrap(visible_text(title), least or width, 12)
        figure.suptitle(lines, x=0.01, ha="left", fontsize=12, weight="bold")
        yield figure, figure.add_subplot()


def _grid(
    title: str,
    label: str,
    shape: tuple[int, int],
    inches: tuple[float, float],
    scale: ScalarMappable,
    cells: Sequence[_Cell],
    decorate: Callable[[Axes], None],
) -> str:
    """Cells of rows by columns in a panel (width, height) inches large, with its scale."""
    (rows, columns), (wide, high) = shape, inches
    with _drawing(wide + 3, high + 3, title, least=wide + 1) as (figure, axes):
        # Cell (row, column) is the unit square about (column, row), row 0 at the top.
        axes.set_xlim(-0.5, columns - 0.5)
        axes.set_ylim(rows - 0.5, -0.5)
        axes.tick_params(length=2)
        # Stands where the cells go; `_svg` finds it by its gid.
        axes.axvspan(0, 0, gid="cells", fc="none", ec="none", zorder=1)
        decorate(axes)
        # In the panel's own coordinates, so that it is exactly as tall as the panel.
        bar = figure.colorbar(scale, cax=axes.inset_axes((1 + 0.14 / wide, 0, 0.16 / wide, 1)))
        bar.set_label(visible_text(label))
        bar.outline.set_visible(False)
        # Labels take what they need; the figure is resized until the panel fits.
        figure.draw_without_rendering()
        panel, (width, height) = axes.get_position(), figure.get_size_inches()
        figure.set_size_inches(
            width + wide - panel.width * width, height + high - panel.height * height
        )
        return _svg(figure, title, axes, cells)


def _wrap(text: str, inches: float, size: float) -> str:
    return textwrap.fill(text, max(6, int(inches * 72 / (0.6 * size)))) or text


def _ticks(count: int, inches: float, least: float) -> range:
    """Every n-th index, n as small as leaves `least` inches between labels."""
    step = 1
    while count > 1 and inches * step / count < least - 1e-6:
        step += 1 if step == 1 else 3 if step == 2 else step
    return range(0, count, step)


def _legend(figure: Figure, handles: list[Any], names: list[str], width: float) -> None:
    """A legend under the axes, where it covers no data."""
    # matplotlib leaves out names that start with an underscore.
    shown = [textwrap.shorten(" " + n, 60, placeholder="…") for n in names]
    shown = [f"\u2009{n}" if n.startswith("_") else n for n in shown]
    column = max(len(n) for n in shown) * 0.085 + 0.6
    figure.legend(
        handles,
        shown,
        loc="outside lower left",
        ncols=max(1, min(len(shown), int(width / column))),
        frameon=False,
        handlelength=2.6,
    )


def _log_axis(axes: Axes, values: list[np.ndarray]) -> None:
    from matplotlib.ticker import AutoLocator, FuncFormatter, LogLocator, NullLocator

    decades = math.log10(max(v.max() for v in values) / min(v.min() for v in values))
    axes.set_yscale("log")
    # Within half a decade a log axis has no round numbers to label.
    subs = (1.0,) if decades > 3 else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(AutoLocator() if decades < 0.7 else LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


class _Cell(NamedTuple):
    """A run of cells of one colour; no colour where the value is NaN."""

    row: int
    column: int
    columns: int
    colour: str
    tip: str


def _svg(
    figure: Figure,
    title: str,
    axes: Axes | None = None,
    cells: Sequence[_Cell] = (),
) -> str:
    """The figure as an `<svg>` element fit to stand in an HTML page.

    Cells are written here and not drawn by matplotlib: a third of the size of its
    paths, sharp where an image would blur in print, and each with its tooltip.
    """
    stream = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(stream, format="svg", metadata=nothing)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    if axes is not None:
        text = text.replace('<g id="cells">', "<g>" + _rectangles(figure, axes, cells), 1)
    # matplotlib's group names (axes_1, ...) would occur twice on a page of two figures.
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    label = html.escape(visible_text(title))
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _rectangles(figure: Figure, axes: Axes, cells: Sequence[_Cell]) -> str:
    height = figure.get_size_inches()[1] * 72
    parts = ['<g shape-rendering="crispEdges">']
    for row, column, columns, colour, tip in cells:
        corners = [(column - 0.5, row - 0.5), (column + columns - 0.5, row + 0.5)]
        (left, top), (right, low) = axes.transData.transform(corners).round(2).tolist()
        top, low = height - top, height - low
        box = f'x="{left:g}" y="{top:.6g}" width="{right - left:.4g}" height="{low - top:.4g}"'
        title = f"<title>{html.escape(tip, quote=False)}</title>"
        parts.append(f'<rect {box} fill="{colour or "#c8c8c8"}">{title}</rect>')
        if not colour:
            line = f"M{left:g} {low:.6g}L{right:g} {top:.6g}"
            parts.append(f'<path d="{line}" stroke="#777" stroke-width=".8"/>')
    return "".join(parts) + "</g>\n"
