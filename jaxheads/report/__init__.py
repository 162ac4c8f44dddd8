"""Figures of heads, and one self-contained HTML file to read them in.

`figures` turns numpy arrays into SVG strings; `page` sets SVG strings, tables and
text on a page. matplotlib and jinja2 are imported when a figure is drawn or a page
is rendered, not when this package is imported.
"""

from jaxheads.report.figures import attention_pattern, bars, curves, head_heatmap, token_strip
from jaxheads.report.page import Report, render, write

__all__ = [
    "Report",
    "attention_pattern",
    "bars",
    "curves",
    "head_heatmap",
    "render",
    "token_strip",
    "write",
]
