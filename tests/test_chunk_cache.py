"""`ChunkCache`, LongHeads: with all chunks it is full attention; with few it goes beyond."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import close, mostly_slow, tiny_model, tiny_tokens

from jaxheads.decode.chunk_cache import ChunkCache, represented, unrotated
from jaxheads.model.rotary import rotary_angles, rotate

WIDTH = 4


def read(model, cache, tokens, pieces):
    parts, at = [], 0
    for size in pieces:
        out = model(tokens[:, at : at + size], cache=cache)
        parts, cache, at = [*parts, out.logits], out.cache, at + size
    return jnp.concatenate(parts, axis=1), cache


@pytest.mark.parametrize("kind", mostly_slow(("mha", "gqa", "mqa"), "gqa"))
def test_all_chunks_are_full_attention(kind):
    model = tiny_model(kind)
    tokens = tiny_tokens(2, 26)
    expected = model(tokens).logits
    for pieces in ([4] * 6 + [1, 1], [3, 1, 3, 3, 4, 4, 4, 4]):
        cache = ChunkCache.empty(model.config, 2, 26, width=WIDTH, chunks=7)
        found, cache = read(model, cache, tokens, pieces)
        close(found, expected)
        assert int(cache.length) == 26


def by_hand(model, tokens, chunks):
    """Layer 0's z of the last token, from the definition: [B,H,Dh]."""
    config = model.config
    out = model(tokens, taps=("q", "k", "v"))
    q, k, v = (np.asarray(out.taps[name][0], np.float64) for name in ("q", "k", "v"))
    length = tokens.shape[1]
    positions = jnp.arange(length)[None]
    angles = rotary_angles(positions, config.ropes[:1], config.rotated_dim)[0]
    q, k = (np.asarray(unrotated(jnp.asarray(x, jnp.float32), angles)) for x in (q, k))
    group = config.n_heads // config.n_kv_heads
    mine = (length - 1) // WIDTH
    found = np.zeros((tokens.shape[0], config.n_heads, config.head_dim))
    for row, kv in np.ndindex(tokens.shape[0], config.n_kv_heads):
        heads = range(kv * group, (kv + 1) * group)
        fit = np.zeros(mine)
        for chunk in range(mine):
            piece = slice(chunk * WIDTH, (chunk + 1) * WIDTH)
            about = represented(
                jnp.asarray(q[row : row + 1, piece]), jnp.asarray(k[row : row + 1, piece]),
                jnp.asarray(v[row : row + 1, piece], jnp.float32), config,
            )  # fmt: skip
            fit[chunk] = np.mean([q[row, -1, head] @ np.asarray(about)[0, head] for head in heads])
        others = sorted(range(1, mine - 1), key=lambda chunk: -fit[chunk])[: chunks - 3]
        ids = sorted([0, mine - 1, mine, *others])
        slots = [
            s for chunk in ids for s in range(chunk * WIDTH, (chunk + 1) * WIDTH) if s < length
        ]
        at = [i for i, chunk in enumerate(ids) for _ in range(WIDTH)][: len(slots)]
        new = np.asarray([i * WIDTH + s % WIDTH for i, s in zip(at, slots, strict=True)])
        for head in heads:
            keys = turned(k[row, slots, kv], new, config)
            query = turned(q[row, -1:, head], new[-1:], config)[0]
            logits = keys @ query * config.head_dim**-0.5
            weights = np.exp(logits - logits.max())
            found[row, head] = weights / weights.sum() @ v[row, slots, kv]
    return found


def turned(x, positions, config):
    angles = rotary_angles(jnp.asarray(positions)[None], config.ropes[:1], config.rotated_dim)[0]
    return np.asarray(rotate(jnp.asarray(x, jnp.float32)[None, :, None], *angles))[0, :, 0]


@pytest.mark.parametrize("kind", mostly_slow(("mha", "gqa"), "gqa"))
def test_few_chunks_are_those_of_the_definition(kind):
    model = tiny_model(kind)
    for length in (25, 28):
        tokens = tiny_tokens(2, length, length)
        cache = ChunkCache.empty(model.config, 2, length, width=WIDTH, chunks=4)
        pieces = [WIDTH] * (length // WIDTH) + [1] * (length % WIDTH)
        out, at = None, 0
        for size in pieces:
            out = model(tokens[:, at : at + size], cache=cache, taps="z")
            cache, at = out.cache, at + size
        # The first layer reads the embedding, whatever is attended to.
        close(out.taps["z"][0, :, -1], by_hand(model, tokens, 4))


def test_distances_stay_within_the_chunks():
    """A model whose far tokens are disturbed by position reads a long text as a short one."""
    model = tiny_model(context_length=16)
    tokens = tiny_tokens(1, 61)
    cache = ChunkCache.empty(model.config, 1, 61, width=WIDTH, chunks=4)
    found, cache = read(model, cache, tokens, [4] * 15 + [1])
    assert np.isfinite(np.asarray(found)).all()
    assert cache.size == 64


def test_a_step_is_traced_once_and_bytes_are_counted():
    model = tiny_model()
    count = 0

    @jax.jit
    def step(cache, token):
        nonlocal count
        count += 1
        return model(token, cache=cache).cache

    cache = ChunkCache.empty(model.config, 1, 20, width=WIDTH, chunks=4)
    for token in range(7):
        cache = step(cache, np.full((1, 1), token))
    assert count == 1
    config = model.config
    tokens = 2 * 20 * config.n_kv_heads + WIDTH * config.n_heads + 5 * config.n_heads
    assert cache.nbytes == config.n_layers * tokens * config.head_dim * 4


def test_wrong_input_is_named():
    model = tiny_model()
    config = model.config
    with pytest.raises(ValueError, match="chunks must be at least 3, got 2"):
        ChunkCache.empty(config, 1, 8, width=4, chunks=2)
    with pytest.raises(ValueError, match="20 chunks of 4 tokens exceed the model's context of 64"):
        ChunkCache.empty(config, 1, 8, width=4, chunks=20)
    with pytest.raises(ValueError, match="layers without windows"):
        ChunkCache.empty(config.replace(windows=(4, 0, 4)), 1, 8, width=4, chunks=3)
    cache = ChunkCache.empty(config, 1, 8, width=4, chunks=3)
    with pytest.raises(ValueError, match="at most a chunk of 4 tokens is read at a time, got 5"):
        model(tiny_tokens(1, 5), cache=cache)
    with pytest.raises(ValueError, match="scores and pattern cannot be edited, tapped or read"):
        model(tiny_tokens(1, 4), cache=cache, taps="scores")
