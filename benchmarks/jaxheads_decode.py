"""Decodes with our caches, in a process of its own; called by decode.py.

Prints one line of JSON: seconds to read the prompt, seconds of each timed run of decode steps,
bytes of keys and values, the tokens, and the growth of peak memory in MB.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

import jaxheads as jh
from jaxheads.decode import Full, HeadKinds, HeadWise, Policy, advance, start


def policy_of(engine: str, full: np.ndarray, sinks: int, recent: int) -> Policy:
    """What an engine's name stands for."""
    if engine == "full":
        return Full()
    bits = 8 if engine.endswith("8 bits") else None
    chosen = full if engine.startswith("head-wise") else np.zeros_like(full)
    return HeadWise(HeadKinds(chosen, sinks=sinks, recent=recent, bits=bits))


def peak_mb(reset: bool = False) -> float:
    """The largest memory of this process so far, or from now on, in MB. On Linux."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        if line.startswith("VmHWM")
    )
    return float(line.split()[1]) / 1e3


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--job", required=True)
    options = parser.parse_args()
    with open(options.job, encoding="utf-8") as file:
        job = json.load(file)
    model, _ = jh.load(options.checkpoint)
    room = job["steps"] * (job["repeats"] + 1) + 1
    # Positions beyond the model's own context cost what others do.
    length = max(model.config.context_length, len(job["tokens"]) + room)
    model = jh.Transformer(model.config.replace(context_length=length), model.params)
    jax.block_until_ready(model.params)
    before = peak_mb(reset=True)
    policy = policy_of(job["engine"], np.asarray(job["full"], bool), job["sinks"], job["recent"])
    began = time.perf_counter()
    state = start(model, np.asarray([job["tokens"]]), max_new_tokens=room, policy=policy)
    jax.block_until_ready(state.progress.tokens)
    read = time.perf_counter() - began
    cache = state.cache
    state = advance(model, state, job["steps"])  # compiles
    seconds = []
    for _ in range(job["repeats"]):
        jax.block_until_ready(state.progress.tokens)
        began = time.perf_counter()
        state = advance(model, state, job["steps"])
        jax.block_until_ready(state.progress.tokens)
        seconds.append(time.perf_counter() - began)
    grown = peak_mb() - before
    found = {
        "read": read,
        "seconds": seconds,
        "bytes": cache.nbytes,
        # A slot is reserved for every token to come; the peer's cache grows as it decodes.
        "slots": len(job["tokens"]) + room,
        "tokens": np.asarray(state.progress.tokens)[0, : job["steps"]].tolist(),
        "grown_mb": grown,
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
