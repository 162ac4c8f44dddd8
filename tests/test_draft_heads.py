"""Draft heads: what they compute, how they are trained, their files."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_lora import task_data
from tiny import close, tiny_model, tiny_tokens

import jaxheads as jh
from jaxheads.data.rows import ArrayRows
from jaxheads.decode.draft import KINDS, DraftHeads, Ends
from jaxheads.methods import draft_heads
from jaxheads.methods.draft_heads import DraftTraining
from jaxheads.methods.method import TextData, Tuned
from jaxheads.model.parameters import flatten
from jaxheads.train.fit import Fit
from jaxheads.train.job import Job
from jaxheads.train.optimizer import Optimizer

CONFIG = tiny_model().config
FIT = Fit(steps=60, batch_size=4, optimizer=Optimizer(learning_rate=5e-3))
METHOD = DraftTraining(
    heads=2, vocabulary=80, top=8, prompts=2, prompt_length=4, new_tokens=6, fit=FIT
)


def text() -> TextData:
    """Two texts a row; the held-out rows are the same."""
    segments = np.tile(np.repeat([1, 2], [9, 5]), (8, 1))
    batch = jh.Batch(tiny_tokens(8, 14), np.ones((8, 14), bool), None, segments)
    return TextData(ArrayRows(batch), ArrayRows(batch))


@pytest.fixture(scope="module")
def states():
    return draft_heads.states_of(Job(), tiny_model(), text().train, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_head_says_what_the_model_says(kind):
    made = DraftHeads.new(CONFIG, kind, 2, jax.random.key(0))
    out = tiny_model()(tiny_tokens(), taps="final")
    hidden, ends = out.taps["final"], Ends.of(tiny_model(), None)
    block = made.block(CONFIG)
    if block is not None:
        context, _ = block.begin(jnp.ones((2, 14), bool), None, "prefill", {}, {})
        hidden = block.run(hidden, context, {}, None)[0]
    for number, head in enumerate(made.heads, 1):
        drafted = jax.random.normal(jax.random.key(1), (2, 14, number, 40))
        close(ends.logits(head(hidden, drafted)), out.logits)


def test_a_head_is_its_formula():
    rng = np.random.default_rng(0)
    kernel, skip = rng.normal(size=(2, 120, 40)).astype(np.float32)
    readout, bias = rng.normal(size=(40, 40)).astype(np.float32), np.ones(40, np.float32)
    layer = {"kernel": kernel, "bias": bias, "skip": skip}
    params = {"heads": {"0": {"layers": {"0": layer}, "readout": readout}}}
    with pytest.raises(ValueError, match=r"draft head 1 has a kernel of \(120, 40\)"):
        DraftHeads.of(params, CONFIG)
    layer |= {"kernel": kernel[:80], "skip": skip[:80]}
    (head,) = DraftHeads.of(params, CONFIG).heads
    h, drafted = rng.normal(size=(3, 40)), rng.normal(size=(3, 1, 40))
    u = np.concatenate([h, drafted[:, 0]], axis=1)
    inner = u @ kernel[:80] + bias
    expected = (u @ skip[:80] + inner / (1 + np.exp(-inner))) @ readout
    close(head(jnp.float32(h), jnp.float32(drafted)), expected)


def test_vectors_have_mean_square_one():
    vectors = Ends.of(tiny_model(), None).vectors(jnp.asarray(tiny_tokens()))
    close(jnp.mean(vectors**2, axis=-1), np.ones((2, 14)))


def test_states_are_what_the_model_says(states):
    out = tiny_model()(text().train[np.arange(8)], taps="final")
    close(states.hidden, out.taps["final"])
    np.testing.assert_array_equal(states.ids[..., 0], jnp.argmax(out.logits, axis=-1))
    probabilities = jax.nn.softmax(out.logits, axis=-1)
    close(states.shares, jnp.take_along_axis(probabilities, jnp.asarray(states.ids), axis=-1))


def test_the_loss_is_the_cross_entropy_with_the_model_ahead(states):
    """Of the second head, token by token, over a draft vocabulary."""
    vocabulary = draft_heads.frequent_tokens(states, 80, 97)
    made = DraftHeads.new(CONFIG, "hydra", 2, jax.random.key(0), vocabulary=vocabulary)
    moved = jax.tree.map(lambda x: x + 0.1, made.replace(vocabulary=None))
    made = moved.replace(vocabulary=vocabulary)
    params, frozen = draft_heads._divided(tiny_model(), made)
    loss, metrics = draft_heads.draft_loss(params, frozen, states, None)
    ends, place = frozen["ends"], {int(t): n for n, t in enumerate(vocabulary)}
    means = []
    for number, head in enumerate(made.heads, 1):
        total, right, count = 0.0, 0, 0
        for row in range(8):
            for t in range(14 - number):
                if states.batch.segments[row, t] != states.batch.segments[row, t + number]:
                    continue
                tokens = jnp.asarray(states.batch.tokens[row : row + 1, t + 1 : t + number + 1])
                x = head(states.hidden[row : row + 1, t], ends.vectors(tokens))
                logp = np.asarray(jax.nn.log_softmax(ends.logits(x[:, None])[0, 0]))
                ids, shares = (s[row, t + number] for s in (states.ids, states.shares))
                total -= sum(
                    p * logp[place[int(i)]]
                    for i, p in zip(ids, shares, strict=True)
                    if int(i) in place
                )
                right += int(vocabulary[logp.argmax()] == ids[0])
                count += 1
        means.append(total / count)
        close(metrics[f"accuracy_{number}"], right / count)
    close(loss, np.mean(means))
    assert int(metrics["weight"]) == 8 * (7 + 3)


def test_frequent_tokens_come_first_and_ties_by_id(states):
    kept = np.asarray(draft_heads.frequent_tokens(states, 60, 97))
    said = np.bincount(states.ids[..., 0].ravel(), minlength=97)
    assert len(set(kept)) == 60 and (np.diff(kept) > 0).all()
    left = np.setdiff1d(np.arange(97), kept)
    assert said[left].max() <= said[kept].min()
    never = np.flatnonzero(said == 0)
    unsaid = kept[said[kept] == 0]
    np.testing.assert_array_equal(unsaid, never[: len(unsaid)])


def test_training_beats_untrained_heads_and_hydra_beats_medusa():
    model, data = tiny_model(), text()
    before = jax.tree.map(np.array, model.params)
    tuned = METHOD.train(Job(), model, None, data)
    assert list(tuned) == ["hydra", "medusa"]
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, model.params), before)
    frozen = METHOD.measure(Job(), model, data, Tuned())
    found = {kind: METHOD.measure(Job(), model, data, one) for kind, one in tuned.items()}
    kept = ["kept_1", "kept_2"]
    assert list(frozen) == ["loss", "accuracy_1", "accuracy_2", *kept, "tokens_per_step"]
    for kind in tuned:
        assert found[kind]["accuracy_1"] > frozen["accuracy_1"] + 0.1
        assert found[kind]["tokens_per_step"] >= 1
    assert found["hydra"]["loss"] < found["medusa"]["loss"] < frozen["loss"]
    assert tuned["medusa"].trained == 2 * (2 * 40 * 40 + 40)
    assert tuned["hydra"].trained == sum(2 * n * 40 * 40 + 40 * 40 + 40 for n in (2, 3))


@pytest.mark.slow
def test_the_block_of_hydra_plus_plus_is_trained():
    (tuned,) = DraftTraining(
        kinds=("hydra++",), heads=1, vocabulary=None, top=8, fit=FIT
    ).train(Job(), tiny_model(), None, text()).values()  # fmt: skip
    assert np.abs(tuned.beside["prefix"]["attn"]["o"]).max() > 0
    assert "vocabulary" not in tuned.beside


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_saved_whole_and_read_back(kind, tmp_path):
    vocabulary = jnp.arange(5, 60, dtype=jnp.int32)
    made = DraftHeads.new(CONFIG, kind, 2, jax.random.key(0), vocabulary=vocabulary)
    path = tmp_path / "heads.safetensors"
    made.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    chex.assert_trees_all_equal(DraftHeads.load(path, CONFIG), made)
    # As a run of a method saves `Tuned.beside`.
    save_file({name: np.asarray(leaf) for name, leaf in flatten(made.params)}, path)
    chex.assert_trees_all_equal(DraftHeads.load(path, CONFIG), made)


def test_files_of_other_models_are_refused(tmp_path):
    path = tmp_path / "heads.safetensors"
    with pytest.raises(FileNotFoundError, match="no draft heads at"):
        DraftHeads.load(path, CONFIG)
    save_file({"other": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="no draft heads: expected parameters heads/0/"):
        DraftHeads.load(path, CONFIG)
    DraftHeads.new(CONFIG, "hydra++", 1, jax.random.key(0)).save(path)
    with pytest.raises(ValueError, match="blocks/attn/k has shape"):
        DraftHeads.load(path, CONFIG.replace(n_kv_heads=6))
    DraftHeads.new(CONFIG, "medusa", 1, jax.random.key(0), vocabulary=jnp.array([97])).save(path)
    with pytest.raises(ValueError, match=r"draft vocabulary spans 97..97, expected ids"):
        DraftHeads.load(path, CONFIG)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"kinds": ("hydro",)}, "unknown kind 'hydro'"),
        ({"kinds": ("hydra", "hydra")}, "kinds must differ"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"vocabulary": 0}, "vocabulary must be at least 1, got 0"),
    ],
)
def test_mistakes_in_settings_are_named(change, told):
    with pytest.raises(ValueError, match=told):
        DraftTraining(**change)


@pytest.mark.parametrize(
    ("method", "data", "told"),
    [
        (METHOD, task_data(), "learn from running text"),
        (DraftTraining(heads=13), text(), "rows of 14 tokens are too short for 13 draft heads"),
        (DraftTraining(vocabulary=98), text(), "vocabulary 98 is more than the model's 97"),
    ],
)
def test_mistakes_in_data_are_named(method, data, told):
    with pytest.raises(ValueError, match=told):
        method.train(Job(), tiny_model(), None, data)
