"""Training divided over 8 fake devices gives what one device gives, in both modes of sharding."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from devices import on_eight_devices

import jaxheads as jh
from jaxheads.data import ArrayRows
from jaxheads.model.parameters import flatten
from jaxheads.train import Fit, Job, Mesh, Optimizer, make_mesh
from jaxheads.train.losses import language_loss

SHAPE = {"n_layers": 2, "n_heads": 8, "head_dim": 8, "d_model": 32, "d_mlp": 128, "vocab_size": 256}
# A large eps: else rounding decides the sign of the step of a gradient near zero.
ADAM = Optimizer(learning_rate=1e-2, weight_decay=0.1, clip=1.0, eps=1e-3)
Case = tuple[dict[str, Any], int, dict[str, Any]]
MESHES: dict[str, Case] = {  # the mesh, key/value heads, other settings of the fit
    "all": ({"fsdp": 2, "tensor": 2}, 4, {"batch_size": 16, "accumulate": 2, "average": 0.5}),
    "sequence, few key heads": ({"sequence": 2, "tensor": 4}, 2, {}),
}
MORE: dict[str, Case] = {
    "auto": ({"fsdp": 2, "tensor": 2, "mode": "auto"}, 4, {"batch_size": 16, "accumulate": 2}),
    "data": ({}, 4, {}),
    "fsdp": ({"fsdp": 8}, 4, {"average": 0.5}),
    "tensor": ({"tensor": 8}, 8, {}),
    "one key head": ({"tensor": 4, "data": 2}, 1, {}),
    "sequence": ({"sequence": 2, "tensor": 2}, 4, {}),
    "auto, sequence": ({"sequence": 2, "fsdp": 2, "mode": "auto"}, 4, {}),
}


def model_of(kv_heads: int) -> jh.Transformer:
    config = jh.ModelConfig(**SHAPE, n_kv_heads=kv_heads, context_length=64)
    return jh.Transformer.random(config, jax.random.key(0))


def text() -> jh.Batch:
    """Packed rows: some with two texts, some with padding."""
    tokens = np.random.default_rng(0).integers(0, 256, (32, 16)).astype(np.int32)
    segments = np.ones((32, 16), np.int32)
    segments[::2, 9:] = 2
    segments[1::4, 12:] = 0
    return jh.Batch(tokens, segments > 0, None, segments)


def parameters_loss(params: Any, frozen: Any, batch: jh.Batch, key: Any) -> Any:
    """Everything is trained, under edits that are not."""
    model = jh.Transformer(frozen["config"].value, params)
    return language_loss(model, batch, edits=frozen["edits"], chunk=frozen["chunk"].value)


def edits_loss(edits: Any, model: Any, batch: jh.Batch, key: Any) -> Any:
    return language_loss(model, batch, edits=edits)


@jax.tree_util.register_static
class Static:
    """A setting that is no array."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return hash(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.value == other.value


def train(mesh: Any, kv_heads: int, fit: dict[str, Any], *, both: bool) -> dict[str, Any]:
    """Losses of each step and what was trained: all parameters, and edits if `both`."""
    model, rows = model_of(kv_heads), ArrayRows(text())
    fit_ = Fit(**{"steps": 3, "batch_size": 8, "optimizer": ADAM} | fit)
    losses: list[float] = []
    job = Job(mesh=mesh, on_step=lambda report: losses.append(report.metrics["loss"]))
    edits = jh.mask_heads(model.config, [(0, 1), (1, 3)])
    parts = {"edits": edits, "config": Static(model.config), "chunk": Static(8)}
    held_out = rows if both else None
    params = job.fit(
        "parameters", parameters_loss, model.params, parts, rows, fit_, held_out=held_out
    )
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(params)}
    if both:
        offsets = jh.Edits.identity(model.config, "z", offset=True)
        found = job.fit("edits", edits_loss, offsets, model, rows, fit_)
        leaves["z"] = np.asarray(found["z"].offset)
    specs = {path: str(leaf.sharding) for path, leaf in flatten(params)}
    return {"losses": losses, "leaves": leaves, "specs": specs}


def compare(cases: dict[str, Case]) -> dict[str, Any]:
    """For each mesh the losses, and the largest differences from one device."""
    found = {}
    for name, (sizes, kv_heads, fit) in cases.items():
        mesh = make_mesh(Mesh(**sizes))
        both = name == next(iter(cases))
        whole, divided = (train(m, kv_heads, fit, both=both) for m in (None, mesh))
        far = {
            path: float(np.abs(leaf - divided["leaves"][path]).max())
            for path, leaf in whole["leaves"].items()
        }
        losses = [whole["losses"], divided["losses"]]
        found[name] = {"losses": losses, "far": far, "specs": divided["specs"]}
    return found


def check(found: dict[str, Any]) -> None:
    whole, divided = found["losses"]
    assert len(whole) in (3, 6)
    np.testing.assert_allclose(divided, whole, rtol=1e-5)
    for path, far in found["far"].items():
        assert far < 1e-5, path


@pytest.fixture(scope="module")
def found():
    return on_eight_devices(compare, MESHES)


@pytest.mark.parametrize("name", MESHES)
def test_a_divided_run_equals_an_undivided_one(found, name):
    check(found[name])


def test_the_result_stays_divided(found):
    specs = found["all"]["specs"]
    assert "spec=P(None, 'fsdp', 'tensor', None)" in specs["blocks/attn/q"]
    assert "spec=P('tensor', 'fsdp')" in specs["embed/tokens"]


@pytest.mark.slow
def test_other_meshes_too():
    for name, one in on_eight_devices(compare, MORE).items():
        print(name)
        check(one)
