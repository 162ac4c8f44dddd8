"""What is not used costs nothing, and values are never compiled in."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_model, tiny_tokens

import jaxheads as jh
from jaxheads.model.transformer import _forward

pytestmark = pytest.mark.optimised

CONFIG = tiny_model().config


def program(**options):
    """The compiled logits of the model, with the edits among the inputs."""
    edits = options.pop("edits", None)

    def run(model, tokens, edits):
        return model(tokens, edits=edits, **options).logits

    return jax.jit(run).lower(tiny_model(), tiny_tokens(), edits).compile()


def cost(compiled):
    return (
        compiled.cost_analysis()["flops"],
        compiled.memory_analysis().temp_size_in_bytes,
        compiled.cost_analysis()["bytes accessed"],
    )


@pytest.fixture(scope="module")
def plain():
    return cost(program())


@pytest.mark.parametrize(
    "options",
    [{"edits": jh.Edits()}, {"edits": {}}, {"taps": ()}, {"taps": {}}, {"taps": []}],
    ids=["no edits", "no mapping", "no taps", "no named taps", "no listed taps"],
)
def test_an_unused_site_costs_nothing(plain, options):
    assert cost(program(**options)) == plain


@pytest.mark.parametrize("site", ["z", "neurons"])
def test_a_tap_that_is_not_returned_costs_nothing(plain, site):
    assert cost(program(taps=(site,)))[:2] == plain[:2]


def test_scaling_heads_is_less_than_a_percent_of_the_work(plain):
    flops, memory, _ = cost(program(edits=jh.scale_heads(CONFIG, np.ones((3, 6)))))
    assert plain[0] < flops < 1.01 * plain[0]
    # One number per head and layer, and one layer's worth of z at most.
    assert memory <= plain[1] + 4 * (3 * 6 + 2 * 14 * 6 * 8)


def test_one_program_serves_every_value_choice_of_heads_and_strength():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def masked(edits):
        return tiny_model()(tiny_tokens(), edits=edits).logits

    choices = [
        jh.mask_heads(CONFIG, []),
        jh.mask_heads(CONFIG, [(0, 1), (2, 5)]),
        jh.mask_heads(CONFIG, [(layer, head) for layer in range(3) for head in range(6)]),
        jh.scale_heads(CONFIG, np.full((3, 6), 0.5)),
        jh.Edits.identity(CONFIG, "z"),
    ]
    outputs = [np.asarray(masked(edits)) for edits in choices]
    for output in outputs[1:4]:
        assert np.abs(output - outputs[0]).max() > 1e-3
    np.testing.assert_array_equal(outputs[4], outputs[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda heads, strength: jh.attend_to(CONFIG, heads, "self", strength),
        lambda heads, strength: jh.set_activation(
            CONFIG, "z", np.ones((3, 1, 1, 6, 8)), heads=heads, weight=strength
        ),
        lambda heads, strength: jh.steer(
            CONFIG, {layer: np.ones(40) for layer, _ in heads}, strength=strength
        ),
        lambda heads, strength: jh.clamp_neurons(CONFIG, dict.fromkeys(heads, strength)),
    ],
    ids=["attend_to", "patch", "steer", "clamp_neurons"],
)
def test_choices_and_strengths_have_one_structure(make):
    edits = [make([(0, 1)], 0.5), make([(1, 2), (2, 5)], 2.0), make([(2, 0)], jnp.float32(1))]
    chex.assert_trees_all_equal_structs(*edits)
    chex.assert_trees_all_equal_shapes_and_dtypes(*edits)
    weak = {tuple(leaf.weak_type for leaf in jax.tree.leaves(edit)) for edit in edits}
    assert len(weak) == 1


def test_calling_the_model_directly_compiles_once():
    tokens = tiny_tokens(length=11)
    before = _forward._cache_size()
    for seed in range(3):
        scale = np.random.default_rng(seed).normal(size=(3, 6))
        tiny_model()(tokens + 0, edits=jh.scale_heads(CONFIG, scale), taps={"z": jh.head_norm})
    assert _forward._cache_size() == before + 1
