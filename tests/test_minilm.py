"""all-MiniLM-L6-v2 end to end, against values recorded by scripts/make_minilm_reference.py."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxheads as jh

pytestmark = pytest.mark.optimised

LONGEST = 512
"""Tokens that the model has positions for; sentence-transformers keeps 256."""


@pytest.fixture(scope="module")
def minilm():
    return jh.load("all-minilm-l6-v2")


@pytest.fixture(scope="module")
def reference(fixtures_dir):
    about = json.loads((fixtures_dir / "minilm_reference.json").read_text(encoding="utf-8"))
    with np.load(fixtures_dir / "minilm_reference.npz") as file:
        ends = np.cumsum(file["lengths"])[:-1]
        tokens = [row.tolist() for row in np.split(file["tokens"], ends)]
        return about["sentences"], tokens, file["embeddings"]


@pytest.fixture(scope="module")
def embedded(minilm, reference):
    """All sentences in one padded batch."""
    model, tokenizer = minilm
    return np.asarray(jh.sentence_embeddings(model, tokenizer(reference[0])), np.float64)


def test_tokens_are_those_of_the_reference(minilm, reference):
    _, tokenizer = minilm
    sentences, tokens, _ = reference
    assert len(sentences) == 50
    assert [tokenizer.encode(sentence) for sentence in sentences] == tokens
    assert max(map(len, tokens)) > 256, "a text that sentence-transformers would cut"


def test_embeddings_are_those_of_the_reference(reference, embedded):
    expected = reference[2].astype(np.float64)
    assert embedded.shape == expected.shape == (50, 384)
    cosines = (embedded * expected).sum(-1) / np.linalg.norm(expected, axis=-1)
    assert cosines.min() >= 0.9999, cosines.min()
    np.testing.assert_allclose(embedded, expected, atol=1e-5)


def test_embeddings_mean_something(embedded):
    """Two sentences about eating, and one about a violin."""
    assert embedded[0] @ embedded[1] > 0.6 > 0.2 > embedded[0] @ embedded[3]


def test_padding_has_no_part(minilm, reference, embedded):
    model, tokenizer = minilm
    left = tokenizer(reference[0][:4], side="left", length=40)
    np.testing.assert_allclose(jh.sentence_embeddings(model, left), embedded[:4], atol=1e-5)


def test_special_tokens_and_the_end_of_a_batch_count_once(minilm):
    """The mean written out once more, on what the model hands back."""
    model, tokenizer = minilm
    batch = tokenizer(["one two three", "one"])
    final = np.asarray(model(batch, taps=("final",)).taps["final"], np.float64)
    for row, mask, found in zip(
        final, batch.mask, jh.sentence_embeddings(model, batch), strict=True
    ):
        mean = row[mask].mean(axis=0)
        np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=1e-6)


def test_edits_act(minilm):
    model, tokenizer = minilm
    batch = tokenizer(["A man is eating food."])
    every = [(layer, head) for layer in range(6) for head in range(12)]
    plain = jh.sentence_embeddings(model, batch)
    quiet = jh.sentence_embeddings(model, batch, edits=jh.mask_heads(model.config, every))
    assert float((plain * quiet).sum()) < 0.9
    identity = jh.Edits.identity(model.config, "z")
    slope = jax.grad(lambda e: jh.sentence_embeddings(model, batch, edits=e)[0] @ plain[0] ** 2)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(slope(identity)))


def test_a_row_without_tokens_is_zero(minilm):
    model, tokenizer = minilm
    batch = tokenizer(["a b"])
    empty = jh.Batch(batch.tokens, np.zeros_like(batch.mask))
    found = jh.sentence_embeddings(model, empty)
    assert not found.any()


def test_bad_input(minilm):
    model, tokenizer = minilm
    with pytest.raises(ValueError, match="batch must be a Batch, got ndarray"):
        jh.sentence_embeddings(model, np.zeros((1, 4), np.int32))
    long = tokenizer("word " * (LONGEST + 1))
    with pytest.raises(ValueError, match=f"exceeds the model's context of {LONGEST}"):
        jh.sentence_embeddings(model, long)
