"""Where values lie on a mesh, read off their types.

In JAX's Explicit mode the type of an array says over which axes of the mesh it is divided.
The model names no axis of any mesh: the tokens' type says how batch and tokens are divided, the
weights' types how heads, neurons, vocabulary and model width are, and from these the layout of
every value follows. Without a mesh, or in Auto mode, types say nothing and nothing here acts:
the compiler decides.

The layout, whatever the axes are called:

- the axes of a value that come from a weight (heads, neurons, vocabulary) stay divided as the
  weight is;
- a weight that is divided over an axis that also divides the batch (fully sharded data
  parallelism) is gathered where it is used, in the dtype of the activations, and gathered again
  in the backward pass rather than kept;
- a product over a divided axis (the output projection, the second matrix of the MLP) is summed
  over the devices at once, so that the residual stream is divided as the tokens are;
- keys and values see all tokens, queries stay divided.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

Array = jax.Array
Tree = TypeVar("Tree")
Axes = tuple[tuple[str, ...], ...]

POLICIES: dict[str, Callable[..., bool] | None] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
REMAT = ("none", *POLICIES)
"""What a block keeps for its backward pass.

Everything but attention weights and the inside of the gated MLP, which are cheap to compute again;
the products with weights; nothing but its input.
"""


def axes_of(x: Any) -> Axes:
    """For each axis of x, the names of the mesh axes over which it is divided."""
    kind = jax.typeof(x)
    spec = () if kind.sharding is None else kind.sharding.spec
    named = [(names,) if isinstance(names, str) else tuple(names or ()) for names in spec]
    return tuple(named + [()] * (kind.ndim - len(named)))


def divided(x: Any) -> bool:
    """Whether the type of x says that it is divided over anything."""
    return any(axes_of(x))


def lay(x: Array, axes: Axes) -> Array:
    """x divided as told; nothing happens where it already is."""
    return x if axes_of(x) == axes else jax.reshard(x, PartitionSpec(*axes))


def whole(x: Array, axis: int) -> Array:
    """x with one axis on every device."""
    axes = list(axes_of(x))
    axes[axis] = ()
    return lay(x, tuple(axes))


def gathered(tree: Tree, x: Array, dtype: Any) -> Tree:
    """Weights for use with x: undivided over the axes that divide x.

    A matrix is rounded to `dtype`, that of the activations, first, as its product with them
    would do: that halves what is sent for float32 weights and bfloat16 activations.
    """
    taken = {name for names in axes_of(x) for name in names}

    def gather(weight: Array) -> Array:
        axes = axes_of(weight)
        kept = tuple(tuple(name for name in names if name not in taken) for names in axes)
        if kept == axes:
            return weight
        return lay(weight.astype(dtype) if weight.ndim > 1 else weight, kept)

    return jax.tree.map(gather, tree) if taken else tree


def contract(equation: str, x: Array, weight: Array, **options: Any) -> Array:
    """einsum of a value and a gathered weight, laid out as the module says.

    Args:
      equation: for two operands, without an ellipsis, e.g. "bthe,hed->btd".
      x: the value.
      weight: the weight, already in a dtype that suits x.
      **options: of `jnp.einsum`.
    """
    if not (divided(x) or divided(weight)):
        return jnp.einsum(equation, x, weight, **options)
    operands, result = equation.split("->")
    left, right = operands.split(",")
    axes = dict(zip(right, axes_of(weight), strict=True))
    axes |= {letter: names for letter, names in zip(left, axes_of(x), strict=True) if names}
    spec = PartitionSpec(*(axes.get(letter, ()) for letter in result))
    return jnp.einsum(equation, x, weight, out_sharding=spec, **options)


def take_rows(table: Array, index: Array | np.ndarray) -> Array:
    """Rows of a table [N,...] for int [B,T]; NaN for an index outside rather than another row."""
    inside = jnp.where(index < 0, table.shape[0], index)
    if not (divided(table) or divided(inside)):
        return jnp.take(table, inside, axis=0, mode="fill")
    spec = PartitionSpec(*axes_of(inside), *axes_of(table)[1:])
    return table.at[inside].get(mode="fill", out_sharding=spec)


def like_heads(kv: Array, q: Array) -> Array:
    """Keys or values [B,S,K,Dh] for queries [B,T,H,Dh] that are divided over more devices than K.

    Where heads are divided and key/value heads are whole (there are fewer of them than
    devices), each is repeated for its queries and every device keeps those that its own
    queries read: [B,S,H,Dh], divided as the queries are. Else unchanged.
    """
    heads = axes_of(q)[2]
    if axes_of(kv)[2] == heads:
        return kv
    b, s, k, dh = kv.shape
    repeated = jnp.broadcast_to(kv[:, :, :, None], (b, s, k, q.shape[2] // k, dh))
    axes = axes_of(kv)
    return lay(repeated.reshape(b, s, q.shape[2], dh), (axes[0], axes[1], heads, axes[3]))


def rematerialised(body: Callable[..., Any], x: Array, remat: str) -> Callable[..., Any]:
    """The body of the layer scan with what it keeps for its backward pass restricted.

    Gathered weights are never kept: they are the whole model.

    Args:
      body: a function to be scanned.
      x: the carry, whose layout says whether weights are gathered.
      remat: one of `REMAT`.
    """
    if remat == "none" and not divided(x):
        return body
    return jax.checkpoint(body, policy=POLICIES.get(remat, _all_but_gathered), prevent_cse=False)


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name != "reshard"
