"""Training of parameters: all, by pattern, of chosen heads, and from scratch."""

import dataclasses
import string

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_lora import loss_of, task_data
from tiny import close, tiny_model

import jaxheads as jh
from jaxheads import tasks
from jaxheads.data.rows import ArrayRows
from jaxheads.methods import from_scratch, precise_heads
from jaxheads.methods.fine_tuning import FineTuning, Rest, parameters_loss
from jaxheads.methods.method import TaskData, TextData
from jaxheads.model.parameters import flatten
from jaxheads.train.fit import Fit
from jaxheads.train.job import Job, _step
from jaxheads.train.optimizer import Optimizer
from jaxheads.train.select import merge, select

FIT = Fit(steps=6, batch_size=4, optimizer=Optimizer(learning_rate=0.01, weight_decay=0.1))


def changed(model, params) -> set[str]:
    before = dict(flatten(model.params))
    return {p for p, leaf in flatten(params) if not np.array_equal(before[p], leaf)}


def with_params(model, params):
    whole = dict(flatten(model.params)) | dict(flatten(params))
    return jh.Transformer(model.config, jh.model.parameters.nest(whole))


# --- All, or by pattern -----------------------------------------------------------------------


def test_full_fine_tuning_moves_every_leaf_and_leaves_the_model_alone():
    model = tiny_model()
    before = jax.tree.map(np.array, model.params)
    tuned = FineTuning(fit=FIT).train(Job(), model, None, task_data())["fine tuning"]
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, model.params), before)
    assert changed(model, tuned.params) == set(dict(flatten(model.params)))
    assert tuned.trained == sum(leaf.size for leaf in jax.tree.leaves(model.params))
    assert loss_of(with_params(model, tuned.params)) < 0.8 * loss_of(model)


def test_patterns_choose_what_is_trained_and_handed_back():
    model = tiny_model()
    method = FineTuning(patterns=("blocks/mlp/*", "!*/gate"), fit=FIT)
    params = method.train(Job(), model, None, task_data())["fine tuning"].params
    assert changed(model, params) == {"blocks/mlp/up", "blocks/mlp/down"}
    assert set(dict(flatten(params))) == changed(model, params)


def test_with_compute_in_bfloat16_parameters_stay_float32():
    model = tiny_model()
    chosen = select(model.params, ["blocks/mlp/*"])
    batch = task_data().train_batch
    item = (batch, batch.answers())

    def products(compute):
        rest = Rest(chosen.frozen, model.config.replace(dtype=compute))
        made = jax.make_jaxpr(parameters_loss)(chosen.trainable, rest, item, jax.random.key(0))
        return str(made).count("bf16")

    assert products("float32") == 0 < products("bfloat16")
    rest = Rest(chosen.frozen, model.config.replace(dtype="bfloat16"))
    gradient = jax.eval_shape(
        jax.grad(parameters_loss, has_aux=True), chosen.trainable, rest, item, jax.random.key(0)
    )[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


def test_a_model_in_half_precision_gets_its_dtype_back():
    model = tiny_model().astype("bfloat16")
    method = FineTuning(patterns=("blocks/mlp/up",), fit=FIT)
    params = method.train(Job(), model, None, task_data())["fine tuning"].params
    assert params["blocks"]["mlp"]["up"].dtype == jnp.bfloat16


def test_settings_nobody_knows_are_refused():
    with pytest.raises(ValueError, match="compute"):
        FineTuning(compute="float8")
    with pytest.raises(ValueError, match="remat"):
        FineTuning(remat="some")
    with pytest.raises(ValueError, match="path or pattern"):
        FineTuning(patterns=("blocks/mpl/*",)).train(Job(), tiny_model(), None, task_data())


# --- Chosen heads -----------------------------------------------------------------------------

HEADS = [(0, 1), (2, 4)]


def test_slices_of_other_heads_are_bit_identical():
    model = tiny_model(biases=True)
    # Both signs of zero must survive.
    attn = dict(flatten(model.params))
    attn["blocks/attn/q"] = attn["blocks/attn/q"].at[1].set(-0.0)
    model = with_params(model, jh.model.parameters.nest(attn))
    method = precise_heads.PreciseHeads(fit=dataclasses.replace(FIT, average=0.5))
    tuned = method.tune(Job(), "chosen", model, task_data(), HEADS)
    old, new = dict(flatten(model.params)), dict(flatten(tuned.params))
    assert set(new) == {
        f"blocks/attn/{n}" for n in ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias")
    }
    mask = jh.head_mask(model.config, HEADS)
    group = mask.reshape(3, 2, 3).any(-1)
    count = 0
    for path, leaf in new.items():
        axis = 1 if path.endswith(("o", "bias")) else 2
        here = group if path.split("/")[-1][0] in "kv" else mask
        same = np.asarray(old[path]).view(np.uint32) == np.asarray(leaf).view(np.uint32)
        kept = np.moveaxis(same, axis, 1).reshape(*here.shape, -1)
        np.testing.assert_array_equal(kept.all(-1), ~here, err_msg=path)
        assert kept[here].mean() < 0.1, path
        count += here.sum() * (leaf.size // here.size)
    assert tuned.trained == count and tuned.heads == HEADS
    assert loss_of(with_params(model, tuned.params)) < loss_of(model)


def test_one_program_serves_all_sets_of_heads():
    model, method = tiny_model(), precise_heads.PreciseHeads(fit=FIT)
    job, data = Job(), task_data()
    method.tune(job, "first", model, data, HEADS)
    step = _step.cache_info()
    tuned = method.tune(job, "second", model, data, [(1, 0), (1, 5)])
    assert _step.cache_info().misses == step.misses
    old, new = (p["blocks"]["attn"]["q"] for p in (model.params, tuned.params))
    moved = np.abs(np.asarray(old) - np.asarray(new)).max((1, 3)) > 0
    np.testing.assert_array_equal(moved, jh.head_mask(model.config, [(1, 0), (1, 5)]))


class Letters:
    """A tokenizer with one token for each character."""

    def encode(self, text, *, add_special_tokens=True):
        return [string.printable.index(letter) % 97 for letter in text]

    def encode_with_offsets(self, text, *, add_special_tokens=True):
        return self.encode(text), [(i, i + 1) for i in range(len(text))]


def sums(count):
    return tasks.generate("arithmetic", count, 0, shots=1)


@pytest.mark.slow
def test_the_score_of_a_head_is_what_the_answer_loses_without_it():
    model, examples = tiny_model(), sums(4)
    scores = precise_heads.key_heads(model, examples, Letters(), "ablation")
    pairs = tasks.encode_pairs(examples, Letters())

    def difference(edits):
        answers, wrong = pairs.answers[:, 0], pairs.wrong[:, 0]
        return jh.logit_difference(model, pairs.clean, answers, wrong, edits=edits).mean()

    lost = difference(None) - difference(jh.mask_heads(model.config, [(1, 4)]))
    assert scores.shape == (3, 6)
    close(scores[1, 4], lost, 1e-4)


@pytest.mark.slow
def test_path_and_attribution_scores_agree_in_sign_and_order():
    model, examples = tiny_model(), sums(8)
    path, estimate = (
        precise_heads.key_heads(model, examples, Letters(), score).ravel()
        for score in ("path", "attribution")
    )
    assert np.corrcoef(path, estimate)[0, 1] > 0.5


def test_the_method_scores_tunes_and_draws_controls():
    examples = sums(8)
    batch = tasks.encode(examples, Letters()).batch
    data = TaskData(examples, examples, batch, batch)
    method = precise_heads.PreciseHeads(
        heads=2, score="ablation", examples=4, controls=1, fit=dataclasses.replace(FIT, steps=2)
    )
    found = method.train(Job(), tiny_model(), Letters(), data)
    assert list(found) == ["precise heads", "random 1"]
    best = found["precise heads"]
    assert best.scores[best.heads[0]] == best.scores.max()
    assert not set(best.heads) & set(found["random 1"].heads)
    with pytest.raises(ValueError, match="score"):
        precise_heads.PreciseHeads(score="magic")


# --- From scratch -----------------------------------------------------------------------------

TEXTS = [
    "the cat sat on the mat and the dog sat on the log.",
    "the dog saw the cat on the mat; the cat saw the dog on the log.",
] * 4


def test_the_tokenizer_is_learned_the_same_each_time_and_holds_any_text():
    one, two = (from_scratch.learn_tokenizer(TEXTS, 300) for _ in range(2))
    assert one.backend.to_str() == two.backend.to_str()
    assert 257 < one.vocab_size <= 300
    for text in (TEXTS[0], "Größe → 漢字 \x00\n\t🙂", "  two  spaces "):
        assert one.decode(one.encode(text)) == text
    assert len(one.encode(TEXTS[0])) < 0.6 * len(TEXTS[0])
    assert one.eos_id == one.token_id(from_scratch.END)
    with pytest.raises(ValueError, match="vocabulary must be more than 256"):
        from_scratch.learn_tokenizer(TEXTS, 256)
    with pytest.raises(ValueError, match="no text"):
        from_scratch.learn_tokenizer(["", ""], 300)


def test_a_model_from_scratch_learns_and_is_read_again(tmp_path):
    method = from_scratch.FromScratch(
        shape=from_scratch.Shape(n_layers=2, n_heads=2, d_model=16, d_mlp=24, context_length=32),
        vocabulary=300,
        fit=Fit(steps=40, batch_size=4, optimizer=Optimizer(learning_rate=0.03, clip=1.0)),
    )
    start, tokenizer = method.create(TEXTS, seed=0)
    assert start.config.vocab_size == tokenizer.vocab_size
    batch = tokenizer(TEXTS)
    rows = ArrayRows(batch)
    (tuned,) = method.train(Job(), start, tokenizer, TextData(rows, rows, TEXTS)).values()
    trained = jh.Transformer(start.config, tuned.params)
    loss = float(jh.next_token_loss(trained, batch))
    assert loss < 0.6 * np.log(tokenizer.vocab_size)
    jh.save(trained, tokenizer, tmp_path / "model")
    model, read = jh.load(tmp_path / "model")
    chex.assert_trees_all_equal(model.params, tuned.params)
    np.testing.assert_array_equal(read(TEXTS).tokens, batch.tokens)
    # Another model may take its tokenizer.
    other = dataclasses.replace(method, tokenizer=str(tmp_path / "model"))
    model, taken = other.create([], seed=0)
    assert model.config.vocab_size == start.config.vocab_size
    assert taken.encode(TEXTS[0]) == read.encode(TEXTS[0])


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="d_model 130 is not divisible by n_heads 4"):
        from_scratch.Shape(d_model=130).config(300)
    with pytest.raises(ValueError, match="got 100"):
        from_scratch.FromScratch(vocabulary=100)


def test_the_parts_are_the_whole():
    params = tiny_model().params
    chosen = select(params, heads=HEADS)
    chex.assert_trees_all_equal(merge(chosen.trainable, chosen.frozen), params)
