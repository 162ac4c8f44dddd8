"""Every config is read, whole and as its short run, and takes a step on a small model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxheads as jh
from jaxheads.convert.load import load_config
from jaxheads.methods.run import FROZEN, make_job, prepare_run, read_run, train
from jaxheads.train import Fit

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.toml"))


@pytest.fixture(scope="module")
def small():
    """A small random model with enough heads, and SmolLM2's tokenizer."""
    config, tokenizer = load_config("smollm2-135m-instruct")
    config = config.replace(n_layers=4, n_heads=8, n_kv_heads=4, head_dim=4, d_model=16, d_mlp=32)
    return jh.Transformer.random(config, jax.random.key(0)), tokenizer


def one_step(settings: Any) -> Any:
    """The settings with every stage cut to one step."""
    if isinstance(settings, Fit):
        return dataclasses.replace(
            settings, steps=1, optimizer=dataclasses.replace(settings.optimizer, warmup=0)
        )
    if not dataclasses.is_dataclass(settings):
        return settings
    parts = {
        field.name: one_step(getattr(settings, field.name))
        for field in dataclasses.fields(settings)
    }
    return dataclasses.replace(settings, **parts)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_says_how_it_is_run_and_what_comes_out(path):
    header = path.read_text().split("\n\n")[0]
    for word in (f"jaxheads train --config configs/{path.name}", "Expected:", "Runtime:"):
        assert word in header, word
    for word in ("EXPECT\n", "RUNTIME\n", "TODO"):
        assert word not in header, word


FAST = ("lofit_counterfactual", "lora_counterfactual", "python_docs_from_scratch")


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem not in FAST))
        for path in CONFIGS
    ],
)
def test_a_config_takes_a_step(path, small, tmp_path):
    whole, short = read_run(path), read_run(path, runlocal=True)
    assert whole != short
    text = short.data.source.startswith("corpus:")
    data = dataclasses.replace(short.data, limit=16 if text else None)
    run = dataclasses.replace(short, method=one_step(short.method), neighbours=(), data=data)
    ready = prepare_run(run, lambda place: small)
    results = train(run, ready, make_job(run, None, tmp_path), tmp_path)
    assert results["variants"][FROZEN]["trained"] == 0
    for variant in results["variants"].values():
        assert np.isfinite(variant["held_out"]["loss"])
    assert (tmp_path / "results.json").is_file()
