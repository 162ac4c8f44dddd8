"""Clean and corrupted prompts of tiny models and of the planted one, for tests of circuits."""

import functools

import numpy as np
import planted
from tiny import tiny_model, tiny_tokens

from jaxheads import Batch
from jaxheads.circuits.edge_attribution import edge_attribution
from jaxheads.circuits.edge_forward import Runner
from jaxheads.sweep.metrics import LogitDifference

VARIANTS = {
    "plain": {},
    "parallel": {"parallel": True},
    "rest": {
        "biases": True,
        "branch_scale": True,
        "first_attn_norm": False,
        "qk_norm": "head",
        "attn_softcap": 5.0,
        "norm": "layer",
        "norm_bias": True,
        "causal": False,
        "windows": (0, 5, 0),
    },
}


def batch(seed: int, padded: bool = True) -> Batch:
    tokens = tiny_tokens(rows=2, length=9, seed=seed)
    mask = np.ones(tokens.shape, bool)
    if padded:
        mask[1, :3] = False
    return Batch(tokens, mask)


CLEAN, CORRUPTED = batch(0), batch(1)
METRIC = LogitDifference.of(CLEAN, np.array([1, 2]), np.array([3, 4]))


@functools.cache
def runner(variant: str = "plain") -> Runner:
    return Runner.of(tiny_model(**VARIANTS[variant]), CLEAN, CORRUPTED, METRIC, at_once=8)


@functools.cache
def planted_pair():
    pairs = planted.planted_pairs()
    return planted.planted_model(), pairs.clean, pairs.corrupted, planted.planted_metric(pairs)


@functools.cache
def planted_scores(steps: int):
    return edge_attribution(*planted_pair(), steps=steps)
