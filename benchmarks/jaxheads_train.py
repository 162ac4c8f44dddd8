"""Our half of `train.py`: training steps of jaxheads, in a process of its own.

Takes the same inputs and requests as `torch_train.py` and answers alike. The steps are those that
`jaxheads train` runs for LoFiT and for fine-tuning, without its loop.

    python benchmarks/jaxheads_train.py FOLDER INPUTS.npz WORKLOAD --threads 2

Beside the peer's workloads there is "edited": fine-tuning of all parameters with edits of every
head on `z`, a factor and an offset, which are trained with them. The first answer also tells
what one step is in matrix products, and XLA's own count, which takes the layers' loop once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxheads as jh
from jaxheads.edits import Affine, Edits, head_mask, offset_heads, scale_heads
from jaxheads.methods.fine_tuning import Rest, parameters_loss
from jaxheads.methods.lofit import importance_loss, offsets_loss
from jaxheads.methods.objective import fit_loss
from jaxheads.model.batch import Batch
from jaxheads.model.config import ModelConfig
from jaxheads.model.layout import REMAT
from jaxheads.train.optimizer import Optimizer
from jaxheads.train.step import Loss, Metrics, make_step, start
from jaxheads.train.topology import report

Arrays = dict[str, np.ndarray]
Task = tuple[Loss, Any, Any]
"""A loss, what is trained, and what is frozen."""


def offsets_task(model: jh.Transformer, arrays: Arrays, **_: Any) -> Task:
    """LoFiT's second stage: offsets of the chosen heads."""
    config = model.config
    heads = [(int(layer), int(head)) for layer, head in arrays["heads"]]
    values = np.zeros((config.n_layers, config.n_heads, config.head_dim), np.float32)
    values[tuple(arrays["heads"].T)] = arrays["offsets"]
    keep = scale_heads(config, head_mask(config, heads).astype(np.float32))
    return offsets_loss, offset_heads(config, values), {"model": model, "keep": keep}


def importance_task(model: jh.Transformer, arrays: Arrays, **_: Any) -> Task:
    """LoFiT's first stage: factors of all heads."""
    factors = Edits(z=Affine(scale=jnp.asarray(1 + arrays["factors"][:, None, None])))
    return importance_loss, factors, {"model": model, "l1": jnp.float32(arrays["l1"])}


def full_task(model: jh.Transformer, arrays: Arrays, **options: Any) -> Task:
    """All parameters; the options are those of `Rest`."""
    return parameters_loss, model.params, Rest({}, model.config, **options)


def edited_task(model: jh.Transformer, arrays: Arrays, **options: Any) -> Task:
    """All parameters, and edits of all heads."""
    trainable = {"params": model.params, "edits": neutral_edits(model.config)}
    return edited_loss, trainable, Rest({}, model.config, **options)


def neutral_edits(config: ModelConfig) -> Edits:
    """A factor 1 and an offset 0 for every head, at `z`."""
    heads = (config.n_layers, 1, 1, config.n_heads)
    return Edits(z=Affine(jnp.ones((*heads, 1)), jnp.zeros((*heads, config.head_dim))))


def edited_loss(trainable: Any, rest: Rest, item: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
    """`parameters_loss` with edits."""
    options: dict[str, Any] = {"remat": rest.remat, "chunk": rest.chunk}
    return fit_loss(rest.model(trainable["params"]), item, edits=trainable["edits"], **options)


WORKLOADS: dict[str, Callable[..., Task]] = {
    "offsets": offsets_task,
    "importance": importance_task,
    "full": full_task,
    "edited": edited_task,
}


def peak_bytes() -> int:
    """The largest memory that this process has had, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def make_batch(tokens: np.ndarray, answers: int | None) -> Any:
    """Rows [B,T] whose loss counts everywhere, or for their last tokens only."""
    mask = np.ones(tokens.shape, bool)
    if answers is None:
        return jax.tree.map(jnp.asarray, Batch(tokens, mask))
    last = np.broadcast_to(np.arange(tokens.shape[1]) >= tokens.shape[1] - answers, mask.shape)
    batch = Batch(tokens, mask, last)
    return jax.tree.map(jnp.asarray, (batch, batch.answers()))


class Worker:
    """One workload, compiled, and its state."""

    def __init__(self, options: argparse.Namespace) -> None:
        with np.load(options.inputs) as file:
            arrays = {name: file[name] for name in file.files}
        kind = options.workload
        rest = {} if kind in ("offsets", "importance") else {"remat": options.remat}
        if options.chunk is not None:
            rest["chunk"] = options.chunk
        loss, trainable, self.frozen = WORKLOADS[kind](jh.load(options.folder)[0], arrays, **rest)
        rate = float(arrays["rate_full" if kind == "edited" else f"rate_{kind}"])
        optimizer = Optimizer(learning_rate=rate).build(1)
        # Copied: memory that a file was read into is not the step's to overwrite, so the first step
        # would keep it beside its result.
        self.state = start(jax.tree.map(jnp.copy, trainable), optimizer)
        del trainable
        self.batch = make_batch(arrays["tokens"], options.answers)
        step = make_step(loss, optimizer)
        begun = time.perf_counter()
        self.compiled = step.lower(self.state, self.frozen, self.batch).compile()  # type: ignore[attr-defined]
        self.compile_seconds = time.perf_counter() - begun

    def ready(self) -> dict[str, Any]:
        """What is known before the first step."""
        found = report(self.compiled)
        return {
            "versions": {name: version(name) for name in ("jax", "flax")},
            "peak_bytes": peak_bytes(),
            "compile_seconds": self.compile_seconds,
            "matrix_flops": found["flops"],
            "counted_flops": self.compiled.cost_analysis()["flops"],
            "temporary_bytes": found["memory"]["temporaries"],
        }

    def step(self) -> float:
        """Takes one step; returns its loss."""
        self.state, metrics = self.compiled(self.state, self.frozen, self.batch)
        jax.block_until_ready(self.state)
        return float(metrics["loss"])


def main() -> int:
    """Loads and compiles, then takes one step for each line of the input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="the model")
    parser.add_argument("inputs", help="npz of the batch and of where training starts")
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--threads", type=int, default=2, help="cores and threads")
    parser.add_argument("--remat", choices=REMAT, default="none", help="of full and edited")
    parser.add_argument("--chunk", type=int, help="slots unembedded at a time, of full and edited")
    parser.add_argument("--answers", type=int, help="only this many tokens of each row count")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # XLA, not yet started, sizes its thread pool by it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    worker = Worker(options)
    print(json.dumps(worker.ready()), flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter(), time.process_time()
        reply: dict[str, Any] = {"loss": worker.step()}
        reply["seconds"] = time.perf_counter() - begun[0]
        reply["processor_seconds"] = time.process_time() - begun[1]
        reply["peak_bytes"] = peak_bytes()
        print(json.dumps(reply), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
