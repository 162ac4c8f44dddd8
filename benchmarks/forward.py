"""Times the forward pass against transformers' eager PyTorch model, and what it costs to start.

    python benchmarks/forward.py [--json] [--repeats 15] [--threads 2]

Both run the same weights (ours, exported and loaded by transformers) on the same tokens in one
process, in turn, so that whatever else the machine does meets both alike. Needs torch and
transformers: `make benchmark` installs them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

MODEL = "smollm2-135m-instruct"
RESULTS = Path(__file__).resolve().parent / "results" / "forward.json"
ROWS, LENGTH = 8, 128
BUSY = 0.5
"""Load average per core, before the start, above which the timings deserve a warning."""


# Each of these runs in a process of its own, so that nothing is warm.


def time_load(name_or_path: str, threads: int) -> dict[str, float]:
    """Seconds to load a model with its tokenizer, and growth of peak memory, in MB."""
    use_threads(threads)
    import jax

    import jaxheads as jh

    jax.devices()  # starts the backend, which is no part of loading
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, (model, _) = timed(lambda: jax.block_until_ready(jh.load(name_or_path)))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    return {"seconds": seconds, "peak_mb": grown / 1e3, "parameters_mb": parameters / 1e6}


def time_compile(checkpoint: str, threads: int) -> dict[str, float]:
    """Seconds to compile the forward pass."""
    use_threads(threads)
    import jax

    import jaxheads as jh

    model, _ = jh.load(checkpoint)
    lowered = jax.jit(lambda model, tokens: model(tokens).logits).lower(model, random_tokens())
    return {"forward": timed(lowered.compile)[0]}


def time_forward(checkpoint: str, exported: str, repeats: int, threads: int) -> dict[str, Any]:
    """Seconds of both forward passes, in turn, with logits at all positions."""
    use_threads(threads)
    import jax
    import torch
    from transformers import AutoModelForCausalLM

    import jaxheads as jh

    torch.set_num_threads(threads)
    model, _ = jh.load(checkpoint)
    theirs = AutoModelForCausalLM.from_pretrained(
        exported, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = random_tokens()
    tensor = torch.tensor(tokens, dtype=torch.long)

    def run_ours() -> Any:
        return jax.block_until_ready(model(tokens).logits)

    @torch.inference_mode()
    def run_theirs() -> Any:
        return theirs(tensor, use_cache=False).logits

    ours, reference = np.asarray(run_ours()), run_theirs().numpy()
    difference = float(np.abs(ours - reference).max() / np.abs(reference).max())
    if not difference < 1e-4:
        raise RuntimeError(f"the two models disagree: relative difference {difference:.1e}")
    del ours, reference
    seconds: dict[str, list[float]] = {"jaxheads": [], "transformers": []}
    for _ in range(repeats):
        seconds["jaxheads"].append(timed(run_ours)[0])
        seconds["transformers"].append(timed(run_theirs)[0])
    ratios = [b / a for a, b in zip(seconds["jaxheads"], seconds["transformers"], strict=True)]
    return {
        "relative_difference": difference,
        "seconds": seconds,
        # Of neighbouring runs, which met the same conditions: 25 %, median, 75 %.
        "ratio_quartiles": [float(q) for q in np.percentile(ratios, [25, 50, 75])],
    }


# What they share.


def use_threads(count: int) -> None:
    """Limits this process to `count` cores; XLA sizes its thread pool by what it may use."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def random_tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 49152, (ROWS, LENGTH)).astype(np.int32)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Runs a function in a new process and returns its result."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def prepare(folder: str) -> tuple[str, str]:
    """Writes the model as a native checkpoint and for transformers."""
    import jaxheads as jh

    model, tokenizer = jh.load(MODEL)
    checkpoint, exported = f"{folder}/native", f"{folder}/huggingface"
    jh.save(model, tokenizer, checkpoint)
    jh.export(model, exported, tokenizer=tokenizer)
    return checkpoint, exported


def measure(repeats: int, threads: int) -> dict[str, Any]:
    """Everything, as it goes to the JSON file."""
    found: dict[str, Any] = {
        "model": MODEL,
        "batch": [ROWS, LENGTH],
        "dtype": "float32",
        "threads": threads,
        "machine": platform.machine(),
        "load_average_before": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("jax", "flax", "torch", "transformers")},
    }
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, exported = alone(prepare, folder)
        found["forward"] = alone(time_forward, checkpoint, exported, repeats, threads)
        found["compile"] = alone(time_compile, checkpoint, threads)
        found["load_gguf"] = alone(time_load, MODEL, threads)
        found["load_native"] = alone(time_load, checkpoint, threads)
    found["load_average_after"] = os.getloadavg()[0]
    return found


def show(found: dict[str, Any]) -> None:
    """Prints two small tables."""
    from rich import print as write
    from rich.table import Table

    forward = found["forward"]
    write(f"Forward pass, {ROWS} x {LENGTH} tokens, float32, {found['threads']} threads")
    table = Table("", "median s", "best s", "tokens/s")
    for name, seconds in forward["seconds"].items():
        middle = statistics.median(seconds)
        rate = ROWS * LENGTH / middle
        table.add_row(name, f"{middle:.3f}", f"{min(seconds):.3f}", f"{rate:.0f}")
    low, median, high = forward["ratio_quartiles"]
    write(table)
    write(
        f"transformers takes {median:.2f} times as long (median of pairs of neighbouring runs; "
        f"quartiles {low:.2f} to {high:.2f}); logits agree to "
        f"{forward['relative_difference']:.0e} of their largest."
    )
    table = Table("start", "", "MB at the peak", "MB of weights")
    for name, seconds in found["compile"].items():
        table.add_row(f"compile {name}", f"{seconds:.1f} s", "", "")
    for name in ("load_gguf", "load_native"):
        load = found[name]
        sizes = (f"+ {load['peak_mb']:.0f}", f"{load['parameters_mb']:.0f}")
        table.add_row(name.replace("_", " "), f"{load['seconds']:.1f} s", *sizes)
    write(table)
    if found["load_average_before"] > BUSY * (os.cpu_count() or 1):
        write(
            f"Load average {found['load_average_before']:.1f} before the start: other programs "
            "were running. The ratio is of interleaved runs; the seconds mean little."
        )


def main() -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="also write results/forward.json")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each")
    parser.add_argument("--threads", type=int, default=2, help="cores and threads of both")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if not 1 <= options.threads <= (cores or 1):
        parser.error(f"--threads must lie in 1..{cores}, got {options.threads}")
    found = measure(options.repeats, options.threads)
    show(found)
    if options.json:
        RESULTS.parent.mkdir(exist_ok=True)
        partial = RESULTS.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        partial.replace(RESULTS)
        print(f"wrote {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
