"""CD-T: how much of what sources write reaches the logits, or other nodes.

Source: Hsu et al. (2024), "Efficient Automated Circuit Discovery in Transformers using Contextual
Decomposition". At a source the relevant part is its activation minus a mean and the irrelevant
part is the mean; all that lies upstream of it is irrelevant. The rules by which both parts
propagate are in `decomposition`.

Axes: B batch, T positions, L layers, H query heads, K key/value heads, Dh head size, D model
width, N sources, M targets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.circuits.cdt_nodes import (
    SOURCE_SITES,
    TARGET_SITES,
    Node,
    Nodes,
    as_arrays,
    check_model,
    check_node,
    placed_at,
    slots_of,
    spread_mean,
    stack,
)
from jaxheads.circuits.decomposition import (
    ATTENTION_RULES,
    Visit,
    through_block,
    through_unembedding,
)
from jaxheads.model.batch import Batch
from jaxheads.model.context import as_taps
from jaxheads.model.transformer import Transformer
from jaxheads.names import choose
from jaxheads.sites import SITES

Array = jax.Array
ArrayLike = jax.Array | np.ndarray

Sources = Sequence[Node | Sequence[Node]]


def cdt_relevance(
    model: Transformer,
    batch: Batch,
    answers: ArrayLike,
    wrong: ArrayLike,
    sources: Sources,
    means: Mapping[str, ArrayLike],
    *,
    attention: str = "pattern",
    chunk: int = 18,
) -> np.ndarray:
    """Relevance of sources to the difference of two logits after each prompt.

    Args:
      model: a language model in float32.
      batch: prompts; the logits are read at each row's last real token.
      answers: int [B], token ids.
      wrong: int [B], token ids.
      sources: N sources; each a `Node` at `z`, `mlp_out` or `resid_pre`, or several that are
        relevant together.
      means: what counts as irrelevant at a source, for every site with sources: `z`
        [L,H,Dh], `mlp_out` and `resid_pre` [L,D], or with axes of T or of B and T after L,
        as taps of a run on other prompts have.
      attention: a name of `ATTENTION_RULES`.
      chunk: sources that are propagated at once; bounds memory, one program for all.

    Returns:
      float32 [N,B]: relevant part of logit(answer) - logit(wrong), in logits.

    Raises:
      ValueError: a model that the rules do not cover; an unknown site, layer, head, position
        or attention rule; means that are missing or do not fit; ids that are not one of the
        vocabulary per row.
    """
    check_model(model)
    if model.config.head != "lm":
        raise ValueError(f"relevance to logits needs config.head 'lm', got {model.config.head!r}")
    ids = np.stack([_ids(model, batch, "answers", answers), _ids(model, batch, "wrong", wrong)], 1)
    run = _prepare(model, batch, sources, means, attention, chunk)
    slots = slots_of(Node("final", 0, position=-1), batch)
    found = [_to_logits(model, *run.shared, part, start, ids, slots, attention=attention)
             for part, start in run.chunks]  # fmt: skip
    return run.collect(found)


def cdt_relevance_to(
    model: Transformer,
    batch: Batch,
    sources: Sources,
    targets: Sequence[Node],
    means: Mapping[str, ArrayLike],
    *,
    attention: str = "pattern",
    chunk: int = 18,
) -> np.ndarray:
    """Share of targets that comes from sources: mean |r| / (mean |r| + mean |i|).

    The means are over rows, the target's positions and features; r and i are the relevant and
    irrelevant parts of what the target holds. What a source itself adds at its own site is not
    counted, so a source has no share in itself nor in what lies before it.

    Args:
      model: a model in float32.
      batch: prompts.
      sources: as for `cdt_relevance`.
      targets: M nodes at `q`, `k`, `v`, `z` or `mlp_in`.
      means: as for `cdt_relevance`.
      attention: a name of `ATTENTION_RULES`.
      chunk: as for `cdt_relevance`.

    Returns:
      float32 [N,M], between 0 and 1.

    Raises:
      ValueError: as for `cdt_relevance`.
    """
    if not targets:
        raise ValueError("no targets: expected at least one node")
    check_model(model)
    for node in targets:
        check_node(model, "target", node, TARGET_SITES)
    run = _prepare(model, batch, sources, means, attention, chunk)
    group = model.config.group_size
    grouped = [replace(n, head=n.head // group) if n.head is not None and n.site in "kv" else n
               for n in targets]  # fmt: skip
    nodes = stack([as_arrays(node, batch) for node in grouped])
    stop = max(node.layer for node in targets) + 1
    found = [_to_nodes(model, *run.shared, part, start, stop, nodes, attention=attention)
             for part, start in run.chunks]  # fmt: skip
    return run.collect(found)


def cdt_parts(
    model: Transformer,
    batch: Batch,
    source: Node | Sequence[Node],
    means: Mapping[str, ArrayLike],
    sites: Sequence[str],
    *,
    attention: str = "pattern",
) -> dict[str, Array]:
    """The relevant part of the activations at some sites; the rest of them is irrelevant.

    Args:
      model: a model in float32.
      batch: prompts.
      source: a node, or several that are relevant together.
      means: as for `cdt_relevance`.
      sites: names of sites of the stack, `scores`, `pattern` and `head_out` excepted.
      attention: a name of `ATTENTION_RULES`.

    Returns:
      By site, the relevant part with the shape of a tap of it, [L,B,T,...].

    Raises:
      ValueError: as for `cdt_relevance`, or an unknown site.
    """
    unparted = ("scores", "pattern", "head_out")
    known = [name for name, site in SITES.items() if site.stacked and name not in unparted
             and not name.startswith("cross.")]  # fmt: skip
    for site in sites:
        choose("site", site, known)
    run = _prepare(model, batch, [source], means, attention, 1)
    nodes = jax.tree.map(lambda leaf: leaf[0], run.chunks[0][0])
    return _parts(model, *run.shared, nodes, sites=tuple(sites), attention=attention)


# What runs on the device.


def _layer(model: Transformer, mask: Array, layer: Array | int, total: Array, rule: str) -> tuple:
    """A layer's context with the totals of its sites, and the stream after it."""
    context, _ = model.begin(mask, None, "prefill", {}, {})
    context = replace(context, taps=as_taps(("pattern",) if rule == "pattern" else ()))
    index = partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
    sliced = jax.tree.map(index, model.layers())
    after, here, _ = model.step(total, context, sliced, {})
    return sliced.block, here, after


def _seeding(source: Nodes, layer: Array, mask: Array, means: Mapping[str, Array]) -> Visit:
    """Puts what a source adds, its activation minus the mean, in the place of what was there."""

    def visit(site: str, relevant: Array, total: Array) -> Array:
        if site not in means:
            return relevant
        with_heads = total.ndim == 4
        placed = placed_at(source, site, layer, mask, total.shape[2] if with_heads else 1)
        placed = jnp.any(placed, axis=0)
        mean = jax.lax.dynamic_index_in_dim(means[site], layer, keepdims=False)
        return jnp.where(placed[..., None] if with_heads else placed, total - mean, relevant)

    return visit


def _propagate(
    model: Transformer,
    streams: Array,
    mask: Array,
    means: Mapping[str, Array],
    sources: Nodes,
    start: Array,
    stop: Array | int,
    rule: str,
    measured: Array,
    measure: Callable[[Array, str, Array, Array], Array] | None,
) -> tuple[Array, Array, Array]:
    """Carries the relevant parts of all sources from a layer to another.

    Returns:
      The parts [N,B,T,D] and the total [B,T,D] of the last stream, and what was measured.
    """

    def body(layer: Array, carry: tuple) -> tuple:
        total, relevant, measured = carry
        block, here, after = _layer(model, mask, layer, total, rule)

        def one(source: Nodes, relevant: Array, measured: Array) -> tuple[Array, Array]:
            seed = _seeding(source, layer, mask, means)

            def visit(site: str, part: Array, whole: Array) -> Array:
                nonlocal measured
                if measure is not None and site in TARGET_SITES:
                    measured = measured + measure(layer, site, part, whole)
                return seed(site, part, whole)

            return through_block(block, here, relevant, visit, rule), measured

        relevant, measured = jax.vmap(one)(sources, relevant, measured)
        return after, relevant, measured

    total = jax.lax.dynamic_index_in_dim(streams, start, keepdims=False)
    relevant = jnp.zeros((len(sources.site), *total.shape))
    total, relevant, measured = jax.lax.fori_loop(start, stop, body, (total, relevant, measured))
    return relevant, total, measured


@partial(jax.jit, static_argnames="attention")
def _to_logits(
    model: Transformer,
    streams: Array,
    mask: Array,
    means: Mapping[str, Array],
    sources: Nodes,
    start: Array,
    ids: Array,
    slots: Array,
    *,
    attention: str,
) -> Array:
    config, nothing = model.config, jnp.zeros(len(sources.site))
    relevant, total, _ = _propagate(
        model, streams, mask, means, sources, start, config.n_layers, attention, nothing, None
    )
    rows = jnp.arange(len(mask))
    relevant, total = relevant[:, rows, slots], total[rows, slots]
    parts = jax.vmap(lambda part: through_unembedding(model, part, total, ids))(relevant)
    return parts[..., 0] - parts[..., 1]


@partial(jax.jit, static_argnames="attention")
def _to_nodes(
    model: Transformer,
    streams: Array,
    mask: Array,
    means: Mapping[str, Array],
    sources: Nodes,
    start: Array,
    stop: Array,
    targets: Nodes,
    *,
    attention: str,
) -> Array:
    def measure(layer: Array, site: str, part: Array, whole: Array) -> Array:
        sizes = jnp.stack([jnp.abs(part), jnp.abs(whole - part)]).sum(axis=-1)
        sizes = sizes if whole.ndim == 4 else sizes[..., None]
        placed = placed_at(targets, site, layer, mask, sizes.shape[-1])
        return jnp.einsum("pbth,mbth->pm", sizes, placed.astype(sizes.dtype))

    nothing = jnp.zeros((len(sources.site), 2, len(targets.site)))
    *_, sums = _propagate(
        model, streams, mask, means, sources, start, stop, attention, nothing, measure
    )
    return sums[:, 0] / jnp.maximum(sums.sum(axis=1), jnp.finfo(sums.dtype).tiny)


@partial(jax.jit, static_argnames=("sites", "attention"))
def _parts(
    model: Transformer,
    streams: Array,
    mask: Array,
    means: Mapping[str, Array],
    source: Nodes,
    *,
    sites: tuple[str, ...],
    attention: str,
) -> dict[str, Array]:
    def body(carry: tuple, layer: Array) -> tuple:
        total, relevant = carry
        block, here, after = _layer(model, mask, layer, total, attention)
        seed, found = _seeding(source, layer, mask, means), {}

        def visit(site: str, part: Array, whole: Array) -> Array:
            found[site] = seed(site, part, whole)
            return found[site]

        relevant = through_block(block, here, relevant, visit, attention)
        return (after, relevant), {site: found[site] for site in sites}

    carry = (streams[0], jnp.zeros_like(streams[0]))
    return jax.lax.scan(body, carry, jnp.arange(model.config.n_layers))[1]


# What is checked and packed on the host.


class _Run(NamedTuple):
    """A run's shared arguments, and its sources in chunks with the layer each begins at."""

    shared: tuple[Array, Array, dict[str, Array]]
    chunks: list[tuple[Nodes, int]]
    order: np.ndarray

    def collect(self, found: Sequence[Array]) -> np.ndarray:
        """Results of the chunks, as the sources were given."""
        rows = np.concatenate([np.asarray(part) for part in found])[: len(self.order)]
        result = np.empty_like(rows)
        result[self.order] = rows
        return result


def _prepare(
    model: Transformer,
    batch: Batch,
    sources: Sources,
    means: Mapping[str, ArrayLike],
    attention: str,
    chunk: int,
) -> _Run:
    check_model(model)
    choose("attention rule", attention, ATTENTION_RULES)
    if not sources:
        raise ValueError("no sources: expected at least one node")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    groups = [[source] if isinstance(source, Node) else list(source) for source in sources]
    for group in groups:
        if not group:
            raise ValueError("a source without nodes: expected at least one")
        for node in group:
            check_node(model, "source", node, SOURCE_SITES)
    width = max(map(len, groups))
    # A node that is there twice changes nothing, so it fills up the shorter groups.
    full = [group + group[:1] * (width - len(group)) for group in groups]
    first = np.array([min(node.layer for node in group) for group in groups])
    order = np.argsort(first, kind="stable")
    chunk = min(chunk, len(groups))
    chunks = []
    packed = [stack([as_arrays(node, batch) for node in group]) for group in full]
    used = {node.site for group in groups for node in group}
    spread = {site: spread_mean(model, batch, means, site) for site in sorted(used)}
    for begin in range(0, len(order), chunk):
        part = order[begin : begin + chunk]
        filled = np.concatenate([part, np.repeat(part[-1:], chunk - len(part))])
        chunks.append((stack([packed[i] for i in filled]), int(first[part[0]])))
    nothing = jnp.zeros((batch.tokens.shape[0], 0), jnp.int32)
    streams = model(batch, taps="resid_pre", logits_at=nothing).taps["resid_pre"]
    return _Run((streams, jnp.asarray(batch.mask), spread), chunks, order)


def _ids(model: Transformer, batch: Batch, name: str, ids: ArrayLike) -> np.ndarray:
    values, rows = np.asarray(ids), batch.tokens.shape[:1]
    if values.shape != rows or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{name} must be one token id per row, {rows}, got shape {values.shape}")
    wild = values[(values < 0) | (values >= model.config.vocab_size)]
    if wild.size:
        raise ValueError(
            f"{name} holds token id {wild[0]}, outside the vocabulary of {model.config.vocab_size}"
        )
    return values.astype(np.int32)
