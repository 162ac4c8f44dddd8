"""`lora`: low-rank changes of the weights of attention and MLP, as edits.

Source: Hu et al. (2021), "LoRA: Low-Rank Adaptation of Large Language Models". A weight W becomes
W + (alpha / r) A B with A of r columns and B of r rows (eq. 3). B starts at zero, so that nothing
changes; A starts as in the released code, uniform in +-1/sqrt(n) for n inputs (the paper says
Gaussian). The paper adapts queries and values; other sites are for whoever asks. Weights between
which and the next site a function stands (`gate` and `up` of the MLP) have no such edit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.edits.build import Heads, head_mask
from jaxheads.edits.edits import Edits
from jaxheads.edits.fold import BETWEEN
from jaxheads.edits.kinds import LowRank
from jaxheads.model.config import ModelConfig
from jaxheads.names import choose
from jaxheads.sites import axis_sizes, find_site

Array = jax.Array
LORA_SITES = ("q_pre", "v")
"""Where the paper adapts: queries and values."""


def lora(
    config: ModelConfig,
    key: Array,
    rank: int = 8,
    alpha: float = 16.0,
    sites: Sequence[str] = LORA_SITES,
    *,
    heads: Heads | None = None,
) -> Edits:
    """`LowRank` edits that change nothing yet, to be trained.

    Args:
      config: of the model.
      key: of the initial values.
      rank: r of every factor.
      alpha: the change is multiplied by alpha / r, so that the learning rate need not follow
        the rank.
      sites: where: "q_pre", "k_pre", "v", "attn_out", "mlp_out", "cross.q", "cross.attn_out".
      heads: (layer, head) pairs that alone are changed; see `restrict_heads`.

    Returns:
      Edits with float32 factors `down` [L,*source,r] and `up` [L,r,*site] of zeros.

    Raises:
      ValueError: no sites, one that no single weight writes or that is named twice, a rank below
        1, or heads as `restrict_heads` refuses them.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if not sites or len(set(sites)) != len(sites):
        raise ValueError(f"sites must name at least one site, each once, got {tuple(sites)!r}")
    size = axis_sizes(config)

    def axes(site: str) -> tuple[int, ...]:
        return tuple(size[axis] for axis in find_site(site).axes[2:])

    edits = {}
    for index, site in enumerate(sites):
        source = BETWEEN[choose("site of a low-rank change", site, BETWEEN)][1]
        read, layers = axes(source), config.n_layers
        bound = math.prod(read) ** -0.5
        own = jax.random.fold_in(key, index)
        down = jax.random.uniform(own, (layers, *read, rank), minval=-bound, maxval=bound)
        up = jnp.zeros((layers, rank, *axes(site)))
        edits[site] = LowRank(down, up, source, alpha / rank)
    made = Edits(edits)
    return made if heads is None else restrict_heads(made, head_mask(config, heads))


def restrict_heads(edits: Mapping[str, Any], heads: Array | np.ndarray) -> Edits:
    """`LowRank` edits with the parts of all other heads set to zero.

    At `q_pre` these are a head's columns of `up`, at `attn_out` its rows of `down`. A key/value
    head belongs to a group of query heads and is changed if any of them is chosen. Differentiable:
    applied within a loss, the other heads get no gradient and stay at zero.

    Args:
      edits: `LowRank` edits of attention, with a head axis of H or K in one factor.
      heads: bool [L,H], as `head_mask` returns it.

    Raises:
      ValueError: another kind of edit, or a site without heads.
    """
    return Edits({site: _restrict(site, edit, jnp.asarray(heads)) for site, edit in edits.items()})


def _restrict(site: str, edit: Any, heads: Array) -> LowRank:
    if not isinstance(edit, LowRank):
        raise ValueError(f"edit at {site!r} is {type(edit).__name__}, expected LowRank")
    written, read = find_site(site).head_axis, find_site(edit.source).head_axis
    if written is None and read is None:
        raise ValueError(f"the change at {site!r} has no heads to choose from")
    if read is not None:
        mask = heads.reshape(*heads.shape, *[1] * (edit.down.ndim - 2))
        return dataclasses.replace(edit, down=jnp.where(mask, edit.down, 0))
    layers, count = len(heads), edit.up.shape[2]
    mask = heads.reshape(layers, count, -1).any(axis=-1)[:, None, :, None]
    return dataclasses.replace(edit, up=jnp.where(mask, edit.up, 0))
