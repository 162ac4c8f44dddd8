"""Times decoding over caches that keep a part of the context, against transformers and kvpress.

    python benchmarks/decode.py [--json] [--repeats 3] [--contexts 1024 4096] [--peer-python PATH]

The same weights (SmolLM2, ours exported and loaded by transformers), the same random prompt,
float32, one row, greedy. Every engine reads the prompt and decodes in a process of its own, so that
the growth of its peak memory is its own; processes take turns. Ours: every head full; a share of
heads full, the others with sinks and recent tokens, as they are and in 8 bits; all streaming.
Theirs: the DynamicCache of transformers; of kvpress the DuoAttention press on the same heads, and
StreamingLLM. Bytes are those of the arrays of keys and values, ours with slots of tokens to come.

The peers are installed from PyPI in an environment of their own (kvpress 0.5.5 needs transformers
below 5.3), or taken from --peer-python. The run fails where our first tokens differ from those of
transformers.
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

import jaxheads as jh
from jaxheads.files import write_json

MODEL = "smollm2-135m-instruct"
HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "decode.json"
OURS = ("full", "head-wise", "head-wise, 8 bits", "streaming")
THEIRS = ("transformers", "kvpress duo", "kvpress streaming")
ALIKE = ("full", "transformers")
SINKS, RECENT, STEPS = 4, 252, 16
PEER_PACKAGES = ("torch==2.13.0", "kvpress==0.5.5")
BUSY = 0.5
"""Load average per core, before the start, above which the timings deserve a warning."""


def run(script: str, python: str, checkpoint: str, job: dict[str, Any], threads: int) -> Any:
    """What a worker found."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(job | {"threads": threads}, file)
        file.flush()
        command = [python, str(HERE / script), "--checkpoint", checkpoint, "--job", file.name]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{job['engine']} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(
    contexts: list[int], share: float, repeats: int, threads: int, peer: str, only: list[str]
) -> dict[str, Any]:
    """All engines at all contexts."""
    load = os.getloadavg()[0]
    if load > BUSY * threads:
        write(f"[yellow]the machine is busy (load {load:.1f}): timings will be off")
    model, tokenizer = jh.load(MODEL)
    config = model.config
    shape = (config.n_layers, config.n_kv_heads)
    random = np.random.default_rng(0)
    full = np.zeros(shape[0] * shape[1], bool)
    full[random.permutation(full.size)[: round(share * full.size)]] = True
    found: dict[str, Any] = {
        "model": MODEL,
        "share": share,
        "sinks": SINKS,
        "recent": RECENT,
        "steps": STEPS,
        "threads": threads,
        "load": load,
        "machine": platform.machine(),
        "contexts": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        native, exported = f"{folder}/native", f"{folder}/huggingface"
        jh.save(model, tokenizer, native)
        jh.export(model, exported, tokenizer=tokenizer)
        for context in contexts:
            job = {
                "tokens": random.integers(0, config.vocab_size, context).tolist(),
                "full": full.reshape(shape).tolist(),
                "sinks": SINKS,
                "recent": RECENT,
                "steps": STEPS,
                "repeats": repeats,
            }
            rows = {}
            for name in (name for name in OURS if name in only):
                mine = job | {"engine": name}
                rows[name] = run("jaxheads_decode.py", sys.executable, native, mine, threads)
            for name in (name for name in THEIRS if name in only):
                mine = job | {"engine": name}
                rows[name] = run("torch_decode.py", peer, exported, mine, threads)
            alike = [rows[name]["tokens"] for name in ALIKE if name in rows]
            if len(alike) == len(ALIKE) and alike[0] != alike[1]:
                raise RuntimeError(f"the tokens after {context} differ from those of transformers")
            found["contexts"][str(context)] = rows
            show(context, rows)
    return found


def show(context: int, rows: dict[str, Any]) -> None:
    """Prints the table of one context."""
    table = Table(title=f"context of {context:,} tokens", box=SIMPLE)
    for column in ("cache", "tokens/s", "x first", "bytes", "x first", "grown", "read"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    first = next(iter(rows.values()))
    base = statistics.median(first["seconds"])
    for name, row in rows.items():
        middle = statistics.median(row["seconds"])
        table.add_row(
            name, f"{STEPS / middle:.1f}", f"{base / middle:.2f}", f"{row['bytes'] / 1e6:.1f} MB",
            f"{row['bytes'] / first['bytes']:.2f}", f"{row['grown_mb']:.0f} MB",
            f"{row['read']:.1f} s",
        )  # fmt: skip
    write(table)


def main() -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="also write results/decode.json")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each engine")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 8112])
    names = (*OURS, *THEIRS)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="ENGINE")
    parser.add_argument("--share", type=float, default=0.25, help="of heads that are full")
    parser.add_argument("--threads", type=int, default=2, help="threads of the peer")
    parser.add_argument("--peer-python", help="a Python that has torch and kvpress")
    options = parser.parse_args()
    if options.repeats < 1 or min(options.contexts) <= SINKS + RECENT:
        parser.error(f"expected repeats of 1 or more and contexts above {SINKS + RECENT}")
    if not 0 < options.share <= 1:
        parser.error(f"--share must lie in (0, 1], got {options.share}")
    python = options.peer_python or environment("kvpress", PEER_PACKAGES)
    found = measure(
        options.contexts, options.share, options.repeats, options.threads, python, options.only
    )
    if options.json:
        RESULTS.parent.mkdir(exist_ok=True)
        write_json(RESULTS, found)
        print(f"wrote {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
