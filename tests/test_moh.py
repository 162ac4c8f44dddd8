"""MoH as a trained method, on a tiny model."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_fine_tuning import changed, with_params
from test_lora import loss_of, task_data
from tiny import tiny_model, tiny_tokens

import jaxheads as jh
from jaxheads.data.rows import ArrayRows
from jaxheads.methods.fine_tuning import Rest
from jaxheads.methods.method import TextData
from jaxheads.methods.moh import Moh, Routed
from jaxheads.methods.variants import routed_loss, split_variant
from jaxheads.routing import RoutingPenalty
from jaxheads.train.fit import Fit
from jaxheads.train.job import Job, _step
from jaxheads.train.optimizer import Optimizer
from jaxheads.train.select import select
from jaxheads.train.step import make_step, start

FIT = Fit(steps=6, batch_size=4, optimizer=Optimizer(learning_rate=0.01, schedule="linear"))
QUERY_NORM = Routed(gates="straight_through", scores="query_norm")


def text_data() -> TextData:
    rows = ArrayRows(jh.pack(list(tiny_tokens(8, 10))))
    return TextData(rows, rows)


def trained(**options):
    model = tiny_model()
    return model, Moh(**({"fit": FIT} | options)).train(Job(), model, None, task_data())


def heads_on(route) -> np.ndarray:
    return np.asarray(route.shared).sum(1) + np.asarray(route.top_k)


@pytest.mark.slow
def test_continue_tuning_lowers_the_loss_and_leaves_the_model_alone():
    model = tiny_model()
    before = jax.tree.map(np.array, model.params)
    steps = _step.cache_info().misses
    tuned = Moh(fit=FIT).train(Job(), model, None, task_data())
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, model.params), before)
    routes = ["moh 0.75", "moh 0.5", "random 0.75", "random 0.5"]
    assert list(tuned) == [*routes, "dense", *(f"{name} at first" for name in routes)]
    # Shares are arrays: one step serves all, traced for routers, random ones and dense.
    assert _step.cache_info().misses - steps == 1
    every = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    for name in routes:
        route, first = tuned[name].edits["z"], tuned[f"{name} at first"].edits["z"]
        chex.assert_trees_all_equal(route, first)
        assert tuned[name].trained == every and tuned[f"{name} at first"].trained == 0
        assert heads_on(route).mean() == pytest.approx(6 * float(name.split()[1]), abs=0.2)
        new = with_params(model, tuned[name].params)
        assert loss_of(new, tuned[name].edits) < 0.9 * loss_of(model, tuned[name].edits), name
        assert changed(model, tuned[name].params) == set(dict(jh.model.parameters.flatten(before)))
    assert tuned["moh 0.5"].edits["z"].scores == "query_norm"
    assert tuned["random 0.5"].edits["z"].scores == "random"
    assert tuned["dense"].edits is None and tuned["dense"].trained == every
    assert loss_of(with_params(model, tuned["dense"].params)) < 0.9 * loss_of(model)


@pytest.mark.slow
def test_a_router_with_weights_is_trained_beside_chosen_parameters():
    options = {"routing": Routed(shares=(0.5,)), "patterns": ("blocks/mlp/up",), "controls": False}
    model, tuned = trained(**options)
    assert list(tuned) == ["moh 0.5", "moh 0.5 at first"]
    route, first = tuned["moh 0.5"].edits["z"], tuned["moh 0.5 at first"].edits["z"]
    for name, leaf in route.weights.items():
        moved = np.abs(np.asarray(leaf - getattr(first, name))).max(axis=(1, 2))
        assert (moved > 1e-3).all(), name
    np.testing.assert_array_equal(route.shared, first.shared)
    np.testing.assert_array_equal(route.top_k, first.top_k)
    assert changed(model, tuned["moh 0.5"].params) == {"blocks/mlp/up"}
    assert tuned["moh 0.5"].trained == 3 * (40 * 56 + 2 * 40 * 6 + 40 * 2)
    _, again = trained(**options)
    for part in ("edits", "params"):
        chex.assert_trees_all_equal(
            getattr(again["moh 0.5"], part), getattr(tuned["moh 0.5"], part)
        )


@pytest.mark.slow
def test_it_trains_on_text_too_and_in_half_precision():
    method = Moh(Routed(shares=(0.5,)), ("blocks/mlp/up",), controls=False, fit=FIT)
    model = tiny_model().astype("bfloat16")
    tuned = method.train(Job(), model, None, text_data())["moh 0.5"]
    assert tuned.params["blocks"]["mlp"]["up"].dtype == jnp.bfloat16
    assert tuned.edits["z"].router.dtype == jnp.float32
    new = with_params(model, tuned.params)
    batch = jh.pack(list(tiny_tokens(8, 10)))
    loss = jax.jit(jh.next_token_loss)
    assert loss(new, batch, edits=tuned.edits) < 0.98 * loss(model, batch, edits=tuned.edits)


def parts(routing, share=0.5):
    """What `routed_loss` takes, with the MLPs trained."""
    model = tiny_model()
    chosen = select(model.params, ("blocks/mlp/*",))
    route = routing.route(model.config, share, jax.random.key(0))
    # Copied: a step takes what it is given.
    params = jax.tree.map(jnp.copy, chosen.trainable)
    rest, penalty = Rest(chosen.frozen, model.config), RoutingPenalty(0.01)
    return split_variant(params, jh.Edits(z=route), rest, penalty)


def test_random_routing_draws_anew_at_each_step_and_is_fixed_when_measured():
    trainable, fixed = parts(dataclasses.replace(QUERY_NORM, scores="random"))
    batch = task_data().train_batch
    run = jax.jit(lambda key: routed_loss(trainable, fixed, batch, key)[0])
    first, second = run(jax.random.key(0)), run(jax.random.key(1))
    assert first == run(jax.random.key(0)) != second
    measured = jax.jit(lambda: routed_loss(trainable, fixed, batch, None))
    loss, metrics = measured()
    assert loss == measured()[0]
    assert metrics["task_loss"] == loss - 0.01 * metrics["balance"]
    np.testing.assert_allclose(metrics["task_loss"], loss_of(tiny_model(), fixed.edits), rtol=1e-5)


def test_a_step_with_scores_of_nan_is_not_taken():
    trainable, fixed = parts(Routed())
    optimizer = Optimizer(learning_rate=0.1).build(4)
    step = make_step(routed_loss, optimizer)
    batch = task_data().train_batch
    good, metrics = step(start(trainable, optimizer), fixed, batch)
    assert good.finite and good.step == 1 and np.isfinite(metrics["balance"])
    route = good.trainable["edits"]["z"]
    spoiled = route | {"router": route["router"].at[1, 3].set(np.nan)}
    trainable = good.trainable | {"edits": {"z": spoiled}}
    kept = jax.tree.map(np.array, trainable)
    bad, metrics = step(good.replace(trainable=trainable), fixed, batch)
    assert not bad.finite and bad.step == 1 and np.isnan(metrics["loss"])
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, bad.trainable), kept)


BAD = {
    "gates": (lambda: Routed(gates="soft"), "unknown gates 'soft'"),
    "scores": (lambda: Routed(scores="soft"), "unknown scores 'soft'"),
    "no shares": (lambda: Routed(shares=()), r"shares must lie in \(0, 1\], at least one"),
    "share": (lambda: Routed(shares=(0.5, 1.5)), r"got \(0.5, 1.5\)"),
    "twice": (lambda: Routed(shares=(0.5, 0.5)), "shares must differ"),
    "shared": (lambda: Routed(shared=1.2), r"shared must lie in \[0, 1\], got 1.2"),
    "whole": (lambda: Routed(whole_layers=-1), "whole_layers must be at least 0, got -1"),
    "weight": (lambda: Routed(balance=-1), "balance must be at least 0, got -1"),
    "remat": (lambda: Moh(remat="some"), "unknown remat 'some'"),
    "pattern": (lambda: trained(patterns=("blocks/mpl/*",)), "path or pattern"),
    "none on": (
        lambda: trained(routing=Routed(shares=(0.1,), shared=0.0)),
        "share 0.1 of 3 layers of 6 heads.* leaves 1.8 heads for the 3 others",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_settings_that_cannot_be_are_refused(name):
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()
