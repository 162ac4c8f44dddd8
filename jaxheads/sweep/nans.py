"""Finding where a NaN of a sweep comes from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.model.batch import Batch
from jaxheads.model.context import Tap
from jaxheads.model.transformer import Transformer
from jaxheads.sweep.engine import run_prefix
from jaxheads.sweep.metrics import Metric, name_of
from jaxheads.sweep.points import Points

_WATCHED = {
    site: Tap(site, lambda value, _: jnp.isnan(value).any(axis=(0, 1)))
    for site in ("z", "mlp_out", "resid_post")
}


def refuse_nans(
    model: Transformer,
    batch: Batch,
    metric: Metric,
    points: Points,
    found: np.ndarray,
    unedited: np.ndarray,
) -> None:
    """Checks what a sweep found.

    Args:
      model: the model.
      batch: the prompts.
      metric: what was measured.
      points: the edits.
      found: float32 [N,B].
      unedited: float32 [B].

    Raises:
      ValueError: a NaN; the message names the first layer and head where it appears.
    """
    if np.isnan(unedited).any():
        row = int(np.isnan(unedited).argmax())
        out = model(batch, taps=_WATCHED)
        where = _where(out.taps, 0) or f"{name_of(metric)} makes it of finite logits"
        raise ValueError(f"the unedited model gives NaN in row {row}: {where}")
    broken = np.isnan(found).any(axis=1)
    if not broken.any():
        return
    index = int(broken.argmax())
    cause = _trace(model, batch, metric, points, index)
    raise ValueError(
        f"{int(broken.sum())} of {len(broken)} edits give NaN; the first, at layer "
        f"{int(points.layer[index])}: {cause or f'{name_of(metric)} makes it of finite logits'}"
    )


def _trace(
    model: Transformer, batch: Batch, metric: Metric, points: Points, index: int
) -> str | None:
    """Runs one edit layer by layer and looks at every block."""
    prefix = run_prefix(model, batch, metric, windowed=False)
    first = int(points.layer[index])
    arguments = jax.tree.map(lambda leaf: leaf[index], points.arguments)
    context, _ = model.begin(jnp.asarray(batch.mask), None, "prefill", {}, _WATCHED)
    x = prefix.streams[first]
    for number in range(first, model.config.n_layers):
        build = points.entering if number == first else points.later
        layer, shared = (
            jax.tree.map(lambda leaf, number=number: leaf[number], tree)
            for tree in (model.layers(), points.shared)
        )
        edits = {} if build is None else build(arguments, shared, jnp.asarray(number), 0)
        x, here, _ = model.step(x, context, layer, edits)
        where = _where({name: value[None] for name, value in here.tapped.items()}, number)
        if where:
            return where
    return None


def _where(tapped: dict[str, jax.Array], first: int) -> str | None:
    """The first block with a NaN, of the flags [L,...] of the sites watched."""
    z, mlp, stream = (np.asarray(tapped[name]) for name in ("z", "mlp_out", "resid_post"))
    for index in range(len(z)):
        heads = z[index].any(axis=-1)
        if heads.any():
            return f"it appears first in layer {first + index}, head {int(heads.argmax())} (z)"
        if mlp[index].any():
            return f"it appears first in layer {first + index}, in the MLP"
        if stream[index].any():
            return f"it appears first in layer {first + index}, in the residual stream"
    return None
