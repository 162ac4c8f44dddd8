"""A small language model from scratch with routed heads, beside its controls."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_runs import WORDS

import jaxheads as jh
from jaxheads.data.rows import ArrayRows
from jaxheads.methods.from_scratch import FromScratch, Shape
from jaxheads.methods.method import TextData
from jaxheads.methods.moh import Routed
from jaxheads.methods.moh_from_scratch import MohFromScratch
from jaxheads.train.fit import Fit
from jaxheads.train.job import Job
from jaxheads.train.optimizer import Optimizer

SHAPE = Shape(n_layers=2, n_heads=8, d_model=32, d_mlp=24, context_length=32)
FIT = Fit(steps=12, batch_size=4, optimizer=Optimizer(learning_rate=0.03, clip=1.0))
METHOD = MohFromScratch(shape=SHAPE, vocabulary=280, fit=FIT)
ON = {"0.75": 6, "0.5": 4}


def texts() -> list[str]:
    drawn = np.random.default_rng(0).choice(WORDS, (8, 6))
    return [" ".join(line) for line in drawn]


@pytest.fixture(scope="module")
def start():
    """The random model, and texts to learn, which are those it is measured on."""
    model, tokenizer = METHOD.create(texts(), seed=0)
    rows = ArrayRows(tokenizer(texts()))
    return model, TextData(rows, rows)


@pytest.fixture(scope="module")
def tuned(start):
    model, data = start
    before = jax.tree.map(np.array, model.params)
    found = dataclasses.replace(METHOD, controls=False).train(Job(), model, None, data)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, model.params), before)
    return found


@pytest.fixture(scope="module")
def controls(start):
    model, data = start
    return METHOD.train(Job(), model, None, data)


def loss_of(start, variant) -> float:
    model, data = start
    model, batch = jh.Transformer(model.config, variant.params), data.train[np.arange(8)]
    return float(jax.jit(jh.next_token_loss)(model, batch, edits=variant.edits))


def parameters(start) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(start[0].params))


@pytest.mark.slow
def test_every_share_is_trained_and_the_first_is_the_result(start, tuned):
    assert list(tuned) == ["moh 0.75", "moh 0.5"]
    for variant in tuned.values():
        assert loss_of(start, variant) < 0.8 * np.log(start[0].config.vocab_size)
        # W_r and W_s of two layers, and W_h.
        assert variant.trained == parameters(start) + 2 * 32 * (8 + 8 + 2)


@pytest.mark.slow
def test_a_share_of_eight_heads_is_exact_in_every_layer(tuned):
    for share, count in ON.items():
        route = tuned[f"moh {share}"].edits["z"]
        assert (route.shared.sum(axis=1) + route.top_k == count).all()


@pytest.mark.slow
def test_the_router_learns(start, tuned):
    route = tuned["moh 0.5"].edits["z"]
    key = jax.random.fold_in(jax.random.key(Job().seed), 1)
    first = METHOD.routing.route(start[0].config, 0.5, key)
    moved = jnp.abs(route.router - first.router).max(axis=1)
    assert (moved[~route.shared] > 0.01).all()
    assert (moved[route.shared] == 0).all()
    assert jnp.abs(route.shared_router).max() > 0 and jnp.abs(route.balance).max() > 0


@pytest.mark.slow
def test_controls_are_trained_too(start, tuned, controls):
    names = [f"{way} {share}" for way in ("moh", "random") for share in ON]
    assert list(controls) == [*names, "dense"]
    for variant in controls.values():
        assert loss_of(start, variant) < 0.8 * np.log(start[0].config.vocab_size)
    chex.assert_trees_all_equal(controls["moh 0.5"].params, tuned["moh 0.5"].params)
    assert controls["dense"].edits is None
    assert controls["dense"].trained == parameters(start)
    # A random router has nothing to learn but its gates.
    random = controls["random 0.5"]
    assert random.trained == parameters(start) + 2 * 32 * (8 + 2)
    assert random.edits["z"].router is None and jnp.abs(random.edits["z"].balance).max() > 0


@pytest.mark.slow
def test_with_every_head_on_and_gates_of_one_it_is_the_dense_run(start):
    """So the start and the batches are the same."""
    routing = Routed(shares=(1.0,), shared=1.0, gates="straight_through", scores="query_norm")
    model, data = start
    method = dataclasses.replace(METHOD, routing=routing, fit=dataclasses.replace(FIT, steps=3))
    found = method.train(Job(seed=1), model, None, data)
    chex.assert_trees_all_close(found["moh 1"].params, found["dense"].params, atol=1e-6)


def test_it_starts_from_the_model_that_a_dense_run_starts_from(start):
    plain = FromScratch(shape=SHAPE, vocabulary=280, fit=FIT)
    model, tokenizer = plain.create(texts(), seed=0)
    chex.assert_trees_all_equal(model.params, start[0].params)
    assert tokenizer.vocab_size == start[0].config.vocab_size


def test_a_share_that_leaves_no_head_on_is_refused_before_training(start):
    model, data = start
    method = dataclasses.replace(METHOD, routing=Routed(shares=(0.5, 0.05)))
    with pytest.raises(ValueError, match=r"share 0.05 of 2 layers .* leaves 0.8 heads"):
        method.train(Job(on_step=lambda report: pytest.fail("it trained")), model, None, data)
