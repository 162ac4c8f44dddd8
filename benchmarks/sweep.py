"""Times sweeps over all heads against TransformerLens, which runs a hooked pass for each.

    python benchmarks/sweep.py [--json] [--repeats 3] [--peer-python PATH] [--full]

Three questions about SmolLM2 on 8 IOI prompts of 14 tokens: the logit difference without each head
(zero ablation), with each head at each position as in the clean run (activation patching), and the
first-order estimate of the latter (attribution patching). Ours and the peer's run on the same
weights and tokens, in turn, the peer in a process of its own (`transformer_lens_sweep.py`), so that
whatever else the machine does meets all alike. Ablation has a third competitor: our own forward
pass, vmapped over the heads of a layer and nothing shared. The run fails where effects differ by
more than 1e-3 in logits.

The peer needs torch and transformer-lens. Without --peer-python they are installed from PyPI, into
an environment of their own under .cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from peers import environment
from rich import print as write
from rich.box import SIMPLE
from rich.table import Table

import jaxheads as jh
from jaxheads.files import write_json
from jaxheads.sweep import LogitDifference, ablate_heads, attribution_patching, patch
from jaxheads.tasks import contrast, ioi

MODEL = "smollm2-135m-instruct"
PROMPTS, TEMPLATE, SEED = 8, "went", 0
THREADS = 2
"""Cores and threads of each competitor."""
HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "sweep.json"
PEER_PACKAGES = ("torch==2.13.0", "transformer-lens==4.3.0")
PLACES = ("layer", "position", "head")
SAMPLE = 60
"""Patches that the peer measures; its seconds are scaled to all of them (--full: all). So are
those of ablation as its documentation writes it."""
TOLERANCE = 1e-3
"""Largest difference of two effects, in logits."""
BUSY = 0.1
"""Share of the cores, taken by other programs, above which the timings deserve a warning."""


class Peer:
    """The peer's process. Its answers are arrays; its own clock gives the seconds."""

    def __init__(self, python: str, folder: str) -> None:
        self.folder = Path(folder)
        self.errors = (self.folder / "peer.log").open("w+")
        script = [python, str(HERE / "transformer_lens_sweep.py")]
        inputs = [str(self.folder / "model"), str(self.folder / "inputs.npz")]
        self.process = subprocess.Popen(
            [*script, *inputs, "--threads", str(THREADS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.ready = self._reply()

    def ask(self, task: str, **request: Any) -> tuple[float, np.ndarray]:
        """Seconds and values of a task."""
        out = self.folder / "reply.npz"
        assert self.process.stdin
        line = json.dumps({"task": task, "out": str(out), **request})
        print(line, file=self.process.stdin, flush=True)
        seconds = self._reply()["seconds"]
        with np.load(out) as arrays:
            return seconds, arrays["values"]

    def cpu_seconds(self) -> float:
        """Seconds of processor time used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> Peer:
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
            raise RuntimeError(f"TransformerLens stopped:\n{self.errors.read()[-2000:]}")
        return json.loads(line)


class Ours:
    """The same questions asked of jaxheads. Every answer lies on the host."""

    def __init__(self, model: Any, arrays: dict[str, np.ndarray]) -> None:
        self.model = model
        self.clean, self.corrupted = (jh.pack(arrays[n].tolist()) for n in ("clean", "corrupted"))
        answers = tuple(arrays["answers"].T)
        self.metric = LogitDifference.of(self.clean, *answers)

        def mean(model: Any, batch: Any, edits: Any) -> Any:
            return jh.logit_difference(model, batch, *answers, edits=edits).mean()

        self.last_ablation = np.zeros(0)
        self._plain = jax.jit(mean)
        self._each = jax.jit(jax.vmap(mean, in_axes=(None, None, 0)))
        self._gradient = jax.jit(jax.value_and_grad(mean, argnums=2))

    def cells(self, *axes: str) -> np.ndarray:
        """Everything along axes of `PLACES`, as rows of indices."""
        config, length = self.model.config, self.clean.tokens.shape[1]
        sizes = dict(zip(PLACES, (config.n_layers, length, config.n_heads), strict=True))
        return np.argwhere(np.ones([sizes[axis] for axis in axes]))

    def naive(self) -> np.ndarray:
        """Change of the metric without each head [L,H]: whole passes, a layer's heads at once."""
        config = self.model.config
        values = []
        for layer in range(config.n_layers):
            masks = [jh.mask_heads(config, [(layer, head)]) for head in range(config.n_heads)]
            values.append(self._each(self.model, self.clean, jh.Edits.stack(masks)))
        return np.asarray(values) - float(self._plain(self.model, self.clean, None))

    def ablate(self) -> np.ndarray:
        """Change of the metric without each head, [L,H]."""
        effects = ablate_heads(self.model, self.clean, self.metric, how="zero").values
        self.last_ablation = effects.ravel()
        return effects

    def patch(self) -> np.ndarray:
        """Change of the metric with each head at each position as in the clean run, [L,T,H]."""
        return patch(self.model, self.clean, self.corrupted, self.metric, over=PLACES).values

    def attribute(self) -> np.ndarray:
        """The first-order estimate of `patch`, [L,T,H]."""
        pair = self.clean, self.corrupted
        return attribution_patching(self.model, *pair, self.metric, over=PLACES).values

    def forward_backward(self) -> np.ndarray:
        """The unit in which attribution is counted: the metric, and its gradient in a scale."""
        edits = jh.Edits.identity(self.model.config, "z")
        value, slopes = self._gradient(self.model, self.corrupted, edits)
        np.asarray(slopes["z"].scale)
        return np.asarray(value)


Side = Callable[[], tuple[float, np.ndarray]]


def alternate(sides: dict[str, Side], repeats: int, peer: Peer) -> dict[str, Any]:
    """Runs competitors in turn, a first time and `repeats` times warm.

    A side returns its seconds and its effects, all of one shape. The result has for each side the
    seconds and the seconds of processor time of its runs, the share of the machine that others
    (not the peer) took meanwhile, and the largest difference of effects from the first side's.
    """
    measured = ("seconds", "processor_seconds", "others")
    runs: dict[str, Any] = {name: {m: [] for m in measured} for name in sides}
    for _ in range(repeats + 1):
        effects = {}
        for name, side in sides.items():
            before = processor_seconds(peer)
            seconds, effects[name] = side()
            after = processor_seconds(peer)
            all_of_it, busy, own = (b - a for a, b in zip(before, after, strict=True))
            others = max(busy - own, 0.0) / max(all_of_it, 1e-9)
            for what, value in zip(measured, (seconds, own, others), strict=True):
                runs[name][what].append(value)
        for name, values in effects.items():
            runs[name]["difference"] = difference(name, values, next(iter(effects.values())))
    return runs


def difference(name: str, effects: np.ndarray, reference: np.ndarray) -> float:
    """The largest difference; a RuntimeError if it is not below `TOLERANCE`."""
    found = float(np.abs(effects - reference).max())
    if not found < TOLERANCE:
        raise RuntimeError(f"{name}: effects differ by {found:.1e} logits from the reference")
    return found


def processor_seconds(peer: Peer) -> tuple[float, float, float]:
    """Seconds that the machine had, that it worked, and that this program and the peer worked."""
    if not Path("/proc/stat").exists():
        return 0.0, 0.0, 0.0
    line = Path("/proc/stat").read_text().partition("\n")[0]
    ticks = [int(field) / os.sysconf("SC_CLK_TCK") for field in line.split()[1:9]]
    idle = ticks[3] + ticks[4]
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return sum(ticks), sum(ticks) - idle, usage.ru_utime + usage.ru_stime + peer.cpu_seconds()


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def spread(values: list[float]) -> str:
    """The median and the range."""
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


# The three questions.


def time_ablation(peer: Peer, ours: Ours, repeats: int) -> dict[str, Any]:
    heads = ours.cells("layer", "head")
    chosen = np.random.default_rng(SEED).choice(len(heads), SAMPLE, replace=False)

    def documented() -> tuple[float, np.ndarray]:
        seconds, effects = peer.ask("documented_ablate", cells=heads[chosen].tolist())
        values = ours.last_ablation.copy()
        values[chosen] = effects  # elsewhere nothing to compare
        return seconds * (len(heads) + 1) / (SAMPLE + 1), values

    sides: dict[str, Side] = {
        "transformer-lens": lambda: peer.ask("fast_ablate", cells=heads.tolist()),
        "naive": lambda: timed(lambda: ours.naive().ravel()),
        "jaxheads": lambda: timed(lambda: ours.ablate().ravel()),
        "transformer-lens as documented": documented,
    }
    return alternate(sides, repeats, peer)


def time_patching(peer: Peer, ours: Ours, repeats: int, sample: int | None) -> dict[str, Any]:
    cells = chosen = ours.cells(*PLACES)
    if sample is not None:
        chosen = cells[np.random.default_rng(SEED).choice(len(cells), sample, replace=False)]
    # In forward passes, of which two are without a patch.
    scale = (len(cells) + 2) / (len(chosen) + 2)

    def theirs() -> tuple[float, np.ndarray]:
        seconds, effects = peer.ask("patch", cells=chosen.tolist())
        return seconds * scale, effects

    sides: dict[str, Side] = {
        "transformer-lens": theirs,
        "jaxheads": lambda: timed(lambda: ours.patch()[tuple(chosen.T)]),
    }
    runs = alternate(sides, repeats, peer)
    return {"cells": len(cells), "measured_by_the_peer": len(chosen), **runs}


def time_attribution(peer: Peer, ours: Ours, repeats: int) -> dict[str, Any]:
    def race(task: str, mine: Callable[[], np.ndarray]) -> dict[str, Any]:
        sides: dict[str, Side] = {
            "transformer-lens": lambda: peer.ask(task),
            "jaxheads": lambda: timed(mine),
        }
        return alternate(sides, repeats, peer)

    runs = race("attribute", ours.attribute)
    units = race("forward_backward", ours.forward_backward)
    for name, run in runs.items():
        run["forward_backward_seconds"] = units[name]["seconds"]
        warm, one = (statistics.median(each["seconds"][1:]) for each in (run, units[name]))
        run["forward_backwards"] = warm / one
    return runs


def check_peer(peer: Peer, ours: Ours, heads: int) -> dict[str, Any]:
    """The peer against plain transformers, and its fast settings against its own functions."""
    cells = np.random.default_rng(SEED).permutation(ours.cells(*PLACES))[:heads]
    found: dict[str, Any] = {}
    for fast, other, chosen in (
        ("fast_ablate", "transformers_ablate", cells[:, [0, 2]]),
        ("patch", "documented_patch", cells),
        ("attribute", "documented_attribute", None),
    ):
        request = {} if chosen is None else {"cells": chosen.tolist()}
        (quick, a), (slow, b) = peer.ask(fast, **request), peer.ask(other, **request)
        apart = difference(fast, a, b)
        found[other] = {"seconds": slow, f"{fast}_seconds": quick, "difference": apart}
    return found


# Putting it together.


def prepare(folder: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """Loads the model, writes it and the prompts for the peer."""
    model, tokenizer = jh.load(MODEL)
    jh.export(model, folder / "model", tokenizer=tokenizer)
    examples = ioi(PROMPTS, seed=SEED, template=TEMPLATE)
    arrays: dict[str, Any] = {
        "clean": np.array([tokenizer.encode(example.prompt) for example in examples]),
        "corrupted": np.array([tokenizer.encode(example.corrupted or "") for example in examples]),
        "answers": contrast(examples, tokenizer),
    }
    np.savez(folder / "inputs.npz", **arrays)
    return model, arrays


def measure(python: str, repeats: int, full: bool) -> dict[str, Any]:
    """Everything, as it goes to the JSON file."""
    if hasattr(os, "sched_setaffinity"):  # XLA, not yet started, sizes its thread pool by it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, arrays = prepare(folder)
        with Peer(python, name) as peer:
            ours = Ours(model, arrays)
            return {
                "model": MODEL,
                "batch": list(arrays["clean"].shape),
                "dtype": "float32",
                "threads": THREADS,
                "machine": platform.machine(),
                "versions": {n: version(n) for n in ("jax", "flax")} | peer.ready["versions"],
                "attribution": time_attribution(peer, ours, repeats),
                "ablation": time_ablation(peer, ours, repeats),
                "patching": time_patching(peer, ours, repeats, None if full else SAMPLE),
                "peer": {"boot": peer.ready["seconds"], **check_peer(peer, ours, heads=12)},
            }


def show(found: dict[str, Any]) -> None:
    """Prints a table and what it needs to be read."""
    rows, length = found["batch"]
    write(f"{found['model']}, {rows} x {length} tokens, float32, {found['threads']} threads")
    taken = []
    for task in ("ablation", "patching", "attribution"):
        columns = ("first s", "warm s", "processor s", "ratio", "difference")
        table = Table(task, *columns, box=SIMPLE)
        runs = {name: run for name, run in found[task].items() if isinstance(run, dict)}
        for name, run in runs.items():
            first, *warm = run["seconds"]
            paired = zip(warm, runs["jaxheads"]["seconds"][1:], strict=True)
            work = statistics.median(run["processor_seconds"][1:])
            times = f"{first:.3g}", spread(warm), f"{work:.3g}", spread([a / b for a, b in paired])
            table.add_row(name, *times, f"{run['difference']:.0e}")
            taken.append(statistics.median(run["others"]))
        write(table)
    patching = found["patching"]
    write(
        "TransformerLens as documented: `run_with_hooks(tokens, fwd_hooks=...)`, on "
        f"{SAMPLE} heads and scaled; else without a cache and with the last token's logits only."
    )
    write(
        "Seconds and ratios: median (range). Ratio: to jaxheads next in turn. Processor s: of all "
        "threads. Difference: of effects, in logits, from TransformerLens."
    )
    write(
        f"TransformerLens patched {patching['measured_by_the_peer']} of {patching['cells']} "
        "heads and positions, drawn at random; its seconds are scaled to all."
    )
    units = [f"{r['forward_backwards']:.1f} ({name})" for name, r in found["attribution"].items()]
    write(f"Attribution patching in forward and backward passes: {', '.join(units)}.")
    if max(taken) > BUSY:
        write(
            f"Other programs took up to {max(taken):.0%} of the cores. PyTorch's threads wait for "
            "one another at every operation, so the seconds mean little and the ratios flatter us."
        )


def main() -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="also write results/sweep.json")
    parser.add_argument("--repeats", type=int, default=3, help="warm runs of each")
    parser.add_argument("--peer-python", help="a Python that has torch and transformer-lens")
    parser.add_argument("--full", action="store_true", help="the peer patches every position")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    python = options.peer_python or environment("transformer-lens", PEER_PACKAGES)
    found = measure(python, options.repeats, options.full)
    show(found)
    if options.json:
        write_json(RESULTS, found)
        print(f"wrote {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
