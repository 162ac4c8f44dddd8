"""The transformer as one pure function: padding, causality, caches, numerics, bad input."""

import dataclasses
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import KV_HEADS, close, tiny_model, tiny_tokens

import jaxheads as jh
from jaxheads.model import Image, Rope, empty_cache, parameter_table
from jaxheads.model.config import ACTIVATIONS

SHORT = 9
PAD_ID = 96


def offset_edit(seed=5):
    offset = np.random.default_rng(seed).normal(size=(3, 6, 8)).astype(np.float32)
    return jh.offset_heads(tiny_model().config, offset)


def padded(side):
    """Two rows of 14 and 9 tokens in one rectangle."""
    full, short = tiny_tokens()
    return jh.pack([list(full), list(short[:SHORT])], side=side, pad=PAD_ID)


def real(side):
    """The columns of the short row that hold tokens."""
    return slice(14 - SHORT, 14) if side == "left" else slice(0, SHORT)


# Padding and causality


@pytest.mark.parametrize("kind", KV_HEADS)
@pytest.mark.parametrize("how", ["plain", "tapped and edited"])
def test_a_row_is_the_same_alone_and_padded_on_either_side(kind, how):
    model = tiny_model(kind)
    options = {} if how == "plain" else {"taps": ("pattern",), "edits": offset_edit()}
    alone = model(tiny_tokens()[1:, :SHORT], **options)
    outputs = {side: model(padded(side), **options) for side in ("left", "right")}
    for side, output in outputs.items():
        columns = real(side)
        close(output.logits[1, columns], alone.logits[0])
        if how != "plain":
            close(output.taps["pattern"][:, 1, :, columns, columns], alone.taps["pattern"][:, 0])
    # The full row does not see how its neighbour is padded either.
    close(outputs["left"].logits[0], outputs["right"].logits[0])


def test_what_stands_in_the_padding_is_never_read():
    batch = padded("left")
    other = batch.replace(tokens=np.where(batch.mask, batch.tokens, 3))
    model = tiny_model()
    np.testing.assert_array_equal(model(batch).logits[batch.mask], model(other).logits[batch.mask])


def test_a_row_of_padding_only_stays_finite():
    mask = np.array([[True] * 14, [False] * 14])
    assert np.isfinite(tiny_model()(tiny_tokens(), mask).logits).all()


@pytest.mark.parametrize("taps", [(), ("pattern",)], ids=["plain", "tapped"])
def test_a_later_token_changes_nothing_before_it(taps):
    tokens = tiny_tokens()
    changed = tokens.copy()
    changed[:, 10:] = (changed[:, 10:] + 1) % 97
    before, after = (tiny_model()(t, taps=taps) for t in (tokens, changed))
    np.testing.assert_array_equal(before.logits[:, :10], after.logits[:, :10])
    assert np.abs(before.logits[:, 10:] - after.logits[:, 10:]).max() > 0.1
    if taps:
        assert np.triu(after.taps["pattern"], 1).max() == 0
        close(after.taps["pattern"].sum(-1), np.ones((3, 2, 6, 14)))


def test_fused_and_dense_attention_agree():
    close(tiny_model()(tiny_tokens()).logits, tiny_model()(tiny_tokens(), taps="pattern").logits)


# The cache


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("edited", [False, True], ids=["plain", "edited"])
def test_chunks_and_single_tokens_through_the_cache_equal_one_pass(side, edited):
    model = tiny_model()
    scale = jnp.full((3, 1, 1, 2, 1), 1.5)
    edits = offset_edit() | jh.Edits(k=jh.Affine(scale=scale)) if edited else None
    batch = padded("left") if side == "left" else jh.pack([list(r) for r in tiny_tokens()])
    whole = model(batch, edits=edits).logits
    cache, pieces = empty_cache(model.config, batch=2, size=16), []
    for start, stop in ((0, 6), (6, 12), (12, 13), (13, 14)):
        phase = "prefill" if stop - start > 1 else "decode"
        piece = batch.tokens[:, start:stop], batch.mask[:, start:stop]
        output = model(*piece, edits=edits, cache=cache, phase=phase)
        cache = output.cache
        pieces.append(output.logits)
    close(np.concatenate(pieces, axis=1)[batch.mask], np.asarray(whole)[batch.mask])
    assert int(cache.length) == 14
    np.testing.assert_array_equal(cache.mask[:, :14], batch.mask)
    assert not cache.mask[:, 14:].any()


def test_a_full_cache_refuses_more_tokens():
    cache = empty_cache(tiny_model().config, batch=2, size=16).replace(length=jnp.int32(12))
    with pytest.raises(ValueError, match=r"16"):
        tiny_model()(tiny_tokens(length=6), cache=cache)


def test_a_cache_for_another_batch_is_refused_by_name():
    cache = empty_cache(tiny_model().config, batch=1, size=16)
    with pytest.raises(ValueError, match="cache"):
        tiny_model()(tiny_tokens(length=6), cache=cache)


# What is returned, and how precise it is


def test_logits_at_equals_gathering():
    at = np.array([[13, 2], [0, 7]])
    chosen = tiny_model()(tiny_tokens(), logits_at=at).logits
    assert chosen.shape == (2, 2, 97)
    every = np.asarray(tiny_model()(tiny_tokens()).logits)
    close(chosen, np.take_along_axis(every, at[..., None], axis=1))


@pytest.mark.parametrize("at", [np.array([1, 2]), np.array([[14], [3]]), np.array([[1.0], [2.0]])])
def test_logits_at_is_checked(at):
    with pytest.raises(ValueError, match="logits_at"):
        tiny_model()(tiny_tokens(), logits_at=at)


def test_bfloat16_keeps_activations_narrow_and_logits_wide():
    wide, model = tiny_model(), tiny_model().astype("bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.bfloat16.dtype}
    output = model(tiny_tokens(), taps=("embed", "z", "resid_post", "final"))
    assert {value.dtype for value in output.taps.values()} == {jnp.bfloat16.dtype}
    assert output.logits.dtype == jnp.float32
    exact = wide(tiny_tokens()).logits
    # 8 bits of mantissa through 3 layers: about 1 % of the largest logit.
    close(output.logits, exact, 0.03)
    assert np.abs(output.logits - exact).max() > 1e-4


def test_float32_parameters_are_cast_where_they_are_used():
    wide = tiny_model()
    model = jh.Transformer(wide.config.replace(dtype="bfloat16"), wide.params)
    shapes = jax.eval_shape(lambda m: m(tiny_tokens(), taps=("q", "scores", "pattern", "z")), model)
    assert {n: str(v.dtype) for n, v in shapes.taps.items()} == {
        "q": "bfloat16", "scores": "float32", "pattern": "float32", "z": "bfloat16",
    }  # fmt: skip
    assert shapes.logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.float32.dtype}


# The config

IMAGE = Image(8, 8, 4)
CHANGES = {
    # field: (fields of the model that it is changed in, its new value)
    "n_layers": ({}, 2),
    "n_heads": ({}, 4),
    "n_kv_heads": ({}, 3),
    "head_dim": ({}, 10),
    "d_model": ({}, 48),
    "d_mlp": ({}, 64),
    "vocab_size": ({}, 98),
    "context_length": ({}, 8),
    "family": ({}, "gpt2"),
    "causal": ({}, False),
    "windows": ({}, (0, 3, 0)),
    "ropes": ({}, (Rope(100.0),)),
    "rotary_dim": ({}, 4),
    "n_positions": ({}, 64),
    "position_offset": ({"n_positions": 70}, 2),
    "relative_buckets": ({}, 6),
    "relative_distance": ({"relative_buckets": 6}, 5),
    "norm": ({}, "layer"),
    "norm_eps": ({}, 0.1),
    "norm_bias": ({"norm": "layer"}, True),
    "norm_plus_one": ({}, True),
    "norm_place": ({}, "post"),
    "embed_norm": ({}, True),
    "first_attn_norm": ({}, False),
    "final_norm": ({}, False),
    "qkv_bias": ({}, True),
    "o_bias": ({}, True),
    "qk_norm": ({}, "head"),
    "attn_scale": ({}, 0.1),
    "attn_softcap": ({}, 0.5),
    "cross": ({}, True),
    "activation": ({}, "gelu"),
    "gated": ({}, False),
    "mlp_bias": ({}, True),
    "parallel": ({}, True),
    "branch_scale": ({}, True),
    "image": ({"image": IMAGE, "context_length": 5}, Image(8, 8, 4, channels=1)),
    "embed_scale": ({}, 3.0),
    "n_token_types": ({}, 2),
    "head": ({}, "mlm"),
    "head_bias": ({"head": "mlm"}, False),
    "tied": ({}, False),
    "unembed_bias": ({}, True),
    "logit_scale": ({}, 0.5),
    "logit_softcap": ({}, 1.0),
    "pooler": ({}, True),
    "projection": ({}, 7),
    "projected": ({"projection": 7, "head": "none"}, "highest"),
    "eos_id": ({"projection": 7, "head": "none", "projected": "eos"}, 5),
    "dtype": ({}, "bfloat16"),
}


def test_every_config_field_is_in_the_table():
    assert list(CHANGES) == [field.name for field in dataclasses.fields(jh.ModelConfig)]


def shapes_of(config):
    return {path: leaf.shape for path, leaf in parameter_table(config).items()}


@pytest.mark.parametrize("field", CHANGES)
def test_every_config_field_is_read(field):
    """A field that changes shapes asks for other parameters; any other changes what comes out."""
    base, value = CHANGES[field]
    model = tiny_model(**base)
    config = model.config.replace(**{field: value})
    shapes, before = (
        {path: leaf.shape for path, leaf in parameter_table(c).items()}
        for c in (config, model.config)
    )
    if shapes != before:
        with pytest.raises(ValueError, match="the parameter tree does not fit the config"):
            jh.Transformer(config, model.params)
        return
    changed = jh.Transformer(config, model.params)
    if field == "context_length":
        with pytest.raises(ValueError, match="14 tokens exceeds the model's context of 8"):
            changed(tiny_tokens())
    elif field == "family":
        # Read by `export` alone.
        assert changed.config.family == "gpt2"
    else:
        before, after = model(tiny_tokens()), changed(tiny_tokens())
        one = before.logits if before.pooled is None else before.pooled
        other = after.logits if after.pooled is None else after.pooled
        assert np.abs(one - other).max() > 1e-3


def test_activations_differ_from_one_another():
    x = jnp.linspace(-3, 3, 31)
    for one, other in itertools.combinations(ACTIVATIONS.values(), 2):
        assert np.abs(one(x) - other(x)).max() > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 0}, "config.n_layers must be positive, got 0"),
        ({"d_model": -4}, "config.d_model must be positive, got -4"),
        ({"ropes": (Rope(0.0),)}, "config.ropes: base must be positive, got 0.0"),
        ({"ropes": (Rope(), Rope())}, "config.ropes must have 1 or 3 entries, got 2"),
        ({"windows": (4,)}, "config.windows must have 3 entries"),
        ({"rotary_dim": 10}, "must be even and at most head_dim (8), got 10"),
        ({"n_positions": 8}, "config.n_positions (8) is less than context_length (64)"),
        ({"norm_bias": True}, "config.norm_bias is only for norm 'layer'"),
        ({"image": Image(8, 8, 4)}, "config.context_length must be the 5 tokens of the image"),
        ({"parallel": True, "norm_place": "post"}, "config.parallel needs norm_place 'pre'"),
        ({"norm_eps": float("nan")}, "config.norm_eps must be positive"),
        ({"n_kv_heads": 4}, "config.n_heads (6) must be a multiple of config.n_kv_heads (4)"),
        (
            {"head_dim": 7},
            "must be even and at most head_dim (7), got 7",
        ),
        ({"activation": "gleu"}, "unknown config.activation 'gleu'. Did you mean 'gelu'"),
        ({"dtype": "float64"}, "unknown config.dtype 'float64'"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_model().config.replace(**changes)


@pytest.mark.parametrize("value", ["6", 6.0])
def test_a_config_field_of_another_type_is_refused(value):
    with pytest.raises(ValueError, match=r"config\.n_heads"):
        tiny_model().config.replace(n_heads=value)


# The parameter tree


def test_a_wrong_parameter_tree_names_every_leaf():
    model = tiny_model()
    params = model.params
    attn = {k: v for k, v in params["blocks"]["attn"].items() if k != "v"}
    attn |= {"w": params["blocks"]["attn"]["v"], "o": jnp.zeros((3, 6, 8, 41))}
    wrong = params | {"blocks": params["blocks"] | {"attn": attn}}
    with pytest.raises(ValueError) as error:
        jh.Transformer(model.config, wrong)
    message = str(error.value)
    assert "missing blocks/attn/v (3, 40, 2, 8)" in message
    assert "unexpected blocks/attn/w" in message
    assert "blocks/attn/o has shape (3, 6, 8, 41), expected (3, 6, 8, 40)" in message


def test_params_gives_back_what_was_put_in():
    model = tiny_model(biases=True, tied=False)
    again = jh.Transformer(model.config, model.params)
    assert jax.tree.structure(again) == jax.tree.structure(model)
    chex.assert_trees_all_equal(again.params, model.params)
    assert "3 layers x 6 heads of 8 (2 key/value heads)" in repr(model)


# Bad input


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (np.arange(5), None, "tokens must have shape [B,T], got (5,)"),
        (np.zeros((1, 2, 3), int), None, "tokens must have shape [B,T], got (1, 2, 3)"),
        (np.ones((2, 3), np.float32), None, "tokens must be integers, got float32"),
        (np.zeros((2, 0), int), None, "tokens of shape (2, 0) are empty"),
        (np.zeros((0, 2), int), None, "tokens of shape (0, 2) are empty"),
        (np.array([[1, 97]]), None, "token id 97 is outside the vocabulary of 97"),
        (np.array([[1, -1]]), None, "token id -1 is outside the vocabulary of 97"),
        (np.zeros((1, 65), int), None, "65 tokens exceeds the model's context of 64"),
        (np.zeros((1, 4), int), np.ones((1, 3), bool), "mask has shape (1, 3), expected"),
    ],
)
def test_bad_tokens_are_refused(tokens, mask, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_model()(tokens, mask)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_a_mask_that_is_not_bool_is_refused_by_name(dtype):
    with pytest.raises(ValueError, match=r"mask must be bool"):
        tiny_model()(tiny_tokens(), np.ones((2, 14), dtype))


def test_tokens_may_be_a_nested_list():
    close(tiny_model()(tiny_tokens().tolist()).logits, tiny_model()(tiny_tokens()).logits)


def test_a_mask_given_twice_is_refused():
    batch = padded("left")
    with pytest.raises(ValueError, match="mask and segments must not be given twice"):
        tiny_model()(batch, batch.mask)


def test_an_unknown_phase_is_refused():
    with pytest.raises(ValueError, match="unknown phase 'decoding'"):
        tiny_model()(tiny_tokens(), phase="decoding")


def test_a_sequence_longer_than_the_cache_is_refused():
    cache = empty_cache(tiny_model().config, batch=2, size=8)
    with pytest.raises(ValueError, match="14 tokens do not fit a cache of 8 slots"):
        tiny_model()(tiny_tokens(), cache=cache)


@jax.jit
def traced_logits(tokens):
    return tiny_model()(tokens).logits


@pytest.mark.parametrize(
    "bad",
    [97, pytest.param(-1)],
)
def test_a_token_outside_the_vocabulary_is_nan_under_a_trace(bad):
    tokens = tiny_tokens()
    tokens[0, 4] = bad
    logits = traced_logits(tokens)
    assert np.isnan(logits[0, 4:]).all()
    close(logits[1], tiny_model()(tiny_tokens()).logits[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": []}, "no rows to pack"),
        ({"rows": [[1], []]}, "row 1 is empty"),
        ({"rows": [[1, 2, 3]], "length": 2}, "a row has 3 tokens, more than length=2"),
        ({"rows": [[1]], "side": "top"}, "side must be 'left' or 'right', got 'top'"),
    ],
)
def test_pack_refuses(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jh.pack(**options)


def test_pack_places_rows_and_targets():
    rows, targets = [[5, 6, 7], [8]], [[False, True, True], [True]]
    left = jh.pack(rows, targets, side="left", length=4, pad=1)
    np.testing.assert_array_equal(left.tokens, [[1, 5, 6, 7], [1, 1, 1, 8]])
    np.testing.assert_array_equal(left.mask, [[0, 1, 1, 1], [0, 0, 0, 1]])
    # A first token has nothing before it to be predicted from.
    np.testing.assert_array_equal(left.target_mask, [[0, 0, 1, 1], [0, 0, 0, 0]])
    right = jh.pack(rows)
    np.testing.assert_array_equal(right.tokens, [[5, 6, 7], [8, 0, 0]])
    np.testing.assert_array_equal(right.target_mask, [[0, 1, 1], [0, 0, 0]])


# Transformations


def test_gradients_of_the_parameters_are_the_slopes_of_the_loss():
    model = tiny_model("gqa", biases=True, tied=False)
    batch = padded("left")

    @jax.jit
    @jax.value_and_grad
    def loss(model):
        return jh.next_token_loss(model, batch)

    slopes = loss(model)[1].params
    for path, leaf in jax.tree_util.tree_leaves_with_path(slopes):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), name
        # Softmax does not see a constant added to every key's logit.
        assert np.abs(leaf).max() > 1e-6 or "k_bias" in name, name
    leaves, tree = jax.tree.flatten(model.params)
    rng = np.random.default_rng(0)
    step = [np.asarray(1e-3 * rng.normal(size=leaf.shape), np.float32) for leaf in leaves]

    def moved(sign):
        parts = [leaf + sign * s for leaf, s in zip(leaves, step, strict=True)]
        return loss(jh.Transformer(model.config, tree.unflatten(parts)))[0]

    slope = sum((g * s).sum() for g, s in zip(jax.tree.leaves(slopes), step, strict=True))
    np.testing.assert_allclose((moved(1) - moved(-1)) / 2, slope, rtol=2e-2)


def test_vmap_over_a_stack_of_edits_is_a_loop_in_one_program():
    model, tokens = tiny_model(), tiny_tokens()
    rng = np.random.default_rng(1)
    scales = rng.normal(size=(4, 3, 6)).astype(np.float32)
    many = [jh.scale_heads(model.config, scale) for scale in scales]

    @jax.jit
    @chex.assert_max_traces(n=1)
    def each(stack):
        return jax.vmap(lambda edits: model(tokens, edits=edits).logits)(stack)

    for group in (many, many[::-1]):
        together = each(jh.Edits.stack(group))
        close(together, np.stack([model(tokens, edits=edits).logits for edits in group]))


def test_the_layer_axis_of_a_stack_of_edits_is_not_taken_for_layers():
    many = [jh.scale_heads(tiny_model().config, np.ones((3, 6))) for _ in range(4)]
    with pytest.raises(ValueError, match=re.escape("applied with jax.vmap")):
        tiny_model()(tiny_tokens(), edits=jh.Edits.stack(many))
