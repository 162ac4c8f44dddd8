"""Taps: every site can be read, whole or reduced inside the layer scan."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from tiny import close, tiny_model, tiny_tokens

import jaxheads as jh
from jaxheads.model.context import as_taps
from jaxheads.sites import axis_sizes

pytestmark = pytest.mark.optimised

CONFIG = tiny_model().config
SIZES = {**axis_sizes(CONFIG), "B": 2, "T": 14, "S": 14}


def every_site():
    return tiny_model()(tiny_tokens(), taps=tuple(jh.SITES)).taps


@pytest.mark.parametrize("site", jh.SITES.values(), ids=lambda site: site.name)
def test_every_site_has_its_documented_shape(site):
    value = every_site()[site.name]
    axes = site.signature.strip("[]").split(",")
    assert value.shape == tuple(SIZES[axis] for axis in axes)
    assert value.dtype == jnp.float32
    assert np.isfinite(np.asarray(value)).all()


def test_sites_fit_together():
    found, params = every_site(), tiny_model().params
    close(found["resid_pre"][0], found["embed"])
    np.testing.assert_array_equal(found["resid_pre"][1:], found["resid_post"][:-1])
    close(found["resid_mid"], found["resid_pre"] + found["attn_out"])
    close(found["resid_post"], found["resid_mid"] + found["mlp_out"])
    close(found["attn_out"], found["head_out"].sum(3))
    # Rotation changes no norm, and none at position 0.
    close(*(np.linalg.norm(found[s], axis=-1) for s in ("q", "q_pre")))
    np.testing.assert_array_equal(found["k"][:, :, 0], found["k_pre"][:, :, 0])
    q_key = np.repeat(found["k"], 3, axis=3)
    scores = np.einsum("lbthe,lbshe->lbhts", found["q"], q_key) / np.sqrt(8)
    causal = np.tril(np.ones((14, 14), bool))
    close(found["scores"][..., causal], scores[..., causal])
    close(found["pattern"], jax.nn.softmax(found["scores"], axis=-1))
    close(
        found["mlp_out"],
        np.einsum("lbtf,lfd->lbtd", found["neurons"], params["blocks"]["mlp"]["down"]),
    )
    close(found["logits"], found["final"] @ params["embed"]["tokens"].T)


def test_tapping_changes_nothing():
    close(every_site()["logits"], tiny_model()(tiny_tokens()).logits)


# The forms in which taps are asked for


def test_names_in_every_form():
    assert list(as_taps("z")) == list(as_taps(["z"])) == list(as_taps(("z", "z"))) == ["z"]
    assert list(as_taps(("z", "pattern"))) == ["z", "pattern"]
    assert as_taps({"mine": "z", "q": None})["mine"] == jh.Tap("z")
    assert as_taps({"q": None})["q"] == jh.Tap("q")
    assert as_taps(()) == as_taps({}) == as_taps([]) == {}
    assert as_taps({"z": jh.head_norm})["z"].reduce.func is jh.head_norm


def times(factor, value, context):
    return factor * value.mean(axis=1)


def own_attention(value, context):
    """How much each head attends to its own token, next to the size of its output."""
    own = jnp.diagonal(context.pattern, axis1=-2, axis2=-1)
    return {"own": own, "size": jh.head_norm(value, context)}


def test_a_reducer_gives_what_reducing_the_stack_gives():
    factor = np.random.default_rng(0).normal(size=(6, 1)).astype(np.float32)
    taps = {
        "z": jh.head_norm,
        "twice": jh.Tap("z", jh.head_norm),
        "last": jh.Tap("z", jh.last_token),
        "sum": jh.Tap("z", jh.token_sum),
        "mean": jh.Tap("z", Partial(times, factor)),
        "whole": "z",
        "read": jh.Tap("z", own_attention, needs=("pattern",)),
        "layer": jh.Tap("resid_pre", lambda value, context: context.layer),
        "embed": jh.head_norm,
        "logits": jh.last_token,
    }
    found, full = tiny_model()(tiny_tokens(), taps=taps).taps, every_site()
    assert set(found) == set(taps)
    norms = np.linalg.norm(full["z"], axis=-1)
    for name in ("z", "twice"):
        close(found[name], norms)
    close(found["read"]["size"], norms)
    close(found["read"]["own"], np.diagonal(full["pattern"], axis1=-2, axis2=-1))
    close(found["last"], full["z"][:, :, -1])
    close(found["sum"], full["z"][:, :, 1:].sum((1, 2)))
    close(found["mean"], factor * full["z"].mean(2))
    close(found["whole"], full["z"])
    np.testing.assert_array_equal(found["layer"], [0, 1, 2])
    close(found["embed"], np.linalg.norm(full["embed"], axis=-1))
    close(found["logits"], full["logits"][:, -1])


def test_arrays_of_a_partial_are_traced_not_baked_in():
    traces = []

    def count(factor, value, context):
        traces.append(1)
        return factor * value.mean(axis=1)

    first, second = (
        tiny_model()(tiny_tokens(), taps={"z": Partial(count, jnp.float32(f))}).taps["z"]
        for f in (1, 2)
    )
    close(second, 2 * first)
    # The scan may trace its body more than once; another value must not add to that.
    once = len(traces)
    tiny_model()(tiny_tokens(), taps={"z": Partial(count, jnp.float32(3))})
    assert len(traces) == once


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out_of_reducers(side):
    batch = jh.pack([list(tiny_tokens()[0]), list(tiny_tokens()[1, :9])], side=side)
    taps = {"z": None, "last": jh.Tap("z", jh.last_token), "sum": jh.Tap("z", jh.token_sum)}
    found = tiny_model()(batch, taps=taps).taps
    z = np.asarray(found["z"])
    short = z[:, 1, 5:] if side == "left" else z[:, 1, :9]
    close(found["last"], np.stack([z[:, 0, -1], short[:, -1]], axis=1))
    close(found["sum"], z[:, 0, 1:].sum(1) + short[:, 1:].sum(1))


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        ("patern", "unknown site 'patern'. Did you mean 'pattern'"),
        (("z", "zz"), "unknown site 'zz'. Did you mean 'z'"),
        ({"mine": None}, "unknown site 'mine'"),
        ({"norm": jh.head_norm}, "unknown site 'norm'"),
        ({"mine": "heads_out"}, "unknown site 'heads_out'. Did you mean 'head_out'"),
        ({"z": jh.Tap("z", jh.head_norm, needs=("score",))}, "unknown site 'score'"),
    ],
)
def test_a_tap_that_cannot_be_honoured_is_refused(taps, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_model()(tiny_tokens(), taps=taps)


def test_what_is_no_tap_is_refused():
    with pytest.raises(TypeError, match="tap 'z' must be a site name, a Tap or a reducer, got 3"):
        tiny_model()(tiny_tokens(), taps={"z": 3})


def test_the_last_token_of_a_site_with_its_tokens_elsewhere():
    found = tiny_model()(tiny_tokens(), taps={"pattern": jh.last_token}).taps["pattern"]
    close(found, every_site()["pattern"][:, :, :, -1])


def test_the_token_sum_of_a_site_with_its_tokens_elsewhere():
    # Six tokens and six heads: the wrong axis has the right size.
    tokens = tiny_tokens(length=6)
    found = tiny_model()(tokens, taps={"pattern": jh.token_sum, "full": "pattern"}).taps
    close(found["pattern"], found["full"][:, :, :, 1:].sum((1, 3)))


# Memory


def temporary_bytes(function):
    compiled = jax.jit(function).lower(tiny_model(), tiny_tokens()).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_a_reducer_keeps_memory_flat():
    def inside(model, tokens):
        return model(tokens, taps={"head_out": jh.head_norm}).taps["head_out"]

    def after(model, tokens):
        return jh.head_norm(model(tokens, taps="head_out").taps["head_out"], None)

    assert jax.eval_shape(inside, tiny_model(), tiny_tokens()).shape == (3, 2, 14, 6)
    stack = 4 * 3 * 2 * 14 * 6 * 40
    saved = temporary_bytes(after) - temporary_bytes(inside)
    # All but the one layer that is always alive.
    assert saved >= stack * 2 / 3


# Means over data


def batches():
    rows = [list(row) for row in tiny_tokens(4)]
    return [
        jh.pack([rows[0], rows[1][:9]], side="left"),
        jh.pack([rows[2][:1], rows[3][:5]], side="right", length=14),
    ]


@pytest.mark.parametrize(
    "site",
    [
        "z",
        "embed",
        pytest.param("final"),
    ],
)
def test_mean_activation_leaves_out_padding_and_first_tokens(site):
    kept = []
    for batch in batches():
        value = np.asarray(tiny_model()(batch, taps=tuple(jh.SITES)).taps[site])
        value = value if jh.SITES[site].stacked else value[None]
        for row, mask in enumerate(batch.mask):
            kept.append(value[:, row, mask][:, 1:])
    expected = np.concatenate(kept, axis=1)
    assert expected.shape[1] == 13 + 8 + 0 + 4
    expected = expected.mean(1) if jh.SITES[site].stacked else expected[0].mean(0)
    close(jh.mean_activation(tiny_model(), batches(), site), expected)


def test_mean_activation_refuses():
    model = tiny_model()
    with pytest.raises(ValueError, match="no tokens to average"):
        jh.mean_activation(model, [])
    with pytest.raises(ValueError, match="no tokens to average"):
        jh.mean_activation(model, [jh.pack([[3], [4]], length=14)])
    with pytest.raises(ValueError, match=re.escape("site 'pattern' [L,B,H,T,S] has no mean")):
        jh.mean_activation(model, batches(), "pattern")
    with pytest.raises(ValueError, match="unknown site 'zz'"):
        jh.mean_activation(model, batches(), "zz")
