"""Generation: cached equals uncached, padded equals alone, with and without edits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_model, tiny_tokens

import jaxheads as jh
from jaxheads.decode.sampling import Sampler, sample

pytestmark = pytest.mark.usefixtures("quickly_compiled")

CONFIG = tiny_model().config
EDITS = {
    "none": None,
    "mask": jh.mask_heads(CONFIG, [(0, 1), (2, 3)]),
    "offset": jh.offset_heads(CONFIG, np.full((3, 6, 8), 0.3, np.float32)),
}


def by_hand(row, count, edits):
    """Greedy decoding by a whole forward pass for each token."""
    row = list(row)
    for _ in range(count):
        logits = tiny_model()(np.asarray([row + [0] * (30 - len(row))]), edits=edits).logits
        row.append(int(np.argmax(logits[0, len(row) - 1])))
    return row[-count:]


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_equals_uncached_forwards_row_by_row(name, side):
    rows = [tiny_tokens(1, 12)[0].tolist(), tiny_tokens(1, 7, 1)[0].tolist()]
    made = jh.generate(
        tiny_model(), jh.pack(rows, side=side), edits=EDITS[name], max_new_tokens=8
    ).rows()
    assert made == [by_hand(row, 8, EDITS[name]) for row in rows]


def test_the_phase_of_an_edit_decides_where_it_acts():
    strong = jh.offset_heads(CONFIG, np.full((3, 6, 8), 2.0, np.float32))
    prompt = tiny_tokens(1, 12)

    def made(edits):
        return jh.generate(tiny_model(), prompt, edits=edits, max_new_tokens=8).rows()[0]

    plain, both = made(None), made(strong)
    prefill, decode = made(strong.when("prefill")), made(strong.when("decode"))
    assert prefill[0] == both[0] != plain[0]
    assert decode[0] == plain[0]
    assert len({tuple(x) for x in (plain, both, prefill, decode)}) == 4


def test_rows_end_at_stop_tokens_independently():
    prompt = jh.pack([tiny_tokens(1, 12)[0].tolist(), tiny_tokens(1, 7, 1)[0].tolist()])
    free = jh.generate(tiny_model(), prompt, max_new_tokens=8).rows()
    stop = free[0][2]
    stopped = jh.generate(tiny_model(), prompt, max_new_tokens=8, stop=[stop]).rows()
    for row, whole in zip(stopped, free, strict=True):
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert row == whole[:end]


def test_one_program_serves_every_value_of_an_edit():
    traces = []

    def counting(value, context):
        traces.append(1)
        return value

    def edits(strength):
        steer = jh.offset_heads(CONFIG, np.full((3, 6, 8), strength, np.float32))
        return steer | jh.Edits(mlp_out=jax.tree_util.Partial(counting))

    prompt = tiny_tokens(1, 12)
    jh.generate(tiny_model(), prompt, edits=edits(0.1), max_new_tokens=4)
    first = len(traces)
    jh.generate(tiny_model(), prompt, edits=jh.Edits(**edits(0.9)), max_new_tokens=4)
    # The Partial wraps a new function each time it is made; the same one must not retrace.
    assert first > 0
    same = edits(0.5)
    jh.generate(tiny_model(), prompt, edits=same, max_new_tokens=4)
    before = len(traces)
    jh.generate(tiny_model(), prompt, edits=jax.tree.map(lambda x: 2 * x, same), max_new_tokens=4)
    assert len(traces) == before


def test_sampling_follows_its_key_and_its_limits():
    prompt = tiny_tokens(1, 12)

    def draw(seed, **options):
        return jh.generate(
            tiny_model(), prompt, max_new_tokens=8, key=jax.random.key(seed), **options
        ).rows()[0]

    assert draw(0, temperature=1.0) == draw(0, temperature=1.0)
    assert draw(0, temperature=1.0) != draw(1, temperature=1.0)
    greedy = jh.generate(tiny_model(), prompt, max_new_tokens=8).rows()[0]
    assert draw(0, temperature=1.0, top_k=1) == greedy
    assert draw(3, temperature=1.0, top_p=1e-6) == greedy


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    probability = np.array([0.5, 0.3, 0.15, 0.05])
    logits = jnp.log(jnp.asarray(np.tile(probability, (4000, 1)), jnp.float32))
    sampler = Sampler.of(1.0, None, 0.7, 4)
    drawn = np.asarray(sample(sampler, logits, jax.random.key(0)))
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    np.testing.assert_allclose(shares, [0.625, 0.375, 0, 0], atol=0.03)
    cold = Sampler.of(0.5, 3, None, 4)
    shares = np.bincount(np.asarray(sample(cold, logits, jax.random.key(1))), minlength=4) / 4000
    squared = probability[:3] ** 2 / (probability[:3] ** 2).sum()
    np.testing.assert_allclose(shares, [*squared, 0], atol=0.03)


BAD = {
    "no tokens": ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    "too long": ({"max_new_tokens": 60}, "exceed the model's context of 64"),
    "temperature": ({"temperature": -1.0}, "temperature must be 0 or more, got -1.0"),
    "top_k": ({"top_k": 0}, "top_k must be at least 1, got 0"),
    "top_p": ({"top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5"),
    "no key": ({"temperature": 1.0}, "needs a random key"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_refused(name):
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        jh.generate(tiny_model(), tiny_tokens(1, 12), **{"max_new_tokens": 4, **options})


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="needs at least one token"):
        jh.generate(tiny_model(), np.zeros((1, 0), np.int32), max_new_tokens=4)
    batch = jh.Batch(np.zeros((1, 5), np.int32), np.zeros((1, 5), bool))
    with pytest.raises(ValueError, match="every row needs at least one real token"):
        jh.generate(tiny_model(), batch, max_new_tokens=4)
