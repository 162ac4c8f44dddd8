"""`dropout`: values set to zero at random while training, as edits."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from jaxheads.edits.edits import Edits
from jaxheads.model.config import ModelConfig
from jaxheads.model.context import Context
from jaxheads.model.layout import axes_of, lay
from jaxheads.sites import find_site

Array = jax.Array
DROPOUT_SITES = ("attn_out", "mlp_out")
"""Where Vaswani et al. (2017), section 5.4, drop: what each branch adds to the stream."""


@struct.dataclass
class Dropout:
    """x / (1 - rate) with probability 1 - rate, else 0; Srivastava et al. (2014).

    Attributes:
      keys: uint32 [L,2], the data of one random key for each layer.
      rate: the probability of 0. Static.
      whole_heads: whether a head [..., Dh] is kept or dropped as one. Static.
    """

    keys: Array
    rate: float = struct.field(pytree_node=False, default=0.1)
    whole_heads: bool = struct.field(pytree_node=False, default=False)

    def __call__(self, value: Array, context: Context) -> Array:
        """Returns the value with some entries dropped and the others enlarged."""
        shape = (*value.shape[:-1], 1) if self.whole_heads else value.shape
        key = jax.random.wrap_key_data(self.keys)
        keep = jax.random.bernoulli(key, 1 - self.rate, shape)
        axes = axes_of(value)
        keep = lay(keep, (*axes[:-1], ()) if self.whole_heads else axes)
        return jnp.where(keep, value / (1 - self.rate), 0)


def dropout(
    config: ModelConfig,
    key: Array,
    rate: float,
    sites: Sequence[str] = DROPOUT_SITES,
    *,
    whole_heads: bool = False,
) -> Edits:
    """Edits that drop values at random, different in each layer and at each site.

    Args:
      config: of the model.
      key: a random key; a new one for each step, such as the one that a loss is given.
      rate: the probability with which a value becomes zero, in [0, 1).
      sites: sites of the stack.
      whole_heads: drop whole heads, for sites such as `z` (Zhou et al. 2020, "Scheduled
        DropHead").

    Raises:
      ValueError: a rate outside [0, 1), or a site without layers.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate must lie in [0, 1), got {rate}")
    edits = {}
    for index, site in enumerate(sites):
        if not find_site(site).stacked:
            raise ValueError(f"dropout acts at sites of the stack, got {site!r}")
        keys = jax.random.split(jax.random.fold_in(key, index), config.n_layers)
        edits[site] = Dropout(jax.random.key_data(keys), rate, whole_heads)
    return Edits(edits)
