"""`StreamingMix`: between attention to everything and to sinks and recent tokens, by head.

The relaxation that Xiao et al. (2024), "DuoAttention: Efficient Long-Context LLM Inference with
Retrieval and Streaming Heads", train (eq. 1), and a way to ask what a choice of heads costs without
a cache of its own: gates of 1 and 0 give what `jaxheads.decode.HeadCache` computes, in one program
for all choices.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from jaxheads.model.attention import Slots
from jaxheads.model.context import Context
from jaxheads.model.layout import axes_of, lay, whole

Array = jax.Array


@struct.dataclass
class StreamingMix:
    """alpha * z + (1 - alpha) * z_stream, an edit of `z`.

    z_stream is attention to the first `sinks` tokens and the last `recent` ones, the query's own
    among them, from the same queries, keys and values. It costs a second attention, which edits of
    `scores` and `pattern` do not reach.

    Attributes:
      alpha: float [L,K], one gate for each key/value head: 1 sees everything, 0 streams.
      sinks: first tokens that are seen. Static.
      recent: last tokens that are seen. Static.
    """

    alpha: Array
    sinks: int = struct.field(pytree_node=False, default=4)
    recent: int = struct.field(pytree_node=False, default=256)

    def __call__(self, value: Array, context: Context) -> Array:
        """Returns the mixture.

        Raises:
          ValueError: gates of another number of heads; a pass over a cache, which alone has the
            keys of the tokens before.
        """
        k, v = context.k, context.v
        if self.alpha.shape != (k.shape[2],):
            raise ValueError(
                f"alpha has shape {self.alpha.shape} per layer, expected {(k.shape[2],)}: one for "
                "each key/value head"
            )
        if context.allowed.shape[-1] != k.shape[1]:
            raise ValueError(
                f"StreamingMix sees the keys of {k.shape[1]} tokens, but a cache has room for "
                f"{context.allowed.shape[-1]}: with a cache, use jaxheads.decode.HeadCache"
            )
        places = context.positions
        query, key = places[:, None, :, None], whole(places, 1)[:, None, None, :]
        near = (key < self.sinks) | (key > query - self.recent)
        # Sites are visited by the model's own attention only.
        alone = dataclasses.replace(context, edits={}, taps={})
        allowed = context.allowed & near
        streamed, _ = Slots(k, v).attend(context.q, alone, allowed, context.bias)
        alpha = jnp.repeat(self.alpha, value.shape[2] // k.shape[2]).astype(value.dtype)
        alpha = lay(alpha, axes_of(value)[2:3])[:, None]
        return streamed + alpha * (value - streamed)
