"""Figures of heads, and one self-contained HTML file to read them in.

`figures`, `heatmaps` and `circuit` turn numbers into SVG strings; `page` sets SVG
strings, tables and text on a page. matplotlib and jinja2 are imported when a figure is
drawn or a page is rendered, not when this package is imported.
"""

from jaxheads.report.circuit import circuit_drawing
from jaxheads.report.figures import bars, curves, token_strip
from jaxheads.report.heatmaps import attention_pattern, head_heatmap, heatmap
from jaxheads.report.page import Report, render, write

__all__ = [
    "Report",
    "attention_pattern",
    "bars",
    "circuit_drawing",
    "curves",
    "head_heatmap",
    "heatmap",
    "render",
    "token_strip",
    "write",
]
