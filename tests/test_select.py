"""What is trained: leaves by path, slices by head and layer, the rest bit-identical."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_model, tiny_tokens

from jaxheads import Affine, Batch, Edits, Transformer
from jaxheads.model import parameter_table
from jaxheads.model.parameters import flatten
from jaxheads.train.losses import language_loss
from jaxheads.train.optimizer import Optimizer
from jaxheads.train.select import HEAD_AXES, mask_edits, merge, only, restore, select

HEADS = [(0, 1), (2, 5)]  # of 6 query heads; key/value heads 0 and 1 of 2


def model():
    return tiny_model(biases=True, tied=False)


def paths(tree):
    return set(dict(flatten(tree)))


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["blocks/attn/[qo]"], {"blocks/attn/q", "blocks/attn/o"}),
        (["unembed/kernel", "*norm/scale"], {"unembed/kernel", "final_norm/scale", *(
            f"blocks/{n}_norm/scale" for n in ("attn", "mlp"))}),
        (["mlp", "!biases"], {f"blocks/mlp/{n}" for n in ("gate", "up", "down")}),
        (["!biases", "mlp"], {f"blocks/mlp/{n}" for n in ("gate", "up", "down")}),
        (["!blocks/*", "!norms"], {"embed/tokens", "unembed/kernel"}),
        (["heads"], {f"blocks/attn/{n}" for n in HEAD_AXES}),
        (["attention"], {f"blocks/attn/{n}" for n in (*HEAD_AXES, "o_bias")}),
    ],
)  # fmt: skip
def test_patterns_choose_paths(patterns, expected):
    params = model().params
    chosen = select(params, patterns)
    assert paths(chosen.trainable) == expected
    assert paths(chosen.frozen) == paths(params) - expected
    assert chosen.count == sum(leaf.size for leaf in jax.tree.leaves(chosen.trainable))
    assert all(leaf is None for _, leaf in flatten(chosen.mask))


def test_everything_is_chosen_unless_told_otherwise():
    params = model().params
    assert select(params).frozen == {}
    assert paths(select(params, heads=HEADS).trainable) == {f"blocks/attn/{n}" for n in HEAD_AXES}


def test_merge_is_the_inverse():
    params = model().params
    chosen = select(params, ["blocks/attn/q", "final_norm/*"])
    whole = dict(flatten(merge(chosen.trainable, chosen.frozen)))
    assert all(whole.pop(path) is leaf for path, leaf in flatten(params))
    assert not whole
    with pytest.raises(ValueError, match="blocks/attn/q is both trained and frozen"):
        merge(chosen.trainable, params)


def test_head_axes_are_those_of_the_parameter_table():
    table = parameter_table(model().config)
    for name, (kind, axis) in HEAD_AXES.items():
        assert table[f"blocks/attn/{name}"].axes[axis] == kind
    per_head = {p for p, leaf in table.items() if {"H", "K"} & set(leaf.axes)}
    assert per_head == {f"blocks/attn/{name}" for name in HEAD_AXES}


def test_heads_choose_their_slices_and_the_key_value_heads_they_read():
    chosen = select(model().params, heads=HEADS)
    mask = chosen.mask["blocks"]["attn"]
    query, shared = np.zeros((3, 6), bool), np.zeros((3, 2), bool)
    query[0, 1] = query[2, 5] = shared[0, 0] = shared[2, 1] = True
    for name, (kind, axis) in HEAD_AXES.items():
        shape = chosen.trainable["blocks"]["attn"][name].shape
        assert np.broadcast_shapes(mask[name].shape, shape) == shape
        assert mask[name].size == shape[0] * shape[axis]
        np.testing.assert_array_equal(
            mask[name].reshape(3, -1), query if kind == "H" else shared, err_msg=name
        )
    # Per head q, o and of each group k, v: matrices of 40 x 8; biases of q, k, v.
    assert chosen.count == 2 * 4 * 40 * 8 + 2 * 3 * 8


def test_two_heads_of_a_group_share_its_keys_and_values():
    one, two = (
        select(model().params, ["*attn/[kv]"], heads=h) for h in ([(1, 3)], [(1, 3), (1, 5)])
    )
    assert one.count == two.count == 2 * 40 * 8


def test_layers_restrict_what_heads_do_not():
    chosen = select(model().params, ["heads", "mlp", "unembedding"], heads=HEADS, layers=[1])
    mask = dict(flatten(chosen.mask))
    assert mask["blocks/mlp/up"].ravel().tolist() == [False, True, False]
    assert mask["unembed/kernel"] is None
    assert mask["blocks/attn/o"][0].any() and not mask["blocks/attn/o"][1].any()
    mlp = 3 * 40 * 56 + 2 * 56 + 40
    assert chosen.count == mlp + 97 * 40 + 2 * 4 * 40 * 8 + 2 * 3 * 8


def test_attentions_of_two_stacks_are_told_apart():
    one = model().params["blocks"]
    params = {"encoder": {"blocks": one}, "decoder": {"blocks": {**one, "cross": one["attn"]}}}
    chosen = select(params, heads={"decoder/blocks/cross": [(0, 1)]}, patterns=["*cross/[qo]"])
    assert paths(chosen.trainable) == {"decoder/blocks/cross/q", "decoder/blocks/cross/o"}
    assert chosen.count == 2 * 40 * 8
    with pytest.raises(ValueError, match=r"3 attentions .*heads must be a mapping"):
        select(params, heads=[(0, 1)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patterns": ["blocks/atn/q"]}, "Did you mean 'blocks/attn/q'"),
        ({"patterns": ["all", "!head"]}, "unknown path or pattern 'head'. Did you mean 'heads'"),
        ({"patterns": "mlp"}, "patterns must be a list, got the string 'mlp'"),
        ({"patterns": ["mlp", "!mlp"]}, "choose nothing of the parameter tree"),
        ({"heads": [(0, 6)]}, r"head \(0, 6\) of blocks/attn: .*layer in 0..2 and a head in 0..5"),
        ({"heads": [(3, 0)]}, r"head \(3, 0\)"),
        ({"heads": [(-1, 0)]}, r"head \(-1, 0\)"),
        ({"heads": []}, "no heads of 'blocks/attn' are given"),
        ({"heads": {"blocks/atn": [(0, 0)]}}, "Did you mean 'blocks/attn'"),
        ({"heads": HEADS, "patterns": ["mlp"]}, "no pattern chooses its parameters"),
        ({"layers": [3]}, "layer 3 of blocks/.* expected one of 0..2"),
        ({"layers": []}, "layers is empty"),
        ({"layers": [0], "patterns": ["unembedding"]}, "no chosen leaf has layers"),
    ],
)
def test_bad_choices_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        select(model().params, **options)


def bits(array):
    return np.asarray(array).view(np.uint32)


def test_all_other_slices_stay_bit_identical_through_training():
    config, params = model().config, model().params
    # Negative zeros, which adding 0.0 would turn into positive ones.
    params = jax.tree.map(np.array, params)
    for leaf in jax.tree.leaves(params):
        leaf[..., 0] = -0.0
    params = jax.tree.map(jnp.asarray, params)
    chosen = select(params, ["heads", "mlp"], heads=HEADS, layers=[1])
    optimizer = Optimizer(learning_rate=1e-2, weight_decay=0.1, clip=0.5).build(5, chosen.mask)
    batch = Batch(tiny_tokens(4), np.ones((4, 14), bool))

    @jax.jit
    def step(trainable, state):
        def loss(trainable):
            return language_loss(Transformer(config, merge(trainable, chosen.frozen)), batch)[0]

        updates, state = optimizer.update(jax.grad(loss)(trainable), state, trainable)
        return optax.apply_updates(trainable, updates), state

    trained, state = chosen.trainable, jax.jit(optimizer.init)(chosen.trainable)
    for _ in range(5):
        trained, state = step(trained, state)
    assert step._cache_size() == 1

    masks, before = dict(flatten(chosen.mask)), dict(flatten(chosen.trainable))
    for path, after in flatten(trained):
        mask, old = np.broadcast_to(masks[path], after.shape), before[path]
        np.testing.assert_array_equal(bits(after)[~mask], bits(old)[~mask], err_msg=path)
        assert (bits(after) != bits(old))[mask].mean() > 0.9, path


def test_restore_takes_back_what_was_not_trained():
    before, after = (
        {"a": jnp.array([-0.0, 1.0]), "b": jnp.ones(2)},
        {"a": jnp.zeros(2), "b": jnp.zeros(2)},
    )
    found = restore({"a": np.array([False, True]), "b": None}, after, before)
    np.testing.assert_array_equal(bits(found["a"]), bits(np.float32([-0.0, 0.0])))
    np.testing.assert_array_equal(found["b"], [0.0, 0.0])


def test_a_masked_optimizer_is_that_of_the_chosen_slice_alone():
    mask = np.array([[True], [False], [True]])
    params, gradient = jnp.arange(6.0).reshape(3, 2), jnp.ones((3, 2)).at[1].set(1e6)
    settings = Optimizer("sgd", 1.0, clip=1.0)
    whole, part = settings.build(1, mask), settings.build(1)
    found, _ = whole.update(gradient, whole.init(params), params)
    rows = np.array([0, 2])
    alone, _ = part.update(gradient[rows], part.init(params[rows]), params[rows])
    np.testing.assert_array_equal(found[rows], alone)
    np.testing.assert_array_equal(bits(found[1]), bits(np.float32([-0.0, -0.0])))


def test_one_program_serves_every_mask():
    """The mask is read from the state: steps that are shared between stages stay right."""
    first, second = (only(np.array(m), optax.sgd(1.0)) for m in ([True, False], [False, True]))
    params = jnp.ones(2)
    update = jax.jit(first.update)
    for optimizer, expected in ((first, [-1.0, 0.0]), (second, [0.0, -1.0])):
        found, _ = update(jnp.ones(2), optimizer.init(params), params)
        np.testing.assert_array_equal(found, expected)
    assert update._cache_size() == 1


def test_a_gradient_that_is_not_finite_outside_does_no_harm():
    optimizer = only(np.array([True, False]), optax.sgd(1.0))
    params = jnp.ones(2)
    found, _ = optimizer.update(jnp.array([1.0, jnp.nan]), optimizer.init(params), params)
    np.testing.assert_array_equal(found, [-1.0, -0.0])


def test_edits_are_masked_by_head():
    edits = Edits(z=Affine(jnp.ones((3, 1, 1, 6, 8)), jnp.zeros((3, 1, 1, 6, 8))))
    mask = mask_edits(edits, [(2, 4)])
    assert jax.tree.structure(mask) == jax.tree.structure(edits)
    for leaf in jax.tree.leaves(mask):
        assert leaf.shape == (3, 1, 1, 6, 1) and leaf.sum() == 1 and leaf[2, 0, 0, 4, 0]
    optimizer = Optimizer("adamw", 0.1).build(1, mask)
    updates, _ = optimizer.update(edits, optimizer.init(edits), edits)
    assert np.argwhere(np.asarray(updates["z"].scale).any(axis=-1)).tolist() == [[2, 0, 0, 4]]


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (Edits(mlp_out=Affine(jnp.ones((3, 1, 1, 40)))), r"'mlp_out' \[L,B,T,D\] have no heads"),
        (Edits(z=Affine(jnp.ones((3, 1, 1, 1, 1)))), r"head \(2, 4\) of edit at 'z'"),
        (Edits(z=Affine(jnp.ones((3,)))), r"shape \(3,\), expected layers first and heads on"),
    ],
)
def test_edits_without_heads_are_refused(edits, message):
    with pytest.raises(ValueError, match=message):
        mask_edits(edits, [(2, 4)])
