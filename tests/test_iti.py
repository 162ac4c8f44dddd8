"""ITI: probes against an independent optimiser, directions, and where the shift acts."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from scipy.optimize import minimize
from tiny import close, tiny_model, tiny_tokens

import jaxheads as jh
from jaxheads import tasks
from jaxheads.methods import iti
from jaxheads.methods.method import TaskData, placed
from jaxheads.model.batch import Batch, pack
from jaxheads.token_scores import token_scores
from jaxheads.train.job import Job


@pytest.fixture(scope="module")
def statements():
    """z [L,N,H,Dh] of 3 layers and 2 heads; only head 1.0 tells the labels apart."""
    rng = np.random.default_rng(0)
    labels = rng.random(60) < 0.4
    values = rng.normal(size=(3, 60, 2, 5)).astype(np.float32) * 2 + 7
    values[1, :, 0, 2] += 4 * labels
    return values, labels


def test_probes_minimise_the_objective_of_scikit_learn(statements):
    values, labels = statements
    weight, bias = jax.device_get(iti.fit_probes(values, labels, 0.5))
    signs = np.where(labels, 1.0, -1.0)

    def objective(w, x):
        margins = signs * (x @ w[:-1] + w[-1])
        return w[:-1] @ w[:-1] / 2 + 0.5 * np.logaddexp(0, -margins).sum()

    for layer, head in ((0, 1), (1, 0), (2, 0)):
        x = values[layer, :, head].astype(np.float64)
        middle = x.mean(axis=0)
        best = minimize(objective, np.zeros(6), (x - middle,), tol=1e-12).x
        np.testing.assert_allclose(weight[layer, head], best[:-1], atol=2e-4)
        np.testing.assert_allclose(bias[layer, head], best[-1] - best[:-1] @ middle, atol=2e-3)


def test_probes_converge_on_separable_and_large_values():
    x = np.linspace(-400, 900, 40, dtype=np.float32).reshape(1, 40, 1, 1)
    labels = x.ravel() > 100
    weight, bias = iti.fit_probes(x, labels)
    assert np.isfinite(weight).all()
    assert iti.probe_accuracy(x, labels, weight, bias) == 1


def test_the_informative_head_wins_and_its_direction_is_found(statements):
    values, labels = statements
    weight, bias = iti.fit_probes(values, labels)
    accuracy = iti.probe_accuracy(values, labels, weight, bias)
    assert np.unravel_index(accuracy.argmax(), accuracy.shape) == (1, 0)
    direction = np.asarray(iti.mass_mean(values, labels))
    np.testing.assert_allclose(np.linalg.norm(direction, axis=-1), 1, rtol=1e-5)
    assert direction[1, 0, 2] > 0.9
    along = values[1, :, 0] @ direction[1, 0]
    np.testing.assert_allclose(iti.spread(values, direction)[1, 0], along.std(), rtol=1e-4)


def test_values_of_the_last_real_token_in_parts_of_one_shape():
    model, tokens = tiny_model(), tiny_tokens(5, 6)
    mask = np.arange(6) < np.array([6, 3, 5, 1, 4])[:, None]
    found = iti.last_values(Job(), model, Batch(tokens, mask), batch_size=2)
    z = np.asarray(model(tokens, mask, taps="z").taps["z"])
    close(found, z[:, np.arange(5), mask.sum(axis=1) - 1])


def words(text):
    return [3 + sum(word.encode()) % 90 for word in text.split()]


class Words:
    """A word is a token."""

    def encode(self, text, *, add_special_tokens=True):
        return words(text)

    def encode_with_offsets(self, text, *, add_special_tokens=True):
        return words(text), [(0, 0)] * len(words(text))


@pytest.fixture(scope="module")
def tuned():
    examples = [
        tasks.Example(f"the sky over {n} is", f" blue{n}", group=str(n % 10), wrong=f" red{n}")
        for n in range(30)
    ]
    batch = tasks.encode(examples, Words()).batch
    method = iti.ITI(heads=4, alpha=3.0, controls=2)
    return method.train(Job(), tiny_model(), Words(), TaskData(examples, examples, batch, batch))


def test_variants_shift_as_many_heads_as_far(tuned):
    assert list(tuned) == [
        "iti",
        "random 1",
        "random direction 1",
        "random 2",
        "random direction 2",
    ]
    norms = {
        name: np.linalg.norm(np.asarray(t.edits["z"].offset)[:, 0, 0], axis=-1)
        for name, t in tuned.items()
    }
    for name, t in tuned.items():
        assert t.trained == 4 * 8
        assert sorted(t.heads) == [tuple(i) for i in np.argwhere(norms[name])]
    np.testing.assert_allclose(norms["random direction 1"], norms["iti"], rtol=1e-5)
    assert not set(tuned["random 1"].heads) & set(tuned["iti"].heads)


def test_alpha_zero_changes_nothing():
    model, tokens = tiny_model(), tiny_tokens()
    edits = iti.shifted(model.config, [(1, 2)], np.zeros((3, 6, 8))).edits
    np.testing.assert_array_equal(model(tokens, edits=edits).logits, model(tokens).logits)


def test_offsets_fold_through_the_output_projection(tuned):
    model, tokens = tiny_model(), tiny_tokens()
    edits = tuned["iti"].edits
    folded = jh.fold(model, edits)
    close(folded(tokens).logits, model(tokens, edits=edits).logits)
    changed = np.asarray(folded.params["blocks"]["attn"]["o_bias"])
    offset = np.asarray(edits["z"].offset)[:, 0, 0]
    close(changed, np.einsum("lhd,lhdm->lm", offset, model.params["blocks"]["attn"]["o"]))


def test_scoring_answers_equals_generating_them(tuned):
    model, edits = tiny_model(), tuned["iti"].edits
    prompts = pack([[5, 9, 2, 40], [7, 1]])
    new = np.asarray(
        jh.generate(
            model, prompts, max_new_tokens=3, edits=iti.when_generating(edits, prompts)
        ).tokens
    )
    rows = [[5, 9, 2, 40, *new[0]], [7, 1, *new[1]]]
    batch = pack(rows, [[False] * 4 + [True] * 3, [False] * 2 + [True] * 3])
    scored, _ = token_scores(model, batch, batch.answers(), edits=placed(tuned["iti"], batch))
    assert np.asarray(scored.right).all()
    elsewhere, _ = token_scores(model, batch, batch.answers(), edits=edits)
    assert not np.allclose(scored.loss, elsewhere.loss, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"direction": "mass"}, "unknown direction 'mass'.*mass_mean"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"c": 0.0}, "c must be above 0"),
        ({"controls": -1}, "controls must be at least 0, got -1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        iti.ITI(**settings)


def test_examples_need_a_wrong_answer():
    with pytest.raises(ValueError, match="example 0 has no wrong answer: 'a b'"):
        iti.statement_values(Job(), tiny_model(), Words(), [tasks.Example("a b", " c")])


@pytest.mark.slow
def test_true_capitals_grow_likelier_than_with_random_heads_or_directions(smollm2):
    model, tokenizer = smollm2
    train, held_out = tasks.split(tasks.generate("capitals", 87, 0), 0.25, 0)
    batch = tasks.encode(held_out, tokenizer).batch
    data = TaskData(train, held_out, batch, batch)
    fitted, check = (
        iti.statement_values(Job(), model, tokenizer, side) for side in tasks.split(train, 0.2, 0)
    )
    accuracy = iti.probe_accuracy(*check, *iti.fit_probes(*fitted))
    assert accuracy.max() > 0.9 > 0.75 > accuracy.mean()
    pairs, answers = tasks.contrast(held_out, tokenizer), batch.answers()

    @jax.jit
    def logits(model, edits):
        return model(batch, edits=edits, logits_at=answers.slots[:, :1]).logits[:, 0]

    clean, chosen = jax.nn.log_softmax(logits(model, {})), np.arange(len(pairs))

    def effect(tuned, share):
        """How much likelier the true capital is than the wrong one, and the divergence."""
        edits = placed(replace(tuned, edits=jax.tree.map(lambda x: share * x, tuned.edits)), batch)
        found = jax.nn.log_softmax(logits(model, edits))
        p = np.exp(found)
        kl = np.sum(np.exp(clean) * (clean - found), axis=-1).mean()
        return float(p[chosen, pairs[:, 0]].mean() - p[chosen, pairs[:, 1]].mean()), float(kl)

    method = iti.ITI(heads=14, alpha=8.0, controls=5)
    tuned = method.train(Job(), model, tokenizer, data)
    found = [effect(tuned["iti"], share) for share in (0.0, 0.25, 0.5, 1.0)]
    margins, divergences = zip(*found, strict=True)
    assert list(margins) == sorted(margins) and list(divergences) == sorted(divergences)
    assert divergences[0] == pytest.approx(0, abs=1e-5)
    controls = [effect(t, 1.0)[0] for name, t in tuned.items() if name != "iti"]
    assert margins[-1] > max(controls) + 0.03
