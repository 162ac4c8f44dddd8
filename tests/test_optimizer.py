"""Optimizers, their schedules and what weight decay acts on; settings of a stage."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_model

from jaxheads import Affine, Edits
from jaxheads.train.config import read_config
from jaxheads.train.fit import Fit
from jaxheads.train.optimizer import RULES, SCHEDULES, Optimizer, decayed

PARAMS = {"q": jnp.linspace(-1, 2, 12).reshape(3, 4), "scale": jnp.full((3, 4), 1.5)}
MASK = {"q": True, "scale": False}


@jax.jit
def gradient(params):
    return jax.grad(lambda p: sum(jnp.sum(jnp.sin(3 * x) ** 2) for x in jax.tree.leaves(p)))(params)


def descend(transformation, steps=5):
    def step(carry, _):
        params, state = carry
        updates, state = transformation.update(gradient(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(
        lambda params: jax.lax.scan(step, (params, transformation.init(params)), length=steps)
    )
    return run(PARAMS)[0][0]


LINEAR = optax.linear_schedule(0.1, 0.0, 5)
SAME = {
    "adamw": (
        {"weight_decay": 0.3, "b1": 0.8, "b2": 0.95, "schedule": "linear"},
        optax.adamw(LINEAR, b1=0.8, b2=0.95, weight_decay=0.3, mask=MASK),
    ),
    "adam": ({"eps": 1e-2}, optax.adam(0.1, eps=1e-2)),
    "sgd": ({"momentum": 0.7, "schedule": "linear"}, optax.sgd(LINEAR, momentum=0.7)),
    "lion": (
        {"b1": 0.5, "b2": 0.7, "weight_decay": 0.3},
        optax.lion(0.1, b1=0.5, b2=0.7, weight_decay=0.3, mask=MASK),
    ),
    "adafactor": ({"momentum": 0.5}, optax.adafactor(0.1, momentum=0.5)),
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_optax_s_own(name):
    options, reference = SAME[name]
    ours = Optimizer(name, 0.1, clip=0.5, **options).build(5)
    theirs = optax.chain(optax.clip_by_global_norm(0.5), reference)
    for a, b in zip(*(jax.tree.leaves(descend(t)) for t in (ours, theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_clipping_limits_the_global_norm():
    transformation = Optimizer("sgd", 1.0, clip=0.5).build(1)
    updates, _ = transformation.update(gradient(PARAMS), transformation.init(PARAMS), PARAMS)
    assert float(optax.tree.norm(gradient(PARAMS))) > 1
    np.testing.assert_allclose(float(optax.tree.norm(updates)), 0.5, rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_warm_up_rises_to_the_peak_and_moves_at_once(schedule):
    rate = Optimizer(learning_rate=2.0, schedule=schedule, warmup=4).rate(20)
    np.testing.assert_allclose([rate(n) for n in range(5)], [0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6)


def test_what_follows_the_warm_up():
    def rates(schedule, *steps, **options):
        rate = Optimizer(learning_rate=2.0, schedule=schedule, warmup=10, **options).rate(50)
        return [float(rate(n)) for n in steps]

    np.testing.assert_allclose(rates("constant", 10, 30, 49), [2, 2, 2])
    np.testing.assert_allclose(rates("linear", 10, 30, 50), [2, 1, 0], atol=1e-6)
    np.testing.assert_allclose(rates("linear", 30, 50, end=0.5), [1.5, 1])
    np.testing.assert_allclose(rates("cosine", 20, 30, 50), [1 + 0.5**0.5, 1, 0], atol=1e-6)
    np.testing.assert_allclose(rates("cosine", 30, 50, end=0.5), [1.5, 1], atol=1e-6)
    np.testing.assert_allclose(rates("wsd", 39, 40, 45, 50), [2, 2, 1, 0], atol=1e-6)
    np.testing.assert_allclose(rates("wsd", 25, 37.5, 50, decay=0.5, end=0.5), [2, 1.5, 1])
    np.testing.assert_allclose(rates("wsd", 10, 30, 50, decay=1.0), [2, 1, 0], atol=1e-6)


def test_weight_decay_acts_on_matrices_only():
    model = tiny_model(biases=True, tied=False)
    tree = {"params": model.params, "edits": Edits(z=Affine(jnp.ones((3, 1, 1, 6, 1))))}
    found = decayed(tree)
    assert found["edits"] is False
    paths = jax.tree_util.tree_leaves_with_path(found["params"])
    kept = {jax.tree_util.keystr(path, simple=True, separator="/") for path, yes in paths if yes}
    attn = {f"blocks/attn/{name}" for name in "qkvo"}
    mlp = {f"blocks/mlp/{name}" for name in ("gate", "up", "down")}
    assert kept == attn | mlp | {"embed/tokens", "unembed/kernel"}
    # The model itself is a pytree of the same parameters.
    assert sum(jax.tree.leaves(decayed(model))) == len(kept)
    assert decayed(jnp.ones((3, 4))) is False


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adamv"}, "Did you mean 'adam' or 'adamw'"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive, got nan"),
        ({"clip": -1.0}, "clip must be positive"),
        ({"b2": 1.0}, "b2 must be at least 0 and below 1"),
        ({"warmup": -1}, "warmup must be at least 0"),
        ({"end": 0.1}, "end = 0.1 is not read by the schedule 'constant', expected one of linear"),
        ({"schedule": "cosine", "decay": 0.1}, "decay = 0.1 is not read by the schedule 'cosine'"),
        ({"name": "sgd", "b1": 0.9}, "b1 = 0.9 is not read by the optimizer 'sgd'"),
        ({"name": "adam", "weight_decay": 0.1}, "weight_decay = 0.1 is not read by .*adamw, sgd"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Optimizer(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 8, "accumulate": 3}, "batch_size 8 must be a multiple of accumulate 3"),
        ({"average": 1.0}, "average must lie strictly between 0 and 1"),
        ({"steps": 5, "optimizer": Optimizer(warmup=5)}, "5 steps has no step after a warmup of 5"),
    ],
)
def test_bad_stages_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Fit(**settings)


def test_a_stage_is_read_from_a_file(tmp_path):
    path = tmp_path / "fit.toml"
    path.write_text('steps = 40\n[optimizer]\nname = "lion"\nclip = 1\nschedule = "wsd"\n')
    expected = Fit(40, optimizer=Optimizer("lion", clip=1.0, schedule="wsd"))
    assert read_config(path, Fit) == expected
    path.write_text("[optimizer]\nmomentum = 0.9\n")
    with pytest.raises(ValueError, match=r"momentum = 0.9 is not read by the optimizer 'adamw'"):
        read_config(path, Fit)
