"""Contrastive decoding between two edits of a model, and DoLa between two depths of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import close, tiny_model, tiny_tokens

import jaxheads as jh
from jaxheads.decode.contrast import Contrasted, DoLa, contrast, divergence

CONFIG = tiny_model().config
MASKED = jh.mask_heads(CONFIG, [(0, 1), (1, 3), (2, 0)])
ROWS = [tiny_tokens(1, 12)[0].tolist(), tiny_tokens(1, 7, 1)[0].tolist()]


def continued(model, **options):
    return jh.generate(model, jh.pack(ROWS), max_new_tokens=8, **options).rows()


def by_hand(choose, count=8):
    """Greedy decoding by whole passes; `choose` maps tokens to scores of the next one."""
    found = []
    for row in ROWS:
        tokens = list(row)
        for _ in range(count):
            padded = np.asarray([tokens + [0] * (20 - len(tokens))])
            tokens.append(int(np.argmax(choose(padded, len(tokens) - 1))))
        found.append(tokens[-count:])
    return found


def logits(tokens, edits=None):
    return tiny_model()(tokens, edits=edits).logits[0]


@pytest.mark.parametrize("expert", [None, jh.mask_heads(CONFIG, [(2, 3)])], ids=["plain", "edited"])
def test_generation_contrasts_two_edits_of_a_model(expert):
    def choose(tokens, last):
        p, q = (jax.nn.log_softmax(logits(tokens, e)[last]) for e in (expert, MASKED))
        return np.where(p >= p.max() + np.log(0.2), p - 0.7 * q, -np.inf)

    model = Contrasted(tiny_model(), MASKED, strength=0.7, plausible=0.2)
    assert continued(model, edits=expert) == by_hand(choose)
    assert continued(model, edits=expert, chunk=5) == by_hand(choose)


def test_without_strength_it_is_the_model_itself():
    model = tiny_model()
    assert continued(Contrasted(model, MASKED, strength=0.0)) == continued(model)
    # One plausible token is taken whatever the contrast says.
    assert continued(Contrasted(model, MASKED, plausible=1.0)) == continued(model)


def test_the_same_edits_leave_only_what_is_plausible():
    same = Contrasted(tiny_model(), {}, strength=1.0, plausible=0.1)
    scores = same(tiny_tokens()).logits
    probability = jax.nn.softmax(tiny_model()(tiny_tokens()).logits)
    plausible = probability >= 0.1 * probability.max(axis=-1, keepdims=True)
    close(jnp.where(plausible, scores, 0), jnp.zeros_like(scores))
    assert (np.asarray(scores)[~np.asarray(plausible)] == -np.inf).all()


@pytest.mark.parametrize("normed", [False, True])
def test_dola_takes_the_layer_that_differs_most(normed):
    base = tiny_model(tied=False)
    model = DoLa(base, (0, 1, 2), normed=normed)

    def choose(tokens, last):
        out = base(tokens, taps="resid_pre")
        mature = jax.nn.log_softmax(out.logits[0, last])
        best = None
        for layer in range(3):
            x = out.taps["resid_pre"][layer, :, last : last + 1]
            x = base.final_norm(x, base.config) if normed else x
            early = jax.nn.log_softmax(base.logits_of(x)[0, 0])
            middle = np.log((np.exp(mature) + np.exp(early)) / 2)
            js = 0.5 * (
                np.sum(np.exp(mature) * (mature - middle))
                + np.sum(np.exp(early) * (early - middle))
            )
            if best is None or js > best[0]:
                best = (js, mature - early)
        return np.where(mature >= mature.max() + np.log(0.1), best[1], -np.inf)

    assert continued(model) == by_hand(choose)


def test_dola_of_equal_depths_is_zero():
    """Where blocks write nothing, every exit is the last layer."""
    base = tiny_model()
    silent = jh.Edits(
        attn_out=jh.Affine(jnp.zeros((3, 1, 1, 1))), mlp_out=jh.Affine(jnp.zeros((3, 1, 1, 1)))
    )
    scores = DoLa(base, (0, 1, 2), normed=True)(tiny_tokens(), edits=silent).logits
    plausible = np.isfinite(np.asarray(scores))
    assert plausible.any(axis=-1).all()
    close(np.where(plausible, scores, 0), np.zeros_like(scores))


def test_candidates_are_even_layers_of_a_half():
    tied, untied = tiny_model(), tiny_model(tied=False)
    assert DoLa.of(tied, "low").layers == ()
    assert DoLa.of(untied, "low").layers == (0,)
    assert DoLa.of(tied, "high").layers == (2,)
    with pytest.raises(ValueError, match="candidates must be 'low' or 'high', got 'middle'"):
        DoLa.of(tied, "middle")
    with pytest.raises(ValueError, match=r"layers must lie in 0..2, at least one, got \(\)"):
        DoLa.of(tied, "low")(tiny_tokens())
    with pytest.raises(ValueError, match=r"layers must lie in 0..2, at least one, got \(3,\)"):
        DoLa(tied, (3,))(tiny_tokens())


def test_the_parts_by_hand():
    p, q = jnp.log(jnp.asarray([0.5, 0.3, 0.2])), jnp.log(jnp.asarray([0.2, 0.3, 0.5]))
    np.testing.assert_allclose(contrast(p, q, 1.0, 0.5), [np.log(2.5), 0.0, -np.inf], atol=1e-6)
    middle = np.asarray([0.35, 0.3, 0.35])
    expected = 0.5 * (
        np.sum(np.exp(p) * np.log(np.exp(p) / middle))
        + np.sum(np.exp(q) * np.log(np.exp(q) / middle))
    )
    close(divergence(p, q), expected)
    close(divergence(p, p), 0.0)


def test_a_policy_reads_a_plain_model_only():
    from jaxheads.decode.policies import Full

    with pytest.raises(ValueError, match="a policy reads a plain model, got Contrasted"):
        continued(Contrasted(tiny_model(), MASKED), policy=Full())
