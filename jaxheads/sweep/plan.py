"""The plan of a sweep: which points run together, in what order, within a memory budget.

Points of one window, sorted by the layer they begin in, make a *wave*. A wave goes up the
stack once: at each layer the streams of points that began below move through the block, a
*chunk* of them at a time, and those of points that begin here come in. So a chunk is always
full of work, whatever layers its points come from, and nothing below a point is computed for
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jaxheads.model.config import ModelConfig

WINDOWS = 4
"""Most windows of one sweep: each costs compiling, and saves the slots before it."""
MARGIN = {"cpu": 128, "gpu": 4096, "tpu": 4096}
"""What starting a chunk costs, in tokens of work: small chunks leave the device idle."""
SMALLEST_CHUNK = 8
"""Points among which common slots are shared at the least, for judging whether it pays."""
DEFAULT_BUDGET = 2 * 2**30
"""Bytes."""


@dataclass(frozen=True)
class Wave:
    """Points that go up the stack together.

    Attributes:
      start: the first slot of the window; slots before it are those of the unedited run.
      chunk: rows of one step.
      grid: int [lanes, rows], the point of each row; lanes are devices along the edit axis.
      real: bool [lanes, rows], False where a row only fills up.
      entering: int [L], rows that begin in each layer, in the order of the grid.
    """

    start: int
    chunk: int
    grid: np.ndarray
    real: np.ndarray
    entering: np.ndarray

    @property
    def steps(self) -> Iterator[tuple[int, int, int]]:
        """(layer, rows that began below, rows that begin here), from the first layer on."""
        below = 0
        for layer, count in enumerate(self.entering.tolist()):
            if below or count:
                yield layer, below, count
            below += count


@dataclass(frozen=True)
class Shape:
    """What the cost of a point depends on.

    Attributes:
      config: of the model.
      rows: B.
      slots: T.
      reads: slots from the first that the metric reads to the end.
      read: N, slots the metric reads in each row.
      tokens: M or V, logits of each.
    """

    config: ModelConfig
    rows: int
    slots: int
    reads: int
    read: int
    tokens: int

    def stream_bytes(self, width: int) -> int:
        """Bytes of the residual stream of one point."""
        return (
            self.rows * width * self.config.d_model * np.dtype(self.config.compute_dtype).itemsize
        )

    def step_bytes(self, width: int) -> int:
        """Bytes that one point needs while it moves through a block, or is read out."""
        c = self.config
        heads = (2 * c.n_heads + 2 * c.n_kv_heads) * c.head_dim
        features = 4 * c.d_model + 3 * c.d_mlp + heads
        maps = 2 * c.n_heads * width * self.slots
        block = self.rows * (width * features + maps) * 4
        return max(block, self.rows * self.read * self.tokens * 8)

    def block_flops(self, width: int, queries: int | None = None) -> int:
        """Multiplications and additions of one block on `width` slots, for one point.

        With fewer queries, as in the last block, the rest of the slots gives only keys and
        values.
        """
        c, q = self.config, width if queries is None else queries
        d, dh = c.d_model, c.head_dim
        per_query = 2 * c.n_heads * dh * d + 4 * c.n_heads * dh * self.slots / 2
        per_query += (3 if c.gated else 2) * c.d_mlp * d
        return round(2 * self.rows * (q * per_query + width * 2 * c.n_kv_heads * dh * d))


def plan(
    layer: np.ndarray,
    slot: np.ndarray,
    shape: Shape,
    *,
    budget: int,
    lanes: int,
    platform: str,
) -> list[Wave]:
    """Divides points into waves and chunks.

    Args:
      layer: int [N], where each point begins.
      slot: int [N], its first changed slot.
      shape: what a point costs.
      budget: bytes for all lanes together, weights and the unedited run not counted.
      lanes: devices along the edit axis.
      platform: "cpu", "gpu" or "tpu".

    Raises:
      ValueError: the budget is too small for one point.
    """
    slot = np.minimum(slot, shape.slots - shape.reads)
    starts = _windows(slot)
    waves = []
    for start in np.unique(starts):
        chosen = np.flatnonzero(starts == start)
        chosen = chosen[np.argsort(layer[chosen], kind="stable")]
        waves += _waves(chosen, layer, int(start), shape, budget // lanes, lanes, platform)
    return waves


def worth_sharing(rows: int, slots: int, platform: str) -> bool:
    """Whether computing so many common slots once saves more than the extra step costs."""
    return (rows - 1) * slots * SMALLEST_CHUNK >= MARGIN.get(platform, MARGIN["gpu"])


def _windows(slot: np.ndarray) -> np.ndarray:
    """For each point the first slot of its window: at most `WINDOWS` different ones, at or
    before its own slot, with the fewest slots computed in vain.
    """
    values, counts = np.unique(slot, return_counts=True)
    # best[w][i]: slots in vain for the first i values in w windows, and where the last begins.
    best = [[(0 if i == 0 else np.inf, 0) for i in range(len(values) + 1)]]
    for _ in range(WINDOWS):
        row: list[tuple[float, int]] = [(0, 0)]
        for i in range(1, len(values) + 1):
            vain = [
                (best[-1][j][0] + float(((values[j:i] - values[j]) * counts[j:i]).sum()), j)
                for j in range(i)
            ]
            row.append(min(vain))
        best.append(row)
    starts, end = np.zeros(len(values), slot.dtype), len(values)
    for window in range(WINDOWS, 0, -1):
        begin = best[window][end][1]
        starts[begin:end] = values[begin] if end > begin else 0
        end = begin
        if not end:
            break
    return starts[np.searchsorted(values, slot)]


def _waves(
    chosen: np.ndarray,
    layer: np.ndarray,
    start: int,
    shape: Shape,
    budget: int,
    lanes: int,
    platform: str,
) -> list[Wave]:
    width = shape.slots - start
    stream, step = shape.stream_bytes(width), shape.step_bytes(width)
    if budget < 2 * stream + step:
        raise ValueError(
            f"a budget of {budget * lanes:,} bytes is too small: one edit of {shape.rows} rows of "
            f"{width} slots needs {(2 * stream + step) * lanes:,}. Use fewer rows at a time."
        )
    most = max(1, int(budget / 2 // step))  # half for what a step computes
    held = max(most + 1, int(budget / 2 // stream))  # half for the streams
    most = min(most, held // 2)
    per_wave = max(1, held - most) * lanes
    waves = []
    for part in np.split(chosen, range(per_wave, len(chosen), per_wave)):
        counts = np.bincount(layer[part], minlength=shape.config.n_layers)
        rows = -(-counts // lanes)
        chunk = _chunk(rows, most, shape.rows * width, MARGIN.get(platform, MARGIN["gpu"]))
        waves.append(_wave(part, counts, rows, start, chunk, lanes))
    return waves


def _chunk(rows: np.ndarray, most: int, tokens: int, margin: int) -> int:
    """The number of rows of a step that makes the whole wave cheapest.

    A step on a part of a chunk costs as much as on all of it, so the best number fits how many
    points begin in each layer.
    """
    below = np.cumsum(rows) - rows
    sizes = np.arange(1, max(1, min(most, int(rows.sum()))) + 1)
    steps = (-(-below // sizes[:, None]) + -(-rows // sizes[:, None])).sum(axis=1)
    return int(sizes[np.argmin(steps * (sizes * tokens + margin))])


def _wave(
    part: np.ndarray, counts: np.ndarray, rows: np.ndarray, start: int, chunk: int, lanes: int
) -> Wave:
    total = int(rows.sum()) + chunk  # a last chunk may reach over the end
    grid = np.full((lanes, total), part[0])
    real = np.zeros((lanes, total), bool)
    done, row = 0, 0
    for count, high in zip(counts.tolist(), rows.tolist(), strict=True):
        here = np.full(high * lanes, part[min(done, len(part) - 1)])
        here[:count] = part[done : done + count]
        grid[:, row : row + high] = here.reshape(high, lanes).T
        real[:, row : row + high] = (np.arange(high * lanes) < count).reshape(high, lanes).T
        done, row = done + count, row + high
    return Wave(start, chunk, grid, real, rows)
