"""One self-contained HTML file: text, figures, tables and facts on a page.

The page loads nothing and runs nothing (its content security policy says so too): it
can be mailed, archived or opened from disk and looks the same in ten years.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

_SHOWN = {" ": "·", "\n": "↵", "\t": "⇥"}
# What a browser would fetch: resource attributes, CSS urls and imports, from outside.
_LOADS = re.compile(
    r"""<(?!a\b)[a-z][^<>]*\s(?:xlink:)?(?:src|href|srcset|data|poster)\s*=\s*["']?\s*"""
    r"""((?:[a-z+.-]+:)?//[^\s"'>]+)|url\(\s*["']?((?:[a-z+.-]+:)?//[^\s"')]+)|(@import\b)""",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Block:
    """One piece of a page: `kind` names its template, `content` is what it shows."""

    kind: str
    content: Mapping[str, Any]


@dataclass(frozen=True)
class Report:
    """A page in the making. Each method returns a new report with one block more.

        page = Report("Heads of a model").section("Sweep", "All 270 heads.").figure(svg, "...")
        write(page, "report.html")

    Text is escaped everywhere; only `figure` and `html` take markup, and they must be
    given markup that is trusted.

    Attributes:
      title: the page's title.
      subtitle: a line under it.
      blocks: what is on the page, from the top.
    """

    title: str
    subtitle: str = ""
    blocks: tuple[Block, ...] = ()

    def section(self, heading: str, text: str = "") -> Report:
        """Starts a section, with a link to it at the head of the page.

        Args:
          heading: the section's heading.
          text: plain text; an empty line starts a new paragraph.
        """
        paragraphs = [p.strip() for p in re.split(r"\n\s*\n", text) if p.strip()]
        anchor = self._anchor(heading)
        return self._with("section", heading=heading, paragraphs=paragraphs, anchor=anchor)

    def figure(self, svg: str, caption: str) -> Report:
        """Adds a figure.

        Args:
          svg: an `<svg>` element, as the functions of `figures` return.
          caption: a line under it; errors name it.

        Raises:
          ValueError: `svg` is not an `<svg>` element or loads something from outside.
        """
        if not re.match(r"<svg[\s>].*</svg>\s*\Z", svg, re.DOTALL):
            raise ValueError(f"figure {caption!r}: expected an <svg> element, got {svg[:60]!r}")
        _refuse_loads(f"figure {caption!r}", svg)
        width = re.match(r'<svg[^>]*\swidth="([0-9.]+(?:pt|px)?)"', svg)
        return self._with("figure", svg=svg, caption=caption, width=width and width[1])

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str) -> Report:
        """Adds a table. Columns of numbers stand right-aligned, to the same decimals.

        Args:
          columns: the column headings.
          rows: one sequence per row: text, numbers (numpy's and jax's scalars too),
            booleans, or None where there is no value.
          caption: a line above it; errors name it.

        Raises:
          ValueError: there are no columns, a row's length differs from theirs, or a
            number is NaN or infinite.
        """
        where = f"table {caption!r}"
        if not columns:
            raise ValueError(f"{where}: expected at least one column, got none")
        for index, row in enumerate(rows):
            if len(row) != len(columns):
                raise ValueError(
                    f"{where}: expected {len(columns)} cells in row {index}, got {len(row)}"
                )
        cells = [
            [_plain(f"{where}, column {name!r}, row {i}", row[j]) for i, row in enumerate(rows)]
            for j, name in enumerate(columns)
        ]
        numeric = [
            any(_is_number(v) for v in column) and all(v is None or _is_number(v) for v in column)
            for column in cells
        ]
        shown = [_format_column(column) for column in cells]
        return self._with(
            "table",
            columns=list(zip(columns, numeric, strict=True)),
            rows=[list(zip(row, numeric, strict=True)) for row in zip(*shown, strict=True)],
            caption=caption,
        )

    def html(self, fragment: str) -> Report:
        """Adds trusted markup as it is, `token_strip`'s say. Scripts in it do not run.

        Raises:
          ValueError: the fragment loads something from outside.
        """
        _refuse_loads("html fragment", fragment)
        return self._with("html", fragment=fragment)

    def facts(self, facts: Mapping[str, Any]) -> Report:
        """Adds a list of labelled values: a model's name, its sizes, the run's settings.

        Raises:
          ValueError: a number is NaN or infinite.
        """
        plain = {k: _plain(f"fact {k!r}", v) for k, v in facts.items()}
        return self._with("facts", facts={k: _format_column([v])[0] for k, v in plain.items()})

    def _with(self, kind: str, **content: Any) -> Report:
        return replace(self, blocks=(*self.blocks, Block(kind, content)))

    def _anchor(self, heading: str) -> str:
        slug = re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-") or "section"
        taken = {b.content["anchor"] for b in self.blocks if b.kind == "section"}
        number = 2
        anchor = slug
        while anchor in taken:
            anchor, number = f"{slug}-{number}", number + 1
        return anchor


def render(report: Report) -> str:
    """The report as the text of one HTML file; the same report gives the same text."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    source = resources.files("jaxheads.report").joinpath("page.html.j2").read_text("utf-8")
    sections = [b.content for b in report.blocks if b.kind == "section"]
    return environment.from_string(source).render(report=report, sections=sections)


def write(report: Report, path: str | os.PathLike[str]) -> Path:
    """Writes the report as one HTML file; it appears whole or not at all.

    Args:
      report: what to write.
      path: the file; folders above it are made, a file in its place is replaced.

    Returns:
      The path written.

    Raises:
      OSError: the file cannot be written there; the message says where and why.
    """
    path = Path(path)
    # A lone surrogate cannot be encoded; it is shown as its escape.
    data = render(report).encode("utf-8", "backslashreplace")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise type(error)(
            error.errno, f"cannot write the report into {path.parent}: {error.strerror}", str(path)
        ) from error
    return path


def visible(token: str) -> str:
    """`token` with every character that cannot be seen shown by a sign.

    A space shows as ·, a newline as ↵, a tab as ⇥, an ASCII control character as its
    control picture, any other (zero-width, text direction, odd space, lone surrogate)
    as its escape, and an empty token as ∅.
    """
    return "".join(_SHOWN.get(c) or _seen(c) for c in token) or "∅"


def visible_text(text: str) -> str:
    """`text` with control characters shown, and spaces and line breaks as they are."""
    return "".join(c if c in " \n" else _seen(c) for c in text)


def _seen(c: str) -> str:
    if ord(c) < 32 or c == "\x7f":
        return "␡" if c == "\x7f" else chr(0x2400 + ord(c))
    if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Cn", "Zs", "Zl", "Zp"} and c != " ":
        return c.encode("unicode_escape").decode()
    return c


def _finalize(value: Any) -> Any:
    # Markup (trusted) and values that are not text pass as they are.
    return visible_text(value) if type(value) is str else value


def _refuse_loads(where: str, markup: str) -> None:
    found = _LOADS.search(markup)
    if found:
        address = next(group for group in found.groups() if group)
        raise ValueError(
            f"{where}: expected self-contained markup, but it loads {address!r} from outside"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(where: str, value: Any) -> Any:
    """`value` as None, a bool, an int, a finite float or a string."""
    if not isinstance(value, str) and hasattr(value, "item") and np.ndim(value) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: expected a finite number, got {value}")
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def _format_column(values: Sequence[Any]) -> list[str]:
    """Each value as text: floats to four digits of the largest, integers in thousands."""
    largest = max((abs(v) for v in values if isinstance(v, float)), default=0.0)
    decimals = 3 if not largest else min(max(3 - math.floor(math.log10(largest)), 0), 6)
    shown = []
    for value in values:
        if value is None:
            shown.append("–")
        elif isinstance(value, bool):
            shown.append("yes" if value else "no")
        elif isinstance(value, float):
            text = f"{value:,.{decimals}f}"
            lost = value and abs(value) < 10 ** (1 - decimals)
            shown.append((f"{value:.3g}" if lost else text).replace("-", "−"))
        elif isinstance(value, int):
            shown.append(f"{value:,}".replace("-", "−") if abs(value) > 9999 else str(value))
        else:
            shown.append(value)
    return shown
