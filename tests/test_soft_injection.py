"""Soft Injection: identities of the gates, few-shot prompts, the gates kept on the way."""

import jax
import numpy as np
import pytest
from tiny import close, tiny_model, tiny_tokens

import jaxheads as jh
from jaxheads import tasks
from jaxheads.methods import soft_injection
from jaxheads.methods.measure import measure
from jaxheads.methods.method import TaskData, placed
from jaxheads.model.batch import Batch
from jaxheads.token_scores import token_scores
from jaxheads.train.fit import Fit
from jaxheads.train.job import Job
from jaxheads.train.optimizer import Optimizer
from jaxheads.train.step import make_step, start


class Characters:
    """A character is a token; 2 stands in front of a prompt."""

    def encode(self, text, *, add_special_tokens=True):
        return [2] * add_special_tokens + [3 + ord(c) % 90 for c in text]

    def encode_with_offsets(self, text, *, add_special_tokens=True):
        ids = self.encode(text, add_special_tokens=add_special_tokens)
        return ids, [(0, 0)] * len(ids)


def letters(count, seed=0):
    rng = np.random.default_rng(seed)
    drawn = rng.permutation(26)[:count]
    return [
        tasks.Example(f"{chr(97 + i)}:", f"{chr(97 + (i + 1) % 26)}!", group=str(i)) for i in drawn
    ]


@pytest.fixture(scope="module")
def data():
    train, held_out = letters(20), letters(8, seed=1)
    sides = [tasks.encode(side, Characters()).batch for side in (train, held_out)]
    return TaskData(train, held_out, *sides)


def test_gates_of_zero_and_one(data):
    model, tokens = tiny_model(), tiny_tokens()
    embedding = np.random.default_rng(0).normal(size=(3, 6, 8)).astype(np.float32)
    closed = soft_injection.injection(embedding, np.zeros((3, 6)))
    np.testing.assert_array_equal(model(tokens, edits=closed).logits, model(tokens).logits)
    full = soft_injection.injection(embedding, np.ones((3, 6)))
    value = np.broadcast_to(embedding[:, None, None], (3, 2, 14, 6, 8))
    patched = jh.set_activation(model.config, "z", value)
    close(model(tokens, edits=full).logits, model(tokens, edits=patched).logits)
    alpha = np.linspace(0, 1, 18, dtype=np.float32).reshape(3, 6)
    partly = model(tokens, edits=soft_injection.injection(embedding, alpha), taps="z").taps["z"]
    # The input of layer 0 is not changed by any gate.
    z = model(tokens, taps="z").taps["z"][0]
    close(partly[0], (1 - alpha[0, :, None]) * z + alpha[0, :, None] * embedding[0])


def test_few_shot_prompts_hold_other_examples_solved():
    examples = letters(5)
    batch = soft_injection.few_shot(examples, Characters(), 3, 7, seed=0)
    assert batch.tokens.shape == (7, 1 + 3 * (2 + 2 + 2) + 2) and batch.mask.all()
    text = {tuple(Characters().encode(e.prompt, add_special_tokens=False)): e for e in examples}
    for row in batch.tokens.tolist():
        assert row[0] == 2
        asked = [text[tuple(row[i : i + 2])] for i in range(1, len(row), 6)]
        assert len({e.prompt for e in asked}) == 4
        for n, e in enumerate(asked[:-1]):
            answer = Characters().encode(e.answer + "\n\n", add_special_tokens=False)
            assert row[3 + 6 * n : 7 + 6 * n] == answer
    assert len({tuple(row) for row in batch.tokens.tolist()}) > 1
    with pytest.raises(ValueError, match="5 shots and a question need 6 different examples, got 5"):
        soft_injection.few_shot(examples, Characters(), 5, 1, seed=0)


def test_only_the_first_answer_token_is_a_target(data):
    batch = soft_injection.first_target(data.train_batch)
    assert batch.answers().slots.shape == (20, 1)
    np.testing.assert_array_equal(batch.answers().ids[:, 0], data.train_batch.answers().ids[:, 0])


def test_loss_acts_where_the_variant_is_placed(data):
    model, rng = tiny_model(), np.random.default_rng(0)
    embedding = rng.normal(size=(3, 6, 8)).astype(np.float32)
    gates = rng.normal(size=(3, 6)).astype(np.float32)
    batch = soft_injection.first_target(data.train_batch)
    given = (batch, batch.answers())
    frozen = {"model": model, "embedding": embedding}
    loss, _ = soft_injection.injection_loss({"gates": gates}, frozen, given, None)
    tuned = soft_injection.injected(embedding, np.asarray(jax.nn.sigmoid(gates)))
    scores, _ = token_scores(model, *given, edits=placed(tuned, batch))
    close(loss, scores.loss.mean())
    everywhere, _ = token_scores(model, *given, edits=tuned.edits)
    assert abs(everywhere.loss.mean() - loss) > 1e-3


def test_gates_are_kept_on_the_way():
    settings = {"learning_rate": 0.25, "name": "adam"}
    keeping = soft_injection.KeepingOptimizer(validate_every=2, **settings).build(5)
    gates = np.ones((2, 3), np.float32)
    state = start({"gates": gates, "step": np.float32(0), "kept": np.zeros((3, 2, 3))}, keeping)
    plain = start({"gates": gates}, Optimizer(**settings).build(5))

    def loss(trained, frozen, batch, key):
        return ((trained["gates"] - batch) ** 2).sum(), {}

    step, reference = make_step(loss, keeping), make_step(loss, Optimizer(**settings).build(5))
    seen = []
    for n in range(5):
        state, metrics = step(state, None, np.float32(n))
        plain, expected = reference(plain, None, np.float32(n))
        seen.append(np.asarray(plain.trainable["gates"]))
        assert metrics["gradient_norm"] == expected["gradient_norm"]
    np.testing.assert_array_equal(state.trainable["gates"], seen[-1])
    np.testing.assert_allclose(state.trainable["kept"], [seen[1], seen[3], seen[4]], rtol=1e-6)


def test_training_takes_the_best_of_the_gates_kept(data):
    # A rate so high that the last gates need not be the best.
    optimizer = Optimizer(name="adam", learning_rate=2.0)
    method = soft_injection.SoftInjection(
        prompts=4, shots=2, validate_every=4, controls=1, fit=Fit(12, 4, optimizer=optimizer)
    )
    tuned = method.train(Job(), tiny_model(), Characters(), data)
    assert list(tuned) == ["soft_injection", "all heads", "random 1"]
    alpha = np.asarray(tuned["soft_injection"].edits["z"].weight)[:, 0, 0, :, 0]
    dealt = np.asarray(tuned["random 1"].edits["z"].weight)[:, 0, 0, :, 0]
    np.testing.assert_array_equal(np.sort(dealt.ravel()), np.sort(alpha.ravel()))
    assert (np.asarray(tuned["all heads"].edits["z"].weight) == 1).all()
    _, check = tasks.split(data.train, 0.2, 0)
    batch = soft_injection.first_target(tasks.encode(check, Characters()).batch)
    validation = TaskData(check, check, batch, batch)
    # No gate of this few steps from the start is as good for the examples that chose.
    chosen = measure(Job(), tiny_model(), validation, tuned["soft_injection"])["loss"]
    half = soft_injection.injected(
        np.asarray(tuned["all heads"].edits["z"].value)[:, 0, 0], np.full((3, 6), 0.5, np.float32)
    )
    assert chosen < measure(Job(), tiny_model(), validation, half)["loss"]


def test_bad_settings():
    with pytest.raises(ValueError, match="shots must be at least 1, got 0"):
        soft_injection.SoftInjection(shots=0)
    with pytest.raises(ValueError, match=r"fit.average must be left out, got 0.9"):
        soft_injection.SoftInjection(fit=Fit(average=0.9))


def test_targets_may_be_padded_on_the_left():
    tokens = np.array([[0, 5, 6, 7], [4, 5, 6, 7]])
    batch = Batch(tokens, tokens > 0, np.array([[0, 0, 1, 1], [0, 1, 1, 1]], bool))
    np.testing.assert_array_equal(
        soft_injection.first_target(batch).targets, [[0, 0, 1, 0], [0, 1, 0, 0]]
    )


@pytest.mark.slow
def test_gates_do_better_than_all_heads_and_gates_dealt_anew(smollm2):
    """Capitals without examples in the prompt, on countries that were not trained on."""
    model, tokenizer = smollm2
    train, held_out = tasks.split(tasks.generate("capitals", 87, 0), 0.34, 0)
    encoded = tasks.encode([*train, *held_out], tokenizer).batch.tokens.shape[1]
    sides = [tasks.encode(side, tokenizer, length=encoded).batch for side in (train, held_out)]
    data = TaskData(train, held_out, *sides)
    optimizer = Optimizer(name="adam", learning_rate=0.2)
    method = soft_injection.SoftInjection(
        prompts=8, shots=4, validate_every=10, fit=Fit(30, 4, optimizer=optimizer)
    )
    tuned = method.train(Job(), model, tokenizer, data)
    loss = {name: measure(Job(), model, data, t)["loss"] for name, t in tuned.items()}
    frozen = measure(Job(), model, data)["loss"]
    others = [v for name, v in loss.items() if name != "soft_injection"]
    assert loss["soft_injection"] < min(frozen, *others) - 0.05
