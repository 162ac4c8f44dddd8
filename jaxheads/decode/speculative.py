"""`speculate`: several tokens from one pass of the model, drafted by small heads.

Each step drafts a tree of continuations, reads all of its nodes in one pass in which a node sees
the tokens before and its ancestors, and keeps the longest line that the model agrees with. The
root is the model's own next token, so a step keeps at least one token and with `Greedy` the output
is that of ordinary greedy decoding.

Sources: Cai et al. (2024), "Medusa", section 2.1; Ankner et al. (2024), "Hydra". The tree is read
into the last slots of the cache; what is kept is then copied behind the row's own tokens, so that
rows keep different numbers of tokens and nothing has gaps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxheads.decode.accept import Accept, Greedy
from jaxheads.decode.caches import cache_for
from jaxheads.decode.checks import check_request
from jaxheads.decode.draft import DraftHeads, Ends
from jaxheads.decode.prefill import last_slots
from jaxheads.decode.tree import Tree
from jaxheads.model.batch import Batch
from jaxheads.model.cache import KVCache, empty_cache
from jaxheads.model.context import Edit
from jaxheads.model.tower import Tower
from jaxheads.model.transformer import Transformer

Array = jax.Array


@struct.dataclass
class Speculated:
    """New tokens of each row, and how they were come by.

    A row's length is its steps plus its accepted drafts.

    Attributes:
      tokens: int32 [B,N], the generated ids; entries past a row's length mean nothing.
      lengths: int32 [B], generated tokens of each row, its stop token included.
      steps: int32 [B], passes of the model over a tree while the row was unfinished.
      accepted: int32 [B,heads], steps in which the draft of each head was kept.
    """

    tokens: Array
    lengths: Array
    steps: Array
    accepted: Array

    @property
    def tokens_per_step(self) -> float:
        """Mean over all steps of all rows; 1 is ordinary decoding."""
        return float(jnp.sum(self.lengths) / jnp.sum(self.steps))

    @property
    def acceptance(self) -> np.ndarray:
        """float [heads], share of all steps in which the draft of each head was kept."""
        share = jnp.sum(self.accepted, axis=0) / jnp.sum(self.steps)
        return np.asarray(share)

    def rows(self) -> list[list[int]]:
        """The ids of each row as plain lists."""
        tokens, lengths = np.asarray(self.tokens), np.asarray(self.lengths)
        return [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]


def speculate(
    model: Transformer,
    heads: DraftHeads,
    prompts: Batch | Array | np.ndarray,
    *,
    max_new_tokens: int,
    tree: Tree | None = None,
    accept: Accept | None = None,
    edits: Mapping[str, Edit] | None = None,
    stop: Sequence[int] = (),
) -> Speculated:
    """Continues prompts. Compiled once for each shape of the prompts, tree and kind of heads.

    Args:
      model: a causal language model without windows and position biases.
      heads: draft heads trained for it.
      prompts: `Batch` or int [B,T]; rows of different lengths may be padded on either side.
      max_new_tokens: N, tokens to generate at most.
      tree: what is drafted; None for the best three, two and one choices of three heads, one
        below the other, or of as many heads as there are.
      accept: the rule of acceptance; None for `Greedy`.
      edits: what to change in the model, in the prefill and in every step; heads read the
        edited states. Edits that draw at random for each slot draw differently here.
      stop: token ids after which a row ends.

    Raises:
      ValueError: as `jaxheads.generate`; heads of another model; a tree deeper than there are
        heads, or wider than their vocabulary; a model with windows or position biases.
    """
    if not isinstance(prompts, Batch):
        tokens = np.asarray(prompts) if not hasattr(prompts, "shape") else prompts
        prompts = Batch(tokens, np.ones(tokens.shape, bool))
    check_request(
        model, prompts, max_new_tokens=max_new_tokens, samples=1, chunk=None, cache=None,
        stop=stop, prompt_taps={},
    )  # fmt: skip
    tree = Tree.of_widths((3, 2, 1)[: len(heads.heads)]) if tree is None else tree
    _check(model, heads, tree)
    return _speculate(
        model, heads, prompts, {} if edits is None else edits,
        Greedy() if accept is None else accept, jnp.asarray(list(stop), jnp.int32),
        tree=tree, new=max_new_tokens,
    )  # fmt: skip


def _check(model: Transformer, heads: DraftHeads, tree: Tree) -> None:
    config = model.config
    heads.check(config)
    if any(config.windows) or config.relative_buckets:
        raise ValueError(
            "speculative decoding is for models without windows and position biases, got windows "
            f"{sorted(set(config.windows))}, relative_buckets={config.relative_buckets}"
        )
    if tree.heads > len(heads.heads):
        raise ValueError(
            f"a tree of depth {tree.heads} needs as many heads, got {len(heads.heads)}"
        )
    most = config.vocab_size if heads.vocabulary is None else heads.vocabulary.shape[0]
    rank = max((rank for path in tree.paths for rank in path), default=0)
    if rank >= most:
        raise ValueError(f"rank {rank} of the tree is outside the {most} tokens that are drafted")


@struct.dataclass
class Fixed:
    """What stays the same from step to step.

    Attributes:
      model: the model.
      heads: the draft heads.
      ends: what the heads take from the model.
      edits: what to change.
      accept: the rule of acceptance.
      stop: int32 [M].
      mask: bool [B,T], the real tokens of the prompts.
      tree: static.
    """

    model: Transformer
    heads: DraftHeads
    ends: Ends
    edits: Mapping[str, Edit]
    accept: Accept
    stop: Array
    mask: Array
    tree: Tree = struct.field(pytree_node=False)


@struct.dataclass
class Progress:
    """What a step changes.

    Attributes:
      result: so far; tokens [B,N+heads], so that a whole line can be written at the end.
      alive: bool [B], False where a row has ended.
      root: int32 [B], the model's own next token.
      hidden: [B,D], the state that the heads read.
      cache: of the model.
      block_cache: of the block of Hydra++, or None.
    """

    result: Speculated
    alive: Array
    root: Array
    hidden: Array
    cache: KVCache
    block_cache: KVCache | None


@partial(jax.jit, static_argnames=("tree", "new"))
def _speculate(
    model: Transformer,
    heads: DraftHeads,
    prompts: Batch,
    edits: Mapping[str, Edit],
    accept: Accept,
    stop: Array,
    *,
    tree: Tree,
    new: int,
) -> Speculated:
    tokens, mask = jnp.asarray(prompts.tokens), jnp.asarray(prompts.mask)
    ends = Ends.of(model, heads.vocabulary)
    fixed = Fixed(model, heads, ends, edits, accept, stop, mask, tree)
    progress = _read_prompts(fixed, tokens, new)

    def unfinished(progress: Progress) -> Array:
        return progress.alive.any()

    done = jax.lax.while_loop(unfinished, partial(_step, fixed, new), progress).result
    return replace(done, tokens=done.tokens[:, :new])


def _read_prompts(fixed: Fixed, tokens: Array, new: int) -> Progress:
    model, tree, mask = fixed.model, fixed.tree, fixed.mask
    rows, width = tokens.shape
    kept = width + new + tree.heads
    cache = cache_for(model, mask, kept + tree.size)
    # The heads may read all states, but only the last one's logits are needed: the others are
    # not computed, as nothing depends on them.
    out = model(tokens, mask, edits=fixed.edits, taps="final", cache=cache)
    last = last_slots(mask)[:, None, None]
    hidden, block_cache = out.taps["final"], None
    if "logits" in fixed.edits:
        logits = jnp.take_along_axis(out.logits, last, axis=1)
    else:
        logits = model.logits_of(jnp.take_along_axis(hidden, last, axis=1))
    block = fixed.heads.block(model.config)
    if block is not None:
        size = kept + tree.heads + 1
        block_cache = empty_cache(block.config, rows, size)
        hidden, block_cache = _run_block(block, hidden, mask, block_cache)
    result = Speculated(
        tokens=jnp.zeros((rows, new + tree.heads), jnp.int32),
        lengths=jnp.zeros(rows, jnp.int32),
        steps=jnp.zeros(rows, jnp.int32),
        accepted=jnp.zeros((rows, tree.heads), jnp.int32),
    )
    assert isinstance(out.cache, KVCache)
    return Progress(
        result=result,
        alive=jnp.ones(rows, bool),
        root=jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32),
        hidden=jnp.take_along_axis(hidden, last, axis=1)[:, 0],
        cache=out.cache,
        block_cache=block_cache,
    )


def _step(fixed: Fixed, new: int, progress: Progress) -> Progress:
    """Drafts a tree, reads it, keeps the best line."""
    model, tree, config = fixed.model, fixed.tree, fixed.model.config
    result, alive = progress.result, progress.alive
    nodes = draft(fixed.heads, fixed.ends, tree, progress.root, progress.hidden)
    before = jnp.sum(fixed.mask, axis=1, dtype=jnp.int32) + result.lengths
    # A node past the context is never kept, but must not read past a table of positions.
    positions = jnp.minimum(before[:, None] + tree.depth, config.context_length - 1)
    held = _held(fixed.mask, result.lengths, progress.cache.size)
    scratch = progress.cache.size - tree.size
    out = model(
        nodes, jnp.broadcast_to(alive[:, None], nodes.shape), edits=fixed.edits, taps="final",
        cache=replace(progress.cache, mask=held, length=jnp.int32(scratch)), phase="decode",
        positions=positions, sees=tree.ancestors,
    )  # fmt: skip
    best = _best_node(fixed.accept, tree, out.logits, nodes)
    line = jnp.asarray(tree.lines)[best]
    drafted = jnp.take_along_axis(nodes, line, axis=1)
    count, ended = _counted(fixed, drafted, jnp.asarray(tree.depth)[best] + 1, new - result.lengths)
    count = jnp.where(alive, count, 0)
    at = fixed.mask.shape[1] + result.lengths
    assert isinstance(out.cache, KVCache)
    cache = _kept(out.cache, scratch, line, at)
    states, block_cache = out.taps["final"], progress.block_cache
    chosen = best[:, None, None]
    hidden = jnp.take_along_axis(states, chosen, axis=1)[:, 0]
    block = fixed.heads.block(config)
    if block is not None:
        assert block_cache is not None
        hidden, block_cache = _read_line(
            fixed.mask, block, jnp.take_along_axis(states, line[..., None], axis=1), count,
            result.lengths, block_cache,
        )  # fmt: skip
    root = jnp.argmax(jnp.take_along_axis(out.logits, chosen, axis=1)[:, 0], axis=-1)
    write = jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=0))
    result = Speculated(
        # Tokens after those that count are written over by the next step.
        tokens=jnp.where(
            alive[:, None], write(result.tokens, drafted, result.lengths), result.tokens
        ),
        lengths=result.lengths + count,
        steps=result.steps + alive,
        accepted=result.accepted + (jnp.arange(1, tree.heads + 1) < count[:, None]),
    )
    alive = alive & ~ended & (result.lengths < new)
    return Progress(result, alive, root.astype(jnp.int32), hidden, cache, block_cache)


def draft(heads: DraftHeads, ends: Ends, tree: Tree, root: Array, hidden: Array) -> Array:
    """The tokens of a tree, int32 [B,N].

    Args:
      heads: the draft heads.
      ends: what they take from the model.
      tree: what is drafted.
      root: int32 [B], the next token.
      hidden: [B,D], the state before it.
    """
    nodes = root[:, None]
    for head, level in zip(heads.heads, tree.levels(), strict=False):
        vectors = ends.vectors(nodes[:, level.lines])
        states = jnp.broadcast_to(hidden[:, None], (*vectors.shape[:2], hidden.shape[1]))
        logits = ends.logits(head(states, vectors))
        _, ids = jax.lax.top_k(logits, int(level.ranks.max()) + 1)
        if heads.vocabulary is not None:
            ids = heads.vocabulary[ids]
        nodes = jnp.concatenate([nodes, ids[:, level.parents, level.ranks]], axis=1)
    return nodes.astype(jnp.int32)


def _best_node(accept: Accept, tree: Tree, logits: Array, nodes: Array) -> Array:
    """int32 [B], the end of the longest line of accepted nodes; of equals the likeliest."""
    accepted, score = accept(logits, nodes, tree.parent)
    is_root = jnp.arange(tree.size) == 0
    ancestors = jnp.asarray(tree.ancestors)
    reached = (accepted | is_root)[:, None, :] | ~ancestors
    reached = reached.all(axis=-1)
    longest = jnp.max(jnp.where(reached, tree.depth, 0), axis=1, keepdims=True)
    total = jnp.where(is_root, 0, score) @ ancestors.T.astype(jnp.float32)
    return jnp.argmax(jnp.where(reached & (tree.depth == longest), total, -jnp.inf), axis=1)


def _counted(fixed: Fixed, line: Array, count: Array, room: Array) -> tuple[Array, Array]:
    """How many of the tokens of a line [B,heads+1] count, up to a stop; whether there is one."""
    place = jnp.arange(line.shape[1])
    stops = (line[..., None] == fixed.stop).any(axis=-1) & (place < count[:, None])
    first = jnp.where(stops.any(axis=1), jnp.argmax(stops, axis=1) + 1, line.shape[1])
    return jnp.minimum(jnp.minimum(count, first), room), stops.any(axis=1)


def _held(mask: Array, lengths: Array, size: int) -> Array:
    """bool [B,S], the slots with tokens: of the prompts [B,T], and `lengths` behind them."""
    behind = jnp.arange(size - mask.shape[1]) < lengths[:, None]
    return jnp.concatenate([mask, behind], axis=1)


def _kept(cache: KVCache, scratch: int, line: Array, at: Array) -> KVCache:
    """The cache with a line [B,W] of the slots from `scratch` on copied to `at` [B]."""

    def moved(held: Array) -> Array:
        nodes = held[:, :, :, scratch:]
        kept = jnp.take_along_axis(nodes, line[None, :, None, :, None], axis=3)

        # Row by row, so that the buffer is written in place.
        def write(row: Array, held: Array) -> Array:
            mine = jax.lax.dynamic_slice_in_dim(kept, row, 1, axis=1)
            return jax.lax.dynamic_update_slice(held, mine, (0, row, 0, at[row], 0))

        return jax.lax.fori_loop(0, held.shape[1], write, held)

    return replace(cache, k=moved(cache.k), v=moved(cache.v))


def _run_block(block: Tower, hidden: Array, mask: Array, cache: KVCache) -> tuple[Array, KVCache]:
    """The block of Hydra++ over states [B,T,D] of the tokens of mask [B,T]."""
    context, started = block.begin(mask, cache, "decode", {}, {})
    hidden, _, cached = block.run(hidden, context, {}, started)
    assert isinstance(cached, KVCache)
    return hidden, cached


def _read_line(
    mask: Array, block: Tower, states: Array, count: Array, lengths: Array, cache: KVCache
) -> tuple[Array, KVCache]:
    """The block over the first `count` [B] states of a line [B,W,D]: the last one, [B,D]."""
    width = states.shape[1]
    scratch, line = cache.size - width, jnp.arange(width)
    held = _held(mask, lengths, cache.size)
    cache = replace(cache, mask=held, length=jnp.int32(scratch))
    states, cache = _run_block(block, states, line < count[:, None], cache)
    cache = _kept(cache, scratch, jnp.broadcast_to(line, states.shape[:2]), mask.shape[1] + lengths)
    last = jnp.maximum(count - 1, 0)[:, None, None]
    return jnp.take_along_axis(states, last, axis=1)[:, 0], cache
