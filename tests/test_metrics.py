"""Losses and metrics, by hand in numpy."""

import jax
import numpy as np
import pytest
from tiny import close, tiny_model, tiny_tokens

import jaxheads as jh


def prompts(side):
    """Two rows of 14 and 9 tokens; the last 4 and the last 2 of them are targets."""
    rows = [list(tiny_tokens()[0]), list(tiny_tokens()[1, :9])]
    targets = [[False] * (len(row) - n) + [True] * n for row, n in zip(rows, (4, 2), strict=True)]
    return rows, jh.pack(rows, targets, side=side)


def row_logits(batch, edits=None):
    """The logits of each row at its real tokens."""
    logits = np.asarray(tiny_model()(batch, edits=edits).logits, np.float64)
    return [values[mask] for values, mask in zip(logits, batch.mask, strict=True)]


def losses(logits, row):
    """Nats of tokens 1, 2, ... of the row."""
    logits = logits[:-1] - logits[:-1].max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -log_p[np.arange(len(row) - 1), row[1:]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("targets", [True, False], ids=["targets", "every token"])
def test_next_token_loss_and_perplexity(side, targets):
    rows, batch = prompts(side)
    last = (4, 2) if targets else (13, 8)
    batch = batch if targets else batch.replace(targets=None)
    every = [losses(lg, row) for lg, row in zip(row_logits(batch), rows, strict=True)]
    expected = np.concatenate([row[-n:] for row, n in zip(every, last, strict=True)]).mean()
    loss = jh.next_token_loss(tiny_model(), batch)
    assert loss.shape == ()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(jh.perplexity(tiny_model(), batch), np.exp(expected), rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_answer_scores(side):
    rows, batch = prompts(side)
    # Let the model be right about all of row 0's targets and half of row 1's.
    for _ in range(4):
        logits = row_logits(batch)
        for place in (-4, -3, -2, -1):
            rows[0][place] = int(logits[0][place - 1].argmax())
        rows[1][-2] = int(logits[1][-3].argmax())
        rows[1][-1] = int(logits[1][-2].argmin())
        batch = jh.pack(
            rows, [list(t[m]) for t, m in zip(batch.targets, batch.mask, strict=True)], side=side
        )
    scores = jh.answer_scores(tiny_model(), batch)
    every = [losses(lg, row) for lg, row in zip(row_logits(batch), rows, strict=True)]
    close(scores["loss"], [every[0][-4:].mean(), every[1][-2:].mean()])
    np.testing.assert_array_equal(scores["token_accuracy"], [1, 0.5])
    np.testing.assert_array_equal(scores["exact"], [1, 0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("edited", [False, True], ids=["plain", "edited"])
def test_logit_difference_and_last_logits(side, edited):
    _, batch = prompts(side)
    edits = jh.scale_heads(tiny_model().config, np.full((3, 6), 0.5)) if edited else None
    answers, wrong = np.array([5, 17]), np.array([60, 3])
    expected = np.stack([logits[-1] for logits in row_logits(batch, edits)])
    close(jh.last_logits(tiny_model(), batch, edits=edits), expected)
    found = jh.logit_difference(tiny_model(), batch, answers, wrong, edits=edits)
    close(found, expected[[0, 1], answers] - expected[[0, 1], wrong])


@pytest.mark.parametrize("answers", [np.array([5, 97]), np.array([[5], [6]]), np.array([5])])
def test_answers_that_do_not_fit_are_refused(answers):
    with pytest.raises(ValueError, match="answers"):
        jh.logit_difference(tiny_model(), prompts("left")[1], answers, np.array([1, 2]))


def test_a_row_without_targets_is_not_exact():
    batch = prompts("left")[1]
    targets = batch.targets.copy()
    targets[1] = False
    scores = jh.answer_scores(tiny_model(), batch.replace(targets=targets))
    assert np.isnan(scores["exact"][1]) and np.isnan(scores["loss"][1])


def test_what_stands_at_other_tokens_does_not_count():
    batch = prompts("left")[1]
    tokens = np.where(batch.mask, batch.tokens, 50)
    close(
        jh.next_token_loss(tiny_model(), batch.replace(tokens=tokens)),
        jh.next_token_loss(tiny_model(), batch),
    )


def test_metrics_are_differentiable_in_the_edits():
    _, batch = prompts("left")
    edits = jh.Edits.identity(tiny_model().config, "z")

    def difference(edits):
        return jh.logit_difference(
            tiny_model(), batch, np.array([5, 17]), np.array([60, 3]), edits=edits
        ).sum()

    slope = jax.jit(jax.grad(difference))(edits)["z"].scale
    assert slope.shape == (3, 1, 1, 6, 1)
    assert np.isfinite(slope).all() and (np.abs(slope) > 1e-6).all()
