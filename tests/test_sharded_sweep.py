"""A sweep divided over 8 fake devices gives what one device gives."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from devices import on_eight_devices

import jaxheads as jh
from jaxheads.convert.place import by_axes
from jaxheads.model.parameters import flatten, nest, parameter_table

CONFIG = jh.ModelConfig(
    n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, d_model=32, d_mlp=64, vocab_size=50,
    context_length=64,
)  # fmt: skip
MESHES = {
    "edits": {"edits": 8},
    "edits, rows and heads": {"edits": 2, "data": 2, "tensor": 2},
}


def batches() -> tuple[jh.Batch, jh.Batch]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50, (4, 10)).astype(np.int32)
    other = tokens.copy()
    other[:, 6] = (other[:, 6] + 3) % 50
    mask = np.ones((4, 10), bool)
    mask[0, :3] = False
    return jh.Batch(tokens, mask), jh.Batch(other, mask)


def run(model: jh.Transformer, mesh: jax.sharding.Mesh | None) -> dict[str, list]:
    clean, corrupted = batches()
    metric = jh.LogitDifference.of(clean, [1, 2, 3, 4], [5, 6, 7, 8])
    found = {
        "ablate": jh.ablate_heads(model, clean, metric, mesh=mesh, rows=True),
        "patch": jh.patch(model, clean, corrupted, metric, mesh=mesh),
    }
    return {name: array.values.tolist() for name, array in found.items()}


def sharded(model: jh.Transformer, mesh: jax.sharding.Mesh) -> jh.Transformer:
    """The model with its heads over the axis "tensor", or a copy on every device."""
    if "tensor" not in mesh.shape:
        return jax.device_put(model, jax.NamedSharding(mesh, jax.P()))
    place = by_axes(mesh)
    params = {
        path: jax.device_put(leaf, place(path, parameter_table(CONFIG)[path].axes, leaf.shape))
        for path, leaf in flatten(model.params)
    }
    return jh.Transformer(CONFIG, nest(params))


def run_divided() -> dict[str, dict[str, list]]:
    model = jh.Transformer.random(CONFIG, jax.random.key(0))
    found = {}
    for name, axes in MESHES.items():
        devices = jax.devices()[: int(np.prod(list(axes.values())))]
        types = (jax.sharding.AxisType.Auto,) * len(axes)
        mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), types, devices=devices)
        found[name] = run(sharded(model, mesh), mesh)
    return found


@pytest.fixture(scope="module")
def divided() -> dict[str, dict[str, list]]:
    return on_eight_devices(run_divided)


@pytest.fixture(scope="module")
def on_one_device() -> dict[str, list]:
    return run(jh.Transformer.random(CONFIG, jax.random.key(0)), None)


@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_gives_what_one_device_gives(name, divided, on_one_device):
    for what, expected in on_one_device.items():
        assert np.abs(expected).max() > 1e-2
        np.testing.assert_allclose(divided[name][what], expected, atol=1e-5)
