"""Causal head gating: the loss, its three fits, and what becomes of the gates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import close, tiny_model, tiny_tokens

import jaxheads as jh
from jaxheads import tasks
from jaxheads.methods import head_gating
from jaxheads.methods.measure import measure
from jaxheads.methods.method import TaskData
from jaxheads.model.batch import Batch
from jaxheads.train.fit import Fit
from jaxheads.train.job import Job
from jaxheads.train.optimizer import Optimizer

SHAPE = (3, 6)


def batch_of(rows, seed=0):
    tokens = tiny_tokens(rows, 8, seed)
    return Batch(tokens, np.ones(tokens.shape, bool), np.arange(8) >= np.full((rows, 1), 6))


def frozen(weight):
    return {"model": tiny_model(), "weight": jnp.float32(weight)}


def test_open_gates_change_nothing_and_closed_ones_mask_heads():
    model, tokens = tiny_model(), tiny_tokens(4, 8)
    gates = np.ones(SHAPE, np.float32)
    np.testing.assert_array_equal(
        model(tokens, edits=head_gating.gated(gates)).logits, model(tokens).logits
    )
    gates[1, 4] = 0
    close(
        model(tokens, edits=head_gating.gated(gates)).logits,
        model(tokens, edits=jh.mask_heads(model.config, [(1, 4)])).logits,
    )


def test_loss_is_that_of_the_targets_less_the_pull():
    batch = batch_of(4)
    data = (batch, batch.answers())
    logits = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32) * 4
    loss, metrics = head_gating.gating_loss({"gates": logits}, frozen(0.3), data, None)
    edits = head_gating.gated(jax.nn.sigmoid(logits))
    logits_after = tiny_model()(batch, edits=edits).logits[:, 5:7]
    chosen = np.take_along_axis(
        jax.nn.log_softmax(logits_after), batch.tokens[:, 6:, None], axis=-1
    )
    task = -chosen.mean()
    close(metrics["task_loss"], task)
    close(loss, task - 0.3 * np.clip(logits, -4, 4).mean())
    assert np.abs(logits).max() > 4 and metrics["weight"] == 8


def test_three_fits_pull_the_gates_apart_from_one_start():
    batch = batch_of(8)
    examples = [tasks.Example(str(n), " x") for n in range(8)]
    data = TaskData(examples, examples, batch, batch)
    optimizer = Optimizer(name="adam", learning_rate=0.3, clip=1.0)
    method = head_gating.HeadGating(weight=20.0, controls=2, fit=Fit(12, 4, optimizer=optimizer))
    job = Job(seed=3)
    tuned = method.train(job, tiny_model(), None, data)
    assert list(tuned) == ["head_gating", "retain", "start", "random 1", "random 2"]
    gates = {name: t.edits["z"].scale[:, 0, 0, :, 0] for name, t in tuned.items()}
    # Pulled this hard, every gate follows, unless its logit is where the pull is clipped.
    pulled = np.abs(jax.scipy.special.logit(gates["start"])) < 3.5
    assert (gates["head_gating"] < gates["start"])[pulled].all()
    assert (gates["start"] < gates["retain"])[pulled].all() and pulled.sum() > 9
    for n in (1, 2):
        dealt = np.asarray(gates[f"random {n}"])
        assert not np.array_equal(dealt, gates["head_gating"])
        np.testing.assert_array_equal(np.sort(dealt.ravel()), np.sort(gates["head_gating"].ravel()))
    # The first fit, which nothing pulls, lowers the loss.
    begin = head_gating.initial_gates(SHAPE, jax.random.key(3))
    end = jax.scipy.special.logit(gates["start"])
    score, item = jax.jit(head_gating.gating_loss), (batch, batch.answers())
    before, after = (score({"gates": g}, frozen(0.0), item, None)[0] for g in (begin, end))
    assert after < before - 0.01
    assert tuned["retain"].trained == 18


def test_initial_gates_are_uniform():
    gates = jax.nn.sigmoid(head_gating.initial_gates((50, 40), jax.random.key(0)))
    quantiles = np.quantile(gates, [0.1, 0.25, 0.5, 0.75, 0.9])
    np.testing.assert_allclose(quantiles, [0.1, 0.25, 0.5, 0.75, 0.9], atol=0.03)


def test_roles_by_hand():
    found = head_gating.roles(np.array([[1.0, 0.2, 0.9]]), np.array([[0.8, 0.1, 0.0]]))
    np.testing.assert_allclose(found["facilitation"], [[0.8, 0.1, 0.0]])
    np.testing.assert_allclose(found["interference"], [[0.0, 0.8, 0.1]])
    np.testing.assert_allclose(found["irrelevance"], [[0.2, 0.18, 0.9]])
    with pytest.raises(ValueError, match=r"retained has shape \(3, 6\), removed \(2, 6\)"):
        head_gating.roles(np.ones((3, 6)), np.ones((2, 6)))


def test_needed_heads_are_the_open_ones_in_order():
    assert head_gating.needed(np.array([[0.6, 0.1], [0.5, 0.9]])) == [(1, 1), (0, 0)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0.0}, "weight must be above 0, got 0.0"),
        ({"controls": -1}, "controls must be at least 0, got -1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        head_gating.HeadGating(**settings)


@pytest.mark.slow
def test_the_model_needs_the_heads_that_are_left(smollm2):
    """IOI: the gates of "remove" keep more of the task than the same gates on other heads."""
    model, tokenizer = smollm2
    examples = tasks.generate("ioi", 48, 0)
    train, held_out = tasks.split(examples, 0.34, 0)
    width = tasks.encode(examples, tokenizer).batch.tokens.shape[1]
    sides = [tasks.encode(side, tokenizer, length=width).batch for side in (train, held_out)]
    data = TaskData(train, held_out, *sides)
    optimizer = Optimizer(name="adam", learning_rate=1.0, clip=1.0)
    method = head_gating.HeadGating(controls=5, fit=Fit(10, 8, optimizer=optimizer))
    tuned = method.train(Job(), model, tokenizer, data)
    loss = {name: measure(Job(), model, data, t)["loss"] for name, t in tuned.items()}
    assert loss["head_gating"] < min(v for name, v in loss.items() if "random" in name) - 0.5
