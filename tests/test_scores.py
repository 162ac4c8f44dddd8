"""Standard scores of heads: on random tokens, on text, and by their names."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tokenizers

import jaxheads as jh
from jaxheads.methods.head_scores import PROBES, SCORES, choose_scores, refused, score_heads
from jaxheads.model.batch import Batch
from jaxheads.sweep.scores import (
    REPEAT_SCORES,
    TEXT_SCORES,
    by_head,
    repeat_scores,
    text_rows,
    text_scores,
)
from jaxheads.tasks import repeated_tokens
from jaxheads.text import Tokenizer
from tests.tiny import tiny_model, tiny_tokens


def by_hand(model: jh.Transformer, batch: Batch) -> dict[str, np.ndarray]:
    """The scores of text in plain loops over attention maps of each row alone."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in TEXT_SCORES}
    for row, mask in zip(batch.tokens, batch.mask, strict=True):
        tokens = row[mask][None]
        maps = np.asarray(model(tokens, taps="pattern").taps["pattern"], np.float64)[:, 0]
        window = np.asarray(model.config.windows or (0, 0, 0))[:, None]
        for t in range(1, tokens.shape[1]):
            a = maps[:, :, t]
            s = np.arange(a.shape[-1])
            entropy = -np.sum(a * np.log(np.where(a > 0, a, 1)), -1)
            seen = t + 1 if model.config.causal else a.shape[-1]
            keys = np.where(window, np.minimum(window, seen), seen)
            found["distance"].append((a * np.abs(t - s)).sum(-1))
            found["entropy"].append(entropy)
            found["evenness"].append(entropy / np.log(keys))
            found["sink"].append(a[:, :, 0])
    return {name: np.mean(values, axis=0) for name, values in found.items()}


def byte_level() -> tokenizers.Tokenizer:
    """A tokenizer whose tokens are bytes."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return backend


def padded(side: str) -> Batch:
    rows = [row[:length].tolist() for row, length in zip(tiny_tokens(2), (14, 9), strict=True)]
    return jh.pack(rows, side=side)


# On random tokens twice over.


def test_repeat_scores_are_means_of_the_attention_map() -> None:
    model, length = tiny_model(), 9
    found = repeat_scores(model, count=3, length=length, seed=1, batch_size=2)
    tokens = repeated_tokens(3, length=length, seed=1, vocab_size=97, first_id=0)
    pattern = np.asarray(model(tokens, taps="pattern").taps["pattern"])
    queries = range(1 + length, 1 + 2 * length)
    for name, back in {"induction": length - 1, "previous": 1, "duplicate": length}.items():
        wanted = np.mean([pattern[:, :, :, t, t - back] for t in queries], axis=(0, 2))
        np.testing.assert_allclose(found[name], wanted, atol=1e-6)


def test_repeats_beyond_the_context_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two times 40 tokens .* context of 64"):
        repeat_scores(tiny_model(), length=40)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        repeat_scores(tiny_model(), length=4, batch_size=0)


# On text.


@pytest.mark.parametrize(
    "fields", [{}, {"windows": (0, 3, 5)}, {"causal": False}], ids=["full", "window", "both ways"]
)
def test_text_scores_are_means_of_the_attention_map(fields: dict) -> None:
    model = tiny_model(**fields)
    batch = padded("right")
    wanted = by_hand(model, batch)
    for name, found in text_scores(model, [batch]).items():
        np.testing.assert_allclose(found, wanted[name], atol=2e-5, err_msg=name)


def test_padding_and_batching_change_no_score() -> None:
    model = tiny_model()
    right, left = padded("right"), padded("left")
    halves = [Batch(right.tokens[i : i + 1], right.mask[i : i + 1]) for i in range(2)]
    wanted = text_scores(model, [right])
    for batches in ([left], halves):
        found = text_scores(model, batches)
        assert found["sink"].info == {"rows": 2, "queries": 13 + 8}
        for name in TEXT_SCORES:
            np.testing.assert_allclose(found[name], wanted[name], atol=1e-5, err_msg=name)


def test_text_scores_of_known_attention() -> None:
    """Heads of queries 0 attend evenly: everything about them is known."""
    model = tiny_model()
    params = model.params
    params["blocks"]["attn"]["q"] = params["blocks"]["attn"]["q"] * 0
    even = jh.Transformer(model.config, params)
    found = text_scores(even, [Batch(tiny_tokens(1), np.ones((1, 14), bool))])
    t = np.arange(1, 14)
    np.testing.assert_allclose(found["distance"], np.mean(t / 2), rtol=1e-5)
    np.testing.assert_allclose(found["entropy"], np.mean(np.log(t + 1)), rtol=1e-5)
    np.testing.assert_allclose(found["evenness"], 1, rtol=1e-5)
    np.testing.assert_allclose(found["sink"], np.mean(1 / (t + 1)), rtol=1e-5)


def test_text_rows_cover_the_text_once_in_one_shape() -> None:
    batches = text_rows(range(10, 33), length=6, first_id=1, batch_size=2)
    assert {batch.tokens.shape for batch in batches} == {(2, 6)}
    rows = [
        row[mask].tolist()
        for batch in batches
        for row, mask in zip(batch.tokens, batch.mask, strict=True)
        if mask.any()
    ]
    assert all(row[0] == 1 for row in rows)
    assert [token for row in rows for token in row[1:]] == list(range(10, 33))
    (short,) = text_rows([5, 6], length=200)
    assert short.tokens.tolist() == [[5, 6]]


def test_text_that_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ValueError, match="the text has no tokens"):
        text_rows([], first_id=1)
    with pytest.raises(ValueError, match="length must be at least 2, got 1"):
        text_rows([1, 2], length=1)
    with pytest.raises(ValueError, match="no queries to score"):
        text_scores(tiny_model(), [])
    with pytest.raises(ValueError, match="no queries to score"):
        text_scores(tiny_model(), [Batch(tiny_tokens(2, 1), np.ones((2, 1), bool))])


# By name.


def test_every_score_has_a_probe_and_says_what_it_is() -> None:
    assert {score.probe for score in SCORES.values()} == set(PROBES)
    assert {*REPEAT_SCORES, *TEXT_SCORES} < set(SCORES)
    assert all(score.meaning and score.unit for score in SCORES.values())


def test_the_docs_list_every_score() -> None:
    page = (Path(__file__).parents[1] / "docs/command-line.md").read_text()
    rows = [f"| `{name}` | {score.unit} | {score.meaning} |" for name, score in SCORES.items()]
    assert "|---|---|---|\n" + "\n".join(rows) + "\n\n" in page


def test_scores_are_chosen_by_name() -> None:
    assert choose_scores(["all"]) == tuple(SCORES)
    assert choose_scores(["sink", "induction", "sink"]) == ("induction", "sink")
    with pytest.raises(ValueError, match=r"unknown score 'inductoin'. Did you mean 'induction'"):
        choose_scores(["inductoin"])
    with pytest.raises(ValueError, match="no score named"):
        choose_scores([])


def test_a_score_the_model_cannot_have_is_refused_by_name() -> None:
    tokenizer = Tokenizer(byte_level())
    model = tiny_model(norm_place="sandwich")
    reasons = refused(model, tokenizer, SCORES)
    assert set(reasons) == {"copying", "successor"}
    assert "norm_place is 'sandwich'" in reasons["copying"]
    assert refused(tiny_model(), tokenizer, SCORES) == {}
    with pytest.raises(ValueError, match=r"score 'copying': .*norm_place is 'sandwich'"):
        score_heads(model, tokenizer, ["copying"])
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        score_heads(model, tokenizer, ["sink"], count=0)


def test_an_array_by_head_has_named_axes() -> None:
    array = by_head("sink", np.arange(18).reshape(3, 6), tiny_model().config)
    assert array.axes == ("layer", "head") and array.values.dtype == np.float32
    assert array.top(1, "highest") == [((2, 5), 17.0)]
    assert dataclasses.replace(array, name="x").shape == (3, 6)


# The real model.


@pytest.mark.slow
def test_smollm2_attention_on_text(smollm2: tuple) -> None:
    """Sinks by layer as the notes on methods have them; the range is over its texts and ours."""
    model, tokenizer = smollm2
    found = score_heads(model, tokenizer, ["sink", "evenness", "distance"])
    by_layer = found["sink"].values.mean(1)
    assert by_layer[[0, 1, 10, 11]].max() < 0.05
    assert by_layer[18:27].min() > 0.35 and by_layer[18:27].mean() > 0.5
    # What goes to the first token goes far: the two differ between layers alike.
    distance = found["distance"].values.mean(1)
    assert np.corrcoef(by_layer, distance)[0, 1] > 0.7
    assert found["evenness"].values.min() >= 0 and found["evenness"].values.max() <= 1


def test_smollm2_induction_heads(smollm2: tuple) -> None:
    model, tokenizer = smollm2
    found = repeat_scores(model, count=2, length=64, first_id=tokenizer.bos_id)
    wanted = {
        "induction": {(18, 6): 0.91, (17, 3): 0.79, (17, 4): 0.74},
        "previous": {(16, 0): 0.89, (11, 1): 0.85},
        "duplicate": {(14, 3): 0.70, (8, 0): 0.68},
    }
    for name, heads in wanted.items():
        assert {head: found[name][head] for head in heads} == pytest.approx(heads, abs=0.1)
