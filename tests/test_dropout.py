"""Dropout as an edit: random in training, absent in measuring."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_model, tiny_tokens

import jaxheads as jh
from jaxheads.data import ArrayRows
from jaxheads.methods.fine_tuning import FineTuning
from jaxheads.methods.method import TextData
from jaxheads.train import Fit, Job


def test_values_are_dropped_at_the_rate_and_keep_their_mean():
    model, tokens = tiny_model(), tiny_tokens(8, 32)
    sites = {"attn_out": None, "mlp_out": None}
    plain = model(tokens, taps=("attn_out",)).taps["attn_out"][0]
    edits = jh.dropout(model.config, jax.random.key(0), 0.25)
    taps = model(tokens, edits=edits, taps=tuple(sites)).taps
    kept = np.asarray(taps["attn_out"]) != 0
    assert abs(kept.mean() - 0.75) < 0.02
    # The first layer reads what it did without dropout.
    first = np.where(kept[0], np.asarray(plain) / 0.75, 0)
    np.testing.assert_allclose(taps["attn_out"][0], first, atol=1e-6)
    # Another mask in each layer, at each site, for each key.
    assert 0.5 < (kept[0] == kept[1]).mean() < 0.75
    assert 0.5 < (kept == (np.asarray(taps["mlp_out"]) != 0)).mean() < 0.75
    other = jh.dropout(model.config, jax.random.key(1), 0.25)
    again = np.asarray(model(tokens, edits=other, taps="attn_out").taps["attn_out"]) != 0
    assert 0.5 < (again == kept).mean() < 0.75


def test_a_head_is_dropped_as_one():
    model, tokens = tiny_model(), tiny_tokens(4, 16)
    edits = jh.dropout(model.config, jax.random.key(0), 0.5, ("z",), whole_heads=True)
    z = np.asarray(model(tokens, edits=edits, taps="z").taps["z"])
    gone = (z == 0).all(axis=-1)
    assert 0.4 < gone.mean() < 0.6
    np.testing.assert_array_equal(gone, (z == 0).any(axis=-1))


def test_no_rate_changes_nothing():
    model, tokens = tiny_model(), tiny_tokens(2, 6)
    edits = jh.dropout(model.config, jax.random.key(0), 0.0)
    np.testing.assert_array_equal(model(tokens, edits=edits).logits, model(tokens).logits)


def test_training_drops_and_measuring_does_not():
    model, tokens = tiny_model(), tiny_tokens(8, 8)
    rows = ArrayRows(jh.Batch(tokens, np.ones(tokens.shape, bool)))
    seen = []
    job = Job(on_step=seen.append)
    method = FineTuning(fit=Fit(steps=2, batch_size=8), dropout=0.3, patterns=("norms",))
    method.train(job, model, None, TextData(rows, rows))
    fitted = FineTuning(fit=Fit(steps=2, batch_size=8), patterns=("norms",))
    plain = []
    fitted.train(Job(on_step=plain.append), model, None, TextData(rows, rows))
    # The first loss is that of the untrained model: with dropout another number.
    assert abs(seen[0].metrics["loss"] - plain[0].metrics["loss"]) > 1e-3
    # Two steps of norms hardly move it: measured without dropout, both agree.
    assert seen[1].measured["loss"] == pytest.approx(plain[1].measured["loss"], abs=0.02)


@pytest.mark.parametrize(("rate", "sites"), [(1.0, ("z",)), (-0.1, ("z",)), (0.1, ("logits",))])
def test_bad_dropout_is_refused(rate, sites):
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\)|sites of the stack"):
        jh.dropout(tiny_model().config, jax.random.key(0), rate, sites)
    with pytest.raises(ValueError, match="dropout must lie in"):
        FineTuning(dropout=float(jnp.float32(1.5)))
