"""`HeadCache`: what its kinds say is attended to, however a text is read, from less memory."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from tiny import close, mostly_slow, tiny_model, tiny_tokens

import jaxheads as jh
from jaxheads.decode.head_cache import HeadCache
from jaxheads.decode.kinds import HeadKinds
from jaxheads.model import empty_cache

LENGTH = 40
KINDS = ("mha", "gqa", "mqa")
PIECES = [7, 1, 7, 1, 1, 7, 7, 7, 1, 1]


@struct.dataclass
class Simulated:
    """z of full and streaming heads, from masks over all tokens: an edit of `z`."""

    full: jax.Array
    sinks: int = struct.field(pytree_node=False)
    recent: int = struct.field(pytree_node=False)
    compensate: bool = struct.field(pytree_node=False)

    def __call__(self, value, context):
        group = value.shape[2] // self.full.shape[0]
        q = context.q.astype(jnp.float32)
        k, v = (jnp.repeat(x, group, axis=2) for x in (context.k, context.v))
        full = jnp.repeat(self.full, group)[None, :, None, None]
        near = jnp.where(context.token_mask, context.positions, -1)[:, None, None, :]
        far = context.positions[:, None, :, None] - self.recent
        near = full | (near < self.sinks) | (near > far)
        logits = jnp.einsum("bthe,bshe->bhts", q, k) * q.shape[-1] ** -0.5
        seen, dropped = context.allowed & near, context.allowed & ~near
        weights = jnp.where(seen, jnp.exp(logits), 0.0)
        total = weights.sum(-1)
        mixed = jnp.einsum("bhts,bshe->bthe", weights, v)
        if self.compensate:
            many = dropped.sum(-1)
            means = [
                jnp.einsum("bhts,bshe->bthe", dropped.astype(jnp.float32), x)
                / jnp.maximum(many, 1).transpose(0, 2, 1)[..., None]
                for x in (k, v)
            ]
            scale = q.shape[-1] ** -0.5
            alone = many * jnp.exp(jnp.einsum("bthe,bthe->bht", q, means[0]) * scale)
            total = total + alone
            mixed = mixed + alone.transpose(0, 2, 1)[..., None] * means[1]
        real = context.token_mask[..., None, None]
        return jnp.where(real, mixed / jnp.maximum(total, 1e-30).transpose(0, 2, 1)[..., None], 0)


def simulated(kinds):
    return jh.Edits(
        z=Simulated(jnp.asarray(kinds.full), kinds.sinks, kinds.recent, kinds.compensate)
    )


def some_full(config, seed=0):
    """A different number of full heads in each layer."""
    shape = (config.n_layers, config.n_kv_heads)
    full = np.random.default_rng(seed).random(shape) < 0.5
    full[0], full[-1, 0] = False, True
    return full


def read(model, cache, tokens, mask, chunks, edits=None, phase="prefill"):
    """Logits [B,T,V] of tokens read in pieces."""
    parts, at = [], 0
    for size in chunks:
        piece = slice(at, at + size)
        out = model(tokens[:, piece], mask[:, piece], cache=cache, edits=edits, phase=phase)
        parts, cache, at = [*parts, out.logits], out.cache, at + size
    return jnp.concatenate(parts, axis=1), cache


def padded(rows, length=LENGTH, side="left"):
    batch = jh.pack(rows, side=side, length=length)
    return np.asarray(batch.tokens), np.asarray(batch.mask)


@pytest.mark.parametrize("compensate", [False, True], ids=["plain", "compensated"])
@pytest.mark.parametrize("kind", mostly_slow(KINDS, "gqa"))
def test_a_head_cache_equals_masks_over_all_tokens(kind, compensate):
    model = tiny_model(kind)
    kinds = HeadKinds(some_full(model.config), sinks=2, recent=5, compensate=compensate)
    tokens = tiny_tokens(2, LENGTH)
    mask = np.ones_like(tokens, bool)
    expected = model(tokens, edits=simulated(kinds)).logits
    plain = model(tokens).logits
    assert np.abs(np.asarray(expected - plain)).max() > 0.01
    for chunks in ([LENGTH], PIECES, [1] * LENGTH):
        cache = HeadCache.empty(model.config, kinds, 2, LENGTH)
        close(read(model, cache, tokens, mask, chunks)[0], expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model = tiny_model()
    kinds = HeadKinds(some_full(model.config), sinks=2, recent=5, compensate=True)
    rows = [tiny_tokens(1, n, n)[0].tolist() for n in (LENGTH, 17, 4)]
    tokens, mask = padded(rows, side=side)
    for chunks in ([LENGTH], PIECES):
        cache = HeadCache.empty(model.config, kinds, 3, LENGTH)
        found, _ = read(model, cache, tokens, mask, chunks)
        for index, row in enumerate(rows):
            alone = model(*padded([row], side="right"), edits=simulated(kinds)).logits[0]
            close(found[index][mask[index]], alone[: len(row)])


def test_a_row_decodes_on_after_padding_on_the_right():
    model = tiny_model()
    kinds = HeadKinds(some_full(model.config), sinks=2, recent=5, compensate=True)
    rows = [tiny_tokens(1, n, n)[0].tolist() for n in (30, 11)]
    tokens, mask = padded([row[:-4] for row in rows], 28, "right")
    cache = HeadCache.empty(model.config, kinds, 2, LENGTH)
    _, cache = read(model, cache, tokens, mask, [7] * 4)
    last = np.asarray([row[-4:] for row in rows])
    found, _ = read(model, cache, last, np.ones((2, 4), bool), [1, 1, 1, 1], phase="decode")
    for index, row in enumerate(rows):
        expected = model(*padded([row], side="right"), edits=simulated(kinds)).logits[0]
        close(found[index], expected[len(row) - 4 : len(row)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_long_prompts(kind):
    model = tiny_model(kind, context_length=600)
    kinds = HeadKinds(some_full(model.config), sinks=4, recent=64, compensate=True)
    rows = [tiny_tokens(1, n, n)[0].tolist() for n in (500, 333)]
    tokens, mask = padded(rows, 500)
    expected = model(tokens, mask, edits=simulated(kinds)).logits
    cache = HeadCache.empty(model.config, kinds, 2, 500)
    found, _ = read(model, cache, tokens, mask, [200, 297, 1, 1, 1])
    close(found[mask], expected[mask])


def test_all_full_is_the_plain_cache():
    model = tiny_model()
    tokens = tiny_tokens(2, LENGTH)
    mask = np.ones_like(tokens, bool)
    cache = HeadCache.empty(model.config, HeadKinds.all_full(model.config), 2, LENGTH)
    plain = empty_cache(model.config, 2, LENGTH)
    assert cache.nbytes == plain.k.nbytes + plain.v.nbytes
    chunks = PIECES
    expected = read(model, plain, tokens, mask, chunks)[0]
    np.testing.assert_array_equal(read(model, cache, tokens, mask, chunks)[0], expected)


def test_streaming_heads_with_room_for_all_are_full():
    model = tiny_model()
    kinds = HeadKinds.all_streaming(model.config, sinks=3, recent=LENGTH, compensate=True)
    tokens = tiny_tokens(2, LENGTH)
    cache = HeadCache.empty(model.config, kinds, 2, LENGTH)
    found, _ = read(model, cache, tokens, np.ones_like(tokens, bool), PIECES)
    close(found, model(tokens).logits)


def test_memory_of_streaming_heads_does_not_grow_with_the_context():
    config = tiny_model().config
    for bits, each in ((None, 8 * 4), (8, 8 + 4)):
        kinds = HeadKinds.all_streaming(config, sinks=2, recent=6, bits=bits)
        sizes = {HeadCache.empty(config, kinds, 1, size).nbytes for size in (10, 10_000)}
        assert sizes == {2 * config.n_layers * config.n_kv_heads * 8 * each}
    kinds = HeadKinds(some_full(config), sinks=2, recent=6)
    heads, full = kinds.full.size, int(kinds.full.sum())
    cache = HeadCache.empty(config, kinds, 3, 100)
    assert cache.nbytes == 2 * 3 * (full * 100 + (heads - full) * 8) * 8 * 4
    assert cache.nbytes / (2 * 3 * heads * 100 * 8 * 4) == pytest.approx(kinds.share(100))


def test_compensation_is_exact_where_dropped_keys_are_equal():
    model = tiny_model()
    same = jnp.asarray(np.random.default_rng(0).normal(size=(3, 1, 1, 2, 8)), jnp.float32)
    edits = jh.Edits(k=jh.Affine(jnp.zeros_like(same), same))
    tokens = tiny_tokens(2, LENGTH)
    kinds = HeadKinds.all_streaming(model.config, sinks=2, recent=5, compensate=True)
    cache = HeadCache.empty(model.config, kinds, 2, LENGTH)
    mask = np.ones_like(tokens, bool)
    found, _ = read(model, cache, tokens, mask, PIECES, edits)
    close(found, model(tokens, edits=edits).logits)
    plain = HeadKinds.all_streaming(model.config, sinks=2, recent=5)
    cache = HeadCache.empty(model.config, plain, 2, LENGTH)
    without, _ = read(model, cache, tokens, mask, [LENGTH], edits)
    assert np.abs(np.asarray(without - found)).max() > 1e-3


def test_eight_bits_are_near_and_independent_of_how_a_text_is_read():
    model = tiny_model()
    tokens = tiny_tokens(2, LENGTH)
    mask = np.ones_like(tokens, bool)
    kinds = HeadKinds(some_full(model.config), sinks=2, recent=5, compensate=True, bits=8)
    found = [
        read(model, HeadCache.empty(model.config, kinds, 2, LENGTH), tokens, mask, chunks)[0]
        for chunks in ([LENGTH], PIECES)
    ]
    close(found[0], found[1])
    exact = HeadKinds(kinds.full, sinks=2, recent=5, compensate=True)
    expected = model(tokens, edits=simulated(exact)).logits
    error = np.abs(np.asarray(found[0] - expected)).max()
    assert 1e-5 < error < 0.05 * np.abs(np.asarray(expected)).max()


def test_a_dense_prefill_sees_the_whole_prompt():
    model = tiny_model()
    tokens = tiny_tokens(2, LENGTH)
    mask = np.ones_like(tokens, bool)
    kinds = HeadKinds.all_streaming(model.config, sinks=2, recent=5, prefill="dense")
    cache = HeadCache.empty(model.config, kinds, 2, LENGTH)
    out = model(tokens[:, :-1], cache=cache)
    close(out.logits, model(tokens[:, :-1]).logits)
    last = model(tokens[:, -1:], cache=out.cache, phase="decode").logits
    assert np.abs(np.asarray(last[:, 0] - model(tokens, mask).logits[:, -1])).max() > 1e-3


def test_a_step_compiles_once():
    model = tiny_model()
    kinds = HeadKinds(some_full(model.config), sinks=2, recent=5)
    cache = HeadCache.empty(model.config, kinds, 1, LENGTH)
    step = jax.jit(chex.assert_max_traces(lambda cache, x: model(x, cache=cache).cache, n=1))
    for token in range(4):
        cache = step(cache, np.full((1, 1), token))
    other = HeadKinds(some_full(model.config)[:, ::-1], sinks=2, recent=5)
    step(HeadCache.empty(model.config, other, 1, LENGTH), np.zeros((1, 1), int))
    chex.clear_trace_counter()


def test_wrong_input_is_named():
    model = tiny_model()
    config = model.config
    tokens = tiny_tokens(1, 8)
    with pytest.raises(ValueError, match=r"full must be bool \[L,K\], got float64 \[3\]"):
        HeadKinds(np.zeros(3))
    with pytest.raises(ValueError, match="bits must be 8 or None, got 4"):
        HeadKinds.all_full(config, bits=4)
    with pytest.raises(ValueError, match="recent must be at least 1, got 0"):
        HeadKinds.all_full(config, recent=0)
    with pytest.raises(ValueError, match=r"are \[2, 2\], expected \[3, 2\] of this model"):
        HeadCache.empty(config, HeadKinds(np.ones((2, 2), bool)), 1, 8)
    with pytest.raises(ValueError, match="causal models without windows"):
        windowed = config.replace(windows=(4, 0, 4))
        HeadCache.empty(windowed, HeadKinds.all_full(config), 1, 8)
    cache = HeadCache.empty(config, HeadKinds.all_full(config), 1, 8)
    with pytest.raises(ValueError, match="9 tokens do not fit a cache of 8 slots"):
        model(tiny_tokens(1, 9), cache=cache)
    with pytest.raises(ValueError, match="scores and pattern cannot be edited, tapped or read"):
        model(tokens, cache=cache, taps="pattern")


def test_kinds_of_a_budget():
    kinds = HeadKinds(np.zeros((3, 2), bool), sinks=2, recent=8)
    scores = np.asarray([[0.1, 0.9], [0.5, 0.5], [0.2, 0.3]])
    two = kinds.keeping(scores, heads=2).full
    assert two.tolist() == [[False, True], [True, False], [False, False]]
    assert kinds.keeping(scores, heads=0.5).full.sum() == 3
    for budget in (0.1, 0.3, 0.5, 1.0):
        found = kinds.keeping(scores, budget=budget, length=100)
        assert found.share(100) <= budget
        more = kinds.keeping(scores, heads=min(int(found.full.sum()) + 1, 6))
        assert budget == 1 or more.share(100) > budget
    with pytest.raises(ValueError, match="less than the 2 sinks and 8 recent tokens"):
        kinds.keeping(scores, budget=0.05, length=100)
    with pytest.raises(ValueError, match=r"budget must lie in \(0, 1\], got 1.5"):
        kinds.keeping(scores, budget=1.5, length=100)
    with pytest.raises(ValueError, match=r"heads must lie in 0..6, got 7"):
        kinds.keeping(scores, heads=7)
    with pytest.raises(ValueError, match=r"scores must be \[3, 2\] without NaN"):
        kinds.keeping(scores[:2], heads=1)
    with pytest.raises(ValueError, match="give one of heads and budget"):
        kinds.keeping(scores)
