"""The next token: filters and the repetition penalty against numpy, greedy, bad options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.decode import Sampler
from jaxheads.decode.sampling import _cut, penalised, sample

DRAWS = 4000
LOGITS = np.log([0.02, 0.4, 0.08, 0.25, 0.01, 0.15, 0.09]).astype(np.float32)
NOTHING = np.zeros((DRAWS, 7), bool)


def shares(seed: int = 0, **options) -> np.ndarray:
    """How often each token is drawn."""
    rows = jnp.asarray(np.tile(LOGITS, (DRAWS, 1)))
    drawn = sample(Sampler.of(7, **options), rows, NOTHING, jax.random.key(seed))
    assert drawn.dtype == jnp.int32
    return np.bincount(np.asarray(drawn), minlength=7) / DRAWS


def directly(temperature=1.0, top_k=None, top_p=None, min_p=None) -> np.ndarray:
    """The distribution, each filter by its definition."""
    p = np.exp(LOGITS.astype(np.float64) / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    kept = set(order[:top_k].tolist())
    if top_p is not None:
        p = np.where(np.isin(np.arange(7), list(kept)), p, 0) / p[list(kept)].sum()
        sums = np.cumsum(p[order])
        kept &= set(order[: int(np.searchsorted(sums, top_p - 1e-9)) + 1].tolist())
    if min_p is not None:
        kept &= set(np.flatnonzero(p >= min_p * p.max()).tolist())
    p = np.where(np.isin(np.arange(7), list(kept)), p, 0)
    return p / p.sum()


CASES = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "top_k": {"top_k": 3},
    "more than there are": {"top_k": 100},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.21},
    "min_p, cold": {"min_p": 0.3, "temperature": 0.5},
    "min_p, hot": {"min_p": 0.3, "temperature": 3.0},
    "min_p of nothing": {"min_p": 0.0},
    "top_k, top_p": {"top_k": 4, "top_p": 0.8, "temperature": 1.5},
    "all": {"top_k": 5, "top_p": 0.95, "min_p": 0.25, "temperature": 1.3},
}


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_filtered_distribution(name):
    expected = directly(**CASES[name])
    found = shares(**{"temperature": 1.0, **CASES[name]})
    np.testing.assert_array_equal(found > 0, expected > 0)
    np.testing.assert_allclose(found, expected, atol=0.03)


def test_thresholds_are_those_of_sorting_a_vocabulary():
    """Also of negative logits, zeros of both signs, and tokens ruled out."""
    logits = np.random.default_rng(0).normal(size=(4, 1000)).astype(np.float32) * 5
    logits[:, :3], logits[:, 3:9] = [0.0, -0.0, 1e-40], -np.inf
    falling = -np.sort(-logits, axis=1)
    for k in (1, 7, 500, 994):
        kept = np.isfinite(_cut(jnp.asarray(logits), Sampler.of(1000, temperature=1, top_k=k)))
        np.testing.assert_array_equal(kept, logits >= falling[:, k - 1 : k])
    p = np.exp(falling.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    for least in (1e-6, 0.5, 0.9, 0.99):
        count = (np.cumsum(p, axis=1) < least).sum(axis=1) + 1
        sampler = Sampler.of(1000, temperature=1, top_p=least)
        np.testing.assert_array_equal(np.isfinite(_cut(jnp.asarray(logits), sampler)).sum(1), count)
    whole = _cut(jnp.asarray(logits), Sampler.of(1000, temperature=1, top_p=1.0))
    np.testing.assert_array_equal(whole, logits)


def test_min_p_of_one_is_greedy():
    assert shares(temperature=5.0, min_p=1.0)[1] == 1


def test_the_repetition_penalty_equals_numpy():
    logits = np.random.default_rng(0).normal(size=(3, 11)).astype(np.float32)
    seen = np.random.default_rng(1).random((3, 11)) < 0.5
    expected = logits.copy()
    for row, column in zip(*np.nonzero(seen), strict=True):
        value = logits[row, column]
        expected[row, column] = value / 1.7 if value > 0 else value * 1.7
    found = penalised(jnp.asarray(logits), jnp.asarray(seen), jnp.float32(1.7))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (np.asarray(found)[seen] < logits[seen]).all()


def test_the_penalty_comes_before_the_temperature_and_acts_on_greedy_too():
    logits, seen = jnp.asarray([[2.0, 1.5, -1.0]]), jnp.asarray([[True, False, False]])
    key = jax.random.key(0)
    assert int(sample(Sampler.of(3), logits, seen, key)[0]) == 0
    assert int(sample(Sampler.of(3, repetition_penalty=1.5), logits, seen, key)[0]) == 1
    cold = Sampler.of(3, temperature=1e-3, repetition_penalty=1.5)
    assert int(sample(cold, logits, seen, key)[0]) == 1


def test_values_of_options_share_one_program():
    traces = []

    @jax.jit
    def draw(sampler, logits, key):
        traces.append(1)
        return sample(sampler, logits, NOTHING[:1], key)

    def of(**options):
        draw(Sampler.of(7, **options), LOGITS[None], jax.random.key(0))
        return len(traces)

    assert of(temperature=1.0, top_k=3) == 1
    assert of(temperature=0.3, top_p=0.5, min_p=0.2, repetition_penalty=1.2) == 1
    assert of(temperature=1.0) == 2  # nothing is searched for
    assert of(temperature=2.0, min_p=0.1) == 2
    assert of() == 3  # nothing is drawn
    assert of(top_k=2, repetition_penalty=2.0) == 3


BAD = {
    "temperature": ({"temperature": -1.0}, "temperature must be 0 or more, got -1.0"),
    "no temperature": ({"temperature": float("nan")}, "temperature must be 0 or more, got nan"),
    "top_k": ({"top_k": 0}, "top_k must be at least 1, got 0"),
    "top_p": ({"top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5"),
    "min_p": ({"min_p": -0.1}, r"min_p must lie in \[0, 1\], got -0.1"),
    "penalty": ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0, got 0.0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_refused(name):
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        Sampler.of(7, **options)
