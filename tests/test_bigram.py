"""Bigram subnetworks: the table against a dense one, the masks, and a tiny model of real text."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import close, tiny_model, tiny_tokens

from jaxheads import ModelConfig, Transformer
from jaxheads.data import ArrayRows
from jaxheads.methods import bigram
from jaxheads.methods.measure import apply
from jaxheads.methods.method import TaskData, TextData
from jaxheads.model.batch import Batch, pack
from jaxheads.train.fit import Fit
from jaxheads.train.job import Job
from jaxheads.train.optimizer import Optimizer
from jaxheads.train.step import make_step, start


def dense(batch, vocab_size):
    """p(w | v) [V,V] by Witten and Bell's rule, and u [V], counted in Python."""
    counts, unigram = np.zeros((vocab_size, vocab_size)), np.ones(vocab_size)
    for row, (tokens, mask) in enumerate(zip(batch.tokens, batch.mask, strict=True)):
        for t in np.flatnonzero(mask):
            unigram[tokens[t]] += 1
            inside = t + 1 < len(tokens) and mask[t + 1]
            if inside and batch.segments is not None:
                inside = batch.segments[row, t] == batch.segments[row, t + 1]
            if inside:
                counts[tokens[t], tokens[t + 1]] += 1
    unigram /= unigram.sum()
    total, different = counts.sum(1, keepdims=True), (counts > 0).sum(1, keepdims=True)
    table = (counts + different * unigram) / np.maximum(total + different, 1)
    return np.where(total > 0, table, unigram), unigram


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 9, (40, 7)) ** 2 % 11
    mask = np.arange(7) < rng.integers(2, 8, (40, 1))
    segments = np.where(mask, 1 + (np.arange(7) > 3), 0)
    return Batch(tokens, mask, None, segments)


def test_the_sparse_table_is_the_dense_one(texts):
    table = bigram.count_bigrams(ArrayRows(texts), 12, chunk=7)
    expected, _ = dense(texts, 12)
    pairs = np.indices((12, 12)).reshape(2, -1)
    close(bigram.bigram_probability(table, *pairs), expected.ravel())
    close(expected.sum(axis=1), np.ones(12))
    assert table.row[11] == 0  # never seen


def test_cross_entropy_is_that_of_the_dense_table(texts):
    table = bigram.count_bigrams(ArrayRows(texts), 12)
    tokens = np.random.default_rng(1).integers(0, 12, (2, 5))
    logits = np.random.default_rng(2).normal(size=(2, 5, 12)).astype(np.float32) * 3
    expected = optax.softmax_cross_entropy(logits, dense(texts, 12)[0][tokens])
    close(bigram.bigram_cross_entropy(table, tokens, logits), expected)


def test_few_successors_leave_their_mass_to_single_tokens(texts):
    whole, _ = dense(texts, 12)
    table = bigram.count_bigrams(ArrayRows(texts), 12, width=2)
    assert table.ids.shape[1] == 2
    pairs = np.indices((12, 12)).reshape(2, -1)
    found = np.asarray(bigram.bigram_probability(table, *pairs)).reshape(12, 12)
    close(found.sum(axis=1), np.ones(12))
    # The commonest successor keeps its share and gets what is left like any other token.
    best = whole[0].argmax()
    assert found[0, best] == pytest.approx(whole[0, best], abs=0.2) and found[0, best] > 1 / 12


def test_texts_without_pairs_are_refused():
    with pytest.raises(ValueError, match="no two neighbouring tokens"):
        bigram.count_bigrams(ArrayRows(pack([[3], [4]])), 12)


def test_masks_multiply_attention_and_mlp_weights_only():
    model, tokens = tiny_model(biases=True), tiny_tokens()
    scores = bigram.initial_scores(model)
    shapes = {f"{a}/{b}": leaf.shape for a, group in scores.items() for b, leaf in group.items()}
    blocks = model.params["blocks"]
    assert shapes == {
        f"{part}/{name}": blocks[part][name].shape
        for part, names in bigram.MASKED.items() for name in names
    }  # fmt: skip
    ones = jax.tree.map(jnp.ones_like, scores)
    close(bigram.subnetwork(model, ones)(tokens).logits, model(tokens).logits)
    none = jax.tree.map(jnp.zeros_like, scores)
    gone = bigram.subnetwork(model, none).params["blocks"]
    assert not gone["attn"]["q"].any() and not gone["mlp"]["down"].any()
    np.testing.assert_array_equal(gone["attn"]["q_bias"], blocks["attn"]["q_bias"])
    np.testing.assert_array_equal(gone["attn_norm"]["scale"], blocks["attn_norm"]["scale"])


def test_the_optimizer_counts_steps_and_nothing_else_changes():
    settings = {"learning_rate": 0.1, "weight_decay": 0.1, "clip": 1.0}
    weights = {"q": np.ones((2, 3), np.float32)}
    counting = bigram.CountingOptimizer(**settings).build(4)
    state = start({"scores": weights, "step": np.float32(0)}, counting)
    plain = start({"scores": weights}, Optimizer(**settings).build(4))

    def loss(trained, frozen, batch, key):
        return (trained["scores"]["q"] ** 3).sum(), {}

    step, reference = make_step(loss, counting), make_step(loss, Optimizer(**settings).build(4))
    for n in range(1, 4):
        state, plain = step(state, None, None)[0], reference(plain, None, None)[0]
        assert state.trainable["step"] == n
    np.testing.assert_array_equal(state.trainable["scores"]["q"], plain.trainable["scores"]["q"])


def test_the_loss_anneals_with_the_step():
    model, tokens = tiny_model(), tiny_tokens(2, 7)
    batch = Batch(tokens, np.ones(tokens.shape, bool))
    table = bigram.count_bigrams(ArrayRows(batch), 97)
    scores = jax.tree.map(lambda leaf: leaf + 0.3, bigram.initial_scores(model))
    frozen = {"model": model, "table": table, "sparsity": 5.0, "growth": 2.0}
    loss = jax.jit(bigram.bigram_loss)
    for step, beta in ((0.0, 1.0), (4.0, 16.0)):
        value, metrics = loss({"scores": scores, "step": step}, frozen, batch, jax.random.key(0))
        mask = 1 / (1 + np.exp(-0.3 * beta))
        close(metrics["mean_mask"], mask)
        close(value, metrics["bigram_loss"] + 5 * mask)
        assert metrics["kept"] == float(mask > 0.9) == 1 - metrics["undecided"]
    expected = bigram.bigram_scores(
        bigram.subnetwork(model, jax.tree.map(lambda s: jnp.full_like(s, mask), scores)),
        table,
        batch,
    )
    close(metrics["bigram_loss"], expected["cross_entropy"])


def test_random_masks_are_as_large_in_every_matrix_of_every_layer():
    scores = bigram.initial_scores(tiny_model())
    keys = iter(jax.random.split(jax.random.key(0), 20))
    masks = jax.tree.map(lambda s: jax.random.uniform(next(keys), s.shape) > 0.8, scores)
    drawn = bigram.shuffled(masks, jax.random.key(1))
    for ours, theirs in zip(jax.tree.leaves(masks), jax.tree.leaves(drawn), strict=True):
        assert not np.array_equal(ours, theirs)
        axes = tuple(range(1, ours.ndim))
        np.testing.assert_array_equal(ours.sum(axes), theirs.sum(axes))


def test_shares_by_hand():
    masks = jax.tree.map(lambda s: np.zeros(s.shape, bool), bigram.initial_scores(tiny_model()))
    masks["attn"]["q"][1, :, 4] = True
    masks["attn"]["k"][1, :, 1] = True
    masks["mlp"]["up"][2] = True
    heads = np.zeros((3, 6))
    # Heads 3 to 5 read key/value head 1.
    heads[1, 3:] = 0.25
    heads[1, 4] = 0.5
    np.testing.assert_allclose(bigram.head_shares(masks), heads)
    blocks = bigram.block_shares(masks)
    np.testing.assert_allclose(blocks["mlp"], [0, 0, 1 / 3])
    width = 40 * 8
    np.testing.assert_allclose(blocks["attn"], [0, 2 * width / (16 * width), 0])


def test_bad_settings_and_data():
    with pytest.raises(ValueError, match=r"growth must be at least 1, got 0.9"):
        bigram.BigramMasks(growth=0.9)
    empty = Batch(np.zeros((1, 2), int), np.ones((1, 2), bool))
    with pytest.raises(ValueError, match=r"trained on text.*corpus:python-docs"):
        bigram.BigramMasks().train(Job(), tiny_model(), None, TaskData([], [], empty, empty))


@pytest.mark.slow
def test_a_tiny_model_of_text_holds_a_bigram_subnetwork():
    """Trained on characters, then masked: fewer weights at a larger lambda, and they do it."""
    from jaxheads.data import open_source
    from jaxheads.methods.objective import fit_loss

    text = "".join(open_source("corpus:python-docs", "train").texts())[:120_000]
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int32) % 97
    tokens = codes[: len(codes) // 32 * 32].reshape(-1, 32)
    rows = ArrayRows(Batch(tokens, np.ones(tokens.shape, bool)))
    config = ModelConfig(
        n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, d_model=64, d_mlp=128, vocab_size=97,
        context_length=64,
    )  # fmt: skip
    begin = Transformer.random(config, jax.random.key(0))
    adam = Optimizer(name="adam", learning_rate=3e-3)
    params = Job().fit("lm", language, begin.params, None, rows, Fit(200, 16, optimizer=adam))
    model = Transformer(config, params)
    small = Optimizer(name="adamw", learning_rate=0.08)
    method = bigram.BigramMasks(growth=1.03, controls=5, fit=Fit(120, 8, optimizer=small))
    held = rows[np.arange(64)]
    kept, found = {}, {}
    for sparsity in (1.0, 20.0):
        chosen = replace(method, sparsity=sparsity)
        tuned = chosen.train(Job(), model, None, TextData(rows, rows))
        table = bigram.count_bigrams(rows, 97)
        found = {n: bigram.bigram_scores(apply(model, t), table, held) for n, t in tuned.items()}
        masks = jax.tree.map(lambda x: np.asarray(x) != 0, tuned["bigram"].params["blocks"])
        kept[sparsity] = bigram.block_shares(masks)
    mean = {s: np.mean([shares["attn"].mean(), shares["mlp"].mean()]) for s, shares in kept.items()}
    assert mean[20.0] < mean[1.0] < 0.9
    assert fit_loss(model, held)[0] < 2.6
    ours = float(found["bigram"]["cross_entropy"])
    assert ours < min(float(found[f"random {n}"]["cross_entropy"]) for n in range(1, 6)) - 0.2
    assert kept[20.0]["mlp"][0] > kept[20.0]["mlp"].mean()


def language(params, frozen, batch, key):
    from jaxheads.methods.objective import fit_loss

    config = ModelConfig(
        n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, d_model=64, d_mlp=128, vocab_size=97,
        context_length=64,
    )  # fmt: skip
    return fit_loss(Transformer(config, params), batch)
