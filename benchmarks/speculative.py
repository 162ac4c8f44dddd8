"""Times speculative decoding against ordinary decoding, with trained draft heads.

    python benchmarks/speculative.py HEADS.safetensors [...] [--json] [--rows 8] [--repeats 3]

HEADS are the `beside.safetensors` of runs of configs/draft_heads_smollm2.toml, told apart by the
names of their folders. Held-out texts of `corpus:python-docs` are continued one at a time,
greedily, in float32: in the ordinary way, and over each tree with each file of heads. All take
turns on each prompt. The run fails where tokens differ.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich import print as write
from rich.box import SIMPLE
from rich.progress import track
from rich.table import Table

import jaxheads as jh
from jaxheads.data.corpus import python_docs
from jaxheads.decode.draft import DraftHeads
from jaxheads.decode.speculative import speculate
from jaxheads.decode.tree import Tree
from jaxheads.files import write_json

MODEL = "smollm2-135m-instruct"
RESULTS = Path(__file__).resolve().parent / "results" / "speculative.json"
TREES = ((1,), (3,), (1, 1, 1), (3, 2, 1))
ORDINARY = "ordinary"


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what it returned."""
    began = time.perf_counter()
    made = jax.block_until_ready(run())
    return time.perf_counter() - began, made


def measure(files: list[Path], rows: int, length: int, new: int, repeats: int) -> dict[str, Any]:
    """Every way on every prompt."""
    loaded, tokenizer = jh.load(MODEL, dtype="float32")
    assert isinstance(loaded, jh.Transformer) and tokenizer is not None
    model = loaded
    ids = [tokenizer.encode(document.text)[:length] for document in python_docs("held_out")]
    prompts = [np.asarray([row]) for row in ids if len(row) == length][:rows]
    ways: dict[str, Callable[[np.ndarray], Any]] = {
        ORDINARY: lambda prompt: jh.generate(model, prompt, max_new_tokens=new)
    }

    def with_heads(heads: DraftHeads, widths: tuple[int, ...]) -> Callable[[np.ndarray], Any]:
        tree = Tree.of_widths(widths)
        return lambda prompt: speculate(model, heads, prompt, max_new_tokens=new, tree=tree)

    for file in files:
        heads = DraftHeads.load(file, model.config)
        for widths in TREES:
            if len(widths) <= len(heads.heads):
                ways[f"{file.parent.name} {widths}"] = with_heads(heads, widths)
    found: dict[str, Any] = {name: {"seconds": [], "per_step": [], "kept": []} for name in ways}
    for run in ways.values():
        timed(lambda run=run: run(prompts[0]))  # compiles
    for prompt in track(prompts, description="prompts"):
        expected: list[list[int]] = []
        for name, run in ways.items():
            times, made = zip(
                *(timed(lambda run=run, prompt=prompt: run(prompt)) for _ in range(repeats)),
                strict=True,
            )
            found[name]["seconds"].append(statistics.median(times))
            if name == ORDINARY:
                expected = made[0].rows()
                found[name]["per_step"].append(1.0)
                continue
            if made[0].rows() != expected:
                raise RuntimeError(f"{name} gave other tokens than ordinary decoding")
            found[name]["per_step"].append(made[0].tokens_per_step)
            found[name]["kept"].append(made[0].acceptance.tolist())
    return {
        "model": MODEL, "rows": len(prompts), "length": length, "new": new, "repeats": repeats,
        "load": os.getloadavg()[0], "machine": platform.machine(), "ways": found,
    }  # fmt: skip


def show(found: dict[str, Any]) -> None:
    """Prints a table."""
    table = Table(box=SIMPLE, title=f"{found['new']} tokens after {found['length']}, one row")
    for column in (
        "way",
        "tokens/step",
        "least",
        "most",
        "kept, by head",
        "tokens/s",
        "x ordinary",
    ):
        table.add_column(column, justify="left" if column == "way" else "right")
    base = sum(found["ways"][ORDINARY]["seconds"])
    for name, way in found["ways"].items():
        seconds, steps = sum(way["seconds"]), way["per_step"]
        kept = np.mean(way["kept"], axis=0) if way["kept"] else []
        table.add_row(
            name, f"{statistics.mean(steps):.2f}", f"{min(steps):.2f}", f"{max(steps):.2f}",
            " ".join(f"{share:.2f}" for share in kept),
            f"{found['rows'] * found['new'] / seconds:.1f}", f"{base / seconds:.2f}",
        )  # fmt: skip
    write(table)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("heads", type=Path, nargs="+", help="beside.safetensors of runs")
    parser.add_argument("--json", action="store_true", help="also write results/speculative.json")
    parser.add_argument("--rows", type=int, default=8, help="prompts")
    parser.add_argument("--length", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens that follow")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each")
    options = parser.parse_args()
    numbers = (options.rows, options.length, options.new, options.repeats)
    if min(numbers) < 1:
        parser.error(f"rows, length, new and repeats must be 1 or more, got {numbers}")
    for file in options.heads:
        if not file.is_file():
            parser.error(f"{file} is no file: expected the beside.safetensors of a run")
    found = measure(options.heads, *numbers)
    show(found)
    if options.json:
        RESULTS.parent.mkdir(exist_ok=True)
        write_json(RESULTS, found)


if __name__ == "__main__":
    main()
