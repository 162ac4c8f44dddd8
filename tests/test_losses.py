"""Losses of training: language modelling, preferences, distillation."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import close, mostly_slow, tiny_model, tiny_tokens

from jaxheads import Affine, Batch, Edits, next_token_loss
from jaxheads.token_scores import next_tokens, over_slots, score
from jaxheads.train.distillation import distillation_loss, hidden_loss
from jaxheads.train.losses import language_loss
from jaxheads.train.preference import (
    Preferences,
    dpo_loss,
    encode_preferences,
    preference_loss,
    sequence_logprobs,
    with_reference,
)

MODEL = functools.partial(tiny_model, tied=False)
run_loss = jax.jit(language_loss, static_argnames=("z_loss", "chunk"))
LENGTHS = [14, 9, 11]


def real(lengths=LENGTHS, length=14):
    return np.arange(length) < np.array(lengths)[:, None]


def batch(**fields):
    """Three rows of different lengths, padded on the right, whose targets are every other token."""
    targets = np.tile(np.arange(14) % 2 == 0, (3, 1))
    return Batch(tiny_tokens(3), real(), targets, **fields)


def offsets(value=0.0):
    """Edits that add to the logits, to differentiate by."""
    return Edits(logits=Affine(offset=jnp.full((3, 14, 97), value)))


@functools.cache
def logits_of(model_kind="gqa"):
    """float64 [3,14,97], of the batch above."""
    return np.asarray(MODEL(model_kind)(batch()).logits, np.float64)


def log_z(logits):
    top = logits.max(-1)
    return top + np.log(np.exp(logits - top[..., None]).sum(-1))


def test_the_language_loss_is_the_mean_over_targets():
    model, data = MODEL(), batch()
    value, metrics = run_loss(model, data, z_loss=1e-2)
    logits = logits_of()
    normaliser = log_z(logits)
    losses, squares, right = [], [], []
    for row, slot in np.argwhere(data.target_mask):
        z, seen = normaliser[row, slot - 1], logits[row, slot - 1]
        losses.append(z - seen[data.tokens[row, slot]])
        squares.append(1e-2 * z**2)
        right.append(seen.argmax() == data.tokens[row, slot])
    close(value, np.mean(losses) + np.mean(squares))
    close(metrics["z_loss"], np.mean(squares))
    close(value - metrics["z_loss"], jax.jit(next_token_loss)(model, data))
    assert float(metrics["weight"]) == len(losses) == data.target_mask.sum()
    close(metrics["token_accuracy"], np.mean(right))
    assert value.dtype == jnp.float32


def test_answers_alone_give_the_same_loss():
    model, data = MODEL(), batch()
    whole, metrics = run_loss(model, data, z_loss=1e-2)
    some, others = run_loss(model, data, data.answers(), z_loss=1e-2)
    close(whole, some)
    close(metrics["weight"], others["weight"])


def test_only_slots_before_targets_have_a_gradient():
    data = batch()

    @jax.jit
    def run(data):
        loss = lambda edits: language_loss(MODEL(), data, edits=edits)[0]  # noqa: E731
        return jax.value_and_grad(loss)(offsets())

    value, gradient = run(data)
    slots = np.roll(data.target_mask, -1, axis=1)
    moved = np.asarray(gradient["logits"].offset)
    assert np.all(moved[~slots] == 0)
    assert np.all(np.any(moved[slots] != 0, axis=-1))
    # What is written in the padding changes nothing at all.
    tokens = np.where(data.mask, data.tokens, (data.tokens + 5) % 97)
    other, same = run(data.replace(tokens=tokens))
    assert float(other) == float(value)
    np.testing.assert_array_equal(same["logits"].offset[slots], moved[slots])


def test_a_text_is_not_predicted_from_the_one_packed_before_it():
    segments = np.where(real(), np.where(np.arange(14) < 6, 1, 2), 0).astype(np.int32)
    data = Batch(tiny_tokens(3), real(), None, segments)
    labels, counted = next_tokens(data)
    expected = real()[:, 1:] & (np.arange(13) != 5)
    np.testing.assert_array_equal(counted[:, :-1], expected)
    assert not counted[:, -1].any()
    np.testing.assert_array_equal(labels[:, :-1], data.tokens[:, 1:])


def test_the_gradient_of_the_z_loss_is_twice_log_z_times_the_probabilities():
    logits = 3 * jax.random.normal(jax.random.key(3), (1, 2, 7))
    found = jax.grad(lambda x: jnp.sum(score(x, jnp.zeros((1, 2), int)).log_z ** 2))(logits)
    z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    close(found, 2 * z * jnp.exp(logits - z), 1e-6)


def test_a_label_outside_the_vocabulary_is_nan():
    found = score(jnp.zeros((1, 3, 7)), jnp.array([[-1, 7, 6]]))
    np.testing.assert_array_equal(jnp.isnan(found.loss), [[True, True, False]])
    close(found.loss[0, 2], math.log(7))


@pytest.mark.parametrize("chunk", [1, 4, 5, 14, 99])
def test_over_slots_is_the_function_of_all_slots(chunk):
    x, y = np.arange(56.0).reshape(2, 14, 2), np.arange(28).reshape(2, 14)
    widths = []

    def function(x, y):
        widths.append(x.shape[1])
        return {"a": x + y[..., None], "b": -y}

    found = over_slots(function, chunk, x, y)
    np.testing.assert_array_equal(found["a"], x + y[..., None])
    np.testing.assert_array_equal(found["b"], -y)
    assert max(widths) <= chunk


def test_chunks_change_neither_values_nor_gradients():
    """Of parameters and edits, compiled once for each size of chunk."""

    @functools.partial(jax.jit, static_argnames="chunk")
    def run(model, edits, data, chunk):
        def loss(model, edits):
            return language_loss(model, data, edits=edits, z_loss=1e-2, chunk=chunk, remat="dots")

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(model, edits)

    given = MODEL(), Edits.identity(MODEL().config, "z")
    whole, parts, _ = (run(*given, batch(), chunk) for chunk in (None, 4, 4))
    for a, b in zip(*map(jax.tree.leaves, (whole, parts)), strict=True):
        close(a, b, 1e-6)
    assert run._cache_size() == 2


@pytest.mark.slow
def test_chunks_save_the_memory_of_the_logits():
    model = tiny_model(vocab_size=4096)
    data = Batch(tiny_tokens(8, 32), np.ones((8, 32), bool))

    def memory(chunk):
        loss = lambda model: language_loss(model, data, chunk=chunk)[0]  # noqa: E731
        program = jax.jit(jax.grad(loss)).lower(model).compile()
        assert ("[8,32,4096]" in program.as_text()) == (chunk is None)
        return program.memory_analysis().temp_size_in_bytes

    logits = 4 * 8 * 32 * 4096
    assert memory(None) - memory(4) > 2 * logits


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ({}, {"z_loss": -1.0}, "z_loss must be at least 0, got -1.0"),
        ({}, {"chunk": 0}, "chunk must be at least 1 slot, got 0"),
        ({}, {"chunk": 4, "edits": offsets}, "edits and taps of 'logits' need all logits at once"),
        ({"head": "none"}, {}, "does not predict the next token"),
        ({"causal": False}, {"chunk": 4}, "does not predict the next token"),
    ],
)
def test_losses_refuse_what_they_cannot_do(model, options, message):
    options = {k: v() if callable(v) else v for k, v in options.items()}
    with pytest.raises(ValueError, match=message):
        language_loss(tiny_model(**model), batch(), **options)


class Letters:
    """One token per letter; a text begins with token 1."""

    def encode(self, text, *, add_special_tokens=True):
        return [1] * add_special_tokens + [ord(c) - 30 for c in text]


def preferences(**options):
    examples = [("Q: why?", " Yes", " No"), ("A longer prompt", " b", " aaa"), ("x", "!", "?")]
    return encode_preferences(examples, Letters(), **options)


def test_pairs_are_prompts_with_either_answer():
    pairs = preferences(max_prompt=5, max_answer=2).pairs
    assert pairs.tokens.shape == (3, 2, 7)
    tokenizer = Letters()
    ends = tokenizer.encode("rompt b", add_special_tokens=False)
    np.testing.assert_array_equal(pairs.tokens[1, 0], ends)
    assert pairs.targets[0, 1].sum() == 2
    np.testing.assert_array_equal(pairs.targets[2, 0], [0, 0, 1, 0, 0, 0, 0])
    assert pairs.mask[2].sum(axis=1).tolist() == [3, 3]


@pytest.mark.parametrize(
    ("examples", "options", "message"),
    [
        ([("a", "b", "b")], {}, "chosen and rejected answer of pair 0 are the same 1 tokens"),
        ([("a", "bc", "bd")], {"max_answer": 1}, r"the same 1 tokens \(of at most 1\)"),
        ([("a", "b", "")], {}, "the rejected text of pair 0 has no tokens"),
        ([("a", "b", "c")], {"max_prompt": 0}, "max_prompt must be at least 1"),
        ([], {}, "no rows"),
    ],
)
def test_bad_pairs_are_named(examples, options, message):
    with pytest.raises(ValueError, match=message):
        encode_preferences(examples, Letters(), **options)


def test_the_log_probability_of_a_row_is_the_sum_over_its_targets():
    model, data = MODEL(), batch()
    logits = logits_of()
    expected = np.zeros(3)
    for row, slot in np.argwhere(data.target_mask):
        seen = logits[row, slot - 1]
        expected[row] += seen[data.tokens[row, slot]] - log_z(seen)
    close(jax.jit(sequence_logprobs)(model, data), expected)
    close(jax.jit(functools.partial(sequence_logprobs, chunk=5))(model, data), expected)


def test_preferences_at_the_reference_cost_log_2_and_pull_both_ways():
    model = MODEL()
    pairs = with_reference(model, preferences(), batch_size=2)
    assert pairs.reference.shape == (3, 2)
    edits = Edits.identity(model.config, "z", offset=True)

    @jax.jit
    def run(edits):
        loss = lambda edits: dpo_loss(model, pairs, edits=edits)  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(edits)

    (value, metrics), gradient = run(edits)
    close(value, math.log(2))
    close(metrics["reward_margin"], 0)
    assert float(metrics["weight"]) == 3
    # Down the gradient the chosen answers gain on the rejected ones, from the very edits.
    better = jax.tree.map(lambda x, g: x - 0.1 * g, edits, gradient)
    (lower, metrics), _ = run(better)
    assert float(lower) < float(value) - 1e-3
    assert float(metrics["reward_margin"]) > 0
    gap = metrics["chosen_reward"] - metrics["rejected_reward"]
    close(gap, metrics["reward_margin"])
    assert run._cache_size() == 1


def test_the_preference_loss_is_equation_7():
    ours, reference = np.random.default_rng(0).normal(-20, 3, (2, 5, 2))
    value, metrics = preference_loss(jnp.asarray(ours), jnp.asarray(reference), 0.3)
    margin = 0.3 * ((ours - reference)[:, 0] - (ours - reference)[:, 1])
    close(value, np.mean(np.log1p(np.exp(-margin))))
    close(metrics["reward_accuracy"], np.mean(margin > 0))
    close(metrics["reward_margin"], np.mean(margin))


def test_preferences_need_a_reference_and_a_beta():
    with pytest.raises(ValueError, match="call with_reference"):
        dpo_loss(MODEL(), preferences())
    pairs = Preferences(preferences().pairs, np.zeros((3, 2)))
    with pytest.raises(ValueError, match="beta must be positive, got 0"):
        dpo_loss(MODEL(), pairs, beta=0)


@pytest.mark.parametrize("chunk", mostly_slow([None, 5], 5))
def test_distillation_is_the_divergence_at_a_temperature(chunk):
    student, teacher, data = MODEL(), MODEL("mha"), batch()
    loss = jax.jit(functools.partial(distillation_loss, temperature=2.0, chunk=chunk))
    value, metrics = loss(student, teacher, data)
    p, q = (logits_of(kind) / 2 for kind in ("mha", "gqa"))
    p, q = (x - log_z(x)[..., None] for x in (p, q))
    slots = np.roll(data.target_mask, -1, axis=1)
    close(value, 4 * np.mean((np.exp(p) * (p - q)).sum(-1)[slots]))
    close(metrics["agreement"], np.mean((p.argmax(-1) == q.argmax(-1))[slots]))
    assert float(loss(student, student, data)[0]) == 0.0


def test_gradients_of_distillation_flow_to_the_student_only():
    edits = Edits.identity(MODEL().config, "z")
    teacher = jax.tree.map(lambda leaf: leaf * 0.5, edits)

    @jax.jit
    def run(model, edits, teacher_edits):
        def loss(model, edits, teacher_edits):
            sides = {"edits": edits, "teacher_edits": teacher_edits}
            far, _ = distillation_loss(MODEL(), model, batch(), **sides)
            near, _ = hidden_loss(MODEL(), model, batch(), "resid_post", **sides)
            return far + near

        return jax.grad(loss, argnums=(0, 1, 2))(model, edits, teacher_edits)

    model, edits, theirs = run(MODEL(), edits, teacher)
    assert all(not leaf.any() for leaf in jax.tree.leaves((model, theirs)))
    assert all(leaf.any() for leaf in jax.tree.leaves(edits))


@pytest.mark.parametrize("site", mostly_slow(["resid_post", "final", "pattern"], "resid_post"))
def test_hidden_states_are_compared_where_tokens_are_real_and_not_first(site):
    student, teacher, data = MODEL(), tiny_model(tied=False, biases=True), batch()
    value, metrics = jax.jit(hidden_loss, static_argnums=3)(student, teacher, data, site)
    ours, theirs = (np.asarray(m(data, taps=site).taps[site]) for m in (student, teacher))
    where = real() & (np.arange(14) > 0)
    squares = (ours - theirs) ** 2
    if site == "pattern":
        squares = np.moveaxis(squares, 2, 3)  # heads before slots -> [L,B,T,H,S]
    close(value, squares[:, where].mean() if site != "final" else squares[where].mean())
    assert float(metrics["weight"]) == where.sum()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda: distillation_loss(MODEL(), MODEL(vocab_size=98), batch()), "vocabulary of 97"),
        (lambda: distillation_loss(MODEL(), MODEL(), batch(), temperature=0), "temperature must"),
        (lambda: hidden_loss(MODEL(), MODEL(), batch(), "resid"), "unknown site 'resid'"),
        (lambda: hidden_loss(MODEL(), MODEL(d_model=48), batch(), "embed"), "expected the teach"),
    ],
)
def test_distillation_refuses_what_does_not_fit(loss, message):
    with pytest.raises(ValueError, match=message):
        loss()
