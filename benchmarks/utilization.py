"""What share of a device's peak a training step reaches: `train.py --shape`.

One device, random weights, no peer. Parameters and AdamW's moments are float32, activations and
matrix products bfloat16. The floating-point operations are those of the model
(`jaxheads.train.meter.model_flops`): what is computed again for the backward pass, by `remat` and
by unembedding in chunks, is not counted, so it lowers the share.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax
import numpy as np
from jaxheads_train import edited_loss, neutral_edits
from rich import print as write
from rich.box import SIMPLE
from rich.table import Table

from jaxheads import ModelConfig, Transformer
from jaxheads.methods.fine_tuning import Rest, parameters_loss
from jaxheads.model.batch import Batch
from jaxheads.model.layout import REMAT
from jaxheads.names import choose
from jaxheads.train.meter import model_flops, peak_flops
from jaxheads.train.optimizer import Optimizer
from jaxheads.train.step import make_step, start
from jaxheads.train.topology import report

SHAPES = {
    # Llama 3.2 1B (its config.json), without the scaling of its rotary frequencies.
    "1b": {
        "n_layers": 16,
        "n_heads": 32,
        "n_kv_heads": 8,
        "head_dim": 64,
        "d_model": 2048,
        "d_mlp": 8192,
        "vocab_size": 128256,
    },
    "tiny": {
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 8,
        "d_model": 32,
        "d_mlp": 64,
        "vocab_size": 97,
    },
}


def measure(
    shape: str, rows: int, length: int, remat: str, chunk: int, repeats: int
) -> dict[str, Any]:
    """Seconds of the step without and with trained edits of all heads, and what it computes."""
    sizes: dict[str, Any] = dict(SHAPES[choose("shape", shape, SHAPES)])
    choose("remat", remat, REMAT)
    config = ModelConfig(**sizes, context_length=length, tied=True, dtype="bfloat16")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, length), np.int32)
    batch = jax.device_put(Batch(tokens, np.ones(tokens.shape, bool)))
    rest = Rest({}, config, remat, chunk)
    device = jax.devices()[0]
    return {
        "shape": shape,
        "batch": [rows, length],
        "remat": remat,
        "chunk": chunk,
        "device": device.device_kind,
        "peak_flops": peak_flops(device.device_kind),
        "model_flops": model_flops(config, rows, length, trained="parameters"),
        "plain": _time(config, rest, batch, False, repeats),
        "edited": _time(config, rest, batch, True, repeats),
    }


def _time(config: ModelConfig, rest: Rest, batch: Batch, edits: bool, repeats: int) -> Any:
    optimizer = Optimizer(learning_rate=1e-4).build(1)

    @jax.jit
    def begin(key: jax.Array) -> Any:
        params = Transformer.random(config, key, dtype="float32").params
        trainable = {"params": params, "edits": neutral_edits(config)} if edits else params
        return start(trainable, optimizer)

    state = begin(jax.random.key(0))
    step = make_step(edited_loss if edits else parameters_loss, optimizer)
    compiled = step.lower(state, rest, batch).compile()  # type: ignore[attr-defined]
    seconds, losses = [], []
    for _ in range(repeats + 1):  # the first is not warm
        begun = time.perf_counter()
        state, metrics = compiled(state, rest, batch)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - begun)
        losses.append(float(metrics["loss"]))
    return {"seconds": seconds, "loss": losses} | report(compiled)


def show(found: dict[str, Any]) -> None:
    """Prints a table."""
    rows, length = found["batch"]
    write(
        f"{found['shape']}, {rows} x {length} tokens, bfloat16, remat {found['remat']}, chunk "
        f"{found['chunk']}, on {found['device']}"
    )
    table = Table("step", "ms", "tokens/s", "TFLOP/s", "MFU", "MB of a device", box=SIMPLE)
    for name in ("plain", "edited"):
        seconds = statistics.median(found[name]["seconds"][1:])
        rate, peak = found["model_flops"] / seconds, found["peak_flops"]
        cells = [f"{1e3 * seconds:.1f}", f"{rows * length / seconds:.0f}", f"{rate / 1e12:.3g}"]
        cells += [f"{rate / peak:.1%}" if peak else "unknown peak"]
        table.add_row(name, *cells, f"{found[name]['memory']['total'] / 1e6:.0f}")
    write(table)
