"""Removing each of SmolLM2's 270 heads, against values recorded from Hugging Face transformers.

There a hook before the output projection sets the head's slice to zero and the whole model runs
again; here one sweep does it for all heads. `scripts/make_ablation_reference.py` makes the values;
`make parity` makes them anew and compares.
"""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import jaxheads as jh

TOLERANCE = 1e-3
"""Largest accepted difference of two logit differences."""


@pytest.fixture(scope="module")
def reference(fixtures_dir):
    with np.load(fixtures_dir / "ablation_reference.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def batch(reference):
    return jh.pack(reference["tokens"].tolist())


@pytest.fixture(scope="module")
def swept(smollm2, reference, batch):
    """Change of the logit difference without each head, [L,H,B]."""
    metric = jh.LogitDifference.of(batch, reference["answers"], reference["wrong"])
    found = jh.ablate_heads(smollm2[0], batch, metric, rows=True)
    assert found.axes == ("layer", "head", "row")
    return found.values


@pytest.fixture(scope="module")
def measure(reference, batch):
    """The logit difference [B] by a whole forward pass; for one edit and for a stack of them."""

    def difference(model, edits):
        answers = reference["answers"], reference["wrong"]
        return jh.logit_difference(model, batch, *answers, edits=edits)

    return jax.jit(difference), jax.jit(jax.vmap(difference, in_axes=(None, 0)))


@pytest.fixture(scope="module")
def unedited(smollm2, measure):
    return np.asarray(measure[0](smollm2[0], None))


def test_the_tokenizer_gives_the_recorded_ids(smollm2, reference, fixtures_dir):
    _, tokenizer = smollm2
    recorded = json.loads((fixtures_dir / "ablation_reference.json").read_text(encoding="utf-8"))
    prompts, answers, wrong = zip(*recorded["prompts"], strict=True)
    assert [tokenizer.encode(text) for text in prompts] == reference["tokens"].tolist()
    assert [tokenizer.encode(text) for text in answers] == reference["answers"][:, None].tolist()
    assert [tokenizer.encode(text) for text in wrong] == reference["wrong"][:, None].tolist()


def test_without_edits(reference, unedited):
    np.testing.assert_allclose(unedited, reference["unedited"], atol=TOLERANCE, rtol=0)


def test_without_each_head(swept, reference):
    expected = reference["ablated"] - reference["unedited"]
    assert swept.shape == expected.shape == (30, 9, 8)
    np.testing.assert_allclose(swept, expected, atol=TOLERANCE, rtol=0)
