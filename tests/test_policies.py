"""Policies of key/value caches: what is kept of a prompt, and that nothing else is there."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from tiny import close, mostly_slow, tiny_model, tiny_tokens

import jaxheads as jh
from jaxheads.decode.head_cache import HeadCache
from jaxheads.decode.kept import KeptCache, compress
from jaxheads.decode.kinds import HeadKinds
from jaxheads.decode.policies import SELECTIONS, Chunks, Full, HeadWise, Selected
from jaxheads.decode.reading import watch
from jaxheads.decode.select import adakv, h2o, snapkv, task_kv, task_kv_heads

ROWS = [tiny_tokens(1, n, n)[0].tolist() for n in (40, 23)]
NEXT = tiny_tokens(2, 6, 9)
SMALL = {
    "snapkv": {"window": 4},
    "h2o": {},
    "adakv": {"window": 4},
    "task_kv": {"sinks": 2, "recent": 4, "top": 8},
}


@struct.dataclass
class Shown:
    """Hides keys by layer and row: an edit of `scores`."""

    shown: jnp.ndarray

    def __call__(self, value, context):
        return jnp.where(self.shown, value, -1e30)


def prompts(rows=ROWS):
    return jh.pack(rows, side="left")


def continued(model, policy, rows=ROWS, edits=None):
    """Logits of the token after the prompt and of those after each of `NEXT`, [B,1+6,V]."""
    read = policy.read(model, prompts(rows), room=8, edits=edits, chunk=16)
    parts, cache = [read.logits[:, None]], read.cache
    for size in (1, 4, 1):
        at = sum(part.shape[1] for part in parts) - 1
        out = model(NEXT[: len(rows), at : at + size], cache=cache, edits=edits, phase="decode")
        parts, cache = [*parts, out.logits], out.cache
    return jnp.concatenate(parts, axis=1), cache


def whole(model, edits=None):
    found = []
    for row, after in zip(ROWS, NEXT, strict=True):
        logits = model(np.asarray([[*row, *after]]), edits=edits).logits[0]
        found.append(logits[len(row) - 1 :])
    return jnp.stack(found)


EVERYTHING = {
    "chunks": Chunks(width=8, chunks=8),
    "full": Full(),
    "head-wise": HeadWise(HeadKinds.all_streaming(tiny_model().config, sinks=2, recent=60)),
    **{rule: Selected(rule, budget=1.0, options=SMALL[rule]) for rule in SELECTIONS},
}


@pytest.mark.parametrize("name", mostly_slow(EVERYTHING, "chunks", "head-wise", "adakv"))
def test_a_budget_of_everything_is_the_plain_model(name):
    model = tiny_model()
    edits = jh.mask_heads(model.config, [(1, 2)])
    # Chunks take no padding.
    rows = ROWS[:1] if name == "chunks" else ROWS
    found, _ = continued(model, EVERYTHING[name], rows, edits)
    close(found, whole(model, edits)[: len(rows)])


@pytest.mark.parametrize("rule", mostly_slow(SELECTIONS, "adakv"))
@pytest.mark.parametrize("kind", mostly_slow(("mha", "gqa", "mqa"), "gqa"))
def test_what_is_not_kept_is_masked(kind, rule):
    """A compressed cache equals a full one whose attention is masked."""
    model = tiny_model(kind)
    policy = Selected(rule, tokens=12, options=SMALL[rule])
    found, cache = continued(model, policy)
    assert isinstance(cache, KeptCache)
    group = model.config.n_heads // model.config.n_kv_heads
    batch = prompts()
    columns = batch.tokens.shape[1]
    shown = np.zeros((3, 2, model.config.n_heads, 1, columns + 8), bool)
    shown[..., columns:] = True
    # The keys that were kept, found again in a full cache by their values.
    full = Full().read(model, batch, room=8).cache
    for layer, row, slot in np.ndindex(*cache.owner.shape):
        owner = int(cache.owner[layer, row, slot])
        if owner == model.config.n_kv_heads:
            continue
        key = np.asarray(cache.kept.k[layer, row, 0, slot])
        distance = np.abs(np.asarray(full.k[layer, row, owner]) - key).max(axis=-1)
        assert distance.min() < 1e-5
        shown[layer, row, owner * group : (owner + 1) * group, 0, distance.argmin()] = True
    edits = jh.Edits(scores=Shown(jnp.asarray(shown)))
    parts, at = [], 0
    for size in (1, 4, 1):
        out = model(NEXT[:, at : at + size], cache=full, edits=edits, phase="decode")
        parts, full, at = [*parts, out.logits], out.cache, at + size
    close(found[:, 1:], jnp.concatenate(parts, axis=1))


@pytest.mark.parametrize("rule", SELECTIONS)
def test_as_many_tokens_are_kept_as_the_budget_says(rule):
    model = tiny_model()
    cache = Selected(rule, budget=0.5, options=SMALL[rule]).read(model, prompts(), room=2).cache
    owners = np.asarray(cache.owner)
    kept = (owners < 2).sum(axis=-1)
    # Two heads of 40 and of 23 tokens, half of each rounded down. Of Task-KV's one is full, which
    # is all of the budget, and the other keeps its 6 sinks and recent tokens.
    expected = [46, 29] if rule == "task_kv" else [40, 22]
    assert (kept == expected).all()
    assert owners.shape[-1] == expected[0]
    if rule in ("snapkv", "h2o"):
        assert (np.stack([(owners == head).sum(-1) for head in (0, 1)]) == [20, 11]).all()
    if rule == "adakv":
        assert ((owners == 0).sum(-1) != (owners == 1).sum(-1)).any()


def test_padding_changes_nothing():
    model = tiny_model()
    for policy in (
        Selected("adakv", tokens=12, options={"window": 4}),
        Selected("h2o", budget=0.5),
    ):
        together, _ = continued(model, policy)
        alone, _ = continued(model, policy, ROWS[:1])
        close(together[0], alone[0])


def test_watching_sums_the_attention_of_the_last_tokens():
    model = tiny_model()
    batch = prompts()
    pattern = model(batch, taps="pattern").taps["pattern"]
    real = jnp.asarray(batch.mask)[None, :, None, :, None]
    for window, chunk in ((None, 512), (None, 16), (7, 16)):
        found, received = watch(model, batch, window=window, chunk=chunk)
        counted = pattern * real
        counted = counted if window is None else counted[:, :, :, -window:]
        close(received, counted.sum(axis=3))
        close(found.logits, model(batch).logits[:, -1])


def scores(*values):
    return jnp.asarray(values, jnp.float32)[None, None]


def test_the_rules_by_hand():
    mask = jnp.ones((1, 6), bool)
    attention = scores([9, 1, 5, 2, 0, 0], [1, 2, 3, 8, 0, 0])
    kept = jnp.asarray([3])
    found = snapkv(attention, mask, kept, window=1, kernel=1)
    assert found[0, 0].astype(int).tolist() == [[1, 0, 1, 0, 0, 1], [0, 0, 1, 1, 0, 1]]
    found = h2o(attention, mask, jnp.asarray([4]))
    assert found[0, 0].astype(int).tolist() == [[1, 0, 1, 0, 1, 1], [0, 0, 1, 1, 1, 1]]
    attention = scores([9, 7, 6, 5, 0, 0], [1, 0, 0, 0, 0, 0])
    found = adakv(attention, mask, kept, window=1, kernel=1, safeguard=0.4)
    assert found[0, 0].astype(int).tolist() == [[1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 1]]
    smooth = snapkv(scores([0, 0, 9, 0, 0, 0]), mask, kept, window=0, kernel=3)
    assert smooth[0, 0].astype(int).tolist() == [[0, 1, 1, 1, 0, 0]]


def test_task_kv_keeps_the_heads_that_differ():
    mask = jnp.ones((1, 6), bool)
    attention = jnp.ones((1, 1, 4, 6)) / 6
    # Vectors of the heads: 0, 1, 2 and 9, their mean 3.
    values = jnp.asarray([0, 1, 2, 9.0])[None, None, :, None, None] * jnp.ones((1, 1, 4, 6, 1))
    options = {"sinks": 1, "recent": 1, "kernel": 1}
    found = task_kv(attention, values, mask, jnp.asarray([4]), beta=0.5, least=2, **options)
    assert found[0, 0].all(axis=-1).tolist() == [False, False, True, True]
    assert found[0, 0].sum(axis=-1).tolist() == [2, 2, 6, 6]
    assert task_kv_heads(32, 32, 0.25, 4)[[0, 31]].tolist() == [8, 4]
    with pytest.raises(ValueError, match=r"beta must lie in \(0, 1\], got 0"):
        task_kv_heads(3, 3, 0, 1)


def test_wrong_input_is_named():
    model = tiny_model()
    with pytest.raises(ValueError, match="unknown rule 'snap'"):
        Selected("snap", budget=0.5)
    with pytest.raises(ValueError, match=r"budget must lie in \(0, 1\], got 0"):
        Selected("snapkv", budget=0)
    with pytest.raises(ValueError, match="give one of budget and tokens"):
        Selected("snapkv")
    with pytest.raises(ValueError, match="would keep 20 of 40 tokens, fewer than the last 32"):
        Selected("snapkv", budget=0.5).read(model, prompts(), room=4)
    with pytest.raises(ValueError, match="prompts must end together"):
        Full().read(model, jh.pack(ROWS, side="right"), room=4)
    cache = Full().read(model, prompts(), room=1).cache
    with pytest.raises(ValueError, match=r"keep must be \[L,B,K,S\] = \[3, 2, 2, 41\]"):
        compress(cache, jnp.ones((3, 2, 2, 40), bool), room=2)
    with pytest.raises(ValueError, match="room must be at least 1 token, got 0"):
        compress(cache, jnp.ones((3, 2, 2, 41), bool), room=0)
    read = Selected("h2o", budget=0.5).read(model, prompts(), room=2)
    with pytest.raises(ValueError, match="3 tokens after 40 others do not fit a cache of 42 slots"):
        model(NEXT[:, :3], cache=read.cache)


def test_bytes_are_those_of_what_is_kept():
    model = tiny_model()
    one = prompts(ROWS[:1])
    full = Full().read(model, one, room=1).cache
    half = Selected("snapkv", tokens=20, options={"window": 4}).read(model, one, room=1).cache
    bytes_of_all = full.k.nbytes + full.v.nbytes
    # Half of 40 tokens, one to come, and four bytes for the head of each key.
    assert half.nbytes == bytes_of_all * 21 / 41 + half.owner.nbytes
    assert half.owner.nbytes == 3 * 40 * 4
    eight = Selected("snapkv", tokens=20, bits=8, options={"window": 4}).read(model, one, room=1)
    assert eight.cache.nbytes < 0.5 * half.nbytes
    wise = HeadWise(HeadKinds.all_full(model.config)).read(model, one, room=1).cache
    assert isinstance(wise, HeadCache) and wise.nbytes == bytes_of_all
