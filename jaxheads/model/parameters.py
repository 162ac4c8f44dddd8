"""The parameter tree: the durable contract that checkpoints and converters speak.

A nested dict of plain arrays. Every leaf of `blocks` is stacked on a leading layer
axis L, and heads are always an axis of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxheads.model.config import ModelConfig
from jaxheads.sites import axis_sizes

Tree = dict[str, Any]


@dataclass(frozen=True)
class Parameter:
    """One leaf of the tree.

    Attributes:
      axes: names of its axes, as in the site table.
      shape: their sizes.
      fan_in: inputs summed by the map, which scales a random initialisation; None
        for a scale (initialised to `neutral`), 0 for a bias (to zero).
      neutral: the value of a scale that changes nothing.
    """

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    fan_in: int | None
    neutral: float = 1.0


@singledispatch
def parameter_table(config: Any) -> dict[str, Parameter]:
    """Every parameter of a model of this config, by its path such as "blocks/attn/q"."""
    raise TypeError(f"expected the config of a model, got {config!r}")


@parameter_table.register
def _(config: ModelConfig) -> dict[str, Parameter]:
    size = axis_sizes(config)

    def leaf(axes: str, fan_in: int | None, neutral: float = 1.0) -> Parameter:
        names = tuple(axes.split())
        return Parameter(names, tuple(size[name] for name in names), fan_in, neutral)

    def norm(path: str, axes: str = "L D") -> None:
        table[f"{path}/scale"] = leaf(axes, None, 0.0 if config.norm_plus_one else 1.0)
        if config.norm_bias:
            table[f"{path}/bias"] = leaf(axes, 0)

    def attention(path: str) -> None:
        for name, head in (("q", "H"), ("k", "K"), ("v", "K")):
            table[f"{path}/{name}"] = leaf(f"L D {head} Dh", width)
            if config.qkv_bias:
                table[f"{path}/{name}_bias"] = leaf(f"L {head} Dh", 0)
        table[f"{path}/o"] = leaf("L H Dh D", config.n_heads * config.head_dim)
        if config.o_bias:
            table[f"{path}/o_bias"] = leaf("L D", 0)

    table: dict[str, Parameter] = {}
    width, image, sandwich = config.d_model, config.image, config.norm_place == "sandwich"
    if image is None:
        table["embed/tokens"] = leaf("V D", width)
    else:
        table["embed/patches"] = leaf("W U C D", image.patch**2 * image.channels)
        if image.bias:
            table["embed/patch_bias"] = leaf("D", 0)
        if image.prefix:
            table["embed/prefix"] = leaf("X D", width)
    if config.n_positions:
        table["embed/positions"] = leaf("P D", width)
    if config.n_token_types:
        table["embed/types"] = leaf("Y D", width)
    if config.embed_norm:
        norm("embed/norm", "D")
    if config.relative_buckets:
        table["relative/bias"] = leaf("N H", config.n_heads)

    norm("blocks/attn_norm")
    attention("blocks/attn")
    if config.qk_norm != "none":
        whole = config.qk_norm == "all"
        neutral = 0.0 if config.norm_plus_one else 1.0
        table["blocks/attn/q_norm/scale"] = leaf("L H Dh" if whole else "L Dh", None, neutral)
        table["blocks/attn/k_norm/scale"] = leaf("L K Dh" if whole else "L Dh", None, neutral)
    if sandwich:
        norm("blocks/attn_post_norm")
    if config.branch_scale:
        table["blocks/attn_scale"] = leaf("L D", None)
    if config.cross:
        norm("blocks/cross_norm")
        attention("blocks/cross")
    norm("blocks/mlp_norm")
    for name, axes in (("gate", "L D F"), ("up", "L D F"), ("down", "L F D")):
        if name == "gate" and not config.gated:
            continue
        table[f"blocks/mlp/{name}"] = leaf(axes, config.d_mlp if name == "down" else width)
        if config.mlp_bias:
            table[f"blocks/mlp/{name}_bias"] = leaf("L D" if name == "down" else "L F", 0)
    if sandwich:
        norm("blocks/mlp_post_norm")
    if config.branch_scale:
        table["blocks/mlp_scale"] = leaf("L D", None)
    if config.final_norm:
        norm("final_norm", "D")

    if config.head == "mlm":
        table["head/dense"] = leaf("D E", width)
        if config.head_bias:
            table["head/dense_bias"] = leaf("D", 0)
        norm("head/norm", "D")
    if config.head != "none":
        if not config.tied:
            table["unembed/kernel"] = leaf("V D", width)
        if config.unembed_bias:
            table["unembed/bias"] = leaf("V", 0)
    if config.pooler:
        table["pooler/kernel"] = leaf("D E", width)
        table["pooler/bias"] = leaf("D", 0)
    if config.projection:
        table["projection/kernel"] = leaf("D Z", width)
    return table


def random_parameters(config: Any, key: jax.Array, dtype: str = "float32") -> Tree:
    """Draws a parameter tree: truncated normals of variance 1/fan_in, neutral scales."""
    table = parameter_table(config)
    keys = jax.random.split(key, len(table))

    def draw(leaf: Parameter, key: jax.Array) -> jax.Array:
        if leaf.fan_in == 0:
            return jnp.zeros(leaf.shape, dtype)
        if leaf.fan_in is None:
            return jnp.full(leaf.shape, leaf.neutral, dtype)
        scale = leaf.fan_in**-0.5
        return (scale * jax.random.truncated_normal(key, -3, 3, leaf.shape)).astype(dtype)

    return nest({path: draw(leaf, k) for (path, leaf), k in zip(table.items(), keys, strict=True)})


def check_parameters(config: Any, tree: Mapping[str, Any]) -> None:
    """Raises ValueError naming every parameter that is missing, unexpected or misshapen."""
    table = parameter_table(config)
    leaves = dict(flatten(tree))
    problems = [f"missing {path} {table[path].shape}" for path in table if path not in leaves]
    problems += [f"unexpected {path}" for path in leaves if path not in table]
    problems += [
        f"{path} has shape {tuple(leaves[path].shape)}, expected {leaf.shape}"
        for path, leaf in table.items()
        if path in leaves and tuple(leaves[path].shape) != leaf.shape
    ]
    if problems:
        raise ValueError("the parameter tree does not fit the config: " + "; ".join(problems))


def optional(params: Mapping[str, Any], name: str) -> nnx.Param | None:
    """The parameter `name` for a module to hold, or None if the tree has none."""
    return nnx.Param(params[name]) if name in params else None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs of path and leaf, e.g. ("blocks/attn/q", array)."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def nest(leaves: Mapping[str, Any]) -> Tree:
    """The inverse of `flatten`."""
    tree: Tree = {}
    for path, value in leaves.items():
        *groups, name = path.split("/")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    return tree
