"""Attention of the heads that each token chose, and of no others.

The masked form of routing computes every head at every token and multiplies by gates that are
mostly zero. Here the chosen (token, head) pairs of a row are listed head by head, each head's list
is cut into blocks of C queries, and a scan takes block after block: the rows of scores, the
weighted values and the output projection of those queries at their head, and nothing else. It is
block-sparse in the way of Gale et al. (2022), "MegaBlocks: Efficient Sparse Training with
Mixture-of-Experts": **nothing is dropped**. There is no capacity, because a token keeps at most A
heads, so that the number of blocks has a bound that does not depend on the routing,

    N = min(H ceil(T / C), floor((T A + H (C - 1)) / C)),

and shapes are static. Blocks that no row of the batch needs are not computed, and padding takes
no slots.

What it costs. Floating-point operations of attention at one token of one layer, with S keys:

| | dense or masked | here |
|---|---|---|
| queries, keys, values | 2 D Dh (H + 2 K) | the same |
| a linear router (and W_s, W_h) | 2 D H (2 D (2 H + 2)) | the same |
| scores and weighted values | 4 S Dh H | 4 S Dh A w |
| output projection | 2 Dh D H | 2 Dh D A w |

w = N C / (T A) is what half-empty last blocks add: less than 1 + H C / (T A), so blocks must be
short against T A / H, the mean length of a head's list.

What cannot be saved: keys and values of every head, and their place in a cache, because a later
token may choose any head; the queries of all heads where their norms are the router's scores, and
with a linear router too as long as queries are a site that is computed before the choice; and
anything outside of attention. One token at a time (decoding) there is nothing to group, and the
masked form is used. Keys that a causal mask or a window hides are computed and masked, as in the
dense form without a fused kernel.

What it does not know: `z`, `head_out`, `scores` and `pattern`, which do not exist here. The
gradient is that of the masked form wherever gates of heads that were not chosen are constant. It
is not for `straight_through` gates: their gradient at a head that was not chosen is the gradient
of the loss along an output that is never computed, and so is left out.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from jaxheads.model.attention import attention_scores, mix_values
from jaxheads.model.context import Context
from jaxheads.model.layout import axes_of, divided, lay

Array = jax.Array

ABSENT = ("z", "head_out", "scores", "pattern")
"""Sites that do not exist where unchosen heads are skipped."""


class Logits(NamedTuple):
    """How scores are made: `scale` and `softcap` of `attention_scores`."""

    scale: float | None = None
    softcap: float | None = None


@struct.dataclass
class Blocks:
    """Where the chosen pairs of each row lie: N blocks of C slots.

    Attributes:
      head: int32 [N,B], the head of a block.
      token: int32 [N,B,C], the query of a slot; T where the slot is empty.
      slot: int32 [B,T,H], the slot of a pair, of N * C in the order of blocks; N * C where the
        token did not choose the head.
      used: bool [N], whether any row has a query in the block.
    """

    head: Array
    token: Array
    slot: Array
    used: Array


def attend_chosen(
    q: Array,
    k: Array,
    v: Array,
    weight: Array,
    chosen: Array,
    gates: Array,
    allowed: Array,
    bias: Array | None = None,
    *,
    block: int,
    most: int,
    logits: Logits = Logits(),  # noqa: B008
) -> Array:
    """Sum over the chosen heads of gate * z_h W_O^h.

    Rows may be divided over a mesh; then each device takes its own.

    Args:
      q: [B,T,H,Dh].
      k: [B,S,K,Dh]; query head h reads key head h // (H/K).
      v: [B,S,K,Dh].
      weight: W_O, [H,Dh,D].
      chosen: bool [B,T,H]. All false at padding.
      gates: float32 [B,T,H], 0 where not chosen.
      allowed: bool [B,1,T or 1,S], True where a query sees a key.
      bias: [1 or B,H,T,S], added to the logits.
      block: C, queries of a block.
      most: A, how many heads a token may choose.
      logits: how scores are made.

    Returns:
      [B,T,D] in the dtype of q; NaN at a token that chose more than `most` heads.

    Raises:
      ValueError: heads or tokens are divided over a mesh.
    """
    run = partial(_of_rows, block=block, most=most, logits=logits)
    if not divided(q):
        return run(q, k, v, weight, chosen, gates, allowed, bias)
    mesh = jax.typeof(q).sharding.mesh
    rows, *others = axes_of(q)
    for what, names in zip(("tokens", "heads"), others, strict=False):
        if any(mesh.shape[name] > 1 for name in names):
            raise ValueError(
                f"{what} are divided over {', '.join(names)} of the mesh: unchosen heads are "
                "skipped only where rows alone are divided; leave out skipping()"
            )
    mine, all_ = PartitionSpec(rows), PartitionSpec()
    of_bias = None if bias is None else all_ if bias.shape[0] == 1 else mine
    specs = (mine, mine, mine, all_, mine, mine, mine, of_bias)
    values = jax.tree.map(_laid, (q, k, v, weight, chosen, gates, allowed, bias), specs)
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=mine, check_vma=False)(*values)


def check_alone(context: Context, prefix: str) -> None:
    """Refuses what needs heads that are not computed.

    Raises:
      ValueError: something else edits, taps or reads `z`, `head_out`, `scores` or `pattern`.
    """
    absent = [prefix + site for site in ABSENT]
    asked = [(f"the tap {name!r}", (tap.site, *tap.needs)) for name, tap in context.taps.items()]
    for site, edit in context.edits.items():
        own = () if site == prefix + "z" else (site,)
        asked.append((f"the edit of {site!r}", (*own, *getattr(edit, "needs", ()))))
    for who, sites in asked:
        for site in sites:
            if site in absent:
                raise ValueError(
                    f"{who} needs {site!r}, which is not computed where routing skips the heads "
                    "that are not chosen: use the Route without skipping()"
                )


def count_blocks(tokens: int, heads: int, most: int, block: int) -> int:
    """N, the most blocks that a row can need: T tokens, H heads of which each chooses up to A."""
    return min(heads * -(-tokens // block), (tokens * most + heads * (block - 1)) // block)


def plan_blocks(chosen: Array, block: int, most: int) -> Blocks:
    """Lists the pairs of chosen [B,T,H] in blocks.

    Args:
      chosen: bool [B,T,H], at most `most` at a token.
      block: C.
      most: A.
    """
    b, t, h = chosen.shape
    each, n = -(-t // block), count_blocks(t, h, most, block)
    # Each head's tokens in order, then T for the rest: [B,H,each,C].
    listed = jnp.sort(jnp.where(chosen, jnp.arange(t)[:, None], t), axis=1)
    listed = jnp.pad(listed, ((0, 0), (0, each * block - t), (0, 0)), constant_values=t)
    listed = jnp.moveaxis(listed, 2, 1).reshape(b, h * each, block)
    blocks = -(-jnp.sum(chosen, axis=1) // block)
    ends = jnp.cumsum(blocks, axis=1)
    starts = ends - blocks
    number = jnp.arange(n)
    # A block's head is the number of heads whose blocks all lie before it; h beyond the last.
    head = jnp.sum(number[:, None] >= ends[:, None, :], axis=-1)
    inside, head = head < h, jnp.minimum(head, h - 1)
    place = head * each + number - jnp.take_along_axis(starts, head, axis=1)
    token = jax.vmap(lambda listed, place: listed[place])(listed, jnp.where(inside, place, 0))
    token = jnp.where(inside[..., None], token, t)
    slot = starts[:, None] * block + jnp.cumsum(chosen, axis=1) - 1
    slot = jnp.where(chosen, slot, n * block)
    used = number < jnp.max(ends[:, -1])
    return Blocks(head.T, jnp.moveaxis(token, 1, 0), slot, used)


def _laid(x: Array, spec: PartitionSpec) -> Array:
    names = spec[0] if spec else ()
    return lay(x, (names or (), *((),) * (x.ndim - 1)))


def _of_rows(
    q: Array,
    k: Array,
    v: Array,
    weight: Array,
    chosen: Array,
    gates: Array,
    allowed: Array,
    bias: Array | None,
    *,
    block: int,
    most: int,
    logits: Logits,
) -> Array:
    """`attend_chosen` of rows that are not divided."""
    # Scores of NaN choose every head: no slots for them, and NaN as in the masked form.
    beyond = jnp.sum(chosen, axis=-1) > most
    blocks = plan_blocks(chosen & ~beyond[..., None], block, most)
    dtype = q.dtype
    if dtype == jnp.float16:  # not every backend multiplies it with float32 sums
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    inputs = (q, gates.astype(q.dtype), k, v, weight.astype(q.dtype), bias)
    out = _summed((logits, most), blocks, allowed, inputs)
    return jnp.where(beyond[..., None], jnp.nan, out).astype(dtype)


Inputs = tuple[Array, Array, Array, Array, Array, Array | None]
"""q [B,T,H,Dh], gates [B,T,H], k and v [B,K,S,Dh], weight [H,Dh,D], bias [1 or B,H,T,S] or None."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(options: tuple[Logits, int], blocks: Blocks, allowed: Array, inputs: Inputs) -> Array:
    """The writes of all blocks, summed over the slots of each token: [B,T,D]."""
    logits, most = options
    weight = inputs[4]

    def body(_: None, block: Any) -> tuple[None, Array]:
        used, at, *slots = block
        b, c = at[1].shape
        empty = jnp.zeros((b, c, weight.shape[-1]), weight.dtype)
        return None, jax.lax.cond(
            used, lambda: _write(logits, *_operands(at, slots, allowed, inputs)), lambda: empty
        )

    _, writes = jax.lax.scan(body, None, _blocks_of(blocks, inputs))
    count, c = writes.shape[0], writes.shape[2]
    # Each token's slots, those that it has first.
    slot = jnp.sort(blocks.slot, axis=-1)[..., :most]

    def collect(writes: Array, slot: Array) -> Array:
        return _rows(writes.reshape(count * c, -1), slot).sum(axis=1)

    return jax.vmap(collect, in_axes=(1, 0))(writes, slot)


def _summed_forward(
    options: tuple[Logits, int], blocks: Blocks, allowed: Array, inputs: Inputs
) -> tuple[Array, Any]:
    return _summed(options, blocks, allowed, inputs), (blocks, allowed, inputs)


def _summed_backward(
    options: tuple[Logits, int], kept: tuple[Blocks, Array, Inputs], d_out: Array
) -> tuple[None, None, Inputs]:
    """Each block is computed again, so that no rows of scores are kept.

    By hand only because gradients of keys, values and weights must be added up in place: JAX would
    add arrays of all heads for each block.
    """
    blocks, allowed, inputs = kept
    logits = options[0]
    shared = inputs[2:]

    def body(sums: Any, block: Any) -> tuple[Any, tuple[Array, Array]]:
        used, at, *slots = block
        operands, visible = _operands(at, slots, allowed, inputs)

        def gradient() -> Any:
            def write(operands: Any) -> Array:
                return _write(logits, operands, visible)

            return jax.vjp(write, operands)[1](jax.vmap(_rows)(d_out, at[1]))[0]

        empty = jax.tree.map(jnp.zeros_like, operands)
        d_q, d_gate, *d_shared = jax.lax.cond(used, gradient, lambda: empty)
        return _added(sums, at, d_shared), (d_q, d_gate)

    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shared)
    sums, slots = jax.lax.scan(body, sums, _blocks_of(blocks, inputs))
    d_q, d_gates = (_from_slots(x, blocks.slot) for x in slots)
    d_shared = jax.tree.map(lambda total, x: total.astype(x.dtype), sums, shared)
    return None, None, (d_q, d_gates, *d_shared)


_summed.defvjp(_summed_forward, _summed_backward)


def _blocks_of(blocks: Blocks, inputs: Inputs) -> Any:
    """What the scan goes through: used, (head, token), q [N,B,C,Dh] and gates [N,B,C]."""

    def take(x: Array, head: Array, token: Array) -> Array:
        return x.at[token, head[:, None]].get(mode="fill", fill_value=0)

    to_slots = jax.vmap(take, in_axes=(0, 1, 1), out_axes=1)
    slots = [to_slots(x, blocks.head, blocks.token) for x in inputs[:2]]
    return (blocks.used, (blocks.head, blocks.token), *slots)


def _from_slots(slots: Array, slot: Array) -> Array:
    """The inverse: [N,B,C,...] -> [B,T,H,...], 0 where a head was not chosen."""

    def collect(slots: Array, slot: Array) -> Array:
        return _rows(slots.reshape(-1, *slots.shape[2:]), slot)

    return jax.vmap(collect, in_axes=(1, 0))(slots, slot)


def _rows(x: Array, index: Array) -> Array:
    """Rows of x, 0 where the index lies beyond the last."""
    return x.at[index].get(mode="fill", fill_value=0)


def _operands(
    at: tuple[Array, Array], slots: Any, allowed: Array, inputs: Inputs
) -> tuple[Any, Array]:
    """What a block needs: q [B,C,Dh], gates [B,C], its head's k and v [B,S,Dh], weight [B,Dh,D]
    and bias [B,C,S]; and which keys its queries see, bool [B,1,C or 1,S].
    """
    head, token = at
    _, _, k, v, weight, bias = inputs
    mine = jax.vmap(lambda x, head: x[head])
    key_head = head // (weight.shape[0] // k.shape[1])
    if allowed.shape[2] > 1:
        allowed = jax.vmap(lambda x, token: x[:, token])(allowed, token)
    rows = None
    if bias is not None:
        own = None if bias.shape[0] == 1 else 0
        take = jax.vmap(lambda x, head, token: x[head, token], in_axes=(own, 0, 0))
        rows = take(bias[0] if own is None else bias, head, token)
    return (*slots, mine(k, key_head), mine(v, key_head), weight[head], rows), allowed


def _write(logits: Logits, operands: Any, allowed: Array) -> Array:
    """What the queries of a block write, each of its own head: [B,C,D]."""
    q, gate, k, v, weight, bias = operands
    q, k, v = q[:, :, None], k[:, :, None], v[:, :, None]
    bias = None if bias is None else bias[:, None]
    scores = attention_scores(q, k, allowed, scale=logits.scale, softcap=logits.softcap, bias=bias)
    z = mix_values(jax.nn.softmax(scores, axis=-1), v)[:, :, 0]
    return jnp.einsum("bce,bed->bcd", z * gate[..., None], weight)


def _added(sums: Any, at: tuple[Array, Array], found: Any) -> Any:
    """Gradients of k, v, weight and bias with those of a block added to its head's."""
    head, token = at
    d_k, d_v, d_weight, d_bias = sums
    key_head = head // (d_weight.shape[0] // d_k.shape[1])
    k, v, weight, bias = found
    add = jax.vmap(lambda total, head, x: total.at[head].add(x))
    d_k, d_v = add(d_k, key_head, k), add(d_v, key_head, v)
    d_weight = d_weight.at[head].add(weight)
    if d_bias is not None:
        row = jnp.arange(len(head)) if d_bias.shape[0] > 1 else jnp.zeros_like(head)
        index = (row[:, None], head[:, None], token)
        d_bias = d_bias.at[index].add(bias, mode="drop")
    return d_k, d_v, d_weight, d_bias
