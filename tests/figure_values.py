"""What figures are drawn of: effects of heads, attention patterns, and tokens hard to show."""

import numpy as np

HOSTILE = [
    "</svg><script>",
    "a&b",
    "\"q'",
    "\n",
    "\x00",
    "\u202e",
    "\u200b",
    " ",
    "",
    "$x_1$",
    "\ud800",
]
LAYERS, HEADS = 30, 9


def effects() -> np.ndarray:
    values = np.random.default_rng(0).normal(0, 0.1, (LAYERS, HEADS))
    values[23, 3] = 2.4
    return values


def pattern(length: int, seed: int = 0) -> np.ndarray:
    scores = np.random.default_rng(seed).normal(size=(length, length))
    weights = np.tril(np.exp(scores))
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)
