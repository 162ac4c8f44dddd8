"""The training step: one program, accumulation, averages, keys, and steps that are not finite."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxheads.train.step import make_step, start

SGD = optax.sgd(0.1)
FROZEN = {"scale": jnp.float32(2)}


def squared_error(weights, frozen, batch, key):
    """Mean over the targets that are not masked, 0 without any, as in a language model's loss."""
    error = batch["x"] @ weights - frozen["scale"] * batch["y"]
    weight = jnp.sum(batch["mask"])
    count = jnp.maximum(weight, 1)
    loss = jnp.sum(jnp.square(error) * batch["mask"]) / count
    distance = jnp.sum(jnp.abs(error) * batch["mask"]) / count
    return loss, {"weight": weight, "error": distance}


def batch_of(seed=0, rows=12):
    """Rows of which some are masked: unequally many in each part of a batch, one of four whole."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 3)).astype(np.float32)
    mask = np.arange(rows) % 4 != 1
    mask[5::3] = False
    return {"x": x, "y": x @ np.array([1, -1, 0.5], np.float32), "mask": mask.astype(np.float32)}


def after(step, batches, *, optimizer=SGD, average=False, weights=None):
    """The state after some batches, and the metrics of the last."""
    state = start(jnp.zeros(3) if weights is None else weights, optimizer, average=average)
    metrics = {}
    for batch in batches:
        state, metrics = step(state, FROZEN, batch)
    return state, metrics


def test_the_step_compiles_once_and_gives_up_the_old_state():
    step = make_step(chex.assert_max_traces(squared_error, n=1), optax.adam(0.1))
    old = start(jnp.zeros(3), optax.adam(0.1))
    state = old
    for index in range(3):
        state, _ = step(state, {"scale": jnp.float32(index)}, batch_of(index))
    assert int(state.step) == 3 and old.trainable.is_deleted()


# --- accumulation ---------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_accumulation_equals_the_whole_batch_also_with_unequal_targets(parts):
    counts = [batch_of()["mask"][part::parts].sum() for part in range(parts)]
    assert len(set(counts)) > 1 and (parts != 4 or min(counts) == 0)
    whole = after(make_step(squared_error, SGD), [batch_of()])
    cut = after(make_step(squared_error, SGD, accumulate=parts), [batch_of()])
    chex.assert_trees_all_close(cut, whole, rtol=1e-5)
    assert float(cut[1]["weight"]) == batch_of()["mask"].sum()


def test_without_a_weight_every_part_counts_the_same():
    def unweighted(*arguments):
        loss, metrics = squared_error(*arguments)
        return loss, {"error": metrics["error"]}

    batch = batch_of()
    parts = [{name: leaf[n::2] for name, leaf in batch.items()} for n in (0, 1)]
    losses = [squared_error(jnp.zeros(3), FROZEN, part, None)[0] for part in parts]
    _, metrics = after(make_step(unweighted, SGD, accumulate=2), [batch])
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-6)
    whole = squared_error(jnp.zeros(3), FROZEN, batch, None)[0]
    assert abs(float(metrics["loss"] - whole)) > 0.01 * float(whole)


def test_gradients_of_half_precision_are_added_up_in_float32():
    def shifted(weights, frozen, batch, key):
        return jnp.mean(batch["x"][:, 0]) * weights[0].astype(jnp.float32), {}

    rows = 512
    x = np.ones((rows, 3), np.float32)
    state, metrics = after(
        make_step(shifted, SGD, accumulate=rows), [{"x": x}], weights=jnp.zeros(3, jnp.bfloat16)
    )
    # Added up in bfloat16, ones stop growing at 256.
    assert state.trainable.dtype == jnp.bfloat16 and float(metrics["gradient_norm"]) == 1


def test_parts_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        make_step(squared_error, SGD, accumulate=0)
    with pytest.raises(ValueError, match="accumulate=5 does not divide the 12 rows"):
        after(make_step(squared_error, SGD, accumulate=5), [batch_of()])


# --- average --------------------------------------------------------------------------------


def test_the_average_follows_what_is_trained():
    batches = [batch_of(n) for n in range(3)]
    plain = make_step(squared_error, SGD)
    averaged = make_step(squared_error, SGD, average=0.75)
    expected = np.zeros(3, np.float32)
    for n in range(1, 4):
        expected = 0.75 * expected + 0.25 * np.asarray(after(plain, batches[:n])[0].trainable)
    state, _ = after(averaged, batches, average=True)
    np.testing.assert_allclose(state.average, expected, rtol=1e-6)
    chex.assert_trees_all_equal(state.trainable, after(plain, batches)[0].trainable)
    assert after(plain, batches)[0].average is None


# --- keys -----------------------------------------------------------------------------------


def noise(weights, frozen, batch, key):
    value = jax.random.normal(key)
    return value + jnp.sum(weights), {"noise": value, "square": jnp.square(value)}


def noises(steps, *, first=0, **options):
    step = make_step(noise, optax.sgd(0.0), **options)
    state = start(jnp.zeros(3), optax.sgd(0.0)).replace(step=jnp.int32(first))
    found = []
    for _ in range(steps):
        state, metrics = step(state, FROZEN, batch_of())
        found.append({name: float(value) for name, value in metrics.items()})
    return found


def test_keys_depend_on_the_seed_and_the_step_alone():
    keys = [metrics["noise"] for metrics in noises(4, seed=1)]
    assert len(set(keys)) == 4
    assert [metrics["noise"] for metrics in noises(2, seed=1, first=2)] == keys[2:]
    assert noises(1, seed=2)[0]["noise"] != keys[0]


def test_every_accumulated_part_has_a_key_of_its_own():
    (found,) = noises(1, accumulate=4)
    # With one key for all parts the mean square would be the square of the mean.
    assert found["square"] > 1.1 * found["noise"] ** 2


# --- steps that are not finite --------------------------------------------------------------


def test_after_a_step_that_is_not_finite_nothing_changes_any_more():
    spoiled = batch_of(1)
    spoiled["y"] = spoiled["y"] * np.nan
    step = make_step(squared_error, optax.adam(0.1), average=0.9)
    options = {"optimizer": optax.adam(0.1), "average": True}
    good, _ = after(step, [batch_of(0)], **options)
    bad, metrics = after(step, [batch_of(0), spoiled], **options)
    later, _ = after(step, [batch_of(0), spoiled, batch_of(2)], **options)
    assert bool(good.finite) and np.isnan(metrics["loss"])
    assert not bool(bad.finite) and not bool(later.finite)
    for state in (bad, later):
        chex.assert_trees_all_equal(state.replace(finite=good.finite), good)


def test_a_gradient_that_is_not_finite_counts_although_the_loss_is():
    def root(weights, frozen, batch, key):
        return jnp.sum(jnp.sqrt(weights)), {}

    state, metrics = after(make_step(root, SGD), [batch_of()])
    assert float(metrics["loss"]) == 0 and np.isinf(metrics["gradient_norm"])
    assert not bool(state.finite) and int(state.step) == 0
    chex.assert_trees_all_equal(state.trainable, jnp.zeros(3))
