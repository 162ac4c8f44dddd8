"""Small random models with odd shapes, shared by the tests."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import pytest

from jaxheads import ModelConfig, Transformer

KV_HEADS = {"mha": 6, "gqa": 2, "mqa": 1}
TOLERANCE = 1e-5


@functools.cache
def tiny_model(
    kind: str = "gqa", *, biases: bool = False, tied: bool = True, **fields: Any
) -> Transformer:
    """Three layers of six heads whose size is not width / heads."""
    shape: dict[str, Any] = {
        "n_layers": 3,
        "n_heads": 6,
        "n_kv_heads": KV_HEADS[kind],
        "head_dim": 8,
        "d_model": 40,
        "d_mlp": 56,
        "vocab_size": 97,
        "context_length": 64,
        "qkv_bias": biases,
        "o_bias": biases,
        "mlp_bias": biases,
        "tied": tied,
    }
    config = ModelConfig(**(shape | fields))
    model = Transformer.random(config, jax.random.key(0))
    leaves, tree = jax.tree.flatten(model.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    # Move scales off one and biases off zero, so that nothing hides behind a neutral value.
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return Transformer(config, jax.tree.unflatten(tree, noisy))


def tiny_tokens(rows: int = 2, length: int = 14, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 97, (rows, length))


def close(actual, expected, tolerance: float = TOLERANCE) -> None:
    """Equality within a tolerance relative to the largest expected value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def mostly_slow(cases: Iterable[Any], *fast: Any) -> list[Any]:
    """Cases for `parametrize` of which only the fast ones run without `make test-slow`."""
    return [c if c in fast else pytest.param(c, marks=pytest.mark.slow) for c in cases]
