"""SmolLM2-135M-Instruct against values recorded from Hugging Face transformers (float32, eager).

A difference is relative: its norm over the last axis against the norm of the reference there.
So each position counts at its own scale; position 0 has activations of norm 22,700, the others
of about 100. Where the whole last axis is not recorded (48 of 576 channels, say), the recorded
part is the scale.

`scripts/make_reference.py` makes the values; `make parity` makes them anew and compares.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import jaxheads as jh

pytestmark = pytest.mark.optimised

TOLERANCE = 5e-5
"""Largest accepted relative difference. Measured on x86: 1e-5 at `z`, below 4e-6 elsewhere."""

LOSS_TOLERANCE = 1e-4
"""Largest accepted difference of a token's loss, in nats. Measured: 4e-5."""


@pytest.fixture(scope="module")
def reference(fixtures_dir):
    stored = np.load(fixtures_dir / "smollm2_reference.npz")
    return {name: stored[name] for name in stored.files}


def relative(actual, expected) -> float:
    """The largest norm of a difference along the last axis, relative to the expected norm."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    difference = np.linalg.norm(actual - expected, axis=-1)
    return float((difference / np.linalg.norm(expected, axis=-1)).max())


def losses(logits, ids) -> np.ndarray:
    """-log p of each token but the first: logits [T,V], ids [T] -> [T-1]."""
    log_p = jax.nn.log_softmax(logits[:-1])
    return -np.asarray(jnp.take_along_axis(log_p, jnp.asarray(ids)[1:, None], axis=1)[:, 0])


def _stream(positions, channels, value, _):
    """Chosen channels [P,C] and norms [P] of a residual stream [1,T,D]."""
    rows = value[0, positions]
    return rows[:, channels], jnp.linalg.norm(rows, axis=-1)


def _z(positions, channels, value, _):
    return value[0, positions][..., channels]


def _pattern(queries, keys, value, _):
    """Chosen weights [H,Q,N] and entropies [H,Q] of patterns [1,H,T,S]."""
    rows = value[0][:, queries]
    at = jnp.broadcast_to(keys, (rows.shape[0], *keys.shape))
    return jnp.take_along_axis(rows, at, axis=-1), jax.scipy.special.entr(rows).sum(-1)


def measured(model, reference, **further):
    """One pass over the long prompt, with taps that gather what is recorded."""
    at = (reference["resid_positions"], reference["resid_channels"])
    streams = ("embed", "resid_mid", "resid_post", "final")
    taps = {site: jh.Tap(site, Partial(_stream, *at)) for site in streams}
    at = (reference["z_positions"], reference["z_channels"])
    taps["z"] = jh.Tap("z", Partial(_z, *at))
    return model(reference["tokens"][None], taps=taps | further)


@pytest.fixture(scope="module")
def fused(smollm2, reference):
    return measured(smollm2[0], reference)


@pytest.fixture(scope="module")
def dense(smollm2, reference):
    at = (reference["pattern_queries"], reference["pattern_keys"])
    return measured(smollm2[0], reference, pattern=jh.Tap("pattern", Partial(_pattern, *at)))


@pytest.fixture(params=["fused", "dense"])
def found(request):
    """Without and with a tap on patterns: two ways through attention."""
    return request.getfixturevalue(request.param)


def test_the_tokenizer_gives_the_recorded_prompt(smollm2, reference, fixtures_dir):
    _, tokenizer = smollm2
    for name, file in (("tokens", "long.txt"), ("short_tokens", "short.txt")):
        text = (fixtures_dir / "text" / file).read_text(encoding="utf-8")
        assert tokenizer.encode(text) == reference[name].tolist()


@pytest.mark.parametrize("site", ["embed", "resid_mid", "resid_post", "final"])
def test_residual_stream(found, reference, site):
    channels, norms = found.taps[site]
    assert relative(channels, reference[site]) < TOLERANCE
    assert relative(norms[..., None], reference[f"{site}_norm"][..., None]) < TOLERANCE


def test_z(found, reference):
    assert relative(found.taps["z"], reference["z"]) < TOLERANCE


def test_pattern(dense, reference):
    weights, entropy = dense.taps["pattern"]
    # A row of weights sums to one: that is its scale, whatever part of it is recorded.
    np.testing.assert_allclose(weights, reference["pattern"], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(entropy, reference["pattern_entropy"], atol=TOLERANCE, rtol=0)
    future = reference["pattern_keys"] > reference["pattern_queries"][:, None]
    assert future.any() and not np.asarray(weights)[:, :, future].any()


def test_logits(found, reference):
    logits = np.asarray(found.logits[0])[reference["logit_positions"]]
    top = np.take_along_axis(logits, reference["top_ids"], axis=-1)
    assert relative(top, reference["top_logits"]) < TOLERANCE
    assert relative(logits[:, reference["random_ids"]], reference["random_logits"]) < TOLERANCE
    np.testing.assert_array_equal(logits.argmax(-1), reference["top_ids"][:, 0])
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    np.testing.assert_allclose(normalizer, reference["log_normalizer"], rtol=TOLERANCE)


def test_losses_and_perplexity_of_the_long_text(found, reference, fixtures_dir):
    ours = losses(found.logits[0], reference["tokens"])
    np.testing.assert_allclose(ours, reference["long_losses"], atol=LOSS_TOLERANCE, rtol=0)
    recorded = json.loads((fixtures_dir / "smollm2_reference.json").read_text(encoding="utf-8"))
    expected = recorded["perplexity"]["text/long.txt"]
    assert np.exp(ours.mean(dtype=np.float64)) == pytest.approx(expected, rel=1e-5)


def test_left_padded_batch(smollm2, reference):
    model, _ = smollm2
    batch = jh.Batch(reference["padded_tokens"], reference["padded_mask"])
    last = np.asarray(jh.last_logits(model, batch))
    top = np.take_along_axis(last, reference["padded_top_ids"], axis=-1)
    assert relative(top, reference["padded_top_logits"]) < TOLERANCE
    np.testing.assert_array_equal(last.argmax(-1), reference["padded_top_ids"][:, 0])


def test_perplexity_of_the_short_text_in_a_padded_batch(smollm2, reference, fixtures_dir):
    """Through our own metric; padding must not count."""
    model, _ = smollm2
    recorded = json.loads((fixtures_dir / "smollm2_reference.json").read_text(encoding="utf-8"))
    batch = jh.pack([reference["short_tokens"]], length=180, side="left", pad=7)
    expected = recorded["perplexity"]["text/short.txt"]
    assert float(jh.perplexity(model, batch)) == pytest.approx(expected, rel=1e-5)
