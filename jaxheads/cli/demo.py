"""`jaxheads demo`: the demonstration."""

from __future__ import annotations

from pathlib import Path

from jaxheads.cli.options import parse


def main(argv: list[str]) -> None:
    """Parses and runs."""
    parse(demo, "demo", argv)


def demo(out: Path = Path("runs/demo"), seed: int = 0) -> None:
    """Run the demonstration on a small pretrained model and write its report.

    Example: jaxheads demo --out runs/demo

    Args:
        out: Folder for the report.
        seed: Of everything that is drawn at random.
    """
    from jaxheads.demo import run_demo

    run_demo(out=out, seed=seed)
