"""Times training steps against PyTorch with transformers, and what our own options cost.

    python benchmarks/train.py [--json] [--repeats 3] [--peer-python PATH] [--threads 2]
    python benchmarks/train.py --shape 1b [--rows 8] [--length 2048]

Without --shape: SmolLM2 in float32, 8 rows of 128 tokens of the Python documentation, the loss of
every next token. Three steps are compared: LoFiT's second stage (offsets of 14 heads), its first
(factors of all heads), and fine-tuning of all parameters, each with AdamW. Ours
(`jaxheads_train.py`) and the peer's (`torch_train.py`, forward pre-hooks on `o_proj`) start from
the same numbers, each in a process of its own, and take turns, so that whatever else the machine
does meets both. The run fails where the losses of a step differ by more than 1e-4 nats. Then ours
against ours: fine-tuning with and without trained edits of all heads, and the options of memory.

With --shape: one device, random weights, bfloat16 activations, float32 parameters; the step with
and without trained edits of all heads, and what share of the device's peak it reaches (MFU).

The peer needs torch and transformers. Without --peer-python they are installed from PyPI, into an
environment of their own under .cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from peers import environment
from rich import print as write
from rich.box import SIMPLE
from rich.table import Table

from jaxheads.files import write_json

MODEL = "smollm2-135m-instruct"
ROWS, LENGTH, HEADS, ANSWERS, SEED = 8, 128, 14, 16, 0
RATES = {"offsets": 1e-2, "importance": 5e-3, "full": 3e-5}
WORKLOADS = {
    "offsets": f"LoFiT, offsets of {HEADS} heads",
    "importance": "LoFiT, factors of all heads",
    "full": "fine-tuning of all parameters",
}
OPTIONS = {
    "remat dots": ("--remat", "dots"),
    "remat full": ("--remat", "full"),
    "chunk 32": ("--chunk", "32"),
    f"{ANSWERS} answers a row": ("--answers", str(ANSWERS)),
}
HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "train.json"
PEER_PACKAGES = ("torch==2.13.0", "transformers==5.23.0")
TOLERANCE = 1e-4
"""Largest difference of the losses of a step, in nats."""
BUSY = 0.5
"""Load average per core, before the start, above which the timings deserve a warning."""


class Side:
    """A process that takes a training step when asked."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.errors = (folder / "errors.log").open("a+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self.ready = self._reply()
        self.steps: list[dict[str, Any]] = []

    def step(self) -> None:
        """Takes one step and keeps what is said of it."""
        assert self.process.stdin
        print("step", file=self.process.stdin, flush=True)
        self.steps.append(self._reply())

    def found(self) -> dict[str, Any]:
        """What was measured, as it goes to the JSON file; the first step is not warm."""
        keys = ("loss", "seconds", "processor_seconds")
        measured = {key: [step[key] for step in self.steps] for key in keys}
        return self.ready | measured | {"peak_bytes": self.steps[-1]["peak_bytes"]}

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *error: object) -> None:
        """Ends the process by ending its input."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.errors.close()

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"a side stopped:\n{self.errors.read()[-2000:]}")
        return json.loads(line)


class Sides:
    """Starts processes on the same inputs."""

    def __init__(self, folder: Path, peer_python: str, threads: int) -> None:
        self.folder, self.peer_python, self.threads = folder, peer_python, threads

    def ours(self, workload: str, *options: str) -> Side:
        return self._start(sys.executable, "jaxheads_train.py", workload, options)

    def theirs(self, workload: str) -> Side:
        return self._start(self.peer_python, "torch_train.py", workload, ())

    def _start(self, python: str, script: str, workload: str, options: tuple[str, ...]) -> Side:
        inputs = (str(self.folder / "model"), str(self.folder / "inputs.npz"), workload)
        command = [python, str(HERE / script), *inputs, "--threads", str(self.threads), *options]
        return Side(command, self.folder)


def alternate(sides: dict[str, Side], repeats: int) -> dict[str, Any]:
    """Lets the sides take a first step and `repeats` warm ones in turn."""
    for _ in range(repeats + 1):
        for side in sides.values():
            side.step()
    return {name: side.found() for name, side in sides.items()}


def time_workload(sides: Sides, workload: str, repeats: int) -> dict[str, Any]:
    """Ours and theirs; a RuntimeError if they do not compute the same."""
    with sides.ours(workload) as ours, sides.theirs(workload) as theirs:
        runs = alternate({"jaxheads": ours, "torch": theirs}, repeats)
    pairs = zip(runs["jaxheads"]["loss"], runs["torch"]["loss"], strict=True)
    runs["difference"] = max(abs(a - b) for a, b in pairs)
    if not runs["difference"] < TOLERANCE:
        raise RuntimeError(f"{workload}: losses differ by {runs['difference']:.1e} nats")
    return runs


def time_edits(sides: Sides, repeats: int, layers: int) -> dict[str, Any]:
    """Fine-tuning of all parameters without edits and with edits of all heads.

    "flops_share" is what the edits add to a step's operations: the elementwise ones are XLA's
    count of a layer, in which the loop over layers counts once, times the layers.
    """
    with sides.ours("full") as plain, sides.ours("edited") as edited:
        runs = alternate({"plain": plain, "edited": edited}, repeats)
    before, after = runs["plain"], runs["edited"]
    added = max(0.0, after["counted_flops"] - before["counted_flops"]) * layers
    matrix = after["matrix_flops"] - before["matrix_flops"]
    runs["flops_share"] = max(added, matrix) / before["matrix_flops"]
    return runs


def time_options(sides: Sides, repeats: int) -> dict[str, Any]:
    """Fine-tuning with options, one after another (the peak of memory is each one's own)."""
    found = {}
    for name, options in OPTIONS.items():
        with sides.ours("full", *options) as side:
            found[name] = alternate({name: side}, repeats)[name]
    return found


def prepare(folder: Path) -> dict[str, Any]:
    """Writes the model and the inputs for both sides; returns what the results say of them."""
    import jaxheads as jh
    from jaxheads.data.corpus import python_docs

    model, tokenizer = jh.load(MODEL)
    jh.export(model, folder / "model", tokenizer=tokenizer)
    config, random = model.config, np.random.default_rng(SEED)
    text = "\n\n".join(document.text for document in python_docs("train"))
    ids = tokenizer.encode(text[: 20 * ROWS * LENGTH])[: ROWS * LENGTH]
    count = config.n_layers * config.n_heads
    chosen = np.sort(random.choice(count, HEADS, replace=False))
    heads = np.stack(np.divmod(chosen, config.n_heads), axis=1)
    factors = (config.n_layers, config.n_heads, config.head_dim)
    rates: dict[str, Any] = {f"rate_{name}": np.float32(rate) for name, rate in RATES.items()}
    np.savez(
        folder / "inputs.npz",
        tokens=np.array(ids, np.int32).reshape(ROWS, LENGTH),
        heads=heads,
        offsets=1e-3 * random.standard_normal((HEADS, config.head_dim), np.float32),
        factors=1e-3 * random.standard_normal(factors, np.float32),
        l1=np.float32(1e-3),
        **rates,
    )
    return {"model": MODEL, "layers": config.n_layers, "heads": heads.tolist()}


def measure(python: str, repeats: int, threads: int, only: list[str]) -> dict[str, Any]:
    """Everything (or the parts named), as it goes to the JSON file."""
    found: dict[str, Any] = {
        "batch": [ROWS, LENGTH],
        "dtype": "float32",
        "threads": threads,
        "machine": platform.machine(),
        "load_average_before": os.getloadavg()[0],
    }
    with tempfile.TemporaryDirectory() as name:
        found |= prepare(Path(name))
        sides = Sides(Path(name), python, threads)
        found["steps"] = {w: time_workload(sides, w, repeats) for w in WORKLOADS if w in only}
        if "edits" in only:
            found["edits"] = time_edits(sides, repeats, found["layers"])
        if "options" in only:
            found["options"] = time_options(sides, max(1, repeats - 1))
    return found


def warm(run: dict[str, Any], key: str = "seconds") -> float:
    """The median of the steps after the first."""
    return statistics.median(run[key][1:])


def ratios(above: dict[str, Any], below: dict[str, Any], key: str = "seconds") -> str:
    """Median and range of the ratio of neighbouring warm steps."""
    found = [a / b for a, b in zip(above[key][1:], below[key][1:], strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})"


def show(found: dict[str, Any]) -> None:
    """Prints tables and what they need to be read."""
    rows, length = found["batch"]
    write(f"{found['model']}, {rows} x {length} tokens, float32, {found['threads']} threads")
    columns = ("step s", "processor s", "GFLOP/s", "peak MB", "ratio", "of processor s", "loss +-")
    table = Table("a step of", "", *columns, box=SIMPLE)
    for workload, runs in found["steps"].items():
        ours, flops = runs["jaxheads"], runs["jaxheads"]["matrix_flops"]
        for name in ("jaxheads", "torch"):
            run = runs[name]
            cells = [f"{warm(run):.2f}", f"{warm(run, 'processor_seconds'):.2f}"]
            cells += [f"{flops / warm(run) / 1e9:.0f}", f"{run['peak_bytes'] / 1e6:.0f}"]
            if name != "jaxheads":
                cells += [ratios(run, ours), ratios(run, ours, "processor_seconds")]
                cells += [f"{runs['difference']:.0e}"]
            table.add_row(WORKLOADS[workload] if name == "jaxheads" else "", name, *cells)
    write(table)
    write(
        "Medians of warm steps. Ratio: torch's step to ours next in turn, median (range). "
        "GFLOP/s: of the matrix products in our program. Peak: of the whole process, loading "
        "included. Loss: largest difference over all steps, in nats."
    )
    if "edits" in found:
        show_ours(found["edits"], found.get("options", {}))
    if found["load_average_before"] > BUSY * (os.cpu_count() or 1):
        write(
            f"Load average {found['load_average_before']:.1f} before the start: other programs "
            "were running. PyTorch's threads wait for one another at every operation, so the "
            "seconds mean little and the ratios flatter us; processor seconds with --threads 1 "
            "are what such a machine can tell."
        )


def show_ours(edits: dict[str, Any], options: dict[str, Any]) -> None:
    """Prints what edits and options cost."""
    plain, edited = edits["plain"], edits["edited"]
    columns = ("step s", "of plain", "processor s", "peak MB", "temporaries MB")
    table = Table("fine-tuning", *columns, box=SIMPLE)
    for name, run in {"plain": plain, "edits of all heads": edited, **options}.items():
        cells = [f"{warm(run):.2f}", f"{warm(run) / warm(plain):.2f}"]
        cells += [f"{warm(run, 'processor_seconds'):.2f}", f"{run['peak_bytes'] / 1e6:.0f}"]
        table.add_row(name, *cells, f"{run['temporary_bytes'] / 1e6:.0f}")
    write(table)
    write(
        f"Trained edits on z, a factor and an offset of each head: {ratios(edited, plain)} times "
        f"the step next in turn, {edits['flops_share']:.2%} more operations."
    )


def main() -> int:
    """Runs the command; returns its exit status."""
    parts = [*WORKLOADS, "edits", "options"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="also write results/train.json")
    parser.add_argument("--repeats", type=int, default=3, help="warm steps of each")
    parser.add_argument("--threads", type=int, default=2, help="cores and threads of each")
    parser.add_argument("--peer-python", help="a Python that has torch and transformers")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="parts to run")
    parser.add_argument("--shape", choices=("1b", "tiny"), help="a random model on one device")
    parser.add_argument("--rows", type=int, default=8, help="of a batch, with --shape")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row, with --shape")
    parser.add_argument("--remat", default="dots", help="none, dots or full, with --shape")
    parser.add_argument("--chunk", type=int, default=512, help="slots of logits, with --shape")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    if options.shape:
        import utilization

        found = utilization.measure(
            options.shape, options.rows, options.length, options.remat, options.chunk,
            options.repeats,
        )  # fmt: skip
        utilization.show(found)
    else:
        python = options.peer_python or environment("transformers", PEER_PACKAGES)
        found = measure(python, options.repeats, options.threads, options.only)
        show(found)
    if options.json:
        path = RESULTS.with_stem(f"train_{options.shape}") if options.shape else RESULTS
        write_json(path, found)
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
