"""The training step, data by step, checkpoints and the loop, on a tiny model."""

import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_model, tiny_tokens

import jaxheads as jh
from jaxheads.methods import lofit
from jaxheads.train import Checkpoints, NotFinite, batches, make_step, run, start


def toy_loss(weights, frozen, batch):
    error = batch["x"] @ weights - frozen["scale"] * batch["y"]
    return jnp.mean(error**2), {"largest": jnp.abs(error).max()}


def toy_data(rows=12):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 3)).astype(np.float32)
    return {"x": x, "y": x @ np.array([1, -1, 0.5], np.float32)}


def toy_run(folder=None, *, steps, every=2, on_step=lambda step, metrics: None):
    optimizer = optax.adam(0.1)
    arguments = {
        "state": start(jnp.zeros(3), optimizer),
        "step": make_step(toy_loss, optimizer),
        "frozen": {"scale": jnp.float32(2)},
        "data": batches(toy_data(), 4, seed=0),
        "steps": steps,
        "on_step": on_step,
    }
    if folder is None:
        return run(**arguments)
    with Checkpoints(folder, every=every) as checkpoints:
        return run(**arguments, checkpoints=checkpoints, config={"steps": steps})


def test_training_lowers_the_loss_and_reports_every_step_in_order():
    seen = []
    toy_run(steps=30, on_step=lambda step, metrics: seen.append((step, metrics["loss"])))
    assert [step for step, _ in seen] == list(range(1, 31))
    assert seen[-1][1] < 0.5 * seen[0][1]


def test_the_step_compiles_once():
    traced = chex.assert_max_traces(toy_loss, n=1)
    step = make_step(traced, optax.adam(0.1))
    state = start(jnp.zeros(3), optax.adam(0.1))
    for index in range(3):
        state, _ = step(state, {"scale": jnp.float32(index)}, batches(toy_data(), 4, 0)[index])
    assert int(state.step) == 3


def test_batches_depend_only_on_the_step_and_cover_every_row_each_pass():
    data = batches({"row": np.arange(12)}, 4, seed=3)
    again = batches({"row": np.arange(12)}, 4, seed=3)
    np.testing.assert_array_equal(data[7]["row"], again[7]["row"])
    passes = [np.concatenate([data[3 * n + i]["row"] for i in range(3)]) for n in (0, 1)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(12))
    assert list(passes[0]) != list(passes[1])
    assert list(batches({"row": np.arange(12)}, 4, seed=4)[0]["row"]) != list(data[0]["row"])


@pytest.mark.parametrize("size", [0, 13])
def test_a_batch_size_out_of_range_is_refused(size):
    with pytest.raises(ValueError, match=f"batch_size must lie in 1..12 .* got {size}"):
        batches({"row": np.arange(12)}, size, seed=0)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    whole = toy_run(tmp_path / "whole", steps=9)
    toy_run(tmp_path / "parts", steps=4)
    seen = []
    parts = toy_run(tmp_path / "parts", steps=9, on_step=lambda step, _: seen.append(step))
    assert seen == [5, 6, 7, 8, 9]
    chex.assert_trees_all_equal(parts, whole)


def test_a_finished_run_is_not_run_again(tmp_path):
    toy_run(tmp_path, steps=4)
    toy_run(tmp_path, steps=4, on_step=lambda *_: pytest.fail("a step was taken"))


def test_only_the_newest_checkpoints_are_kept_and_the_config_is_with_them(tmp_path):
    toy_run(tmp_path, steps=9)
    with Checkpoints(tmp_path, every=2) as checkpoints:
        assert checkpoints.latest == 9
        assert checkpoints.config() == {"steps": 9}
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["8", "9"]


def test_restoring_from_an_empty_folder_says_so(tmp_path):
    empty = pytest.raises(FileNotFoundError, match="no complete checkpoint")
    with Checkpoints(tmp_path, every=1) as checkpoints, empty:
        checkpoints.restore(start(jnp.zeros(3), optax.adam(0.1)))


KILLED = """
import os, sys, jax
sys.path.insert(0, {tests!r})
import test_train
def on_step(step, metrics):
    if step == 6:
        os.kill(os.getpid(), 9)
test_train.toy_run({folder!r}, steps=9, every=1, on_step=on_step)
"""


def test_a_killed_run_goes_on_from_its_last_complete_checkpoint(tmp_path, request):
    code = KILLED.format(tests=str(request.path.parent), folder=str(tmp_path / "killed"))
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr.decode()
    seen = []
    again = toy_run(
        tmp_path / "killed", steps=9, every=1, on_step=lambda step, _: seen.append(step)
    )
    assert seen[-1] == 9 and 1 < seen[0] <= 8
    chex.assert_trees_all_equal(again, toy_run(steps=9))


def test_a_loss_that_is_not_finite_stops_the_run():
    optimizer = optax.sgd(1e30)
    with pytest.raises(NotFinite, match=r"the loss is (nan|inf) after step"):
        run(
            start(jnp.ones(3), optimizer),
            make_step(toy_loss, optimizer),
            {"scale": jnp.float32(1)},
            batches(toy_data(), 4, 0),
            steps=20,
        )


# --- LoFiT on a tiny model -----------------------------------------------------------------


def tiny_batch():
    tokens = tiny_tokens(8, 10)
    targets = np.zeros((8, 10), bool)
    targets[:, -2:] = True
    return jh.Batch(tokens, np.ones((8, 10), bool), targets)


SETTINGS = lofit.Lofit(
    batch_size=4,
    importance=lofit.Importance(steps=6, learning_rate=0.05, l1=1e-3),
    offsets=lofit.Offsets(steps=12, learning_rate=0.1, heads=3),
)


def test_offsets_train_only_the_chosen_heads_and_leave_the_model_alone():
    model, batch = tiny_model(), tiny_batch()
    before = jax.tree.map(np.array, model.params)
    heads = [(0, 1), (2, 0), (2, 5)]
    edits = lofit.train_offsets(model, batch, heads, SETTINGS)
    offset = np.asarray(edits["z"].offset)[:, 0, 0]
    assert edits["z"].scale is None
    np.testing.assert_array_equal(np.abs(offset).max(-1) > 0, jh.head_mask(model.config, heads))
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, model.params), before)
    held = lofit.evaluate(model, batch, edits)
    assert held["loss"] < 0.95 * lofit.evaluate(model, batch)["loss"]
    folded = jh.fold(model, edits)
    np.testing.assert_allclose(folded(batch).logits, model(batch, edits=edits).logits, atol=1e-4)


def test_importance_scores_every_head_and_more_l1_leaves_fewer_moved():
    model, batch = tiny_model(), tiny_batch()
    importance = lofit.find_heads(model, batch, SETTINGS)
    assert importance.shape == (3, 6) and (importance > 0).all()
    strong = lofit.Lofit(
        batch_size=4, importance=lofit.Importance(steps=6, learning_rate=0.05, l1=1.0)
    )
    assert lofit.find_heads(model, batch, strong).mean() < importance.mean()


def test_lofit_compiles_each_stage_once():
    traced = chex.assert_max_traces(lofit._offsets_loss, n=1)
    step = make_step(traced, optax.adam(1e-2))
    model, batch = tiny_model(), tiny_batch()
    data = (batch, batch.answers())
    for heads in ([(0, 1), (1, 2)], [(2, 0), (2, 5)]):
        frozen = {"model": model, "heads": jnp.asarray(heads)}
        state = start(jnp.zeros((2, 8)), optax.adam(1e-2))
        step(state, frozen, data)
