"""Two runs side by side: the checks on pairs of prompts, and what one lends the other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.model.batch import Batch
from jaxheads.model.transformer import Transformer

Array = jax.Array


def check_pair(clean: Batch, corrupted: Batch) -> None:
    """Raises ValueError unless two batches have one shape and the same padding."""
    shapes = np.shape(clean.tokens), np.shape(corrupted.tokens)
    if shapes[0] != shapes[1]:
        raise ValueError(
            "clean and corrupted must be pairs of one shape, got tokens of shapes "
            f"{shapes[0]} and {shapes[1]}"
        )
    differ = (np.asarray(clean.mask) != np.asarray(corrupted.mask)).any(axis=1)
    if differ.any():
        row = int(differ.argmax())
        one, other = (int(np.asarray(batch.mask)[row].sum()) for batch in (clean, corrupted))
        found = f"has {one} and {other} tokens" if one != other else "is padded at different slots"
        raise ValueError(
            f"clean and corrupted must be pairs of equal length and padding, but row {row} {found}"
        )


def first_difference(one: Batch, other: Batch, causal: bool) -> int:
    """The first slot whose activations can differ between two batches; T if none can."""
    differ = (np.asarray(one.tokens) != np.asarray(other.tokens)) & np.asarray(one.mask)
    if not differ.any():
        return differ.shape[1]
    return int(differ.any(axis=0).argmax()) if causal else 0


def values_at(model: Transformer, batch: Batch, *sites: str) -> dict[str, Array]:
    """The values of sites of the stack in the unedited run, each [L,B,T,...]."""
    nothing = jnp.zeros((np.shape(batch.tokens)[0], 0), jnp.int32)
    return model(batch, taps=sites, logits_at=nothing).taps
