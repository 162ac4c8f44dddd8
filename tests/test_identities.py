"""The identities T1-T6, T8, T9 of edits, on random models: MHA, GQA and MQA, float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import KV_HEADS, close, tiny_model, tiny_tokens

import jaxheads as jh
from jaxheads.model.norms import rms_norm

HEADS = [(0, 1), (1, 4), (2, 0), (2, 5)]


@pytest.fixture(params=KV_HEADS)
def model(request):
    return tiny_model(request.param, biases=True)


def with_params(model, **leaves):
    """The model with leaves of its attention replaced."""
    params = model.params
    attn = params["blocks"]["attn"] | leaves
    return jh.Transformer(model.config, params | {"blocks": params["blocks"] | {"attn": attn}})


def test_t1_scaling_z_is_scaling_the_output_projection(model):
    scale = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    edited = model(tiny_tokens(), edits=jh.scale_heads(model.config, scale)).logits
    o = model.params["blocks"]["attn"]["o"] * scale[:, :, None, None]
    close(edited, with_params(model, o=o)(tiny_tokens()).logits)
    assert np.abs(edited - model(tiny_tokens()).logits).max() > 0.1


def test_t2_zero_queries_attend_uniformly(model):
    tokens = tiny_tokens()
    by_query = jh.mask_heads(model.config, HEADS, "uniform")
    by_pattern = jh.attend_to(model.config, HEADS, "uniform")
    found = model(tokens, edits=by_query, taps=("pattern", "logits")).taps
    close(found["logits"], model(tokens, edits=by_pattern).logits)
    rows = np.tril(np.ones((14, 14))) / np.arange(1, 15)[:, None]
    for layer, head in HEADS:
        close(found["pattern"][layer, 0, head], rows)


def test_t2_uniform_attention_skips_padding(model):
    batch = jh.pack([list(tiny_tokens(1, 14)[0]), list(tiny_tokens(1, 9, 1)[0])], side="left")
    edits = jh.mask_heads(model.config, HEADS, "uniform")
    pattern = model(batch, edits=edits, taps="pattern").taps["pattern"]
    np.testing.assert_allclose(pattern[0, 1, 1, -1], [0] * 5 + [1 / 9] * 9, atol=1e-6)


def test_t3_offset_of_z_is_a_bias_through_the_output_projection(model):
    offset = np.random.default_rng(1).normal(size=(3, 6, 8)).astype(np.float32)
    edited = model(tiny_tokens(), edits=jh.offset_heads(model.config, offset)).logits
    attn = model.params["blocks"]["attn"]
    bias = attn["o_bias"] + jnp.einsum("lhe,lhed->ld", offset, attn["o"])
    close(edited, with_params(model, o_bias=bias)(tiny_tokens()).logits)


def test_t4_scaling_the_sink_and_renormalising_is_a_logit_bias(model):
    gamma = np.exp(np.random.default_rng(2).normal(size=(3, 1, 6, 1, 1))).astype(np.float32)
    at_sink = np.zeros((1, 1, 1, 1, 14), np.float32)
    at_sink[..., 0] = 1
    by_logit = jh.Edits(scores=jh.Affine(offset=jnp.log(gamma) * at_sink))

    def renormalise(value, context):
        return value / value.sum(-1, keepdims=True)

    scaled = jh.Affine(scale=1 + (gamma - 1) * at_sink)
    by_pattern = jh.Edits(pattern=jh.Chain((scaled, jax.tree_util.Partial(renormalise))))
    tokens = tiny_tokens()
    close(model(tokens, edits=by_logit).logits, model(tokens, edits=by_pattern).logits)


def test_t5_soft_identity_attention(model):
    strength = 0.3
    tokens = tiny_tokens()
    edits = jh.attend_to(model.config, [(0, h) for h in range(6)], "self", strength)
    edited = model(tokens, edits=edits, taps=("z", "v")).taps
    plain = model(tokens, taps=("z", "v")).taps
    close(edited["v"][0], plain["v"][0])
    own = np.repeat(plain["v"][0], 6 // model.config.n_kv_heads, axis=2)
    close(edited["z"][0], (1 - strength) * plain["z"][0] + strength * own)


def test_t6_writes_sum_to_the_residual_and_the_logits(model):
    taps = ("head_out", "mlp_out", "resid_post", "resid_mid", "resid_pre", "embed", "logits")
    found = model(tiny_tokens(), taps=taps).taps
    bias = model.params["blocks"]["attn"]["o_bias"][:, None, None]
    close(found["resid_mid"], found["resid_pre"] + found["head_out"].sum(3) + bias)
    parts = [found["embed"], *found["head_out"].transpose(0, 3, 1, 2, 4).reshape(18, 2, 14, 40)]
    parts += [*jnp.broadcast_to(bias, (3, 2, 14, 40)), *found["mlp_out"]]
    final = found["resid_post"][-1]
    close(sum(parts), final)
    # Direct logit attribution: each part through the frozen norm and the unembedding.
    frozen = 1 / jnp.sqrt(jnp.mean(final**2, -1, keepdims=True) + model.config.norm_eps)
    params = model.params
    through = [p * frozen * params["final_norm"]["scale"] for p in parts]
    logits = sum(part @ params["embed"]["tokens"].T for part in through)
    close(logits, found["logits"])
    close(rms_norm(final, params["final_norm"]["scale"], 1e-5), sum(through))


def test_t8_patching_every_z_restores_the_attention_outputs(model):
    clean, corrupt = tiny_tokens(seed=0), tiny_tokens(seed=9)
    stored = model(clean, taps=("z", "attn_out")).taps
    edits = jh.set_activation(model.config, "z", stored["z"])
    close(model(corrupt, edits=edits, taps="attn_out").taps["attn_out"], stored["attn_out"])
    assert np.abs(model(corrupt, taps="attn_out").taps["attn_out"] - stored["attn_out"]).max() > 0.1


def test_t9_projecting_a_head_out_is_projecting_its_weights(model):
    direction = np.random.default_rng(3).normal(size=40).astype(np.float32)
    direction /= np.linalg.norm(direction)
    mask = jh.head_mask(model.config, HEADS).astype(np.float32)
    basis = jnp.broadcast_to(direction[:, None], (3, 1, 1, 6, 40, 1))
    edits = jh.Edits(head_out=jh.Project(basis, mask[:, None, None, :, None]))
    o = model.params["blocks"]["attn"]["o"]
    removed = o - mask[:, :, None, None] * (o @ direction)[..., None] * direction
    edited = model(tiny_tokens(), edits=edits).logits
    close(edited, with_params(model, o=removed)(tiny_tokens()).logits)
    folded = jh.fold(model, edits)
    close(folded(tiny_tokens()).logits, edited)
    left = np.abs(folded.params["blocks"]["attn"]["o"] @ direction).max(-1)
    assert left[mask > 0].max() < 1e-6 < left[mask == 0].min()
