"""Generation divided over 8 fake devices gives what one device gives."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from devices import on_eight_devices

import jaxheads as jh
from jaxheads.decode import HeadCache, HeadKinds
from jaxheads.train import Job, Mesh, make_mesh

SHAPE = {"n_layers": 2, "n_heads": 8, "head_dim": 8, "d_model": 32, "d_mlp": 64, "vocab_size": 96}
ROWS, LENGTH, NEW = 4, 6, 5
MESHES: dict[str, tuple[dict[str, Any], int]] = {  # the mesh, key/value heads
    "data and heads": ({"data": 2, "tensor": 4}, 4),
    "few key heads": ({"data": 2, "tensor": 4}, 2),
    "fsdp and heads": ({"data": 1, "fsdp": 2, "tensor": 4}, 4),
    "auto": ({"data": 2, "tensor": 4, "mode": "auto"}, 4),
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"taps": "pattern", "prompt_taps": "z"},
    "penalised": {"repetition_penalty": 1.5},
    "sampled": {"temperature": 1.0, "min_p": 0.01, "top_p": 0.9, "samples": 2, "chunk": 4},
    # So many slots that those which nothing fills are left out of the products.
    "long": {"length": 1100, "chunk": 400},
}


def prompts(length: int = LENGTH) -> jh.Batch:
    """Rows of different lengths."""
    drawn = np.random.default_rng(0).integers(0, 96, (ROWS, length))
    return jh.pack([row[: length - i].tolist() for i, row in enumerate(drawn)], side="left")


def generated(mesh: Any, kv_heads: int, options: dict[str, Any]) -> dict[str, np.ndarray]:
    batch = prompts(options.get("length", LENGTH))
    options = {name: value for name, value in options.items() if name != "length"}
    config = jh.ModelConfig(**SHAPE, n_kv_heads=kv_heads, context_length=2048)
    model = jh.Transformer.random(config, jax.random.key(0))
    edits = jh.mask_heads(config, [(0, 1), (1, 5)], "uniform")
    job = Job(mesh=mesh)
    with job.devices():
        out = jh.generate(
            job.place(model), job.send(batch), edits=job.place(edits), max_new_tokens=NEW,
            key=jax.random.key(3), **options,
        )  # fmt: skip
    found = {"tokens": out.tokens, "lengths": out.lengths, "logprobs": out.logprobs}
    return {name: np.asarray(x) for name, x in (found | out.taps | out.prompt_taps).items()}


def far(names: list[str], ways: list[str]) -> dict[str, float]:
    """The largest difference of anything between one device and a mesh, by mesh and way."""
    found = {}
    for name in names:
        sizes, kv_heads = MESHES[name]
        mesh = make_mesh(Mesh(**sizes))
        for way in ways:
            one, many = (generated(m, kv_heads, WAYS[way]) for m in (None, mesh))
            assert one.keys() == many.keys()
            for what, value in one.items():
                difference = np.abs(value.astype(float) - many[what]).max()
                found[f"{name}, {way}: {what}"] = float(difference)
    return found


def check(names: list[str], ways: list[str]) -> None:
    found = on_eight_devices(far, names, ways)
    for name in names:
        for way in ways:
            assert f"{name}, {way}: logprobs" in found
    assert any(what.endswith("pattern") for what in found) == ("greedy" in ways)
    for what, distance in found.items():
        assert distance < 1e-5, what


def test_divided_generation_equals_undivided_generation() -> None:
    check(["few key heads"], ["sampled"])


@pytest.mark.slow
def test_other_meshes_and_ways_too() -> None:
    check(list(MESHES), list(WAYS))


def head_wise() -> list[Any]:
    """Whether a head-wise cache gives the same in Auto mode, and what it says in Explicit mode."""
    config = jh.ModelConfig(**SHAPE, n_kv_heads=4, context_length=64)
    model = jh.Transformer.random(config, jax.random.key(0))
    full = np.arange(8).reshape(2, 4) % 3 == 0
    kinds = HeadKinds(full, sinks=1, recent=2, compensate=True)

    def tokens(mesh: Any) -> np.ndarray:
        job = Job(mesh=mesh)
        with job.devices():
            cache = HeadCache.empty(config, kinds, ROWS, 20)
            made = jh.generate(
                job.place(model), job.send(prompts()), max_new_tokens=NEW, cache=cache
            )
        return np.asarray(made.tokens)

    auto = tokens(make_mesh(Mesh(data=2, tensor=4, mode="auto")))
    try:
        tokens(make_mesh(Mesh(data=2, tensor=4)))
    except ValueError as error:
        return [bool((auto == tokens(None)).all()), str(error)]
    return [False, "not refused"]


@pytest.mark.slow
def test_head_wise_caches_run_in_auto_mode():
    equal, message = on_eight_devices(head_wise)
    assert equal
    assert "run on a mesh in Auto mode only" in message
