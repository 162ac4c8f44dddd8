"""Batches for training: grain over arrays on the host, addressed by step."""

from __future__ import annotations

from typing import Any

import grain
import jax
import numpy as np


def batches(arrays: Any, batch_size: int, seed: int) -> grain.MapDataset:
    """An endless, reshuffled sequence of batches.

    Batch n depends only on (arrays, batch_size, seed, n), so a run resumes exactly by
    starting at its step.

    Args:
      arrays: a pytree of numpy arrays with a common leading axis of N rows.
      batch_size: rows of a batch.
      seed: of the shuffle; every pass over the rows has its own order.

    Returns:
      A grain dataset; `dataset[n]` is the pytree with leading axis `batch_size`.

    Raises:
      ValueError: a batch size below 1 or above N.
    """
    rows = len(jax.tree.leaves(arrays)[0])
    if not 1 <= batch_size <= rows:
        raise ValueError(f"batch_size must lie in 1..{rows} (rows of the data), got {batch_size}")
    order = grain.MapDataset.range(rows).shuffle(seed=seed).repeat().batch(batch_size)
    return order.map(lambda chosen: jax.tree.map(lambda leaf: np.asarray(leaf)[chosen], arrays))
