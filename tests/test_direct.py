"""Direct effects sum to the logit difference, and splits equal whole forward passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest
from tiny import close, mostly_slow, tiny_model, tiny_tokens

from jaxheads import Batch, Edits, Tap, tasks
from jaxheads.edits import Mix
from jaxheads.sweep.direct import direct_effects, effect_split
from jaxheads.sweep.metrics import LogitDifference, Probability
from jaxheads.sweep.sweep import ablate_heads

ROWS, LENGTH = 2, 9
LAYER_NORMS = {"norm": "layer", "norm_bias": True}
VARIANTS = {
    "rms": {},
    "biases": {"biases": True, "norm_plus_one": True, "branch_scale": True, "logit_scale": 0.7},
    "layer": {**LAYER_NORMS, "biases": True, "unembed_bias": True, "tied": False},
    "parallel": {**LAYER_NORMS, "parallel": True, "gated": False},
    "unnormed": {"final_norm": False},
}


@functools.cache
def batches() -> tuple[Batch, Batch]:
    """Two sets of prompts; the second row ends in padding."""
    mask = np.ones((ROWS, LENGTH), bool)
    mask[1, -2:] = False
    clean, other = (Batch(tiny_tokens(ROWS, LENGTH, seed=seed), mask) for seed in (0, 1))
    return clean, other


def difference() -> LogitDifference:
    """Two right answers in one row, one in the other."""
    answers, wrong = np.array([[3, 7], [4, -1]]), np.array([5, 6])
    return LogitDifference.of(batches()[0], answers, wrong)


@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, *list(VARIANTS)[:2]))
def test_direct_effects_sum_to_the_logit_difference(variant):
    model, metric = tiny_model(**VARIANTS[variant]), difference()
    found = direct_effects(model, batches()[0], metric, rows=True)
    logits = model(batches()[0], logits_at=metric.slots).logits[:, 0]
    expected = np.sum(
        np.take_along_axis(np.asarray(logits), metric.tokens, axis=1) * metric.weights, axis=1
    )
    np.testing.assert_allclose(found.total, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.metric, expected, rtol=1e-5, atol=1e-5)
    assert found.heads.axes == ("layer", "head", "row") and found.heads.shape == (3, 6, ROWS)
    assert np.abs(found.heads.values).min() > 0
    mean = direct_effects(model, batches()[0], metric)
    np.testing.assert_allclose(mean.heads.values, found.heads.values.mean(-1), atol=1e-6)
    np.testing.assert_allclose(mean.total, expected.mean(), rtol=1e-4, atol=1e-5)


def test_each_part_is_named_and_stands_for_its_own_write():
    """Head by head the contribution is its write under the frozen norm, taken by hand."""
    model, metric = tiny_model(**VARIANTS["layer"]), difference()
    batch = batches()[0]
    found = direct_effects(model, batch, metric, rows=True)
    parts = ("final_norm/bias", "unembed/bias", "blocks/attn/o_bias", "embed")
    assert set(found.rest.labels[0]) == set(parts)
    taps = model(batch, taps=("head_out", "mlp_out", "resid_post")).taps
    rows, last = np.arange(ROWS), metric.slots[:, 0]
    norm, kernel = model.params["final_norm"], np.asarray(model.params["unembed"]["kernel"])
    stream = np.asarray(taps["resid_post"])[-1, rows, last]
    size = np.sqrt(stream.var(axis=-1) + model.config.norm_eps)
    toward = np.einsum("bm,bmd->bd", metric.weights, kernel[metric.tokens])

    def by_hand(write):
        centred = write - write.mean(axis=-1, keepdims=True)
        return np.sum(centred * np.asarray(norm["scale"]) * toward, axis=-1) / size

    for layer in range(3):
        write = np.asarray(taps["mlp_out"])[layer, rows, last]
        np.testing.assert_allclose(found.mlps.values[layer], by_hand(write), atol=1e-5)
        for head in range(6):
            write = np.asarray(taps["head_out"])[layer, rows, last, head]
            np.testing.assert_allclose(found.heads.values[layer, head], by_hand(write), atol=1e-5)


def test_the_planted_circuit_writes_its_answer_in_one_place():
    """What no planted head writes to the answer is at most a hundredth of what one does."""
    pairs = planted.planted_pairs()
    found = direct_effects(planted.planted_model(), pairs.clean, planted.planted_metric(pairs))
    ((best, value),) = found.heads.top(1)
    assert best == planted.INDUCTION
    assert value == pytest.approx(float(found.metric), rel=0.01)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"logit_softcap": 30.0}, "logit_softcap"),
        ({"norm_place": "post"}, "norm_place"),
        ({"norm_place": "sandwich"}, "norm_place"),
        ({"head": "mlm", "causal": False}, "head"),
    ],
)
def test_logits_that_are_no_sum_are_refused_by_name(fields, name):
    with pytest.raises(ValueError, match=f"config.{name}="):
        direct_effects(tiny_model(**fields), batches()[0], difference())


def test_a_metric_that_is_not_linear_is_refused():
    metric = Probability.of(batches()[0], np.array([3, 4]))
    with pytest.raises(ValueError, match=r"need a LogitDifference.*got Probability"):
        direct_effects(tiny_model(), batches()[0], metric)


# Total, direct and indirect.


def _values(model, how):
    """What each head gives when removed, [L,B,T,H,Dh], by other means than the package's."""
    clean, other = batches()
    z = model(clean, taps="z").taps["z"]
    if how == "zero":
        return jnp.zeros_like(z)
    if how == "resample":
        return model(other, taps="z").taps["z"]
    if how == "mean":
        return jnp.broadcast_to(jnp.arange(6.0)[:, None] / 10, z.shape)

    def uniform(v, context):
        heads = jnp.repeat(v, 3, axis=2)
        weight = context.allowed[:, 0].astype(jnp.float32)
        return jnp.einsum("bts,bshe->bthe", weight / weight.sum(-1, keepdims=True), heads)

    return model(clean, taps={"v": Tap("v", uniform)}).taps["v"]


@pytest.mark.parametrize("how", mostly_slow(["zero", "mean", "resample", "uniform"], "zero"))
def test_direct_effects_of_removal_equal_frozen_forward_passes(how):
    model, metric = tiny_model(), difference()
    clean, other = batches()
    options = {"how": how}
    if how == "resample":
        options["source"] = other
    if how == "mean":
        options["means"] = np.broadcast_to(np.arange(6.0)[:, None] / 10, (3, 6, 8))
    found = effect_split(model, clean, metric, rows=True, **options)
    assert found.axes == ("effect", "layer", "head", "row")
    total = ablate_heads(model, clean, metric, rows=True, **options)
    np.testing.assert_array_equal(found.sel(effect="total").values, total.values)

    kept = model(clean, taps=("z", "mlp_out")).taps
    replaced = _values(model, how)
    whole = jnp.ones((1, 1, 1, 1, 1))

    @jax.jit
    def frozen(layer, head):
        z = kept["z"].at[layer, :, :, head].set(replaced[layer, :, :, head])
        edits = Edits({"z": Mix(z, whole), "mlp_out": Mix(kept["mlp_out"], whole[0])})
        logits = model(clean, edits=edits, logits_at=metric.slots).logits
        return metric(jnp.take_along_axis(logits, metric.tokens[:, None], axis=2))

    logits = model(clean, logits_at=metric.slots).logits
    unedited = metric(jnp.take_along_axis(logits, metric.tokens[:, None], axis=2))
    expected = jnp.array([[frozen(layer, head) for head in range(6)] for layer in range(3)])
    direct = found.sel(effect="direct").values
    assert np.abs(direct).max() > 1e-3
    close(direct, expected - unedited)
    indirect = found.sel(effect="indirect").values
    np.testing.assert_allclose(indirect, total.values - direct, atol=1e-6)
    assert np.abs(indirect).max() > 1e-3


def test_the_planted_effects_are_direct_and_indirect():
    """The induction head acts on the logits; the previous-token head only through it."""
    pairs = planted.planted_pairs()
    metric = planted.planted_metric(pairs)
    found = effect_split(
        planted.planted_model(), pairs.clean, metric, "resample", source=pairs.corrupted
    )
    direct, indirect = (found.sel(effect=name).values for name in ("direct", "indirect"))
    whole = abs(found.info["unedited"])
    assert direct[planted.INDUCTION] < -0.5 * whole
    assert indirect[planted.PREVIOUS] < -0.5 * whole
    others = np.ones((2, 4), bool)
    others[planted.INDUCTION] = others[planted.PREVIOUS] = False
    assert abs(direct[planted.PREVIOUS]) < 0.02 * whole
    assert np.abs(found.values[:, others]).max() < 0.02 * whole


@pytest.mark.slow
def test_heads_left_out_are_not_measured():
    found = effect_split(tiny_model(), batches()[0], difference(), heads=[(1, 2)])
    assert np.isfinite(found.values[:, 1, 2]).all()
    assert np.isnan(found.values).sum() == 3 * 17
    with pytest.raises(ValueError, match="unknown how"):
        effect_split(tiny_model(), batches()[0], difference(), "median")
    with pytest.raises(ValueError, match="source is needed"):
        effect_split(tiny_model(), batches()[0], difference(), "resample")


@pytest.mark.slow
def test_direct_effects_of_smollm2_sum_to_the_logit_difference(smollm2):
    model, tokenizer = smollm2
    pairs = tasks.encode_pairs(tasks.ioi(6, seed=0), tokenizer)
    metric = LogitDifference.of(pairs.clean, pairs.answers, pairs.wrong)
    found = direct_effects(model, pairs.clean, metric, rows=True)
    np.testing.assert_allclose(found.total, found.metric, rtol=1e-4)
    assert found.heads.mean("row").top(1)[0][0] == (23, 3)
