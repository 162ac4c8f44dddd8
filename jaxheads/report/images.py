"""Small grey images of classes, one class a row, as cells like those of a heatmap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from jaxheads.report.drawing import WIDEST, Cell, cell_colours, grid, real_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_IN_ROW, _MOST_PIXELS = 16, 50_000


def image_grid(images: ArrayLike, classes: Sequence[int | str], *, title: str) -> str:
    """Draws images, black to white from the least to the greatest pixel of all.

    Args:
      images: [N,height,width], any real dtype.
      classes: N; images of one class stand in a row, at most 16 of them.
      title: the figure's title; errors name it.

    Returns:
      An `<svg>` element.

    Raises:
      ValueError: `images` is not [N,height,width], is empty, not finite or of more than 50,000
        pixels to draw, or there are not N classes.
    """
    pixels = real_numbers(title, "images", images, "[N,height,width]")
    if len(classes) != len(pixels):
        raise ValueError(
            f"figure {title!r}: expected {len(pixels)} classes for images of shape "
            f"{pixels.shape}, got {len(classes)}"
        )
    rows: dict[int | str, list[np.ndarray]] = {}
    for image, name in zip(pixels, classes, strict=True):
        rows.setdefault(name, []).append(image)
    rows = {name: row[:_MOST_IN_ROW] for name, row in rows.items()}
    _, high, wide = pixels.shape
    if (count := sum(map(len, rows.values())) * high * wide) > _MOST_PIXELS:
        raise ValueError(
            f"figure {title!r}: {count:,} pixels are too many, expected at most {_MOST_PIXELS:,}"
        )
    across = max(map(len, rows.values()))
    # One pixel between images.
    shape = (len(rows) * (high + 1) - 1, across * (wide + 1) - 1)
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale = ScalarMappable(Normalize(float(pixels.min()), float(pixels.max())), "gray")
    cells = []
    for down, (name, row) in enumerate(rows.items()):
        for place, image in enumerate(row):
            for (y, x), colour in np.ndenumerate(cell_colours(scale, image)):
                tip = f"{name}, image {place}, pixel {y}, {x}: {image[y, x]:.3g}"
                cells.append(Cell(down * (high + 1) + y, place * (wide + 1) + x, 1, colour, tip))
    size = min(0.6 / max(high, wide), (WIDEST - 1.9) / shape[1])

    def decorate(panel: Axes) -> None:
        panel.set_xticks([])
        panel.set_yticks([down * (high + 1) + high / 2 - 0.5 for down in range(len(rows))])
        panel.set_yticklabels([str(name) for name in rows])
        panel.set_ylabel("class")
        for side in ("left", "bottom"):
            panel.spines[side].set_visible(False)

    inches = (max(size * shape[1], 1.2), max(size * shape[0], 1.2))
    return grid(title, "pixel", shape, inches, scale, cells, decorate)
