"""Sharding rules as data: from the path of a leaf of the state to the mesh axes of its dimensions.

A path is matched from its end, so the rule of a parameter also serves its optimizer moments and
its average: "attn/q" matches "trainable/blocks/attn/q" and "optimizer/0/mu/blocks/attn/q". The
first rule that matches counts. Nothing is replicated by default: a leaf without a rule is an error.

The layout (see docs/sharding.md): heads, neurons and vocabulary over "tensor"; the model width of
matrices over "fsdp", from where they are gathered layer by layer when used; norms, biases and
other vectors of the model width whole. Edits are used as they lie, hence never over "fsdp": they
are divided as the value at their site is.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxheads.convert.place import Placement
from jaxheads.edits.fold import BETWEEN
from jaxheads.names import choose
from jaxheads.sites import CROSS_SITES, ENCODER, SITES, find_site
from jaxheads.train.mesh import AXES, BATCH_AXES, AnyMesh

Dimension = str | tuple[str, ...] | None
"""Mesh axes that divide one dimension; None for none."""

SMALL = ("error", "whole")
LIMIT = 0.02
"""Largest share of the bytes that may lie undivided on every device."""


@dataclass(frozen=True)
class Rule:
    """How the leaves of some paths are divided.

    Attributes:
      pattern: a regular expression for the end of a path, from a "/" on.
      axes: the mesh axes of each dimension, those that the mesh lacks being ignored; None for
        a leaf of any rank that is whole on every device.
      small: what happens to a dimension that is smaller than the mesh axis: an "error", or it
        stays "whole" (key/value heads).
    """

    pattern: str
    axes: tuple[Dimension, ...] | None
    small: str = "error"

    def __post_init__(self) -> None:
        choose("value of small", self.small, SMALL)
        try:
            _compiled(self.pattern)
        except re.error as error:
            raise ValueError(f"sharding rule {self.pattern!r} is no pattern: {error}") from error
        named = [name for dimension in self.axes or () for name in _names(dimension)]
        for name in named:
            choose(f"mesh axis in the sharding rule {self.pattern!r}", name, AXES)
        twice = sorted({name for name in named if named.count(name) > 1})
        if twice:
            raise ValueError(
                f"sharding rule {self.pattern!r} divides two dimensions over the mesh axis "
                f"{twice[0]!r}: {shown(self.axes)}"
            )

    def matches(self, path: str) -> bool:
        """Whether the rule is for this path."""
        return _compiled(self.pattern).search(path) is not None


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    # The leaves of a `Transformer` end in the name of nnx.Param's field.
    return re.compile(rf"(?:^|/)(?:{pattern})(?:/value)?$")


def _names(dimension: Dimension) -> tuple[str, ...]:
    return (dimension,) if isinstance(dimension, str) else dimension or ()


def parse_rules(table: Mapping[str, str]) -> tuple[Rule, ...]:
    """Rules as a config writes them, e.g. {"mlp/(gate|up)": "-, fsdp, tensor"}.

    Args:
      table: pattern -> the mesh axes of its dimensions, separated by commas: "-" for none,
        "data+fsdp" for several, "?" after them for a dimension that stays whole where it is
        smaller; or "whole" for a leaf of any rank that is not divided.

    Raises:
      ValueError: an unknown mesh axis, one named twice, or no pattern.
    """
    rules = []
    for pattern, text in table.items():
        if text.strip() == "whole":
            rules.append(Rule(pattern, None))
            continue
        parts = [part.strip() for part in text.split(",")]
        small = "whole" if any(part.endswith("?") for part in parts) else "error"
        axes = tuple(_dimension(part.rstrip("?")) for part in parts)
        rules.append(Rule(pattern, axes, small))
    return tuple(rules)


def _dimension(text: str) -> Dimension:
    names = tuple(name.strip() for name in text.split("+"))
    return None if names == ("-",) else names[0] if len(names) == 1 else names


def shown(axes: Iterable[Dimension] | None) -> str:
    """The axes as `parse_rules` reads them."""
    return "whole" if axes is None else ", ".join("+".join(_names(d)) or "-" for d in axes)


PARAMETERS: tuple[Rule, ...] = (
    # Adafactor's row and column statistics: a matrix less one of its axes, 1/D of its size.
    Rule(r"(v_row|v_col)/.*", None),
    # Whole before anything else: norms of every place, and other vectors of the model width.
    Rule(r"[a-z_]*norm/(scale|bias)", None),
    Rule(r"(o_bias|down_bias|attn_scale|mlp_scale)", (None, None)),
    Rule(r"(attn|cross)/q", (None, "fsdp", "tensor", None)),
    Rule(r"(attn|cross)/[kv]", (None, "fsdp", "tensor", None), small="whole"),
    Rule(r"(attn|cross)/o", (None, "tensor", None, "fsdp")),
    Rule(r"(attn|cross)/q_bias", (None, "tensor", None)),
    Rule(r"(attn|cross)/[kv]_bias", (None, "tensor", None), small="whole"),
    Rule(r"mlp/(gate|up)", (None, "fsdp", "tensor")),
    Rule(r"mlp/down", (None, "tensor", "fsdp")),
    Rule(r"mlp/(gate|up)_bias", (None, "tensor")),
    Rule(r"(embed/tokens|unembed/kernel)", ("tensor", "fsdp")),
    Rule(r"unembed/bias", ("tensor",)),
    Rule(r"embed/positions", (None, "fsdp")),
    Rule(r"embed/(types|prefix)", (None, None)),
    Rule(r"embed/patches", (None, None, None, "fsdp")),
    Rule(r"embed/patch_bias", (None,)),
    Rule(r"relative/bias", (None, "tensor")),
    Rule(r"(head/dense|pooler/kernel|projection/kernel)", ("fsdp", None)),
    Rule(r"(head/dense_bias|pooler/bias)", (None,)),
    # Draft heads are small, and trained beside a frozen model.
    Rule(r"(ends|heads/\d+|prefix)/.*", None),
)
"""Rules of every parameter that `parameter_table` of any family can have."""

_DIVIDED: Mapping[str, Dimension] = {
    "B": BATCH_AXES,
    "T": "sequence",
    "H": "tensor",
    "K": "tensor",
    "F": "tensor",
    "V": "tensor",
}
"""Axes of a value -> the mesh axes over which the model divides it."""


def _edit_rules() -> tuple[Rule, ...]:
    """Rules of the leaves of edits: the axes of the site, a broadcast axis (size 1) whole."""
    inside = r"(/edit|/edits/\d+)*"
    prefix = rf"({re.escape(ENCODER)})?"
    rules = []
    for site in (*SITES.values(), *CROSS_SITES.values()):
        layer = (None,) * site.stacked
        axes = tuple(_DIVIDED.get(axis) for axis in site.axes)
        small = "whole" if "K" in site.axes else "error"
        name = prefix + re.escape(site.name) + inside
        rules.append(Rule(rf"{name}/(scale|offset|value|weight)", (*layer, *axes), small))
        rules.append(Rule(rf"{name}/basis", (*layer, *axes, None), small))
        rules.append(Rule(rf"{name}/tokens", (*layer, BATCH_AXES, "sequence")))
        if site.name in BETWEEN:
            read = tuple(_DIVIDED.get(axis) for axis in find_site(BETWEEN[site.name][1]).axes[2:])
            rules.append(Rule(rf"{name}/down", (None, *read, None)))
            rules.append(Rule(rf"{name}/up", (None, None, *axes[2:]), small))
    # `Route`, whole or of its weights what is trained.
    route = rf"(({prefix}z{inside})|cross\.z{inside})"
    rules.append(Rule(rf"{route}/(router|shared_router)", (None, None, "tensor")))
    rules.append(Rule(rf"{route}/(shared|top_k|balance|keys)", None))
    rules.append(Rule(rf"{prefix}(z|neurons){inside}/(gating|keys)", None))
    return tuple(rules)


EDITS: tuple[Rule, ...] = _edit_rules()
"""Rules of the leaves of every built-in kind of edit at every site."""

METHODS: tuple[Rule, ...] = (
    # What is trained is one array without a name, such as gates [L,H]; and its moments.
    Rule(r"trainable|average|mu|nu|trace|acc_grads|v", None),
    # Soft Injection's task embedding [L,H,Dh]; LoFiT's chosen heads [N,2].
    Rule(r"embedding", (None, "tensor", None)),
    Rule(r"heads", None),
    # The denoiser's network of noise level and class.
    Rule(r"condition/modulation", (None, ("fsdp", "tensor"), None, None)),
    Rule(r"condition/last", (("fsdp", "tensor"), None, None)),
    Rule(r"condition/(time_in|time_out|pixels)", (("fsdp", "tensor"), None)),
    Rule(r"condition/.*", None),
    # Bigrams, looked up by token.
    Rule(r"table/(row|ids|shares|rest|unigram)", None),
)
"""Rules of what `jaxheads.methods` train or hold beside parameters and edits."""

RULES: tuple[Rule, ...] = (*PARAMETERS, *EDITS, *METHODS)
"""The rules table."""


def paths(tree: Any) -> list[tuple[str, Any]]:
    """Pairs of path and leaf, e.g. ("optimizer/0/mu/blocks/attn/q", array)."""
    return [
        (jax.tree_util.keystr(keys, simple=True, separator="/"), leaf)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def find_rule(path: str, shape: Sequence[int], rules: Iterable[Rule] = ()) -> Rule:
    """The first rule that matches, of the given rules and then of `RULES`.

    Raises:
      ValueError: none does.
    """
    table = (*rules, *RULES)
    for rule in table:
        if rule.matches(path):
            return rule
    tail = "/".join(path.split("/")[-2:])
    patterns = [rule.pattern for rule in table]
    near = difflib.get_close_matches(tail, patterns, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"no sharding rule for {path} of shape {tuple(shape)}; the nearest is {near!r}. "
        'Add one to the table [sharding], e.g. "' + tail + '" = "whole"'
    )


def spec_of(
    path: str, shape: Sequence[int], mesh: AnyMesh, rules: Iterable[Rule] = ()
) -> PartitionSpec:
    """How one leaf is divided.

    A leaf of one number is whole without a rule, and so is a dimension of size 1.

    Args:
      path: of the leaf.
      shape: of the leaf.
      mesh: with axes of `AXES`.
      rules: in front of `RULES`.

    Returns:
      A spec with one entry for each dimension.

    Raises:
      ValueError: no rule matches, the rule is for another rank, or a dimension is not a
        multiple of the devices that divide it.
    """
    shape = tuple(shape)
    if all(size == 1 for size in shape):
        return PartitionSpec(*(None,) * len(shape))
    rule = find_rule(path, shape, rules)
    axes = (None,) * len(shape) if rule.axes is None else rule.axes
    if len(axes) != len(shape):
        raise ValueError(
            f"{path} has shape {shape}, but its sharding rule {rule.pattern!r} is for "
            f"{len(axes)} dimensions: {shown(axes)}"
        )
    entries: list[Dimension] = []
    for index, (size, dimension) in enumerate(zip(shape, axes, strict=True)):
        names = tuple(name for name in _names(dimension) if name in mesh.shape)
        devices = math.prod(mesh.shape[name] for name in names)
        if not names or size == 1 or (size < devices and rule.small == "whole"):
            entries.append(None)
            continue
        if size % devices:
            over = " x ".join(f"{name}={mesh.shape[name]}" for name in names)
            raise ValueError(
                f"{path} of shape {shape} cannot be sharded: dimension {index} of size {size} is "
                f"not a multiple of {over} (rule {rule.pattern!r}: {shown(axes)})"
            )
        entries.append(names[0] if len(names) == 1 else names)
    return PartitionSpec(*entries)


def specs(tree: Any, mesh: AnyMesh, rules: Iterable[Rule] = ()) -> Any:
    """How every leaf of a state is divided.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s: a `TrainState`, a parameter tree, edits, a model.
      mesh: with axes of `AXES`; an `AbstractMesh` does.
      rules: in front of `RULES`.

    Returns:
      A tree of the same structure with a `PartitionSpec` for each leaf.

    Raises:
      ValueError: as `spec_of`, for the first leaf that cannot be divided.
    """
    rules = tuple(rules)
    found = [spec_of(path, leaf.shape, mesh, rules) for path, leaf in paths(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), found)


def shardings(tree: Any, mesh: AnyMesh, rules: Iterable[Rule] = ()) -> Any:
    """`specs` as a tree of `NamedSharding`s."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs(tree, mesh, rules),
        is_leaf=_is_spec,
    )


def placement(mesh: AnyMesh, rules: Iterable[Rule] = ()) -> Placement:
    """The rules for loading a model: (path, names of its axes, shape) -> sharding."""
    rules = tuple(rules)

    def place(path: str, axes: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(mesh, spec_of(path, shape, mesh, rules))

    return place


def check_used(rules: Sequence[Rule], tree: Any) -> None:
    """Refuses a rule of one's own that decides nothing.

    Args:
      rules: those in front of `RULES`.
      tree: all that is placed by them: the state and what is frozen.

    Raises:
      ValueError: a rule is not the first match of any leaf; the message has the nearest path.
    """
    names = [path for path, leaf in paths(tree)]
    first = {next((rule for rule in rules if rule.matches(path)), None) for path in names}
    for rule in rules:
        if rule in first:
            continue
        if any(rule.matches(path) for path in names):
            raise ValueError(f"sharding rule {rule.pattern!r} never counts: one before it matches")
        ends = {"/".join(path.split("/")[-2:]) for path in names}
        near = difflib.get_close_matches(rule.pattern, sorted(ends), n=2, cutoff=0.0)
        raise ValueError(
            f"sharding rule {rule.pattern!r} matches nothing; near it: {', '.join(near)}"
        )


def check_unsharded(
    tree: Any, shardings: Any, limit: float = LIMIT, rules: Iterable[Rule] = ()
) -> None:
    """Refuses a layout that leaves too much on every device.

    Has no effect on a mesh without "fsdp" and "tensor", where every device has all by intent. Nor
    do leaves count that a rule lets stay whole because they are small (few key/value heads).

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s, all that a device holds: state and frozen model.
      shardings: how each is divided, from `shardings`.
      limit: the largest accepted share of all bytes.
      rules: in front of `RULES`.

    Raises:
      ValueError: more than that is undivided; the message names the largest leaves.
    """
    layout = jax.tree.leaves(shardings)
    if not layout or not {"fsdp", "tensor"} & set(layout[0].mesh.shape):
        return
    rules = tuple(rules)
    sizes = [(math.prod(x.shape) * x.dtype.itemsize, path) for path, x in paths(tree)]
    whole = [
        size
        for size, sharding in zip(sizes, layout, strict=True)
        if not any(sharding.spec) and not _may_stay_whole(size[1], rules)
    ]
    total = sum(size for size, _ in sizes)
    share = sum(size for size, _ in whole) / max(total, 1)
    if share > limit:
        largest = ", ".join(f"{p} ({n:,} bytes)" for n, p in sorted(whole, reverse=True)[:3])
        raise ValueError(
            f"{share:.1%} of {total:,} bytes are undivided over the mesh "
            f"{dict(layout[0].mesh.shape)}, more than {limit:.0%}; the largest: {largest}. Give "
            "them a sharding rule"
        )


def _may_stay_whole(path: str, rules: tuple[Rule, ...]) -> bool:
    matched = next((rule for rule in (*rules, *RULES) if rule.matches(path)), None)
    return matched is not None and matched.small == "whole"


def _is_spec(value: Any) -> bool:
    return isinstance(value, PartitionSpec)
