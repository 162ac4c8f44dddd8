"""`NamedArray`: numbers whose axes have names and labels."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxheads.files import write_json, write_text
from jaxheads.names import choose

Label = int | str


@dataclass(frozen=True)
class NamedArray:
    """What a sweep returns. Immutable, on the host.

    Attributes:
      name: what the values are, with their unit, e.g. "change of LogitDifference (logits)".
      values: float [...], one axis for each of `axes`; NaN where nothing was measured.
      axes: names of the axes, e.g. ("layer", "head").
      labels: for each axis the labels along it.
      info: facts about the run, such as the unedited value; JSON only.
    """

    name: str
    values: np.ndarray
    axes: tuple[str, ...]
    labels: tuple[tuple[Label, ...], ...]
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = tuple(len(labels) for labels in self.labels)
        if len(set(self.axes)) != len(self.axes) or len(self.axes) != len(shape):
            raise ValueError(f"{self.name}: axes {self.axes} do not fit labels of lengths {shape}")
        if np.shape(self.values) != shape:
            raise ValueError(
                f"{self.name}: values have shape {np.shape(self.values)}, expected {shape} for "
                f"axes {', '.join(self.axes)}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes."""
        return self.values.shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype, copy=copy)

    def __float__(self) -> float:
        if self.axes:
            raise TypeError(f"{self.name} has axes {', '.join(self.axes)}: it is not one number")
        return float(self.values)

    def __getitem__(self, index: Any) -> Any:
        return self.values[index]

    def sel(self, **chosen: Label) -> NamedArray:
        """The part at one label of each axis named, e.g. `effects.sel(layer=18)`.

        Raises:
          ValueError: an unknown axis or label.
        """
        index: list[Any] = [slice(None)] * len(self.axes)
        for axis, label in chosen.items():
            index[self._axis(axis)] = self._position(axis, label)
        kept = [i for i, part in enumerate(index) if isinstance(part, slice)]
        return NamedArray(
            self.name,
            np.asarray(self.values[tuple(index)]),
            tuple(self.axes[i] for i in kept),
            tuple(self.labels[i] for i in kept),
            self.info,
        )

    def mean(self, *axes: str) -> NamedArray:
        """The mean over the axes named, what was not measured left out.

        Raises:
          ValueError: an unknown axis.
        """
        gone = tuple(self._axis(axis) for axis in axes)
        kept = [i for i in range(len(self.axes)) if i not in gone]
        return NamedArray(
            self.name,
            np.asarray(np.nanmean(self.values, axis=gone)) if gone else self.values,
            tuple(self.axes[i] for i in kept),
            tuple(self.labels[i] for i in kept),
            self.info,
        )

    def top(self, count: int = 10, by: str = "magnitude") -> list[tuple[tuple[Label, ...], float]]:
        """The `count` most remarkable entries, as (labels, value).

        Args:
          count: how many, at most.
          by: "magnitude", "highest" or "lowest".

        Raises:
          ValueError: an unknown order, or a count below 1.
        """
        choose("order", by, ("magnitude", "highest", "lowest"))
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        flat = self.values.ravel()
        key = {"magnitude": -np.abs(flat), "highest": -flat, "lowest": flat}[by]
        order = np.argsort(key, kind="stable")  # NaN sorts last
        order = order[~np.isnan(flat[order])][:count]
        return [(self._labels_at(i), float(flat[i])) for i in order]

    def table(self, count: int = 10, by: str = "magnitude") -> str:
        """The `count` most remarkable entries as lines of text, with a heading."""
        rows = [(*map(str, labels), f"{value:+.4f}") for labels, value in self.top(count, by)]
        heads = (*self.axes, "value")
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True))
                 for row in (heads, *rows)]  # fmt: skip
        return "\n".join([self.name, *lines])

    def heatmap(self, *, title: str | None = None, mark: int = 0) -> str:
        """Draws two axes as a heatmap; see `jaxheads.report.heatmap`.

        Args:
          title: default the name.
          mark: outline this many entries of greatest magnitude.

        Returns:
          An `<svg>` element, which notebooks can show with `IPython.display.SVG`.

        Raises:
          ValueError: not two axes: choose with `sel` or `mean` first.
        """
        from jaxheads.report import heatmap

        if len(self.axes) != 2:
            raise ValueError(
                f"a heatmap needs two axes, got {', '.join(self.axes) or 'none'}: choose with "
                "sel(axis=label) or mean(axis)"
            )
        best = [labels for labels, _ in self.top(mark)] if mark else []
        return heatmap(
            self.values,
            title=title or self.name,
            label=self.name,
            axes=(self.axes[0], self.axes[1]),
            labels=(self.labels[0], self.labels[1]),
            mark=[(self._position(self.axes[0], a), self._position(self.axes[1], b))
                  for a, b in best],
        )  # fmt: skip

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON of everything, NaN as null; written to `path` if given."""
        flat = [None if np.isnan(v) else float(v) for v in self.values.ravel()]
        found = {
            "name": self.name,
            "axes": list(self.axes),
            "labels": [list(labels) for labels in self.labels],
            "values": flat,
            "info": dict(self.info),
        }
        if path is not None:
            write_json(Path(path), found)
        return json.dumps(found)

    @classmethod
    def from_json(cls, source: str | Path) -> NamedArray:
        """Reads a file that `to_json` wrote.

        Raises:
          ValueError: it is not one.
        """
        found = json.loads(Path(source).read_text())
        missing = {"name", "axes", "labels", "values"} - set(found)
        if missing:
            raise ValueError(f"{source} holds no named array: {', '.join(sorted(missing))} missing")
        labels = tuple(tuple(part) for part in found["labels"])
        values = np.array([np.nan if v is None else v for v in found["values"]], np.float32)
        shape = tuple(len(part) for part in labels)
        return cls(
            found["name"],
            values.reshape(shape),
            tuple(found["axes"]),
            labels,
            found.get("info", {}),
        )

    def to_csv(self, path: str | Path | None = None) -> str:
        """One line per entry, the labels and then the value; written to `path` if given."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*self.axes, "value"])
        for i, value in enumerate(self.values.ravel()):
            writer.writerow([*self._labels_at(i), repr(float(value))])
        if path is not None:
            write_text(Path(path), out.getvalue())
        return out.getvalue()

    def __repr__(self) -> str:
        axes = ", ".join(
            f"{axis} {len(labels)}" for axis, labels in zip(self.axes, self.labels, strict=True)
        )
        return f"NamedArray({self.name}; {axes or f'{float(self.values):.4f}'})"

    def _axis(self, name: str) -> int:
        return self.axes.index(choose("axis", name, self.axes))

    def _position(self, axis: str, label: Label) -> int:
        labels: Sequence[Label] = self.labels[self._axis(axis)]
        if label not in labels:
            shown = ", ".join(map(str, labels[:12])) + (", ..." if len(labels) > 12 else "")
            raise ValueError(f"axis {axis!r} has no label {label!r}: it has {shown}")
        return labels.index(label)

    def _labels_at(self, flat: int) -> tuple[Label, ...]:
        index = np.unravel_index(flat, self.shape)
        return tuple(labels[i] for labels, i in zip(self.labels, index, strict=True))
