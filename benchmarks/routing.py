"""Times attention that routes its heads against dense attention, and a routed training step.

    python benchmarks/routing.py [--json] [--repeats 5] [--only layers step]
    python benchmarks/routing.py --only layers --shapes smollm2 --lengths 1024 --shares 0.5

"layers": one attention layer, projections, rotary encoding and router included, in float32, with
random weights and inputs. Three forms take turns in one process:
dense (the model's own fused attention), masked (`Route`: every head, times gates) and skipping
(`Route.skipping`: only the chosen heads), forward and with gradients of weights and input. The
operations are those of the matrix products in the compiled program; those of the forward pass are
checked against the formula in jaxheads/model/chosen.py. The run fails where they differ by more
than 1 %, or outputs of the two routed forms by more than 1e-4 of the largest.

"step": fine-tuning of all parameters of SmolLM2 with AdamW, 4 rows of 128 tokens, dense and with
the masked `Route` of configs/moh_smollm2.toml and its load-balance loss. Both steps take turns on
one state.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import print as write
from rich.box import SIMPLE
from rich.table import Table

from jaxheads import ModelConfig, Transformer
from jaxheads.edits import Route
from jaxheads.files import write_json
from jaxheads.methods.moh import Moh, Routed
from jaxheads.model.chosen import count_blocks
from jaxheads.train.topology import report

MODEL = "smollm2-135m-instruct"
RESULTS = Path(__file__).resolve().parent / "results" / "routing.json"
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": {"n_heads": 9, "n_kv_heads": 3, "head_dim": 64, "d_model": 576},
    "wide": {"n_heads": 16, "n_kv_heads": 16, "head_dim": 64, "d_model": 1024},
    "tiny": {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_model": 32},
}
PASSES = ("forward", "gradients")
ROUTED = Routed(gates="renormalised", scores="linear")
STEP_SHARE = 0.75
BUSY = 0.5
"""Load average per core, before the start, above which the timings deserve a warning."""

Program = Callable[..., Any]


# Layers.


def measure_layers(
    shape: str, length: int, rows: int, shares: list[float], block: int, repeats: int
) -> dict[str, Any]:
    """All forms and shares of one shape and length, in turn."""
    config = ModelConfig(n_layers=1, d_mlp=8, vocab_size=8, context_length=length, **SHAPES[shape])
    model = Transformer.random(config, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (rows, length, config.d_model))
    forms: dict[str, Route | None] = {"dense": None}
    for share in shares:
        made = ROUTED.route(config, share, jax.random.key(2))
        forms |= {f"masked {share:g}": made, f"skipping {share:g}": made.skipping(block)}
    found: dict[str, Any] = {}
    for kind in PASSES:
        programs = {name: _compiled(kind, model, x, route) for name, route in forms.items()}
        for name, (program, arguments) in programs.items():
            cost = report(program)
            found.setdefault(name, {})[kind] = {
                "flops": cost["flops"],
                "temporary_bytes": cost["memory"]["temporaries"],
                "seconds": [],
            }
            _warm(program, arguments)
        if kind == "forward":
            for name, route in forms.items():
                expected = _formula(config, rows, length, route)
                _check_flops(name, found[name][kind]["flops"], expected)
                found[name]["heads"] = _heads(config, route)
            _check_values({name: p(*a) for name, (p, a) in programs.items()}, shares)
        for _ in range(repeats):
            for name, (program, arguments) in programs.items():
                found[name][kind]["seconds"].append(_seconds(program, *arguments))
    return {"shape": shape, "length": length, "rows": rows, "block": block, "forms": found}


def _compiled(kind: str, model: Transformer, x: Any, route: Route | None) -> tuple[Any, Any]:
    """A compiled pass and its arguments."""
    weights = {"attn": jax.tree.map(lambda leaf: leaf[0], model.blocks.attn), "x": x}
    first: Any = jax.tree.map(lambda leaf: leaf[0], route)
    if route is not None:
        weights["route"] = first.weights

    def forward(weights: Any, route: Any) -> Any:
        return attend(model, weights, route)

    def gradients(weights: Any, route: Any) -> Any:
        return jax.grad(lambda weights: jnp.sum(jnp.sin(forward(weights, route))))(weights)

    run = forward if kind == "forward" else gradients
    return jax.jit(run).lower(weights, first).compile(), (weights, first)


def attend(model: Transformer, weights: Any, route: Any) -> Any:
    """One layer's attention [B,T,D] of its weights, its input x [B,T,D] and a layer's router."""
    x = weights["x"]
    context, _ = model.begin(jnp.ones(x.shape[:2], bool), None, "prefill", {}, {})
    edits = {} if route is None else {"z": route.with_weights(weights["route"])}
    assert context.angles is not None
    values, angles = {"attn_in": x}, context.angles[0]
    context = dataclasses.replace(context, edits=edits, values=values, angles=angles)
    return weights["attn"](x, context, None)[0]


def _heads(config: ModelConfig, route: Route | None) -> int:
    if route is None:
        return config.n_heads
    return int(np.asarray(route.shared).sum() + np.asarray(route.top_k).sum())


def _formula(config: ModelConfig, rows: int, length: int, route: Route | None) -> float:
    """Operations of the matrix products of a forward pass."""
    d, dh, h, k = config.d_model, config.head_dim, config.n_heads, config.n_kv_heads
    router = 0 if route is None else 2 * d * (2 * h + 2)
    pairs = length * h
    if route is not None and route.skip is not None and length > route.skip[0]:
        block, most = route.skip
        pairs = block * count_blocks(length, h, most, block)
    each = 4 * length * dh + 2 * dh * d
    return rows * (length * (2 * d * dh * (h + 2 * k) + router) + pairs * each)


def _check_flops(name: str, counted: float, expected: float) -> None:
    if abs(counted / expected - 1) > 0.01:
        raise RuntimeError(f"{name}: {counted:.4g} operations, expected {expected:.4g}")


def _check_values(outputs: dict[str, Any], shares: list[float]) -> None:
    for share in shares:
        masked, skipping = (outputs[f"{form} {share:g}"] for form in ("masked", "skipping"))
        far = float(jnp.abs(masked - skipping).max() / jnp.abs(masked).max())
        if not far < 1e-4:
            raise RuntimeError(f"share {share:g}: the two routed forms differ by {far:.1e}")


# A training step.


def measure_step(rows: int, length: int, repeats: int) -> dict[str, Any]:
    """Fine-tuning of SmolLM2 without and with a masked Route, in turn on one state."""
    import jaxheads as jh
    from jaxheads.methods.fine_tuning import Rest, in_float32
    from jaxheads.methods.variants import routed_loss, split_variant
    from jaxheads.model.batch import Batch
    from jaxheads.train.optimizer import Optimizer
    from jaxheads.train.step import make_step, start

    model, _ = jh.load(MODEL)
    config, routing = model.config, Moh().routing
    route = routing.route(config, STEP_SHARE, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, length), np.int32)
    batch = jax.device_put(Batch(tokens, np.ones(tokens.shape, bool)))
    optimizer = Optimizer(learning_rate=1e-5).build(1)
    # This router has no weights, so that both steps have the same state.
    assert not route.weights
    begin, rest = in_float32(model.params), Rest({}, config)
    trainable, masked = split_variant(begin, jh.Edits(z=route), rest, routing.penalty)
    fixed = {"dense": split_variant(begin, None, rest, routing.penalty)[1], "masked": masked}
    state = start(trainable, optimizer)
    del model, begin, trainable
    found: dict[str, Any] = {"layers": config.n_layers, "share": STEP_SHARE, "rows": rows}
    found |= {"length": length, "forms": {}}
    programs = {}
    step = make_step(routed_loss, optimizer)
    for name in fixed:
        programs[name] = step.lower(state, fixed[name], batch).compile()  # type: ignore[attr-defined]
        cost = report(programs[name])
        found["forms"][name] = {
            "flops": cost["flops"],
            "counted_flops": programs[name].cost_analysis()["flops"],
            "temporary_bytes": cost["memory"]["temporaries"],
            "seconds": [],
            "processor_seconds": [],
        }
    for turn in range(repeats + 1):  # the first is not warm
        for name, program in programs.items():
            begun = time.perf_counter(), time.process_time()
            state, _ = jax.block_until_ready(program(state, fixed[name], batch))
            if turn:
                run = found["forms"][name]
                run["seconds"].append(time.perf_counter() - begun[0])
                run["processor_seconds"].append(time.process_time() - begun[1])
    return found


# What they share.


def _warm(program: Program, arguments: Any) -> None:
    jax.block_until_ready(program(*arguments))


def _seconds(program: Program, *arguments: Any) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - begun


def ratio(run: dict[str, Any], dense: dict[str, Any], key: str = "seconds") -> str:
    """Median and range of the ratio of runs in the same round."""
    found = [a / b for a, b in zip(run[key], dense[key], strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})"


def show_layers(found: dict[str, Any]) -> None:
    """Prints tables of one shape and length, one for each pass."""
    write(
        f"attention of shape {found['shape']}, {found['rows']} x {found['length']} tokens, "
        f"float32, blocks of {found['block']}"
    )
    for kind in PASSES:
        table = Table(kind, "heads", "ms", "of dense", "GFLOP", "of dense", "MB", box=SIMPLE)
        dense = found["forms"]["dense"][kind]
        for name, form in found["forms"].items():
            run = form[kind]
            cells = [f"{1e3 * statistics.median(run['seconds']):.1f}", ratio(run, dense)]
            cells += [f"{run['flops'] / 1e9:.3g}", f"{run['flops'] / dense['flops']:.2f}"]
            cells += [f"{run['temporary_bytes'] / 1e6:.0f}"]
            table.add_row(name, str(form["heads"]), *cells)
        write(table)


def show_step(found: dict[str, Any]) -> None:
    """Prints what a masked Route adds to a training step."""
    dense, masked = found["forms"]["dense"], found["forms"]["masked"]
    # XLA counts what is elementwise in a layer once, not for each turn of the loop.
    added = masked["counted_flops"] - dense["counted_flops"]
    products = masked["flops"] / dense["flops"] - 1
    write(
        f"fine-tuning {MODEL}, {found['rows']} x {found['length']} tokens, float32: dense "
        f"{statistics.median(dense['seconds']):.2f} s; with a masked Route, share "
        f"{found['share']}, {statistics.median(masked['seconds']):.2f} s, "
        f"{ratio(masked, dense)} times as long ({ratio(masked, dense, 'processor_seconds')} of "
        f"processor time). Matrix products {products:+.2%}; all that XLA counts, times the "
        f"layers, {added * found['layers'] / dense['flops']:+.2%} of them."
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as it goes to the JSON file."""
    found: dict[str, Any] = {
        "dtype": "float32",
        "device": jax.devices()[0].device_kind,
        "threads": options.threads,
        "machine": platform.machine(),
        "load_average_before": os.getloadavg()[0],
    }
    if "layers" in options.only:
        found["layers"] = []
        for shape, length in itertools.product(options.shapes, options.lengths):
            run = measure_layers(
                shape, length, options.rows, options.shares, options.block, options.repeats
            )
            show_layers(run)
            found["layers"].append(run)
    if "step" in options.only:
        rows, length = options.batch
        found["step"] = measure_step(rows, length, options.repeats)
        show_step(found["step"])
    if found["load_average_before"] > BUSY * (os.cpu_count() or 1):
        write(
            f"Load average {found['load_average_before']:.1f} before the start: other programs "
            "were running. The ratios are of neighbouring runs; the seconds mean little."
        )
    return found


def main() -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ["layers", "step"]
    parser.add_argument("--json", action="store_true", help="also write results/routing.json")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="parts to run")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each")
    parser.add_argument("--threads", type=int, default=2, help="cores and threads")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["smollm2", "wide"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 1024, 2048])
    parser.add_argument("--shares", nargs="+", type=float, default=[1.0, 0.75, 0.5, 0.25])
    parser.add_argument("--rows", type=int, default=1, help="of a layer's input")
    parser.add_argument("--block", type=int, default=64, help="queries of a block")
    parser.add_argument(
        "--batch", nargs=2, type=int, default=[4, 128], help="rows and length of the step"
    )
    options = parser.parse_args()
    for name in ("repeats", "threads", "rows", "block"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if hasattr(os, "sched_setaffinity"):  # XLA, not yet started, sizes its thread pool by it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    found = measure(options)
    if options.json:
        write_json(RESULTS, found)
        print(f"wrote {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
