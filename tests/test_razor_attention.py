"""RazorAttention: scores of key/value heads on repeated tokens, and what the best are worth."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import close, tiny_model

from jaxheads.decode.head_cache import HeadCache
from jaxheads.decode.kinds import HeadKinds
from jaxheads.methods import razor_attention as razor
from jaxheads.tasks import repeated_tokens


def by_hand(model, tokens, length, copies):
    """Induction and echo score of key/value heads, in loops over queries and copies."""
    maps = np.asarray(model(tokens, taps="pattern").taps["pattern"], np.float64)
    totals = np.zeros((2, *maps.shape[:3]))
    for t in range(1 + length, 1 + copies * length):
        for back in range(length, t, length):
            totals[0] += maps[..., t, t - back + 1]
            totals[1] += maps[..., t, t - back]
    means = totals.mean(axis=2) / ((copies - 1) * length)
    kv = model.config.n_kv_heads
    return means.reshape(*means.shape[:2], kv, -1).max(axis=-1)


def test_scores_are_attention_to_all_earlier_copies():
    model = tiny_model()
    tokens = repeated_tokens(2, length=7, seed=3, vocab_size=50, first_id=1)
    rows = razor.copied_tokens(tokens, 4)
    assert rows.shape == (2, 29) and (rows[:, 1:8] == rows[:, 22:]).all()
    np.testing.assert_array_equal(rows[:, :15], tokens)
    found = razor.copy_scores(model, count=2, length=7, seed=3, ids=50, first_id=1)
    for scores, expected in zip(found, by_hand(model, rows, 7, 4), strict=True):
        assert scores.shape == (3, 2)
        close(scores, expected)


def test_shares_choose_the_best_of_both_scores():
    rng = np.random.default_rng(0)
    induction, echo = rng.random((2, 30, 3))
    ranks = razor.ranks(induction, echo)
    best = np.zeros((30, 3), bool)
    best.ravel()[np.argsort(-induction.ravel())[:13]] = True
    best.ravel()[np.argmax(echo)] = True
    np.testing.assert_array_equal(ranks >= -1, best)
    # Any other budget has the same proportion: 2 * 14 % and 2 * 1 %, rounded.
    twice = set(np.argsort(-induction.ravel())[:25]) | set(np.argsort(-echo.ravel())[:2])
    assert set(np.argsort(-ranks.ravel())[: len(twice)]) == twice
    alone = razor.ranks(induction, echo, (0.2, 0.0))
    np.testing.assert_array_equal(np.argsort(-alone, axis=None), np.argsort(-induction, axis=None))


def test_kinds_keep_the_shares_and_compensate():
    model = tiny_model()
    options = {"count": 1, "length": 7, "ids": 50, "first_id": 1}
    kinds = razor.razor_kinds(model, induction=0.5, echo=0.2, sinks=2, recent=5, **options)
    induction, echo = razor.copy_scores(model, **options)
    expected = (induction >= np.sort(induction, axis=None)[-3]) | (echo == echo.max())
    np.testing.assert_array_equal(kinds.full, expected)
    assert kinds.compensate and (kinds.sinks, kinds.recent) == (2, 5)
    scores = razor.scores(model, **options)
    assert scores.shape == (3, 2)
    first = HeadKinds.all_streaming(model.config).keeping(scores, heads=1).full
    assert first.sum() == 1 and induction[first] == induction.max()


def test_mistakes_are_named():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"4 times 30 tokens and one in front exceed the .* of 64"):
        razor.scores(model, first_id=1, length=30)
    with pytest.raises(ValueError, match="copies must be at least 2, got 1"):
        razor.scores(model, first_id=1, length=4, copies=1)
    with pytest.raises(ValueError, match=r"shares must lie in \[0, 1\] .* got \(1.5, 0.1\)"):
        razor.ranks(np.zeros((2, 2)), np.zeros((2, 2)), (1.5, 0.1))
    with pytest.raises(ValueError, match="not both be 0"):
        razor.ranks(np.zeros((2, 2)), np.zeros((2, 2)), (0.0, 0.0))
    with pytest.raises(ValueError, match=r"echo has shape \[2, 1\], expected .* \[2, 2\]"):
        razor.ranks(np.zeros((2, 2)), np.zeros((2, 1)))


@jax.jit
def copy_losses(model, tokens, cache):
    """Nats per token of copies 2, 3 and 4 of a row [1,481] that is read into a cache."""
    slots = jnp.arange(120, 480)[None]
    logits = model(tokens, cache=cache, logits_at=slots).logits
    chosen = jnp.take_along_axis(logits, tokens[:, 121:, None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - chosen).reshape(3, 120).mean(axis=1)


@pytest.mark.slow
def test_smollm2_copies_with_the_chosen_heads_and_not_with_random_ones(smollm2):
    model, tokenizer = smollm2
    first, small = tokenizer.bos_id, {"sinks": 4, "recent": 32}
    induction, echo = razor.copy_scores(model, count=8, first_id=first, seed=1)
    chosen = HeadKinds.all_streaming(model.config, compensate=True, **small).keeping(
        razor.ranks(induction, echo), heads=14
    )
    assert np.unravel_index(induction.argmax(), induction.shape) == (18, 2) and echo.max() > 0.7
    tokens = repeated_tokens(2, length=120, seed=77, vocab_size=razor.COMMON, first_id=first)
    rows = razor.copied_tokens(tokens, 4)

    def losses(kinds):
        cache = HeadCache.empty(model.config, kinds, 1, rows.shape[1])
        return np.mean([copy_losses(model, row[None], cache) for row in rows], axis=0)

    rng = np.random.default_rng(0)
    draws = [chosen.keeping(rng.random(chosen.full.shape), heads=14) for _ in range(5)]
    whole, kept = losses(HeadKinds.all_full(model.config)), losses(chosen)
    random = np.min([losses(kinds) for kinds in draws], axis=0)
    print(whole.round(2), kept.round(2), random.round(2))
    assert (whole < kept).all()
    assert (kept < random - 4).all()
