"""The parameter tree: the durable contract that checkpoints and converters speak.

A nested dict of plain arrays. Every leaf of `blocks` is stacked on a leading layer
axis L, and heads are always an axis of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
        for a norm scale (initialised to one), 0 for a bias (to zero).
    """

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    fan_in: int | None


def parameter_table(config: ModelConfig) -> dict[str, Parameter]:
    """Every parameter of a model of this config, by its path such as "blocks/attn/q"."""
    size = axis_sizes(config)

    def leaf(axes: str, fan_in: int | None) -> Parameter:
        names = tuple(axes.split())
        return Parameter(names, tuple(size[name] for name in names), fan_in)

    width, heads = config.d_model, config.n_heads * config.head_dim
    table = {
        "embed/tokens": leaf("V D", width),
        "blocks/attn_norm/scale": leaf("L D", None),
        "blocks/attn/q": leaf("L D H Dh", width),
        "blocks/attn/k": leaf("L D K Dh", width),
        "blocks/attn/v": leaf("L D K Dh", width),
        "blocks/attn/o": leaf("L H Dh D", heads),
        "blocks/mlp_norm/scale": leaf("L D", None),
        "blocks/mlp/gate": leaf("L D F", width),
        "blocks/mlp/up": leaf("L D F", width),
        "blocks/mlp/down": leaf("L F D", config.d_mlp),
        "final_norm/scale": leaf("D", None),
    }
    if config.qkv_bias:
        table["blocks/attn/q_bias"] = leaf("L H Dh", 0)
        table["blocks/attn/k_bias"] = leaf("L K Dh", 0)
        table["blocks/attn/v_bias"] = leaf("L K Dh", 0)
    if config.o_bias:
        table["blocks/attn/o_bias"] = leaf("L D", 0)
    if config.mlp_bias:
        table["blocks/mlp/gate_bias"] = leaf("L F", 0)
        table["blocks/mlp/up_bias"] = leaf("L F", 0)
        table["blocks/mlp/down_bias"] = leaf("L D", 0)
    if not config.tied:
        table["unembed/kernel"] = leaf("V D", width)
    return table


def random_parameters(config: ModelConfig, key: jax.Array, dtype: str = "float32") -> Tree:
    """Draws a parameter tree: truncated normals of variance 1/fan_in, unit norm scales."""
    table = parameter_table(config)
    keys = jax.random.split(key, len(table))

    def draw(leaf: Parameter, key: jax.Array) -> jax.Array:
        if leaf.fan_in is None:
            return jnp.ones(leaf.shape, dtype)
        if leaf.fan_in == 0:
            return jnp.zeros(leaf.shape, dtype)
        scale = leaf.fan_in**-0.5
        return (scale * jax.random.truncated_normal(key, -3, 3, leaf.shape)).astype(dtype)

    return nest({path: draw(leaf, k) for (path, leaf), k in zip(table.items(), keys, strict=True)})


def check_parameters(config: ModelConfig, tree: Mapping[str, Any]) -> None:
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
