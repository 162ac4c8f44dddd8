"""LoFiT on a tiny model."""

import chex
import jax
import numpy as np
import pytest
from test_lora import loss_of, task_data
from tiny import close, tiny_model

import jaxheads as jh
from jaxheads.methods import lofit
from jaxheads.train.fit import Fit
from jaxheads.train.job import Job
from jaxheads.train.optimizer import Optimizer


def settings(**changes) -> lofit.Lofit:
    def fit(steps, rate):
        optimizer = Optimizer(learning_rate=rate, schedule="linear")
        return Fit(steps=steps, batch_size=4, optimizer=optimizer)

    chosen = {"heads": 3, "controls": 1, "importance": fit(6, 0.05), "offsets": fit(12, 0.1)}
    return lofit.Lofit(**(chosen | changes))


def test_offsets_train_only_the_chosen_heads_and_leave_the_model_alone():
    model = tiny_model()
    before = jax.tree.map(np.array, model.params)
    heads = [(0, 1), (2, 0), (2, 5)]
    tuned = settings().tune(Job(), "chosen", model, task_data(), heads)
    offset = np.asarray(tuned.edits["z"].offset)[:, 0, 0]
    assert tuned.edits["z"].scale is None
    np.testing.assert_array_equal(np.abs(offset).max(-1) > 0, jh.head_mask(model.config, heads))
    assert tuned.heads == heads and tuned.trained == 3 * 8
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, model.params), before)
    assert loss_of(model, tuned.edits) < 0.95 * loss_of(model)
    close(loss_of(jh.fold(model, tuned.edits)), loss_of(model, tuned.edits))


def test_importance_scores_every_head_and_more_l1_leaves_fewer_moved():
    model, job = tiny_model(), Job()
    importance = settings().find_heads(job, model, task_data())
    assert importance.shape == (3, 6) and (importance > 0).all()
    assert settings(l1=1.0).find_heads(job, model, task_data()).mean() < importance.mean()


def test_the_method_tunes_the_best_heads_and_random_ones_beside_them():
    found = settings().train(Job(), tiny_model(), None, task_data())
    assert list(found) == ["lofit", "random 1"]
    best = found["lofit"]
    ranked = np.argsort(-best.scores, axis=None)[:3]
    assert best.heads == [(int(i) // 6, int(i) % 6) for i in ranked]
    assert not set(best.heads) & set(found["random 1"].heads)


def test_the_loss_is_compiled_once_for_all_sets_of_heads():
    loss = jax.jit(chex.assert_max_traces(lofit.offsets_loss, n=1))
    batch = task_data().train_batch
    values = lofit.initial_offsets(tiny_model().config, jax.random.key(0))
    for heads in ([(0, 1), (1, 2)], [(2, 0)]):
        mask = jh.head_mask(tiny_model().config, heads).astype(np.float32)
        frozen = {"model": tiny_model(), "keep": jh.scale_heads(tiny_model().config, mask)}
        loss(values, frozen, (batch, batch.answers()), jax.random.key(0))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="heads must be at least 1, got 0"):
        settings(heads=0)
    with pytest.raises(ValueError, match=r"heads 10, .* more than the 18 heads"):
        settings(heads=10).train(Job(), tiny_model(), None, task_data())
