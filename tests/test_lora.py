"""LoRA as a trained method, on a tiny model."""

import chex
import jax
import numpy as np
import pytest
from tiny import tiny_model, tiny_tokens

import jaxheads as jh
from jaxheads.data.rows import ArrayRows
from jaxheads.methods import lora
from jaxheads.methods.method import TaskData, TextData
from jaxheads.train.fit import Fit
from jaxheads.train.job import Job
from jaxheads.train.optimizer import Optimizer

FIT = Fit(steps=12, batch_size=4, optimizer=Optimizer(learning_rate=0.03, schedule="linear"))


def task_data() -> TaskData:
    """Eight rows whose last two tokens are answers; the held-out ones are the same."""
    tokens = tiny_tokens(8, 10)
    targets = np.zeros((8, 10), bool)
    targets[:, -2:] = True
    batch = jh.Batch(tokens, np.ones((8, 10), bool), targets)
    return TaskData([], [], batch, batch)


def loss_of(model, edits=None) -> float:
    batch = task_data().train_batch
    return float(jax.jit(jh.next_token_loss)(model, batch, edits=edits))


def test_training_lowers_the_loss_and_leaves_the_model_alone():
    model = tiny_model()
    before = jax.tree.map(np.array, model.params)
    method = lora.Lora(rank=2, alpha=4.0, sites=("q_pre", "v", "attn_out"), fit=FIT)
    (name, tuned), *others = method.train(Job(), model, None, task_data()).items()
    assert name == "lora" and not others
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, model.params), before)
    assert loss_of(model, tuned.edits) < 0.8 * loss_of(model)
    # Layers, rank, and width read plus width written, of each site.
    assert tuned.trained == 3 * 2 * ((40 + 48) + (40 + 16) + (48 + 40))
    assert set(tuned.edits) == {"q_pre", "v", "attn_out"}
    assert tuned.params is None
    again = method.train(Job(), model, None, task_data())["lora"]
    chex.assert_trees_all_equal(again.edits, tuned.edits)


def test_it_trains_on_text_too():
    batch = jh.pack(list(tiny_tokens(8, 10)))
    rows = ArrayRows(batch)
    tuned = lora.Lora(rank=2, fit=FIT).train(Job(), tiny_model(), None, TextData(rows, rows))
    loss = jax.jit(jh.next_token_loss)
    losses = [loss(tiny_model(), batch, edits=edits) for edits in (None, tuned["lora"].edits)]
    assert losses[1] < 0.98 * losses[0]


def test_a_site_that_no_weight_writes_is_refused():
    with pytest.raises(ValueError, match="site of a low-rank change"):
        lora.Lora(sites=("neurons",)).train(Job(), tiny_model(), None, task_data())
