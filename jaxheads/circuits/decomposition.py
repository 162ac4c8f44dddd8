"""Contextual decomposition: the rules by which the relevant part of every activation propagates.

Every activation is a sum of two parts, `relevant` and `irrelevant`. The total is the model's own
activation, so only the relevant part is carried; the irrelevant one is total - relevant. Source:
Hsu et al. (2024), "Efficient Automated Circuit Discovery in Transformers using Contextual
Decomposition" (CD-T), after Murdoch et al. (2018); root mean square norms, gated MLPs and
rotary encodings are ours.

Axes: B batch, T queries, S keys, H query heads, K key/value heads, Dh head size, D model width,
F MLP width. Every function works on one decomposition; `jax.vmap` runs many over the same totals.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxheads.model.attention import (
    Attention,
    attention_scores,
    merge_heads,
    mix_values,
    project,
)
from jaxheads.model.block import Block
from jaxheads.model.config import ACTIVATIONS, ModelConfig
from jaxheads.model.context import Context
from jaxheads.model.mlp import MLP, linear
from jaxheads.model.norms import Norm
from jaxheads.model.transformer import Transformer

Array = jax.Array

SMALL = 1e-8
"""Keeps the share of a bias finite where both parts are zero."""

ATTENTION_RULES = ("pattern", "difference")
"""How relevance passes attention: "pattern" holds the attention weights at the model's own, so
that it flows through the values; "difference" also counts what it does to queries and keys."""


Visit = Callable[[str, Array, Array], Array]
"""Called at every site with its name, the relevant part and the total; returns the relevant part
to go on with. Places a source, or measures."""


def share(relevant: Array, irrelevant: Array, bias: Array) -> Array:
    """The part of a bias that is relevant: split elementwise by magnitude."""
    size = jnp.abs(relevant)
    return bias.astype(relevant.dtype) * (size / (size + jnp.abs(irrelevant) + SMALL))


def after_bias(relevant: Array, total: Array, bias: nnx.Param | Array | None) -> Array:
    """Adds to a mapped part its share of the map's bias.

    Args:
      relevant: the part times the weights.
      total: the map's output, bias included.
      bias: broadcasts against `total`; None for a map without.
    """
    if bias is None:
        return relevant
    value = bias[...].astype(relevant.dtype)
    return relevant + share(relevant, total - value - relevant, value)


def through_norm(norm: Norm, config: ModelConfig, relevant: Array, total: Array) -> Array:
    """A norm with its divisor held at that of the total.

    A layer norm centres each part by its own mean, and splits its bias by the magnitudes of
    the parts that enter.
    """
    scale = norm.scale[...].astype(jnp.float32) + (config.norm == "rms" and config.norm_plus_one)
    axes = tuple(range(-scale.ndim, 0))
    part, whole = relevant, total
    if config.norm == "layer":
        part, whole = (x - jnp.mean(x, axis=axes, keepdims=True) for x in (part, whole))
    variance = jnp.mean(whole * whole, axis=axes, keepdims=True)
    out = part * jax.lax.rsqrt(variance + config.norm_eps) * scale
    if norm.bias is None:
        return out
    return out + share(relevant, total - relevant, norm.bias[...])


def through_elementwise(
    function: Callable[..., Array], relevant: tuple[Array, ...], total: tuple[Array, ...]
) -> Array:
    """An elementwise f: the irrelevant part becomes f(irrelevant), relevant is the rest."""
    irrelevant = (whole - part for whole, part in zip(total, relevant, strict=True))
    # Compiled twice, f may round differently, which large activations would show as relevant.
    nothing = jnp.all(jnp.stack(jnp.broadcast_arrays(*relevant)) == 0, axis=0)
    return jnp.where(nothing, 0, function(*total) - function(*irrelevant))


def through_mlp(mlp: MLP, context: Context, relevant: Array, visit: Visit) -> tuple[Array, Array]:
    """An MLP, gated or not: the part [B,T,D] of what it computes, and the total of that.

    The gate product is one function of both its maps, so no term of it is split by hand.
    """
    activation, read = ACTIVATIONS[context.config.activation], context.mlp_in

    def mapped(weight: nnx.Param, bias: nnx.Param | None) -> tuple[Array, Array]:
        whole = linear(read, weight, bias)
        return after_bias(linear(relevant, weight, None), whole, bias), whole

    up, whole_up = mapped(mlp.up, mlp.up_bias)
    if mlp.gate is None:
        part = through_elementwise(activation, (up,), (whole_up,))
    else:
        gate, whole_gate = mapped(mlp.gate, mlp.gate_bias)
        part = through_elementwise(
            lambda g, u: activation(g) * u, (gate, up), (whole_gate, whole_up)
        )
    part = visit("neurons", part, context.neurons)
    whole = linear(context.neurons, mlp.down, mlp.down_bias)
    return after_bias(linear(part, mlp.down, None), whole, mlp.down_bias), whole


def through_attention(
    attn: Attention, context: Context, relevant: Array, visit: Visit, rule: str
) -> tuple[Array, Array]:
    """Attention: the part [B,T,D] of the heads' summed writes, and the total of that.

    The parts of queries and keys are followed in either case, so that they can be measured.
    """
    config = context.config

    def mapped(site: str, weight: nnx.Param, bias: nnx.Param | None) -> Array:
        total = context.values[site]
        part = after_bias(project(relevant, weight[...]), total, bias)
        return visit(site, part, total)

    q = mapped("q_pre", attn.q, attn.q_bias)
    k = mapped("k_pre", attn.k, attn.k_bias)
    if attn.q_norm is not None and attn.k_norm is not None:
        q = through_norm(attn.q_norm, config, q, context.q_pre)
        k = through_norm(attn.k_norm, config, k, context.k_pre)
    # Rotation is linear and has no constant: it acts on each part alone.
    q = visit("q", context.rotate(q), context.q)
    k = visit("k", context.rotate(k), context.k)
    v = mapped("v", attn.v, attn.v_bias)
    if rule == "pattern":
        z = mix_values(context.pattern, v)
    else:

        def heads(q: Array, k: Array, v: Array) -> Array:
            scores = attention_scores(
                q, k, context.allowed, scale=config.attn_scale, softcap=config.attn_softcap,
                bias=context.bias,
            )  # fmt: skip
            return mix_values(jax.nn.softmax(scores, axis=-1), v)

        irrelevant = heads(context.q - q, context.k - k, context.v - v)
        z = heads(context.q, context.k, context.v) - irrelevant
    z = visit("z", z, context.z)
    weight = attn.o[...]
    whole = merge_heads(context.z, weight)
    if attn.o_bias is not None:
        whole = whole + attn.o_bias[...].astype(whole.dtype)
    return after_bias(merge_heads(z, weight), whole, attn.o_bias), whole


def through_block(
    block: Block, context: Context, relevant: Array, visit: Visit, rule: str
) -> Array:
    """One block: the relevant part of the residual stream before it to the one after it.

    Args:
      block: the block.
      context: what the block's own call returned, with `pattern` visited: the totals.
      relevant: [B,T,D].
      visit: called at each site but `scores`, `pattern` and `head_out`.
      rule: a name of `ATTENTION_RULES`.

    Returns:
      [B,T,D].
    """
    config, values = context.config, context.values

    def at(site: str, part: Array) -> Array:
        return visit(site, part, values[site])

    def read(norm: Norm, part: Array, total: Array) -> Array:
        reads = config.norm_place in ("pre", "sandwich")
        return through_norm(norm, config, part, total) if reads else part

    def written(
        norm: Norm, post: Norm | None, scale: nnx.Param | None, part: Array, total: Array
    ) -> Array:
        if config.norm_place == "branch":
            part = through_norm(norm, config, part, total)
        if post is not None:
            part = through_norm(post, config, part, total)
        return part if scale is None else part * scale[...].astype(part.dtype)

    def summed(norm: Norm, stream: Array, branch: Array, before: str, added: str) -> Array:
        if config.norm_place != "post":
            return stream + branch
        return through_norm(norm, config, stream + branch, values[before] + values[added])

    before = at("resid_pre", relevant)
    x = read(block.attn_norm, before, context.resid_pre)
    if not config.first_attn_norm:
        x = jnp.where(context.layer == 0, before, x)
    x = at("attn_in", x)
    out, total = through_attention(block.attn, context, x, visit, rule)
    out = written(block.attn_norm, block.attn_post_norm, block.attn_scale, out, total)
    out = at("attn_out", out)
    middle = at("resid_mid", summed(block.attn_norm, before, out, "resid_pre", "attn_out"))
    seen, name = (before, "resid_pre") if config.parallel else (middle, "resid_mid")
    x = at("mlp_in", read(block.mlp_norm, seen, values[name]))
    out, total = through_mlp(block.mlp, context, x, visit)
    out = written(block.mlp_norm, block.mlp_post_norm, block.mlp_scale, out, total)
    out = at("mlp_out", out)
    return at("resid_post", summed(block.mlp_norm, middle, out, "resid_mid", "mlp_out"))


def through_unembedding(model: Transformer, relevant: Array, total: Array, ids: Array) -> Array:
    """The last norm and the unembedding of some tokens.

    Args:
      model: a language model.
      relevant: [B,D], of the residual stream after the last block.
      total: likewise.
      ids: int [B,M], token ids.

    Returns:
      float32 [B,M], the relevant part of these tokens' logits.
    """
    config, unembed, whole = model.config, model.unembed, total
    assert unembed is not None, "a language model has an unembedding"
    if model.final_norm is not None:
        relevant = through_norm(model.final_norm, config, relevant, total)
        whole = model.final_norm(total, config)
    table = model.embed.tokens if unembed.kernel is None else unembed.kernel
    assert table is not None, "a language model has an embedding"
    kernel = table[...][ids].astype(jnp.float32) * config.logit_scale
    logits, wholes = (jnp.einsum("bd,bmd->bm", x, kernel) for x in (relevant, whole))
    if unembed.bias is not None:
        bias = unembed.bias[...][ids]
        wholes = wholes + bias
        logits = after_bias(logits, wholes, bias)
    cap = config.logit_softcap
    if cap is None:
        return logits
    return through_elementwise(lambda x: cap * jnp.tanh(x / cap), (logits,), (wholes,))
