"""The constructors of edits: what each makes and refuses, and how edits print."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from tiny import close, tiny_model, tiny_tokens

import jaxheads as jh

CONFIG = tiny_model().config
FOURTEEN = [(layer, head) for layer in range(3) for head in range(6)][:14]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def logits(edits, **options):
    return tiny_model()(tiny_tokens(), edits=edits, **options).logits


def random_basis(*shape, seed=0):
    return jnp.linalg.qr(normal(*shape, seed=seed))[0]


# Constructors

FEW = [(0, 1)]
REFUSALS = {
    "layer out of range": (
        lambda: jh.mask_heads(CONFIG, [(3, 0)]),
        "head 3.0 is out of range: the model has layers 0..2 and heads 0..5",
    ),
    "head out of range": (lambda: jh.mask_heads(CONFIG, [(0, 6)]), "head 0.6 is out of range"),
    "negative head": (lambda: jh.mask_heads(CONFIG, [(0, -1)]), "head 0.-1 is out of range"),
    "head twice": (lambda: jh.mask_heads(CONFIG, [(1, 2), (1, 2)]), "head 1.2 is named twice"),
    "unknown how": (
        lambda: jh.mask_heads(CONFIG, FEW, "means"), "unknown how 'means'. Did you mean 'mean'",
    ),
    "mean without means": (
        lambda: jh.mask_heads(CONFIG, FEW, "mean"),
        "means is required here: expected an array of shape (3, 6, 8)",
    ),
    "means misshapen": (
        lambda: jh.mask_heads(CONFIG, FEW, "mean", means=np.ones((3, 2, 8))),
        "means has shape (3, 2, 8), expected (3, 6, 8)",
    ),
    "scale": (
        lambda: jh.scale_heads(CONFIG, np.ones((6, 3))),
        "scale has shape (6, 3), expected (3, 6) or (3, 6, 8)",
    ),
    "offset": (
        lambda: jh.offset_heads(CONFIG, np.ones((3, 6))),
        "offset has shape (3, 6), expected (3, 6, 8)",
    ),
    "steer layer": (
        lambda: jh.steer(CONFIG, {3: np.ones(40)}), "layer 3 is out of range 0..2",
    ),
    "steer vector": (
        lambda: jh.steer(CONFIG, {1: np.ones(41)}), "vectors[1] has shape (41,), expected (40,)",
    ),
    "steer vectors": (
        lambda: jh.steer(CONFIG, np.ones((2, 40))), "vectors has shape (2, 40), expected (3, 40)",
    ),
    "steer site": (
        lambda: jh.steer(CONFIG, np.ones((3, 40)), site="z"),
        "site 'z' [L,B,T,H,Dh] is not a [L,B,T,D] site of the stack",
    ),
    "steer outside": (
        lambda: jh.steer(CONFIG, np.ones((3, 40)), site="embed"), "site 'embed' [B,T,D] is not",
    ),
    "steer unknown site": (
        lambda: jh.steer(CONFIG, np.ones((3, 40)), site="resid"), "unknown site 'resid'",
    ),
    "patch rank": (
        lambda: jh.set_activation(CONFIG, "z", np.ones((2, 14, 6, 8))),
        "value for 'z' has shape (2, 14, 6, 8), expected axes [L,B,T,H,Dh]",
    ),
    "patch without heads": (
        lambda: jh.set_activation(CONFIG, "attn_out", np.ones((3, 2, 14, 40)), heads=FEW),
        "site 'attn_out' [L,B,T,D] has no query head axis",
    ),
    "patch key heads": (
        lambda: jh.set_activation(CONFIG, "k", np.ones((3, 2, 14, 2, 8)), heads=FEW),
        "site 'k' [L,B,T,K,Dh] has no query head axis",
    ),
    "patch layer": (
        lambda: jh.set_activation(CONFIG, "z", np.ones((3, 2, 14, 6, 8)), layers=[-1]),
        "layer -1 is out of range 0..2",
    ),
    "patch without layers": (
        lambda: jh.set_activation(CONFIG, "final", np.ones((2, 14, 40)), layers=[0]),
        "site 'final' is outside the stack: it has no layers to choose",
    ),
    "directions shape": (
        lambda: jh.project_out(CONFIG, np.ones(41)),
        "directions have shape (41,), expected [D], [r,D] or [L,r,D] with L=3, D=40",
    ),
    "directions layers": (
        lambda: jh.project_out(CONFIG, np.ones((2, 1, 40))), "directions have shape (2, 1, 40)",
    ),
    "zero direction": (
        lambda: jh.project_out(CONFIG, np.eye(2, 40) * [[1], [0]]),
        "directions contain a zero vector",
    ),
    "project layer": (
        lambda: jh.project_out(CONFIG, np.ones(40), layers=[5]), "layer 5 is out of range 0..2",
    ),
    "neuron": (
        lambda: jh.clamp_neurons(CONFIG, {(0, 56): 1.0}), "neuron 0.56 is out of range 0..55",
    ),
    "neuron layer": (lambda: jh.clamp_neurons(CONFIG, {(3, 0): 1.0}), "layer 3 is out of range"),
    "reference": (
        lambda: jh.attend_to(CONFIG, FEW, "frist"),
        "unknown reference 'frist'. Did you mean 'first'",
    ),
    "reference heads": (lambda: jh.attend_to(CONFIG, [(9, 9)], "self"), "head 9.9 is out of range"),
    "identity site": (lambda: jh.Edits.identity(CONFIG, "zz"), "unknown site 'zz'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_constructors_refuse(case):
    make, message = REFUSALS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize("heads", [[3], [(1.7, 2)], [(1, 2, 3)]])
def test_heads_that_are_not_pairs_of_integers_are_refused(heads):
    with pytest.raises(ValueError, match=r"head.*(pair|\(layer, head\))"):
        jh.mask_heads(CONFIG, heads)


def test_directions_named_twice_remove_no_more_than_once():
    direction = normal(40)
    twice = jh.project_out(CONFIG, np.stack([direction, 2 * direction]))["resid_post"]
    once = jh.project_out(CONFIG, direction)["resid_post"]
    x = jnp.asarray(normal(3, 1, 1, 40, seed=1))
    close(twice(x, None), once(x, None))


def test_constructors_do_what_they_say():
    x = jnp.asarray(normal(3, 2, 14, 40))
    directions = normal(2, 40, seed=1)
    out = jh.project_out(CONFIG, directions, layers=[0, 2])["resid_post"](x, None)
    assert np.abs(out @ directions.T)[[0, 2]].max() < 1e-4
    np.testing.assert_array_equal(out[1], x[1])
    neurons = jnp.asarray(normal(3, 2, 14, 56))
    clamped = jh.clamp_neurons(CONFIG, {(1, 7): 2.5})["neurons"](neurons, None)
    np.testing.assert_array_equal(clamped, neurons.at[1, :, :, 7].set(2.5))
    steered = jh.steer(CONFIG, {2: directions[0]}, strength=3.0)["resid_post"](x, None)
    close(steered, x.at[2].add(3 * directions[0]))
    z = jnp.asarray(normal(3, 2, 14, 6, 8))
    means = normal(3, 6, 8, seed=2)
    kept = np.asarray(z)
    for how, value in (("zero", np.zeros(8)), ("mean", means[1, 4])):
        masked = jh.mask_heads(CONFIG, [(1, 4)], how, means=means)["z"](z, None)
        expected = kept.copy()
        expected[1, :, :, 4] = value
        close(masked, expected)


def test_attention_is_moved_to_what_the_mask_allows():
    batch = jh.pack([list(tiny_tokens()[0]), list(tiny_tokens()[1, :9])], side="left")
    for reference in ("first", "self"):
        edits = jh.attend_to(CONFIG, [(0, 1)], reference)
        pattern = tiny_model()(batch, edits=edits, taps="pattern").taps["pattern"][0, :, 1]
        columns = np.arange(9) if reference == "self" else np.zeros(9, int)
        np.testing.assert_array_equal(pattern[1, 5:, 5:], np.eye(9)[columns])
        columns = np.arange(14) if reference == "self" else np.zeros(14, int)
        np.testing.assert_array_equal(pattern[0], np.eye(14)[columns])


# Reading edits


@struct.dataclass
class Signed:
    """An edit of one's own, with a field that is no array."""

    power: jax.Array
    sign: int = struct.field(pytree_node=False, default=1)

    def __call__(self, value, context):
        return value * self.sign * self.power


@pytest.mark.parametrize(
    ("edits", "parts"),
    [
        (jh.Edits(), ["Edits()"]),
        (jh.mask_heads(CONFIG, FOURTEEN, "uniform"),
         ["q: Affine(scale=float32[3,1,1,6,1], 14 of 18 heads changed: 0.0, 0.1, 0.2", "..."]),
        (jh.mask_heads(CONFIG, [(0, 1), (2, 5)]), ["2 of 18 heads changed: 0.1, 2.5)"]),
        (jh.attend_to(CONFIG, [(1, 2)], "self"), ["1 of 18 heads changed: 1.2", "'self'"]),
        (jh.project_out(CONFIG, np.ones(40), layers=[1]), ["1 of 3 layers changed"]),
        (jh.scale_heads(CONFIG, np.ones((3, 6)), when="decode"), ["0 of 18", "when decode"]),
        (jh.offset_heads(CONFIG, normal(3, 6, 8), when=np.eye(2, 14, dtype=bool))
         | jh.scale_heads(CONFIG, np.zeros((3, 6))),
         ["when tokens bool[1,2,14] then Affine(", "18 of 18"]),
        (jh.Edits(z=Signed(np.ones((3, 1, 1, 6, 1)))), ["Signed(power=", "sign=1"]),
    ],
)  # fmt: skip
def test_edits_print_what_they_change(edits, parts):
    for part in parts:
        assert part in repr(edits)


def test_edits_print_without_values_too():
    shapes = jax.eval_shape(lambda edits: edits, jh.mask_heads(CONFIG, FEW))
    assert "z: Affine(scale=float32[3,1,1,6,1]" in repr(shapes)


@pytest.mark.parametrize(
    "edits",
    [jh.steer(CONFIG, {1: np.ones(40)}), jh.clamp_neurons(CONFIG, {(1, 3): 1.0})],
    ids=["steer", "neurons"],
)
def test_sites_without_heads_do_not_speak_of_heads(edits):
    assert "heads" not in repr(edits) and "1 of 3 layers changed" in repr(edits)


def test_shapes_alone_say_nothing_about_what_changed():
    shapes = jax.eval_shape(lambda edits: edits, jh.mask_heads(CONFIG, FEW))
    assert "changed" not in repr(shapes)
