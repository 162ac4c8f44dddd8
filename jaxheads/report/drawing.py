"""What the figures are drawn with: colours, cells, ticks, legends, and the way to SVG."""

from __future__ import annotations

import contextlib
import html
import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jaxheads.report.page import visible_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

WIDEST = 9.4
"""Inches; the page's text column."""

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


def colour_scale(table: np.ndarray, *, from_zero: bool = False) -> ScalarMappable:
    """Blue above zero, red below; from zero, or from the least value where all lie close."""
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


def cell_colours(scale: ScalarMappable, table: np.ndarray) -> np.ndarray:
    """Each value's colour as #rrggbb; empty where it is NaN."""
    rgb = (scale.to_rgba(table)[..., :3] * 255).round().astype(int)
    packed = (rgb << (16, 8, 0)).sum(-1)
    names = [f"#{n:06x}" for n in packed.ravel().tolist()]
    return np.where(np.isnan(table), "", np.array(names).reshape(table.shape))


def shade(fraction: float) -> str:
    """CSS colours for a fraction in [-1,1]: white to blue, or to red below zero."""
    full = (8, 81, 156) if fraction >= 0 else (165, 15, 21)
    colour = [round(255 + (c - 255) * abs(fraction)) for c in full]
    linear = [((c / 255 + 0.055) / 1.055) ** 2.4 if c > 10 else c / 3295 for c in colour]
    # WCAG: above this luminance black text has the better contrast.
    bright = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.179
    hexadecimal = "".join(f"{c:02x}" for c in colour)
    return f"background:#{hexadecimal};color:{'#111' if bright else '#fff'}"


@contextlib.contextmanager
def drawing(
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
        lines = wrap(visible_text(title), least or width, 12)
        figure.suptitle(lines, x=0.01, ha="left", fontsize=12, weight="bold")
        yield figure, figure.add_subplot()


def grid(
    title: str,
    label: str,
    shape: tuple[int, int],
    inches: tuple[float, float],
    scale: ScalarMappable,
    cells: Sequence[Cell],
    decorate: Callable[[Axes], None],
) -> str:
    """Cells of rows by columns in a panel (width, height) inches large, with its scale."""
    (rows, columns), (wide, high) = shape, inches
    with drawing(wide + 3, high + 3, title, least=wide + 1) as (figure, axes):
        # Cell (row, column) is the unit square about (column, row), row 0 at the top.
        axes.set_xlim(-0.5, columns - 0.5)
        axes.set_ylim(rows - 0.5, -0.5)
        axes.tick_params(length=2)
        # Stands where the cells go; `to_svg` finds it by its gid.
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
        return to_svg(figure, title, axes, cells)


def wrap(text: str, inches: float, size: float) -> str:
    """`text` in lines of so many inches, in a font of `size` points."""
    return textwrap.fill(text, max(6, int(inches * 72 / (0.6 * size)))) or text


def ticks(count: int, inches: float, least: float) -> range:
    """Every n-th index, n as small as leaves `least` inches between labels."""
    step = 1
    while count > 1 and inches * step / count < least - 1e-6:
        step += 1 if step == 1 else 3 if step == 2 else step
    return range(0, count, step)


def legend(figure: Figure, handles: list[Any], names: list[str], width: float) -> None:
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


def log_axis(axes: Axes, values: list[np.ndarray]) -> None:
    """A logarithmic y axis with round numbers at its ticks."""
    from matplotlib.ticker import AutoLocator, FuncFormatter, LogLocator, NullLocator

    decades = math.log10(max(v.max() for v in values) / min(v.min() for v in values))
    axes.set_yscale("log")
    # Within half a decade a log axis has no round numbers to label.
    subs = (1.0,) if decades > 3 else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(AutoLocator() if decades < 0.7 else LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def same_length(title: str, tokens: Sequence[str], expected: int, what: str) -> None:
    """Raises ValueError unless there are as many tokens as expected."""
    if len(tokens) != expected:
        raise ValueError(
            f"figure {title!r}: expected {expected} tokens for {what}, got {len(tokens)}"
        )


def real_numbers(
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


def exact_text(values: ArrayLike) -> np.ndarray:
    """Each value as the shortest text that reads back as the same number."""
    array = np.asarray(values)
    return np.array([str(v) for v in array.ravel()], object).reshape(array.shape)


class Cell(NamedTuple):
    """A run of cells of one colour; no colour where the value is NaN."""

    row: int
    column: int
    columns: int
    colour: str
    tip: str


def to_svg(
    figure: Figure,
    title: str,
    axes: Axes | None = None,
    cells: Sequence[Cell] = (),
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


def _rectangles(figure: Figure, axes: Axes, cells: Sequence[Cell]) -> str:
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
