"""`fold`: the folded model without edits is the model with them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from tiny import close, tiny_model, tiny_tokens

import jaxheads as jh
from jaxheads.model import Transformer
from jaxheads.model.parameters import flatten
from jaxheads.sites import axis_sizes, find_site

CONFIG = tiny_model().config
HEAD_SITES = ("q_pre", "k_pre", "q", "k", "v", "z", "head_out")
WIDE = (
    "q_pre",
    "k_pre",
    "v",
    "z",
    "head_out",
    "attn_in",
    "attn_out",
    "mlp_in",
    "neurons",
    "mlp_out",
)
SITES = (*WIDE, "q", "k", "resid_mid", "resid_post", "embed", "final")
MODELS = {
    "biases, untied": {"biases": True, "tied": False},
    "no biases, tied": {"biases": False, "tied": True},
}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def shape_of(site, full):
    """[L,1,1,H,Dh] with every feature, or [L,1,1,H,1] with one value per head."""
    spec, size = find_site(site), axis_sizes(CONFIG)
    axes = ("L",) * spec.stacked + spec.axes
    kept = {"L", "H", "K", axes[-1]} if full else {"L", "H", "K"}
    return tuple(size[a] if a in kept and a in size else 1 for a in axes)


def edit_of(kind, site, seed=0):
    """An edit of this kind as rich as folding at the site allows."""
    full, heads = shape_of(site, True), shape_of(site, False)
    if kind == "Affine":
        if site in ("resid_mid", "resid_post"):
            return jh.Affine(offset=normal(seed, *full))
        if site in ("q", "k"):
            return jh.Affine(scale=normal(seed, *heads))
        offset = None if site == "final" else normal(seed + 1, *full)
        return jh.Affine(normal(seed, *full), offset)
    if kind == "Mix":
        value = jnp.zeros(full) if site in ("q", "k", "final") else normal(seed, *full)
        return jh.Mix(value, 0.5 + 0.1 * normal(seed + 1, *heads))
    basis = jnp.linalg.qr(normal(seed, *full, 3))[0]
    return jh.Project(basis, 0.5 + 0.1 * normal(seed + 1, *heads), keep=site == "z")


def complete(site, edit):
    """The same edit with a part of every kind, so that all cases are one program."""
    full, heads = shape_of(site, True), shape_of(site, False)
    parts = {
        jh.Affine: jh.Affine(jnp.ones(full), jnp.zeros(full)),
        jh.Mix: jh.Mix(jnp.zeros(full), jnp.zeros(heads)),
        jh.Project: jh.Project(jnp.zeros((*full, 3)), jnp.zeros(heads), keep=site == "z"),
    }
    if isinstance(edit, jh.Affine):
        scale = jnp.ones(full) if edit.scale is None else edit.scale
        offset = jnp.zeros(full) if edit.offset is None else edit.offset
        edit = jh.Affine(jnp.broadcast_to(scale, full), offset)
    if edit is not None:
        parts[type(edit)] = edit
    return jh.Chain(tuple(parts.values()))


def edited(model, edits):
    """The logits of the model with the edits, one compiled program for all cases."""
    every = {site: complete(site, edits.get(site)) for site in SITES}
    return model(tiny_tokens(), edits=jh.Edits(every)).logits


@functools.cache
def one_program(which):
    """Checks the detour through `complete` once per model."""
    model = tiny_model(**MODELS[which])
    close(edited(model, {}), model(tiny_tokens()).logits)
    return model


CASES = [
    pytest.param(
        which, kind, site
    )
    for which, kinds in (("biases, untied", ("Affine", "Mix", "Project")),
                         ("no biases, tied", ("Affine",)))
    for kind in kinds
    for site in (SITES if kind == "Affine" else (*WIDE, "q", "embed", "final")
                 if kind == "Mix" else (*WIDE, "embed", "final"))
]  # fmt: skip


@pytest.mark.parametrize(("which", "kind", "site"), CASES)
def test_folded_equals_edited(which, kind, site):
    model = one_program(which)
    edits = jh.Edits({site: edit_of(kind, site)})
    before = dict(flatten(model.params))
    expected = edited(model, edits)
    folded = jh.fold(model, edits)
    close(folded(tiny_tokens()).logits, expected)
    assert np.abs(expected - model(tiny_tokens()).logits).max() > 0.01
    # The model itself is as it was, and the new one shares what no edit touches.
    assert all(leaf is before[path] for path, leaf in flatten(model.params))
    after = dict(flatten(folded.params))
    changed = {path.split("/")[-1] for path in after if after[path] is not before.get(path)}
    assert changed and changed <= TOUCHED[site], changed
    assert folded.config.tied == (model.config.tied and site not in ("embed", "final"))


QKV = {"q", "k", "v", "q_bias", "k_bias", "v_bias"}
TOUCHED = {
    "attn_in": QKV,
    # A bias comes with its two siblings where the model had none.
    "q_pre": {"q", *QKV - {"k", "v"}},
    "k_pre": {"k", *QKV - {"q", "v"}},
    "q": {"q", "q_bias"},
    "k": {"k", "k_bias"},
    "v": {"v", *QKV - {"q", "k"}},
    "z": {"o", "o_bias"},
    "head_out": {"o", "o_bias"},
    "attn_out": {"o", "o_bias"},
    "resid_mid": {"o_bias"},
    "mlp_in": {"gate", "up", "gate_bias", "up_bias", "down_bias"},
    "neurons": {"down", "gate_bias", "up_bias", "down_bias"},
    "mlp_out": {"down", "gate_bias", "up_bias", "down_bias"},
    "resid_post": {"gate_bias", "up_bias", "down_bias"},
    "embed": {"tokens", "kernel"},
    "final": {"kernel", "tokens"},
}


def test_no_bias_is_added_where_none_is_needed():
    model = tiny_model()
    folded = jh.fold(model, jh.mask_heads(CONFIG, [(0, 1), (2, 5)]))
    assert folded.config == model.config
    o = folded.params["blocks"]["attn"]["o"]
    mask = jh.head_mask(CONFIG, [(0, 1), (2, 5)])
    assert np.abs(o)[mask].max() == 0
    np.testing.assert_array_equal(o[~mask], model.params["blocks"]["attn"]["o"][~mask])


def test_a_large_offset_costs_no_precision_of_the_weights():
    model = tiny_model()
    folded = jh.fold(model, jh.Edits(v=jh.Affine(offset=1e4 * normal(0, 3, 1, 1, 2, 8))))
    before, after = (m.params["blocks"]["attn"]["v"] for m in (model, folded))
    close(after, before, 1e-6)


def test_a_chain_folds_in_its_order():
    model = one_program("no biases, tied")
    a, b = jh.Edits(z=edit_of("Affine", "z")), jh.Edits(z=edit_of("Project", "z"))
    for chain in (a | b, b | a):
        close(jh.fold(model, chain)(tiny_tokens()).logits, model(tiny_tokens(), edits=chain).logits)


ORDERS = {
    "writers first, then readers": (
        "q_pre",
        "q",
        "head_out",
        "attn_out",
        "z",
        "mlp_out",
        "neurons",
    ),
    "as the model computes them": ("q_pre", "q", "z", "head_out", "attn_out", "neurons", "mlp_out"),
    "as a tree sorts them": ("attn_out", "head_out", "mlp_out", "neurons", "q", "q_pre", "z"),
}


@pytest.mark.parametrize(
    "order",
    list(ORDERS),
)
def test_several_sites_fold_together_in_any_order(order):
    model = one_program("biases, untied")
    kinds = {"q": "Affine", "attn_out": "Project", "mlp_out": "Project"}
    edits = jh.Edits({site: edit_of(kinds.get(site, "Affine"), site) for site in ORDERS[order]})
    close(jh.fold(model, edits)(tiny_tokens()).logits, edited(model, edits))


def test_a_bfloat16_model_stays_one():
    model = tiny_model().astype("bfloat16")
    edits = jh.scale_heads(CONFIG, 1 + 0.1 * normal(0, 3, 6))
    folded = jh.fold(model, edits)
    assert {leaf.dtype for leaf in jax.tree.leaves(folded.params)} == {jnp.bfloat16.dtype}
    exact = model.params["blocks"]["attn"]["o"].astype(jnp.float32)
    exact = exact * edits["z"].scale[:, 0, 0, :, :, None]
    close(folded.params["blocks"]["attn"]["o"], exact.astype(jnp.bfloat16), 0)


# What cannot be folded


@struct.dataclass
class Square:
    weight: jax.Array

    def __call__(self, value, context):
        return value + self.weight * value**2


ONES = jnp.ones((3, 1, 1, 6, 1))
NO_WEIGHT = "no weight writes or reads this site alone"
REFUSED = {
    "z by gate": ("z", jh.Gated(jh.Affine(ONES), phase="decode"), "Gated is not a fixed affine"),
    "z in a chain": ("z", jh.Chain((jh.Affine(ONES), Square(ONES))), "Square is not"),
    "z by a user": ("z", Square(ONES), "cannot be folded: Square is not"),
    "per token": ("z", jh.Mix(jnp.ones((3, 1, 14, 6, 8)), ONES), "value of shape (3, 1, 14, 6, 8)"),
    "per row": ("attn_out", jh.Affine(jnp.ones((3, 2, 1, 1))), "its scale of shape (3, 2, 1, 1)"),
    "pattern": (
        "pattern", jh.AttendTo(jnp.ones((3, 1, 6, 1, 1)), "self"), NO_WEIGHT,
    ),
    "scores": ("scores", jh.Affine(jnp.ones((3, 1, 6, 1, 1))), NO_WEIGHT),
    "resid_pre": ("resid_pre", jh.Affine(jnp.ones((3, 1, 1, 1))), NO_WEIGHT),
    "logits": ("logits", jh.Affine(jnp.ones((1, 1, 97))), NO_WEIGHT),
}  # fmt: skip
AT_THE_WEIGHTS = {
    "rotated q": ("q", jh.Affine(normal(0, 3, 1, 1, 6, 8)), "edit 'q_pre' or 'k_pre' instead"),
    "rotated k": ("k", jh.Affine(offset=normal(0, 3, 1, 1, 2, 8)), "only one factor per head"),
    "resid": ("resid_post", jh.Affine(2 * jnp.ones((3, 1, 1, 1))), "only an offset"),
    "mid": ("resid_mid", jh.project_out(CONFIG, np.ones(40))["resid_post"], "only an offset"),
    "final": ("final", jh.Affine(offset=jnp.ones((1, 1, 40))), "the unembedding has no bias"),
}  # fmt: skip


@pytest.mark.parametrize("case", {**REFUSED, **AT_THE_WEIGHTS})
def test_what_is_not_exact_is_refused_by_name(case):
    site, edit, why = {**REFUSED, **AT_THE_WEIGHTS}[case]
    edits = jh.mask_heads(CONFIG, [(0, 1)]) | {site: edit}
    model = tiny_model()
    before = dict(flatten(model.params))
    with pytest.raises(ValueError, match=re.escape(why)) as error:
        jh.fold(model, edits)
    assert f"'{site}'" in str(error.value)
    assert all(leaf is before[path] for path, leaf in flatten(model.params))
    # What shapes alone tell is listed beforehand; foldable sites are not.
    listed = jh.unfoldable(edits, model.config)
    assert set(listed) == ({site} if case in REFUSED else set())
    assert all(why in reason for reason in listed.values())


def test_nothing_to_fold_is_the_same_model():
    model = tiny_model()
    folded = jh.fold(model, jh.Edits())
    assert isinstance(folded, Transformer) and jh.unfoldable({}, CONFIG) == {}
    for path, leaf in flatten(folded.params):
        assert leaf is dict(flatten(model.params))[path]


@pytest.mark.parametrize("scale", [2.0, np.ones((3, 1, 1, 5, 1))])
def test_an_edit_that_does_not_fit_is_refused_by_name(scale):
    with pytest.raises(ValueError, match="edit at 'z'"):
        jh.fold(tiny_model(), jh.Edits(z=jh.Affine(scale=scale)))
