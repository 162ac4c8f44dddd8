"""Tables of numbers as coloured cells: heads, sweeps, attention patterns.

Blue is positive, red is negative and pale is near zero, as in `figures`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from jaxheads.report.drawing import (
    WIDEST,
    Cell,
    cell_colours,
    colour_scale,
    exact_text,
    grid,
    real_numbers,
    same_length,
    ticks,
)
from jaxheads.report.page import visible, visible_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Label = int | str
_PITCH = 0.125  # inches between neighbouring token labels that can still be read
_MOST = 50_000  # cells; of more, a browser is slow to show the page


def heatmap(
    values: ArrayLike,
    *,
    title: str,
    label: str,
    axes: tuple[str, str],
    labels: tuple[Sequence[Label], Sequence[Label]],
    mark: Sequence[tuple[int, int]] = (),
) -> str:
    """Draws a table of numbers: its first axis down (0 at the top), its second across.

    The colour scale is symmetric about zero where values have both signs, starts at
    zero where they have one, and starts at their own minimum where they all lie
    within a factor of two. Each cell tells its exact value when pointed at.

    Args:
      values: [X,Y], any real dtype. NaN means not measured: a grey, struck-out cell.
      title: the figure's title; errors name it.
      label: what the values are, with their unit.
      axes: names of the two axes.
      labels: X and Y labels. Strings may be tokens: the spaces around them are shown by a
        sign, and so are characters that cannot be seen. Where there is no room for all
        labels, every second (third, ...) is written.
      mark: (row, column) indices of cells to outline.

    Returns:
      An `<svg>` element.

    Raises:
      ValueError: `values` is not [X,Y], is empty, infinite, NaN throughout or of more than
        50,000 cells, `labels` are not X and Y, or `mark` names a cell that is not there.
    """
    table = real_numbers(title, "values", values, "[X,Y]", allow_nan=True)
    rows, columns = table.shape
    for name, given, count in zip(axes, labels, table.shape, strict=True):
        if len(given) != count:
            raise ValueError(
                f"figure {title!r}: expected {count} labels of axis {name!r} for values of shape "
                f"{table.shape}, got {len(given)}"
            )
    if table.size > _MOST:
        raise ValueError(
            f"figure {title!r}: {rows} x {columns} cells are too many to read, expected at most "
            f"{_MOST:,}: draw a part"
        )
    if np.isnan(table).all():
        raise ValueError(f"figure {title!r}: every one of the {table.size} values is NaN")
    for row, column in mark:
        if not (0 <= row < rows and 0 <= column < columns):
            raise ValueError(
                f"figure {title!r}: cannot mark ({row}, {column}): expected a {axes[0]} below "
                f"{rows} and a {axes[1]} below {columns}"
            )
    down, across = ([_label(each) for each in given] for given in labels)
    scale, exact = colour_scale(table), exact_text(values)
    cells = [
        Cell(
            row,
            column,
            1,
            colour,
            f"{axes[0]} {down[row]}, {axes[1]} {across[column]}: {exact[row, column]}",
        )
        for (row, column), colour in np.ndenumerate(cell_colours(scale, table))
    ]
    words = any(isinstance(each, str) for each in labels[0])
    room = WIDEST - 1.6 - 0.08 * max(0, _longest(down) - 4)
    wide = min(max(0.34 * columns, 2.6), room)
    high = min(max(0.2 * rows, 1.6), 12.0)

    def decorate(panel: Axes) -> None:
        from matplotlib.patches import Rectangle

        panel.set_xlabel(
            visible_text(axes[1]) + " (grey: not measured)" * bool(np.isnan(table).any())
        )
        panel.set_ylabel(visible_text(axes[0]))
        _label_across(panel, across, wide)
        _label_down(panel, down, high, words)
        for row, column in mark:
            # Black on white, so that the outline shows on pale and dark cells alike.
            for colour, line in (("white", 3.6), ("black", 1.8)):
                box = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, ec=colour, lw=line)
                box.set(zorder=3, clip_on=False)
                panel.add_patch(box)

    return grid(title, label, (rows, columns), (wide, high), scale, cells, decorate)


def head_heatmap(
    values: ArrayLike,
    *,
    title: str,
    label: str,
    mark: Sequence[tuple[int, int]] = (),
) -> str:
    """Draws one number per head: layers down (0 at the top), heads across.

    Args:
      values: [L,H], any real dtype; otherwise as in `heatmap`.
      title: the figure's title; errors name it.
      label: what the values are, with their unit.
      mark: (layer, head) pairs to outline.

    Returns:
      An `<svg>` element.

    Raises:
      ValueError: as `heatmap`.
    """
    layers, heads = real_numbers(title, "values", values, "[L,H]", allow_nan=True).shape
    return heatmap(
        values,
        title=title,
        label=label,
        axes=("layer", "head"),
        labels=(range(layers), range(heads)),
        mark=mark,
    )


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
    table = real_numbers(title, "pattern", pattern, "[T,S]")
    queries, keys = table.shape
    if queries > keys:
        raise ValueError(
            f"figure {title!r}: expected a pattern [T,S] with T at most S, got shape {table.shape}"
        )
    same_length(title, tokens, keys, f"a pattern of shape {table.shape}")
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
    pitch = min(max(_PITCH, min(0.4, 4.2 / keys)), (WIDEST - 1.9) / keys)
    wide, high = max(pitch * keys, 2.2), max(pitch * queries, 1.2)

    def decorate(axes: Axes) -> None:
        size = 9 if pitch > 0.16 else 7.5
        columns, rows = ticks(keys, wide, 0.12), ticks(queries, high, 0.12)
        axes.set_xlabel("key (attended to)")
        axes.set_ylabel("query (attends)")
        axes.set_xticks(columns, [labels[i] for i in columns], rotation=90, fontsize=size)
        axes.set_yticks(rows, [labels[first + i] for i in rows], fontsize=size)

    return grid(title, "weight", (queries, keys), (wide, high), scale, cells, decorate)


def _label_across(panel: Axes, names: list[str], wide: float) -> None:
    """Labels under the columns, upright where they do not fit lying."""
    lying, pitch = 0.1 + 0.08 * _longest(names), wide / len(names)
    upright = lying > max(pitch, 0.34)
    chosen = ticks(len(names), wide, 0.12 if upright else lying)
    size = 10.0 if not upright else 9.0 if pitch > 0.16 else 7.5
    panel.set_xticks(
        chosen, [_short(names[i]) for i in chosen], rotation=90 if upright else 0, fontsize=size
    )


def _label_down(panel: Axes, names: list[str], high: float, words: bool) -> None:
    """Labels beside the rows; words are written smaller before any is left out."""
    small = words and high / len(names) < 0.19
    chosen = ticks(len(names), high, 0.12 if small else 0.19)
    panel.set_yticks(
        chosen, [_short(names[i]) for i in chosen], fontsize=7.5 if small else 9 if words else 10
    )


def _longest(names: list[str]) -> int:
    return max(len(_short(name)) for name in names)


def _label(value: Label) -> str:
    """A label as it is drawn; of a token, the spaces at its ends are shown."""
    text = str(value)
    inner = text.strip(" ")
    if not inner:
        return visible(text)
    before, _, after = text.partition(inner)
    whole = visible(before) if before else ""
    whole += "".join(c if c == " " else visible(c) for c in inner)
    return whole + (visible(after) if after else "")


def _short(token: str) -> str:
    return token if len(token) <= 14 else token[:13] + "…"
