"""What only training asks of the model: packed texts, and what blocks keep for the way back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_model, tiny_tokens

import jaxheads as jh
from jaxheads.model.layout import REMAT
from jaxheads.train import language_loss


def test_packed_texts_do_not_see_each_other():
    model, tokens = tiny_model(), tiny_tokens(3, 7)
    alone = model(tokens).logits
    packed = np.concatenate([tokens[0], tokens[1, :5], [0, 0], tokens[2]])[None]
    segments = np.array([1] * 7 + [2] * 5 + [0] * 2 + [3] * 7)[None]
    batch = jh.Batch(packed, segments > 0, None, segments)
    found = model(batch).logits[0]
    for part, row in ((found[:7], alone[0]), (found[7:12], alone[1, :5]), (found[14:], alone[2])):
        np.testing.assert_allclose(part, row, atol=1e-5)
    # Without segments they do, and the first token of a text is no target.
    assert np.abs(model(packed, segments > 0).logits[0, 7:12] - alone[1, :5]).max() > 1e-2
    expected = [*range(1, 7), *range(8, 12), *range(15, 21)]
    assert np.flatnonzero(batch.target_mask[0]).tolist() == expected


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (np.ones((2, 5), int), r"segments have shape \(2, 5\), expected that of tokens, \(2, 6\)"),
        (np.ones((2, 6)), "segments must be integers, got float"),
    ],
)
def test_segments_that_do_not_fit_are_refused(segments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(tiny_tokens(2, 6), segments=segments)


def test_segments_and_a_cache_are_refused():
    from jaxheads.model.cache import empty_cache

    model, tokens = tiny_model(), tiny_tokens(2, 6)
    cache = empty_cache(model.config, 2, 8)
    with pytest.raises(ValueError, match="segments and a cache"):
        model(tokens, segments=np.ones((2, 6), int), cache=cache)


@pytest.mark.optimised
def test_what_is_kept_changes_memory_and_nothing_else():
    model = tiny_model()
    tokens = tiny_tokens(4, 64)
    batch = jh.Batch(tokens, np.ones(tokens.shape, bool))
    found, memory = {}, {}
    for remat in REMAT:
        gradient = jax.jit(
            jax.value_and_grad(
                lambda params, remat=remat: language_loss(
                    jh.Transformer(model.config, params), batch, remat=remat
                )[0]
            )
        )
        compiled = gradient.lower(model.params).compile()
        memory[remat] = compiled.memory_analysis().temp_size_in_bytes
        found[remat] = compiled(model.params)
    for remat in REMAT[1:]:
        for ours, theirs in zip(*map(jax.tree.leaves, (found[remat], found["none"])), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert memory["full"] < memory["dots"] < memory["none"]
    with pytest.raises(ValueError, match="unknown remat 'some'"):
        model(jnp.asarray(tokens), remat="some")
