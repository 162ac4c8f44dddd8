"""Routing of heads divided over 8 fake devices gives what one device gives, in both modes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from devices import on_eight_devices

import jaxheads as jh
from jaxheads.data import ArrayRows
from jaxheads.edits import mixture_of_heads
from jaxheads.methods.fine_tuning import Rest
from jaxheads.methods.measure import measure
from jaxheads.methods.method import TextData, Tuned
from jaxheads.methods.variants import fit_variants, routed_loss, split_variant
from jaxheads.model.context import Tap
from jaxheads.model.parameters import flatten
from jaxheads.routing import RoutingPenalty
from jaxheads.routing.statistics import decided
from jaxheads.train import Fit, Job, Mesh, Optimizer, make_mesh
from jaxheads.train.mesh import abstract_mesh
from jaxheads.train.rules import paths, specs
from jaxheads.train.step import start

SHAPE = {"n_layers": 2, "n_heads": 8, "head_dim": 8, "d_model": 32, "d_mlp": 128, "vocab_size": 256}
ROWS, LENGTH, TOP_K = 16, 8, 3
FORMS = {
    "two_stage": ("two_stage", "linear"),
    "renormalised": ("renormalised", "linear"),
    "straight_through": ("straight_through", "query_norm"),
    "random": ("two_stage", "random"),
}
TRAINED = ("two_stage", "straight_through")
BALANCE = 0.5
# A large eps: else rounding decides the sign of the step of a gradient near zero.
ADAM = Optimizer(learning_rate=1e-2, clip=1.0, eps=1e-3)
FIT = Fit(steps=2, batch_size=ROWS, optimizer=ADAM)

Case = tuple[dict[str, Any], int]
MESHES: dict[str, Case] = {  # the mesh, key/value heads
    "few key heads": ({"tensor": 4}, 2),
}
MORE: dict[str, Case] = {
    "auto": ({"fsdp": 2, "tensor": 2, "mode": "auto"}, 4),
    "all": ({"fsdp": 2, "tensor": 2}, 4),
    "few key heads": MESHES["few key heads"],
    "data": ({}, 4),
    "fsdp": ({"fsdp": 8}, 4),
    "a head on each device": ({"tensor": 8}, 8),
    "one key head": ({"tensor": 8}, 1),
    "sequence": ({"sequence": 2, "tensor": 4}, 2),
    "auto, few key heads": ({"tensor": 8, "mode": "auto"}, 2),
    "auto, sequence": ({"sequence": 2, "tensor": 2, "mode": "auto"}, 4),
}
ONE_SHARE_OF_ROWS = ("a head on each device", "one key head", "auto, few key heads", "sequence")


def model_of(kv_heads: int) -> jh.Transformer:
    config = jh.ModelConfig(**SHAPE, n_kv_heads=kv_heads, context_length=64)
    return jh.Transformer.random(config, jax.random.key(0))


def route_of(config: jh.ModelConfig, form: str) -> jh.Route:
    """Two heads shared in the first layer and none in the second; no weight of zero."""
    gates, scores = FORMS[form]
    key = jax.random.key(1)
    edits = mixture_of_heads(config, key, shared=[2, 0], top_k=TOP_K, gates=gates, scores=scores)
    route = edits["z"]
    keys = jax.random.split(jax.random.key(2), 3)
    leaves = route.weights.items()
    drawn = {n: jax.random.normal(k, w.shape) for (n, w), k in zip(leaves, keys, strict=False)}
    return route.with_weights(drawn)


def text() -> jh.Batch:
    """Rows of one token each, another in every two rows: so the devices route apart.

    Some rows end in padding.
    """
    tokens = np.repeat(np.arange(1, ROWS // 2 + 1) * 7, 2)[:, None] + np.zeros(LENGTH, int)
    tokens[:, -2:] += np.arange(ROWS)[:, None]
    mask = np.ones((ROWS, LENGTH), bool)
    mask[::4, 5:] = False
    return jh.Batch(tokens.astype(np.int32), mask)


@jax.jit
def forward(model: jh.Transformer, edits: dict[str, jh.Edits], batch: jh.Batch) -> Any:
    """Logits and what was decided, of every form."""
    taps = {"routing": Tap("attn_out", routing)}
    outs = {n: model(batch, edits=edit, taps=taps) for n, edit in edits.items()}
    return {name: {"logits": o.logits, "routing": o.taps["routing"]} for name, o in outs.items()}


def routing(value: Any, context: Any) -> Any:
    return decided(context)


@jax.jit
def gradients(trainable: Any, frozen: Any, batch: jh.Batch) -> Any:
    """Loss, metrics and gradient of each form that is trained."""
    graded = jax.value_and_grad(routed_loss, has_aux=True)
    return {name: graded(trainable[name], frozen[name], batch, None) for name in trainable}


def parts(model: jh.Transformer, form: str) -> tuple[Any, Any]:
    """What `fit_variants` trains and what it holds."""
    route = route_of(model.config, form)
    rest, penalty = Rest({}, model.config), RoutingPenalty(BALANCE, 0.01)
    return split_variant(model.params, jh.Edits(z=route), rest, penalty)


@functools.cache
def compute(mesh: Any, kv_heads: int, trained: tuple[str, ...]) -> dict[str, Any]:
    """Everything that is compared, as arrays by name."""
    model, batch, job = model_of(kv_heads), text(), Job(mesh=mesh)
    edits = {form: jh.Edits(z=route_of(model.config, form)) for form in FORMS}
    trainable, frozen = ({f: parts(model, f)[i] for f in trained} for i in (0, 1))
    with job.devices():
        given = job.send(batch)
        out = forward(job.place(model), job.place(edits), given)
        graded = gradients(job.place(trainable), job.place(frozen), given)
    real = np.asarray(batch.mask)
    # Padded queries mean nothing.
    logits = {name: np.where(real[..., None], found["logits"], 0) for name, found in out.items()}
    routings = {
        name: jax.tree.map(lambda leaf: np.asarray(leaf)[:, real], found["routing"])
        for name, found in out.items()
    }
    return {
        "logits": logits,
        "routing": routings,
        "loss": {name: np.asarray(loss) for name, ((loss, _), _) in graded.items()},
        "metrics": {name: jax.tree.map(np.asarray, found[0][1]) for name, found in graded.items()},
        "gradient": {name: jax.tree.map(np.asarray, found) for name, (_, found) in graded.items()},
    }


def balances(found: dict[str, Any], devices: int) -> dict[str, float]:
    """The load-balance loss of the whole batch; the mean of those of each device's rows; and
    what the training step made of it.
    """
    routing, real = found["routing"]["two_stage"], np.asarray(text().mask)
    where = np.broadcast_to(np.arange(ROWS)[:, None] * devices // ROWS, real.shape)[real]

    def balance(rows: np.ndarray) -> float:
        layers = []
        for p, chosen in zip(routing.probabilities, routing.chosen, strict=True):
            routed = p.max(axis=0) > 0
            mean, share = p[rows].mean(axis=0), chosen[rows].mean(axis=0)
            layers.append(routed.sum() * (mean * share)[routed].sum())
        return float(np.mean(layers))

    return {
        "whole": balance(where >= 0),
        "each": float(np.mean([balance(where == device) for device in range(devices)])),
        "found": float(found["metrics"]["two_stage"]["balance"]),
    }


def train(mesh: Any, kv_heads: int, accumulate: int = 1) -> dict[str, Any]:
    """Two steps of `fit_variants`: the log, what was trained, and its loss as it is measured."""
    model, rows, logged = model_of(kv_heads), ArrayRows(text()), []
    job = Job(mesh=mesh, on_step=lambda report: logged.append(report.metrics))
    fit = dataclasses.replace(FIT, accumulate=accumulate)
    route, penalty = route_of(model.config, "two_stage"), RoutingPenalty(BALANCE)
    rest, edits = Rest({}, model.config), {"moh": jh.Edits(z=route)}
    found = fit_variants(
        job, routed_loss, model.params, edits, rest=rest, penalty=penalty, fit=fit,
        rows={"rows": rows},
    )["moh"]  # fmt: skip
    params, route = found.params, found.edits["z"]
    where = {name: str(leaf.sharding) for name, leaf in route.weights.items()}
    tuned = Tuned(edits=jh.Edits(z=route), params=params)
    score = measure(job, model, TextData(rows, rows), tuned, ROWS)["loss"]
    leaves = dict(flatten({"params": params, "route": route.weights}))
    metrics = {k: np.asarray([step[k] for step in logged]) for k in ("loss", "balance")}
    return {
        "trained": {path: np.asarray(leaf) for path, leaf in leaves.items()},
        "metrics": metrics,
        "measured": np.asarray(score),
        "where": where,
    }


def far(one: Any, other: Any) -> dict[str, float]:
    """The largest difference of each array, relative to its largest value (or 0.01, if less)."""
    pairs = zip(paths(one), jax.tree.leaves(other), strict=True)
    return {path: _far(a, b) for (path, a), b in pairs}


def _far(one: Any, other: Any) -> float:
    one, other = np.asarray(one, float), np.asarray(other, float)
    return float(np.abs(one - other).max() / max(0.01, np.abs(one).max()))


def compare(cases: dict[str, Case], trained: list[str]) -> dict[str, Any]:
    """For each mesh the largest differences from one device; `trained`: forms with gradients."""
    found: dict[str, Any] = {}
    for name, (sizes, kv_heads) in cases.items():
        mesh = make_mesh(Mesh(**sizes))
        whole, divided = (compute(one, kv_heads, tuple(trained)) for one in (None, mesh))
        rows = mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1)
        router = np.abs(whole["gradient"]["two_stage"]["edits"]["z"]["router"]).max()
        balance = balances(divided, rows)
        found[name] = {"far": far(whole, divided), "balance": balance, "router": float(router)}
    return found


def compare_training(sizes: dict[str, Any], kv_heads: int) -> dict[str, Any]:
    """Training on one device and on eight, whole and in two parts."""
    mesh = make_mesh(Mesh(**sizes))
    runs = {"one": (None, 1), "eight": (mesh, 1), "parts": (mesh, 2), "one, parts": (None, 2)}
    ran = {name: train(mesh, kv_heads, parts) for name, (mesh, parts) in runs.items()}
    where = ran["eight"]["where"]
    for result in ran.values():
        del result["where"]
    return {
        "far": far(ran["one"], ran["eight"]),
        "parts far": far(ran["one, parts"], ran["parts"]),
        "where": where,
        "balance": {name: result["metrics"]["balance"].tolist() for name, result in ran.items()},
        "loss": {name: result["metrics"]["loss"].tolist() for name, result in ran.items()},
    }


def check(found: dict[str, float]) -> None:
    for path, distance in found.items():
        assert distance < 1e-5, path


@pytest.fixture(scope="module")
def found():
    return on_eight_devices(compare, MESHES, TRAINED[:1])


@pytest.mark.parametrize("name", MESHES)
def test_divided_routing_equals_undivided_routing(found, name):
    far = found[name]["far"]
    for form in FORMS:
        assert {f"logits/{form}", f"routing/{form}/gates", f"routing/{form}/chosen"} <= set(far)
    assert {"loss/two_stage", "metrics/two_stage/balance"} <= set(far)
    assert "gradient/two_stage/edits/z/router" in far
    assert found[name]["router"] > 0.01
    check(far)


def check_balance(found: dict[str, float]) -> None:
    """Each device's rows have their own few tokens, so a product of each device's means, which is
    then averaged, is another number.
    """
    np.testing.assert_allclose(found["found"], found["whole"], rtol=1e-5)
    assert found["each"] > 1.05 * found["whole"]


@pytest.mark.parametrize("name", MESHES)
def test_the_balance_loss_is_of_means_over_all_devices(found, name):
    check_balance(found[name]["balance"])


@pytest.mark.slow
def test_other_meshes_too():
    for name, one in on_eight_devices(compare, MORE, TRAINED).items():
        print(name)
        check(one["far"])
        if name not in ONE_SHARE_OF_ROWS:
            check_balance(one["balance"])


@pytest.mark.slow
def test_training_equals_that_of_one_device():
    """Also in parts, whose balance loss is each part's own: near that of the whole batch."""
    found = on_eight_devices(compare_training, {"fsdp": 2, "tensor": 2}, 4)
    check(found["far"])
    check(found["parts far"])
    assert "spec=P(None, None, 'tensor')" in found["where"]["router"]
    assert "spec=P(None, None, 'tensor')" in found["where"]["shared_router"]
    whole, in_parts = (found["balance"][name][0] for name in ("eight", "parts"))
    assert 0.01 < abs(whole - in_parts) < 0.1


def test_the_state_of_a_router_is_divided_over_its_heads():
    model = model_of(4)
    trainable, frozen = parts(model, "two_stage")
    state = jax.eval_shape(lambda tree: start(tree, ADAM.build(2), average=True), trainable)
    found = dict(paths(specs((state, frozen), abstract_mesh(Mesh(fsdp=2, tensor=2), 8))))
    routers = {path: spec for path, spec in found.items() if path.endswith("router")}
    # What is trained, its average and its two moments.
    assert len(routers) == 2 * 4
    assert set(routers.values()) == {jax.P(None, None, "tensor")}
    rest = {path: spec for path, spec in found.items() if "/z/" in path and path not in routers}
    assert {path.split("/")[-1] for path in rest} == {"balance", "shared", "top_k"}
    for path, spec in rest.items():
        assert not any(spec), path
