"""`LowRank` edits and `lora`: what they compute, fold, save, and restrict to heads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import close, tiny_model, tiny_tokens

import jaxheads as jh
from jaxheads.edits.active import active_layers
from jaxheads.edits.kinds import LowRank
from jaxheads.edits.low_rank import lora, restrict_heads
from jaxheads.model.encoder_decoder import EncoderDecoderConfig
from jaxheads.model.parameters import flatten

SITES = ("q_pre", "k_pre", "v", "attn_out", "mlp_out")
WEIGHTS = {
    "q_pre": "blocks/attn/q",
    "k_pre": "blocks/attn/k",
    "v": "blocks/attn/v",
    "attn_out": "blocks/attn/o",
    "mlp_out": "blocks/mlp/down",
}
CONFIG = tiny_model().config
TOKENS = tiny_tokens()
HEADS = [(0, 1), (2, 4)]


@functools.cache
def fresh() -> jh.Edits:
    return lora(CONFIG, jax.random.key(0), rank=2, alpha=4.0, sites=SITES)


@functools.cache
def trained() -> jh.Edits:
    """Edits whose every factor is away from zero."""
    leaves, tree = jax.tree.flatten(fresh())
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, moved)


def logits(edits=None, model=None):
    return (model or tiny_model())(TOKENS, edits=edits).logits


def test_fresh_factors_have_the_axes_of_what_is_read_and_written_and_change_nothing():
    shapes = {s: (e.down.shape[1:], e.up.shape[1:], e.source) for s, e in fresh().items()}
    assert shapes == {
        "q_pre": ((40, 2), (2, 6, 8), "attn_in"),
        "k_pre": ((40, 2), (2, 2, 8), "attn_in"),
        "v": ((40, 2), (2, 2, 8), "attn_in"),
        "attn_out": ((6, 8, 2), (2, 40), "z"),
        "mlp_out": ((56, 2), (2, 40), "neurons"),
    }
    assert {edit.scale for edit in fresh().values()} == {2.0}
    down = np.asarray(fresh()["q_pre"].down)
    assert np.abs(down).max() <= 40**-0.5 and down.std() > 0.5 * (3 * 40) ** -0.5
    assert not np.array_equal(down, fresh()["v"].down)
    np.testing.assert_array_equal(logits(fresh()), logits(None))


def test_the_edit_is_the_product_added_to_the_weight():
    """Against weights written by hand, without `fold`."""
    model = tiny_model()
    params = dict(flatten(model.params))
    for site, edit in trained().items():
        product = np.einsum("l...r,lrx->l...x", edit.down, edit.up.reshape(3, 2, -1))
        params[WEIGHTS[site]] += edit.scale * product.reshape(params[WEIGHTS[site]].shape)
    by_hand = jh.Transformer(CONFIG, jh.model.parameters.nest(params))
    edited = logits(trained())
    close(edited, logits(model=by_hand))
    assert np.abs(np.asarray(edited - logits())).max() > 0.1


@pytest.mark.parametrize("form", ["alone", "before others", "after others", "between"])
def test_folded_equals_edited(form):
    others = jh.Edits(
        attn_in=jh.Affine(scale=jnp.full((3, 1, 1, 40), 1.1), offset=jnp.full((3, 1, 1, 1), 0.1)),
        q_pre=jh.Affine(scale=jnp.linspace(0.5, 1, 6).reshape(1, 1, 1, 6, 1)),
        v=jh.Affine(offset=jnp.linspace(0, 1, 16).reshape(1, 1, 1, 2, 8)),
        z=jh.Affine(scale=jnp.linspace(0.5, 1, 6).reshape(1, 1, 1, 6, 1)),
        head_out=jh.Affine(scale=jnp.linspace(0.5, 1, 6).reshape(1, 1, 1, 6, 1)),
        attn_out=jh.Affine(scale=jnp.linspace(0.5, 1, 40).reshape(1, 1, 1, 40)),
        neurons=jh.Affine(scale=jnp.linspace(0.5, 1, 56).reshape(1, 1, 1, 56)),
    )
    edits = {
        "alone": trained(),
        "before others": trained() | others,
        "after others": others | trained(),
        "between": others | trained() | others,
    }[form]
    assert not jh.unfoldable(edits, CONFIG)
    close(logits(model=jh.fold(tiny_model(), edits)), logits(edits))


def test_fold_leaves_all_other_weights_alone():
    model = tiny_model()
    folded = jh.fold(model, jh.Edits(v=trained()["v"]))
    before, after = dict(flatten(model.params)), dict(flatten(folded.params))
    assert before.keys() == after.keys() and folded.config == CONFIG
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {"blocks/attn/v"}


def test_what_no_single_weight_computes_is_not_folded():
    edit = trained()["attn_out"]
    sandwich = tiny_model(norm_place="sandwich").config
    assert "stands a norm" in jh.unfoldable({"attn_out": edit}, sandwich)["attn_out"]
    wrong = dataclasses.replace(trained()["q_pre"], source="resid_pre")
    with pytest.raises(ValueError, match=r"'q_pre' \(LowRank\) .* no weight maps .* 'resid_pre'"):
        jh.fold(tiny_model(), {"q_pre": wrong})
    with pytest.raises(ValueError, match=r"'z' \(LowRank\) .* no weight maps its source"):
        jh.fold(tiny_model(), {"z": wrong})
    gated = jh.Edits(v=trained()["v"]).when("decode")
    with pytest.raises(ValueError, match="Gated is not a fixed affine map"):
        jh.fold(tiny_model(), gated)


def test_saved_and_read_again(tmp_path):
    trained().save(tmp_path / "lora.safetensors")
    again = jh.Edits.load(tmp_path / "lora.safetensors")
    assert jax.tree.structure(again) == jax.tree.structure(trained())
    jax.tree.map(np.testing.assert_array_equal, again, trained())
    assert "attn_out: LowRank(down=float32[3,6,8,2]" in repr(again)


def test_only_factors_get_a_gradient_and_the_first_goes_to_up():
    def loss(edits):
        return jh.next_token_loss(tiny_model(), jh.pack(list(TOKENS)), edits=edits)

    gradient = jax.jit(jax.grad(loss))(fresh())
    assert len(jax.tree.leaves(gradient)) == 2 * len(SITES)
    for edit in gradient.values():
        # With B = 0 the gradient of A vanishes.
        assert not np.asarray(edit.down).any() and np.asarray(edit.up).any()


def test_it_maps_over_a_stack_and_over_a_gate():
    both = jh.Edits.stack([fresh(), trained()])
    found = jax.jit(jax.vmap(logits))(both)
    close(found, jnp.stack([logits(), logits(trained())]))
    last = np.zeros((1, 14), bool)
    last[:, -1] = True
    gated = logits(trained().when(last))
    close(gated[:, :-1], logits()[:, :-1])
    assert np.abs(np.asarray(gated - logits())[:, -1]).max() > 0.1


def test_restricted_to_heads():
    mask = jh.head_mask(CONFIG, HEADS)
    edits = restrict_heads(
        jh.Edits({s: trained()[s] for s in ("q_pre", "k_pre", "v", "attn_out")}), mask
    )
    up, down = np.asarray(edits["q_pre"].up), np.asarray(edits["attn_out"].down)
    np.testing.assert_array_equal(np.abs(up).max((1, 3)) > 0, mask)
    np.testing.assert_array_equal(np.abs(down).max((2, 3)) > 0, mask)
    # Heads 1 and 4 read key/value heads 0 and 1.
    np.testing.assert_array_equal(
        np.abs(edits["v"].up).max((1, 3)) > 0, [[True, False], [False, False], [False, True]]
    )
    (layers,) = active_layers(jh.Edits.stack([edits])["attn_out"], 3)
    np.testing.assert_array_equal(layers, [True, False, True])
    # Heads of layer 1 and head 0.0 compute what they did.
    taps = ("q_pre", "k_pre")
    plain, changed = (tiny_model()(TOKENS, edits=e, taps=taps).taps for e in (None, edits))
    moved = np.abs(np.asarray(plain["q_pre"] - changed["q_pre"]))[0].max((0, 1, 3))
    np.testing.assert_array_equal(moved > 0, mask[0])
    made = lora(CONFIG, jax.random.key(0), 2, sites=("attn_out",), heads=HEADS)
    np.testing.assert_array_equal(np.abs(made["attn_out"].down).max((2, 3)) > 0, mask)


@pytest.mark.parametrize("zero", ["down", "up", "scale", None])
def test_layers_without_one_of_the_factors_are_not_active(zero):
    edit = trained()["v"]
    if zero == "scale":
        edit = dataclasses.replace(edit, scale=0.0)
    elif zero:
        edit = dataclasses.replace(edit, **{zero: getattr(edit, zero).at[1].set(0)})
    (found,) = active_layers(jh.Edits.stack([jh.Edits(v=edit)])["v"], 3)
    expected = {"scale": [0, 0, 0], None: [1, 1, 1]}.get(zero, [1, 0, 1])
    np.testing.assert_array_equal(found, expected)


def test_half_precision_follows_the_activations():
    model = tiny_model().astype("bfloat16")
    out = model(TOKENS, edits=trained(), taps="q_pre").taps["q_pre"]
    assert out.dtype == jnp.bfloat16
    assert jh.fold(model, trained()).params["blocks"]["attn"]["q"].dtype == jnp.bfloat16


def test_mistakes_are_named():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        lora(CONFIG, key, 0)
    with pytest.raises(ValueError, match=r"each once, got \('v', 'v'\)"):
        lora(CONFIG, key, sites=("v", "v"))
    with pytest.raises(ValueError, match="site of a low-rank change"):
        lora(CONFIG, key, sites=("neurons",))
    with pytest.raises(ValueError, match=r"head 7\.0 is out of range"):
        lora(CONFIG, key, heads=[(7, 0)])
    with pytest.raises(ValueError, match="'mlp_out' has no heads"):
        lora(CONFIG, key, sites=("mlp_out",), heads=HEADS)
    with pytest.raises(ValueError, match="'z' is Affine, expected LowRank"):
        restrict_heads(jh.mask_heads(CONFIG, HEADS), jh.head_mask(CONFIG, HEADS))
    with pytest.raises(ValueError, match=r"'v'.*up has axes \(6, 8\) .* expected \(2, 8\)"):
        logits(jh.Edits(v=trained()["q_pre"]))
    mixed = LowRank(trained()["v"].down, jnp.zeros((3, 5, 2, 8)), "attn_in")
    with pytest.raises(ValueError, match="down has rank 2 and up 5"):
        logits(jh.Edits(v=mixed))


def test_attention_to_an_encoder_and_the_encoder_itself():
    encoder = CONFIG.replace(causal=False)
    config = EncoderDecoderConfig(encoder=encoder, decoder=CONFIG.replace(cross=True))
    model = jh.EncoderDecoder.random(config, jax.random.key(0))
    made = lora(config.decoder, jax.random.key(1), 2, sites=("q_pre", "cross.q", "cross.attn_out"))
    made = made | lora(encoder, jax.random.key(2), 2).under("encoder")
    edits = jax.tree.map(lambda leaf: leaf + 0.1, made)
    plain, edited, folded = (
        m(TOKENS, TOKENS[:, :5], edits=e).logits
        for m, e in ((model, None), (model, edits), (jh.fold(model, edits), None))
    )
    close(folded, edited)
    assert np.abs(np.asarray(edited - plain)).max() > 0.01
