"""The edit algebra: composition, gates, gradients, files, and what each constructor refuses."""

import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from safetensors import safe_open
from safetensors.flax import save_file
from tiny import close, tiny_model, tiny_tokens

import jaxheads as jh
from jaxheads.model import empty_cache

CONFIG = tiny_model().config
FOURTEEN = [(layer, head) for layer in range(3) for head in range(6)][:14]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def logits(edits, **options):
    return tiny_model()(tiny_tokens(), edits=edits, **options).logits


def random_basis(*shape, seed=0):
    return jnp.linalg.qr(normal(*shape, seed=seed))[0]


# Kinds of edit made by users


@struct.dataclass
class AddInput:
    """Adds the input of attention, feature by feature."""

    weight: jax.Array

    def __call__(self, value, context):
        return value + self.weight * context.attn_in


@struct.dataclass
class ScaleBySink:
    """Scales each head's output by the attention it pays to the first token."""

    power: jax.Array
    sign: int = struct.field(pytree_node=False, default=1)

    needs = ("pattern",)

    def __call__(self, value, context):
        sink = jnp.moveaxis(context.pattern[..., 0], 1, 2)
        return value * (1 + self.sign * self.power * sink[..., None])


@struct.dataclass
class ReadsPattern:
    """Forgets to say that it needs the pattern."""

    weight: jax.Array

    def __call__(self, value, context):
        return value + 0 * context.pattern.sum() * self.weight


@struct.dataclass
class ReadsLater:
    """Reads a value that is not computed yet."""

    weight: jax.Array

    def __call__(self, value, context):
        return value + context.mlp_out


def test_an_edit_of_ones_own_gets_its_layer_and_the_values_before_it():
    weight, power = normal(3, 1, 1, 40), normal(3, 1, 1, 6, 1, seed=1)
    edits = jh.Edits(attn_out=AddInput(weight), z=ScaleBySink(power))
    found = tiny_model()(
        tiny_tokens(), edits=edits, taps=("attn_in", "v", "pattern", "z", "attn_out")
    ).taps
    v = np.repeat(found["v"], 3, axis=3)
    plain = np.einsum("lbhts,lbshe->lbthe", found["pattern"], v)
    sink = np.moveaxis(found["pattern"][..., 0], 2, 3)[..., None]
    close(found["z"], plain * (1 + power * sink))
    written = np.einsum("lbthe,lhed->lbtd", found["z"], tiny_model().params["blocks"]["attn"]["o"])
    close(found["attn_out"], written + weight * found["attn_in"])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (ReadsPattern, "context.pattern is not computed unless asked for: name it in `needs`"),
        (ReadsLater, "context.mlp_out is not known here; computed so far: resid_pre, attn_in"),
    ],
)
def test_reading_what_is_not_there_says_so(edit, message):
    with pytest.raises(AttributeError, match=re.escape(message)):
        logits(jh.Edits(z=edit(np.ones((3, 1, 1, 1, 1)))))


def test_a_misspelt_value_is_suggested():
    def edit(value, context):
        return value + context.patern

    with pytest.raises(AttributeError, match="Did you mean 'pattern'"):
        logits(jh.Edits(z=jax.tree_util.Partial(edit)))


# Composition


def test_a_then_b_is_not_b_then_a():
    scale, offset = normal(3, 6), normal(3, 6, 8, seed=1)
    a, b = jh.scale_heads(CONFIG, scale), jh.offset_heads(CONFIG, offset)

    def both(by):
        return logits(jh.Edits(z=jh.Affine(scale[:, None, None, :, None], by[:, None, None])))

    close(logits(a | b), both(offset))
    close(logits(b | a), both(offset * scale[..., None]))
    assert np.abs(logits(a | b) - logits(b | a)).max() > 0.1


def test_composition_keeps_the_order_of_every_edit():
    a, b, c, d = (jh.scale_heads(CONFIG, normal(3, 6, seed=seed)) for seed in range(4))
    z = ((a | b) | (c | d))["z"]
    assert z.edits == (a["z"], b["z"], c["z"], d["z"])
    # Other sites are left as they are, and plain mappings compose too.
    both = a | {"attn_out": jh.Affine()}
    assert set(both) == {"z", "attn_out"} and both["z"] is a["z"]
    assert dict(a | jh.Edits()) == dict(jh.Edits() | a) == dict(a)
    assert dict(a) == {"z": a["z"]}, "composing changed its operand"


def test_edits_are_a_pytree_with_readable_paths():
    edits = jh.Edits(z=jh.Affine(scale=jnp.ones(2)), k=jh.Mix(jnp.ones(3), jnp.ones(4)))
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(edits)]
    assert paths == ["['k'].value", "['k'].weight", "['z'].scale"]
    assert isinstance(jax.tree.map(lambda leaf: 2 * leaf, edits), jh.Edits)


def test_stacking_refuses_what_differs():
    z, k = jh.scale_heads(CONFIG, np.ones((3, 6))), jh.Edits.identity(CONFIG, "k")
    with pytest.raises(ValueError, match="no edits to stack"):
        jh.Edits.stack([])
    with pytest.raises(ValueError, match="2 structures"):
        jh.Edits.stack([z, k])
    with pytest.raises(ValueError, match="1 structures with leaves of shapes"):
        jh.Edits.stack([z, jh.scale_heads(CONFIG, np.ones((3, 6, 8)))])
    assert jh.Edits.stack([z, z])["z"].scale.shape == (2, 3, 1, 1, 6, 1)


# Gradients


def test_every_leaf_of_every_kind_has_a_gradient():
    mix = jh.Mix(normal(3, 1, 1, 6, 8), np.full((3, 1, 1, 6, 1), 0.3, np.float32))
    project = jh.Project(random_basis(3, 1, 1, 6, 8, 2), np.full((3, 1, 1, 6, 1), 0.4, np.float32))
    affine = jh.Affine(1 + normal(3, 1, 1, 6, 1), normal(3, 1, 1, 6, 8))
    edits = jh.Edits(z=jh.Chain((affine, mix, project)))
    edits |= jh.attend_to(CONFIG, FOURTEEN, "self", 0.2)
    slopes = jax.jit(jax.grad(lambda e: logits(e)[..., 3].sum()))(edits)
    leaves = jax.tree_util.tree_leaves_with_path(slopes)
    assert len(leaves) == 7
    for path, slope in leaves:
        assert np.isfinite(slope).all(), path
        # Every layer and head matters: no slice of the leaf is dead.
        assert (np.abs(slope).max(axis=tuple(range(1, slope.ndim))) > 1e-4).all(), path


def test_the_identity_changes_nothing_anywhere():
    sites = list(jh.SITES)
    edits = jh.Edits.identity(CONFIG, *sites) | jh.Edits.identity(CONFIG, *sites, offset=True)
    close(logits(edits), tiny_model()(tiny_tokens()).logits, 1e-6)


@pytest.mark.parametrize(
    ("site", "scale", "offset"),
    [
        ("z", (3, 1, 1, 6, 1), (3, 1, 1, 6, 8)),
        ("k", (3, 1, 1, 2, 1), (3, 1, 1, 2, 8)),
        ("resid_post", (3, 1, 1, 1), (3, 1, 1, 40)),
        ("neurons", (3, 1, 1, 1), (3, 1, 1, 56)),
        ("logits", (1, 1, 1), (1, 1, 97)),
        pytest.param(
            "pattern", (3, 1, 6, 1, 1), (3, 1, 6, 1, 1)),
    ],
)  # fmt: skip
def test_the_identity_has_one_value_per_head_or_feature(site, scale, offset):
    assert jh.Edits.identity(CONFIG, site)[site].scale.shape == scale
    assert jh.Edits.identity(CONFIG, site, offset=True)[site].offset.shape == offset


def test_the_gradient_of_head_scales_is_the_slope_of_the_loss():
    batch = jh.pack([list(row) for row in tiny_tokens()])

    @jax.jit
    @jax.value_and_grad
    @chex.assert_max_traces(n=1)
    def loss(edits):
        return jh.next_token_loss(tiny_model(), batch, edits=edits)

    _, slopes = loss(jh.Edits.identity(CONFIG, "z"))
    for layer, head in ((0, 1), (1, 4), (2, 5)):
        step = np.zeros((3, 6), np.float32)
        step[layer, head] = 0.05
        up, down = (loss(jh.scale_heads(CONFIG, 1 + sign * step))[0] for sign in (1, -1))
        np.testing.assert_allclose(
            (up - down) / 0.1, slopes["z"].scale[layer, 0, 0, head, 0], rtol=0.02, atol=2e-4
        )


# Restricting an edit


def gate_of(*rows):
    """bool [2,14], True in the given slices of the two rows."""
    mask = np.zeros((2, 14), bool)
    for index, row in enumerate(rows):
        mask[index, row] = True
    return mask


OFFSET = normal(3, 6, 8, seed=4)


def offset_when(when):
    return jh.offset_heads(CONFIG, OFFSET, when=when)


def test_a_mask_of_tokens_gates_each_token_alone():
    mask = gate_of(slice(3, 6), slice(8, 9))
    plain = tiny_model()(tiny_tokens(), taps="z").taps["z"]
    found = tiny_model()(tiny_tokens(), edits=offset_when(mask), taps="z").taps["z"]
    close(found[0] - plain[0], mask[:, :, None, None] * OFFSET[0])
    # Later layers see the change, but only from the first edited token on.
    np.testing.assert_array_equal(found[1:, 0, :3], plain[1:, 0, :3])
    np.testing.assert_array_equal(found[1:, 1, :8], plain[1:, 1, :8])
    row = tiny_model()(tiny_tokens(), edits=offset_when(mask[:1]), taps="z").taps["z"]
    close(row[0] - plain[0], np.repeat(mask[:1, :, None, None], 2, axis=0) * OFFSET[0])


@pytest.mark.parametrize("site", ["scores", "pattern"])
def test_a_mask_at_an_attention_map_gates_the_query(site):
    mask = gate_of(slice(3, 6), slice(8, 14))
    plain = np.asarray(tiny_model()(tiny_tokens(), taps="pattern").taps["pattern"])[0]
    bonus = np.zeros((1, 1, 1, 1, 14), np.float32)
    bonus[..., 2] = 1.5
    edits = jh.Edits({site: jh.Affine(offset=bonus)}).when(mask)
    found = np.asarray(tiny_model()(tiny_tokens(), edits=edits, taps="pattern").taps["pattern"])[0]
    if site == "pattern":
        edited = plain + bonus[0, 0]
    else:
        edited = plain * np.exp(bonus[0, 0])
        edited /= edited.sum(-1, keepdims=True)
    close(found, np.where(mask[:, None, :, None], edited, plain))


def test_a_mask_holds_outside_the_stack_and_where_logits_are_read():
    mask = gate_of(slice(3, 6), slice(8, 14))
    at = np.array([[5, 2], [13, 0]])
    chosen = np.take_along_axis(mask, at, axis=1)[..., None]

    def run(embed, final, logits):
        edits = {"embed": embed, "final": final, "logits": logits}
        edits = jh.Edits({s: jh.Affine(offset=v[None, None]) for s, v in edits.items()}).when(mask)
        return tiny_model()(
            tiny_tokens(), edits=edits, logits_at=at, taps=("embed", "final", "logits")
        ).taps

    none, width, words = np.zeros(40, np.float32), normal(40), normal(97)
    plain = run(none, none, 0 * words)
    close(run(width, none, 0 * words)["embed"] - plain["embed"], mask[..., None] * width)
    found = run(none, width, words)
    close(found["final"] - plain["final"], chosen * width)
    unembed = tiny_model().params["embed"]["tokens"]
    close(found["logits"] - plain["logits"], chosen * (unembed @ width + words))
    every = np.asarray(tiny_model()(tiny_tokens()).logits)
    close(plain["logits"], np.take_along_axis(every, at[..., None], axis=1))


@pytest.mark.parametrize(
    ("when", "acts_at"),
    [
        ("prefill", gate_of(slice(0, 13), slice(0, 13))),
        ("decode", gate_of(13, 13)),
        (gate_of(slice(2, 13), slice(0, 4))[:, :13], gate_of(slice(2, 13), slice(0, 4))),
    ],
    ids=["prefill", "decode", "mask shorter than the sequence"],
)
def test_phases_and_masks_in_cached_generation(when, acts_at):
    model, tokens, edits = tiny_model(), tiny_tokens(), offset_when(when)
    first = model(tokens[:, :13], edits=edits, cache=empty_cache(CONFIG, 2, 16))
    last = model(tokens[:, 13:], edits=edits, cache=first.cache, phase="decode")
    expected = model(tokens, edits=offset_when(acts_at)).logits
    close(np.concatenate([first.logits, last.logits], axis=1), expected)
    plain = np.abs(expected - model(tokens).logits).max((0, 2))
    assert (plain[acts_at.any(0)] > 0.01).all()


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ("decoding", "unknown phase 'decoding'. Did you mean 'decode'"),
        (np.ones((2, 14)), "must be 'prefill', 'decode' or a bool [B,T] mask, got float"),
        (np.ones(14, bool), "got bool of shape (14,)"),
    ],
)
def test_when_refuses(when, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        offset_when(when)


def test_a_mask_for_another_batch_is_refused():
    with pytest.raises(ValueError, match="edit at 'z'"):
        logits(offset_when(np.ones((3, 14), bool)))


# Patching


def test_a_patch_replaces_the_chosen_heads_layers_and_positions():
    stored, mask = normal(3, 2, 14, 6, 8), gate_of(slice(3, 6), slice(8, 14))
    heads = [(0, 1), (1, 4), (2, 0), (2, 5)]
    chosen = jh.head_mask(CONFIG, heads)
    chosen[2] = False  # only layers 0 and 1
    where = chosen[:, None, None, :, None] & mask[None, :, :, None, None]

    def replace(where, stored, value, context):
        return jnp.where(where, stored, value)

    by_hand = jh.Edits(z=jax.tree_util.Partial(replace, where, stored))
    patched = jh.set_activation(CONFIG, "z", stored, layers=[0, 1], heads=heads, when=mask)
    outputs = [tiny_model()(tiny_tokens(), edits=edits, taps="z") for edits in (patched, by_hand)]
    close(outputs[0].logits, outputs[1].logits)
    close(outputs[0].taps["z"], outputs[1].taps["z"])
    found = np.asarray(outputs[0].taps["z"])
    full = np.broadcast_to(where, found.shape)
    np.testing.assert_array_equal(found[full], stored[full])
    assert not np.isclose(found, stored)[~full].all()


def test_a_weak_patch_mixes():
    edit = jh.set_activation(CONFIG, "attn_out", np.ones((3, 1, 1, 40)), layers=[1], weight=0.25)[
        "attn_out"
    ]
    np.testing.assert_array_equal(np.ravel(edit.weight), [0, 0.25, 0])


# Edits that do not fit the model


@pytest.mark.parametrize(
    ("edits", "parts"),
    [
        (jh.Edits(z=jh.Affine(scale=np.ones((3, 1, 1, 5, 1)))),
         ["edit at 'z'", "[L,B,T,H,Dh]", "(2, 14, 6, 8)", "scale has shape (1, 1, 5, 1)"]),
        (jh.Edits(z=jh.Affine(scale=np.ones((4, 1, 1, 6, 1)))),
         ["edit at 'z'", "leaf scale", "(4, 1, 1, 6, 1)", "leading layer axis of 3"]),
        (jh.Edits(z=jh.Affine(scale=2.0)), ["edit at 'z'", "shape ()", "layer axis of 3"]),
        (jh.Edits(resid_post=jh.Affine(offset=np.ones((3, 40)))),
         ["edit at 'resid_post'", "offset has shape (40,)", "(2, 14, 40)"]),
        (jh.Edits(logits=jh.Mix(np.ones((1, 1, 97)), np.ones((3, 1, 1, 97)))),
         ["edit at 'logits'", "weight has shape (3, 1, 1, 97)", "(2, 14, 97)"]),
        (jh.Edits(mlp_out=jh.Project(np.ones((3, 1, 1, 39, 2)))),
         ["edit at 'mlp_out'", "basis has shape (1, 1, 39)", "(2, 14, 40)"]),
        (jh.Edits(z=jax.tree_util.Partial(lambda value, context: value[..., :4])),
         ["edit at 'z' must return shape (2, 14, 6, 8)", "got (2, 14, 6, 4)"]),
    ],
)  # fmt: skip
def test_an_edit_that_does_not_fit_says_where_and_what_was_expected(edits, parts):
    with pytest.raises(ValueError) as error:
        logits(edits)
    for part in parts:
        assert part in str(error.value)


def test_an_unknown_site_is_refused_with_a_suggestion():
    message = "unknown site 'resid_pos'. Did you mean 'resid_post'"
    with pytest.raises(ValueError, match=message):
        jh.Edits(resid_pos=jh.Affine())
    with pytest.raises(ValueError, match=message):
        tiny_model()(tiny_tokens(), edits={"resid_pos": jh.Affine()})


# Files


def every_kind():
    affine = jh.Affine(scale=jnp.ones((3, 1, 1, 6, 1), jnp.bfloat16))
    return jh.Edits(
        z=jh.Chain((affine, ScaleBySink(jnp.asarray(normal(3, 1, 1, 6, 1)), sign=-1))),
        attn_out=jh.Mix(jnp.asarray(normal(3, 1, 1, 40)), jnp.ones((3, 1, 1, 1))),
        resid_post=jh.Project(random_basis(3, 1, 1, 40, 2), keep=True),
        pattern=jh.AttendTo(jnp.ones((3, 1, 6, 1, 1)), "first"),
        q=jh.Gated(jh.Affine(offset=jnp.ones((3, 1, 1, 1, 8))), gate_of(3, 4)[None], "decode"),
        logits=AddInput(jnp.ones((1, 1, 97))),
    )


def test_every_kind_survives_a_file(tmp_path):
    edits = every_kind()
    edits.save(tmp_path / "new" / "edits.safetensors")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["edits.safetensors"]
    found = jh.Edits.load(tmp_path / "new" / "edits.safetensors", kinds=[ScaleBySink, AddInput])
    assert jax.tree.structure(found) == jax.tree.structure(edits)
    chex.assert_trees_all_equal(found, edits)
    assert [leaf.dtype for leaf in jax.tree.leaves(found)] == [
        leaf.dtype for leaf in jax.tree.leaves(edits)
    ]
    assert (found["z"].edits[1].sign, found["resid_post"].keep) == (-1, True)
    assert (found["q"].phase, found["pattern"].reference) == ("decode", "first")


def test_a_file_without_edits_in_it(tmp_path):
    jh.Edits().save(tmp_path / "none.safetensors")
    assert dict(jh.Edits.load(tmp_path / "none.safetensors")) == {}


def rewritten(path, change):
    """The file with its description changed; returns its path."""
    with safe_open(path, framework="flax") as file:
        description = json.loads(file.metadata()["jaxheads"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    text = change(description)
    text = text if isinstance(text, str) else json.dumps(text)
    save_file(tensors, path, metadata={"jaxheads": text})
    return path


def wrong_field(description):
    description["sites"]["attn_out"]["fields"]["strength"] = None
    return description


def wrong_tensor(description):
    description["sites"]["attn_out"]["fields"]["value"] = {"tensor": "nowhere"}
    return description


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: {**d, "format": 2}, "format 2, expected 1"),
        (lambda d: "{not json", "edits.safetensors"),
        (lambda d: {"format": 1}, "edits.safetensors"),
        (wrong_field, "strength"),
        (wrong_tensor, "nowhere"),
    ],
    ids=["format", "no JSON", "no sites", "field", "tensor"],
)
def test_a_description_that_is_wrong_is_refused(tmp_path, change, message):
    path = tmp_path / "edits.safetensors"
    every_kind().save(path)
    with pytest.raises(ValueError, match=re.escape(message)):
        jh.Edits.load(rewritten(path, change), kinds=[ScaleBySink, AddInput])


def test_files_that_hold_no_edits_are_refused(tmp_path):
    path = tmp_path / "edits.safetensors"
    with pytest.raises(FileNotFoundError, match="no edits at"):
        jh.Edits.load(path)
    every_kind().save(path)
    with pytest.raises(ValueError, match="unknown kind of edit 'ScaleBySink'"):
        jh.Edits.load(path, kinds=[AddInput])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable file of edits"):
        jh.Edits.load(path)
    for junk in (b"", b"no such format"):
        path.write_bytes(junk)
        with pytest.raises(ValueError, match="not a readable file of edits"):
            jh.Edits.load(path)
    save_file({"x": jnp.ones(2)}, path)
    with pytest.raises(ValueError, match="holds no edits"):
        jh.Edits.load(path)


def test_what_cannot_be_saved_is_refused_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "edits.safetensors"
    jh.scale_heads(CONFIG, np.ones((3, 6))).save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"z cannot be saved: .* got Partial"):
        jh.Edits(z=jax.tree_util.Partial(lambda value, context: value)).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
