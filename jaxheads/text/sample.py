"""A paragraph of plain English that ships with the package."""

from importlib import resources


def sample_text() -> str:
    """About 170 tokens of ordinary prose, to measure what an edit costs in general."""
    return resources.files("jaxheads.text").joinpath("sample.txt").read_text("utf-8")
