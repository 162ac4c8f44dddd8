"""Generation: cached equals uncached, padded equals alone, chunked equals whole; with edits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import close, mostly_slow, tiny_model, tiny_tokens

import jaxheads as jh
from jaxheads.decode import Full, Sampler, advance, start
from jaxheads.decode.head_cache import HeadCache
from jaxheads.decode.kinds import HeadKinds
from jaxheads.model import empty_cache
from jaxheads.taps import head_norm

CONFIG = tiny_model().config
EDITS = {
    "none": None,
    "mask": jh.mask_heads(CONFIG, [(0, 1), (2, 3)]),
    "offset": jh.offset_heads(CONFIG, np.full((3, 6, 8), 0.3, np.float32)),
}
ROWS = [tiny_tokens(1, 12)[0].tolist(), tiny_tokens(1, 7, 1)[0].tolist()]
NEW = 8
STREAMING = HeadKinds.all_streaming(CONFIG, sinks=1, recent=4)


def by_hand(row, count, edits=None, model=None, width=30, choose=lambda logits, row: logits):
    """Greedy decoding by a whole forward pass for each token: the tokens and their log-probs."""
    row, scores = list(row), []
    model = tiny_model() if model is None else model
    for _ in range(count):
        out = model(np.asarray([row + [0] * (width - len(row))]), edits=edits)
        logits = np.asarray(out.logits)[0, len(row) - 1]
        row.append(int(np.argmax(choose(logits, row))))
        scores.append(float(jax.nn.log_softmax(logits)[row[-1]]))
    return row[-count:], scores


# The same tokens, however they are computed


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_equals_uncached_forwards_row_by_row(name, side):
    made = jh.generate(
        tiny_model(), jh.pack(ROWS, side=side), edits=EDITS[name], max_new_tokens=NEW
    )
    expected = [by_hand(row, NEW, EDITS[name]) for row in ROWS]
    assert made.rows() == [tokens for tokens, _ in expected]
    close(made.logprobs, [scores for _, scores in expected])


@pytest.mark.parametrize("side", mostly_slow(["left", "right"], "left"))
def test_a_prefix_is_read_both_ways_and_continued(side):
    prefix = np.array([5, 7])
    made = jh.generate(tiny_model(), jh.pack(ROWS, side=side), prefix=prefix, max_new_tokens=NEW)
    causal = jh.generate(tiny_model(), jh.pack(ROWS, side=side), max_new_tokens=NEW)
    assert made.rows() != causal.rows()
    for row, count, found in zip(ROWS, prefix, made.rows(), strict=True):
        row = list(row)
        for _ in range(NEW):
            padded = np.asarray([row + [0] * (30 - len(row))])
            logits = tiny_model()(padded, prefix=np.array([count])).logits
            row.append(int(np.argmax(logits[0, len(row) - 1])))
        assert found == row[-NEW:]


@pytest.mark.parametrize("kind", mostly_slow(["mha", "gqa", "mqa"], "gqa"))
def test_a_long_prompt_equals_uncached_forwards(kind):
    model = tiny_model(kind, context_length=512)
    rows = [tiny_tokens(1, n, n)[0].tolist() for n in (500, 431)]
    expected = [by_hand(row, 5, model=model, width=512) for row in rows]
    for chunk in (None, 96):
        made = jh.generate(model, jh.pack(rows), max_new_tokens=5, chunk=chunk)
        assert made.rows() == [tokens for tokens, _ in expected]
        close(made.logprobs, [scores for _, scores in expected])


# 12 tokens: a scan over all; a rest of 2; one chunk and a rest; one token at a time.
@pytest.mark.parametrize("chunk", mostly_slow([4, 5, 11, 1], 5))
@pytest.mark.parametrize("side", ["left", "right"])
def test_chunked_equals_whole(chunk, side):
    first = np.arange(12) < 7
    edits = EDITS["mask"].when("prefill") | EDITS["offset"].when(np.tile(first, (2, 1)))
    batch = jh.pack(ROWS, side=side)
    options = {"edits": edits, "max_new_tokens": NEW, "prompt_taps": ("z", "k", "pattern")}
    whole = jh.generate(tiny_model(), batch, **options)
    parts = jh.generate(tiny_model(), batch, **options, chunk=chunk)
    assert parts.rows() == whole.rows()
    close(parts.logprobs, whole.logprobs)
    real = batch.mask
    for site, tokens_at in (("z", 2), ("k", 2), ("pattern", 3)):
        found, expected = (
            np.moveaxis(np.asarray(out.prompt_taps[site]), tokens_at, 2) for out in (parts, whole)
        )
        assert found.shape == expected.shape
        close(found[:, real], expected[:, real])


@pytest.mark.parametrize("fields", [{}, {"windows": (0, 300, 0)}], ids=["whole", "windows"])
def test_slots_that_nothing_fills_are_left_out(fields):
    model = tiny_model(context_length=2048, **fields)
    batch = jh.pack([tiny_tokens(1, n, n)[0].tolist() for n in (700, 641)], side="left")
    # Pieces end at slots 600 and 1200: chunks lie in the first, across their border, and beyond.
    cache = empty_cache(model.config, 2, 1200)
    for first, end in ((0, 256), (256, 512), (512, 668), (668, 700)):
        part = jh.Batch(batch.tokens[:, first:end], batch.mask[:, first:end])
        out = model(part, cache=cache)
        cache = out.cache
    close(out.logits, model(batch).logits[:, 668:])


def test_a_chunk_longer_than_the_prompt_reads_it_whole():
    whole, part = (
        jh.generate(tiny_model(), jh.pack(ROWS), max_new_tokens=NEW, chunk=chunk)
        for chunk in (None, 50)
    )
    assert part.rows() == whole.rows()


def test_the_phase_of_an_edit_decides_where_it_acts():
    strong = jh.offset_heads(CONFIG, np.full((3, 6, 8), 2.0, np.float32))
    prompt = tiny_tokens(1, 12)

    def made(edits):
        return jh.generate(tiny_model(), prompt, edits=edits, max_new_tokens=NEW).rows()[0]

    plain, both = made(None), made(strong)
    prefill, decode = made(strong.when("prefill")), made(strong.when("decode"))
    assert prefill[0] == both[0] != plain[0]
    assert decode[0] == plain[0]
    assert len({tuple(x) for x in (plain, both, prefill, decode)}) == 4


def test_steps_may_be_divided_in_any_way():
    batch, sampler = jh.pack(ROWS), Sampler.of(97, temperature=1.0, min_p=0.02)
    options = {"sampler": sampler, "key": jax.random.key(5)}
    state = start(tiny_model(), batch, max_new_tokens=NEW, **options)
    for steps in (1, 0, 3):
        state = advance(tiny_model(), state, steps)
    assert int(state.progress.step) == 5
    assert not state.done
    state = advance(tiny_model(), state, 100)
    assert state.done
    made = jh.generate(
        tiny_model(), batch, max_new_tokens=NEW, temperature=1.0, min_p=0.02, key=jax.random.key(5)
    )
    np.testing.assert_array_equal(state.progress.tokens, made.tokens)
    np.testing.assert_array_equal(state.progress.lengths, [NEW, NEW])


def test_generation_can_be_part_of_a_program():
    @jax.jit
    def both(model, prompts):
        cache = empty_cache(model.config, 2, 20)
        made = [jh.generate(model, prompts, max_new_tokens=NEW, cache=c) for c in (None, cache)]
        return [x.tokens for x in made]

    expected = jh.generate(tiny_model(), jh.pack(ROWS), max_new_tokens=NEW).tokens
    for tokens in both(tiny_model(), jh.pack(ROWS)):
        np.testing.assert_array_equal(tokens, expected)


# Options


def test_rows_end_at_stop_tokens_independently():
    free = jh.generate(tiny_model(), jh.pack(ROWS), max_new_tokens=NEW).rows()
    stop = free[0][2]
    stopped = jh.generate(tiny_model(), jh.pack(ROWS), max_new_tokens=NEW, stop=[stop, 96]).rows()
    for row, whole in zip(stopped, free, strict=True):
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert row == whole[:end]
    assert len(stopped[0]) < NEW


def test_decoding_ends_with_the_last_row():
    first = jh.generate(tiny_model(), jh.pack(ROWS), max_new_tokens=1).rows()
    state = start(tiny_model(), jh.pack(ROWS), max_new_tokens=NEW, stop=[t for (t,) in first])
    assert state.done
    assert int(advance(tiny_model(), state, 5).progress.step) == 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_repetition_penalty_counts_real_tokens_of_prompt_and_output(side):
    def penalise(logits, row):
        seen = np.isin(np.arange(97), row)
        return np.where(seen, np.where(logits > 0, logits / 3, logits * 3), logits)

    expected = [by_hand(row, NEW, choose=penalise) for row in ROWS]
    # The padding is written with the token that comes next, which must not count as seen.
    batch = jh.pack(ROWS, side=side, pad=expected[1][0][0])
    made = jh.generate(tiny_model(), batch, max_new_tokens=NEW, repetition_penalty=3.0)
    assert made.rows() == [tokens for tokens, _ in expected]
    assert made.rows() != [by_hand(row, NEW)[0] for row in ROWS]
    # Of the model itself, without the penalty.
    close(made.logprobs, [scores for _, scores in expected])


def test_sampling_follows_its_key_and_its_limits():
    def draw(seed, **options):
        key, options = jax.random.key(seed), {"temperature": 1.0, "top_k": 90, **options}
        return jh.generate(
            tiny_model(), jh.pack(ROWS), max_new_tokens=NEW, key=key, **options
        ).rows()

    assert draw(0) == draw(0) != draw(1)
    greedy = jh.generate(tiny_model(), jh.pack(ROWS), max_new_tokens=NEW).rows()
    for limit in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert draw(3, **limit) == greedy


def test_samples_continue_one_prefill():
    """Each row is what a forward pass over it says, and the prompts were read once."""
    read = []

    def counting(value, context):
        read.append((context.phase, value.shape[0]))
        return value

    edits = EDITS["offset"] | jh.Edits(mlp_out=jax.tree_util.Partial(counting))
    made = jh.generate(
        tiny_model(), jh.pack(ROWS, side="left"), edits=edits, max_new_tokens=NEW, temperature=1.0,
        key=jax.random.key(0), samples=3, prompt_taps="z", taps="z",
    )  # fmt: skip
    assert set(read) == {("prefill", 2), ("decode", 6)}
    rows = made.rows()
    assert len({tuple(row) for row in rows}) == 6
    assert made.prompt_taps["z"].shape[:3] == (3, 2, 12)
    for index, row in enumerate(rows):
        prompt = ROWS[index // 3]
        out = tiny_model()(np.asarray([prompt + row]), edits=EDITS["offset"], taps="z")
        z = np.moveaxis(out.taps["z"][:, 0, len(prompt) : -1], 1, 0)
        scores = jax.nn.log_softmax(out.logits[0, len(prompt) - 1 : -1])
        close(made.logprobs[index], scores[np.arange(NEW), row])
        close(made.taps["z"][:, :, index, 0], z)


def test_taps_of_decode_steps_equal_those_of_a_whole_pass():
    norms = {"norms": jh.Tap("z", head_norm)}
    prompt = tiny_tokens(2, 12)
    made = jh.generate(
        tiny_model(), prompt, edits=EDITS["mask"], max_new_tokens=NEW,
        taps={"z": None, "pattern": None, "logits": None, **norms},
        prompt_taps={"resid_post": None, **norms},
    )  # fmt: skip
    tokens = np.concatenate([prompt, made.tokens], axis=1)
    sites = ("z", "pattern", "logits", "resid_post")
    whole = tiny_model()(tokens, edits=EDITS["mask"], taps=sites).taps
    assert made.taps["z"].shape == (NEW - 1, 3, 2, 1, 6, 8)
    assert made.taps["norms"].shape == (NEW - 1, 3, 2, 1, 6)
    for step in range(NEW - 1):
        at = 12 + step
        close(made.taps["z"][step, :, :, 0], whole["z"][:, :, at])
        close(made.taps["norms"][step, :, :, 0], np.linalg.norm(whole["z"][:, :, at], axis=-1))
        close(made.taps["pattern"][step, :, :, :, 0], whole["pattern"][:, :, :, at])
        close(made.taps["logits"][step, :, 0], whole["logits"][:, at])
    close(made.prompt_taps["resid_post"], whole["resid_post"][:, :, :12])
    assert made.prompt_taps["norms"].shape == (3, 2, 12, 6)


def test_one_new_token_is_chosen_without_a_decode_step():
    made = jh.generate(tiny_model(), jh.pack(ROWS), max_new_tokens=1, taps="z")
    assert made.rows() == [by_hand(row, 1)[0] for row in ROWS]
    assert made.taps["z"].shape == (0, 3, 2, 1, 6, 8)


def test_a_cache_of_the_callers_own_is_used_and_consumed():
    options = {"max_new_tokens": NEW, "cache": empty_cache(CONFIG, 2, 33)}
    state = start(tiny_model(), jh.pack(ROWS), **options)
    assert state.cache.size == 33
    assert options["cache"].k.is_deleted()
    tokens = advance(tiny_model(), state, NEW).progress.tokens
    expected = jh.generate(tiny_model(), jh.pack(ROWS), max_new_tokens=NEW).tokens
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.parametrize("kinds", mostly_slow(["all_full", "all_streaming"], "all_streaming"))
def test_samples_share_a_head_wise_cache(kinds):
    """Repeated rows go on as the rows themselves do."""
    options = {"max_new_tokens": NEW, "temperature": 1.0, "top_k": 1, "key": jax.random.key(0)}

    def made(samples):
        chosen = getattr(HeadKinds, kinds)(CONFIG, sinks=1, recent=3, compensate=True)
        cache = HeadCache.empty(CONFIG, chosen, 2, 20)
        return jh.generate(tiny_model(), jh.pack(ROWS), cache=cache, samples=samples, **options)

    alone, repeated = made(1).rows(), made(3).rows()
    assert repeated == [row for row in alone for _ in range(3)]
    plain = jh.generate(tiny_model(), jh.pack(ROWS), max_new_tokens=NEW).rows()
    assert (alone == plain) == (kinds == "all_full")


# Compiles


def counted():
    """An edit that counts how often it is traced."""
    traces = []

    def counting(value, context):
        traces.append(context.phase)
        return value

    return jh.Edits(mlp_out=jax.tree_util.Partial(counting)), traces


def test_one_program_serves_every_value():
    counting, traces = counted()

    def run(strength, seed, prompts=ROWS, **options):
        edits = jh.offset_heads(CONFIG, np.full((3, 6, 8), strength, np.float32)) | counting
        jh.generate(
            tiny_model(), jh.pack(prompts, length=12), edits=edits, max_new_tokens=4,
            key=jax.random.key(seed), **options,
        )  # fmt: skip
        return len(traces)

    first = run(0.1, 0, temperature=1.0, top_k=3, stop=[5])
    assert {"prefill", "decode"} == set(traces)
    more = {"top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.3, "stop": [7]}
    assert run(0.5, 1, temperature=0.3, **more) == first
    assert run(0.5, 1, [row[:5] for row in ROWS], temperature=0.3, **more) == first


def test_any_number_of_steps_shares_one_program():
    counting, traces = counted()
    state = start(tiny_model(), jh.pack(ROWS), max_new_tokens=NEW, edits=counting)
    state = advance(tiny_model(), state, 1)
    before = len(traces)
    for steps in (2, 3, jnp.int32(1)):
        state = advance(tiny_model(), state, steps)
    assert len(traces) == before


# Bad input


BAD = {
    "no tokens": ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    "too long": ({"max_new_tokens": 60}, "exceed the model's context of 64"),
    "temperature": ({"temperature": -1.0}, "temperature must be 0 or more, got -1.0"),
    "no key": ({"temperature": 1.0}, "needs a random key"),
    "samples": ({"samples": 0}, "samples must be at least 1, got 0"),
    "samples of one": ({"samples": 2}, "samples=2 at temperature 0 would all be the same"),
    "chunk": ({"chunk": 0}, "chunk must be at least 1, got 0"),
    "stop token": ({"stop": [97]}, "stop token 97 is outside the vocabulary of 97"),
    "stop string": ({"stop": ["a"]}, "stop string 'a' needs the text .* pass tokenizer="),
    "a string": ({"stop": "ab"}, "stop must be a sequence of token ids and strings, got 'ab'"),
    "on_text": ({"on_text": print}, "on_text needs the text of the tokens: pass tokenizer="),
    "tap": ({"taps": "w"}, "unknown site 'w'"),
    "reducer of chunks": (
        {"chunk": 4, "prompt_taps": {"z": head_norm}},
        "prompt tap 'z' has a reducer, which would see one chunk at a time",
    ),
    "prefix in chunks": (
        {"prefix": np.array([3]), "chunk": 4},
        "prefix needs the prompt whole, got chunk=4 for 12 prompt tokens",
    ),
    "prefix and policy": ({"prefix": np.array([3]), "policy": Full()}, "in chunks"),
    "prefix of two rows": ({"prefix": np.array([3, 3])}, r"prefix has shape \(2,\), expected"),
    "prefix in a ring": (
        {
            "prefix": np.array([3]),
            "cache": HeadCache.empty(CONFIG, STREAMING, 1, 20),
        },
        "prefix needs a KVCache, got a HeadCache",
    ),
    "prefix too long": ({"prefix": np.array([13])}, r"prefix must lie in 0\.\.12"),
    "logits of chunks": ({"chunk": 4, "prompt_taps": "logits"}, "exists at the last token only"),
    "short cache": (
        {"cache": empty_cache(CONFIG, 1, 15)},
        "12 prompt tokens and 4 new ones do not fit a cache of 15 slots",
    ),
    "rows of cache": (
        {"cache": empty_cache(CONFIG, 2, 16)}, "a cache of 2 rows does not fit 1 prompts"
    ),
    "used cache": (
        {"cache": empty_cache(CONFIG, 1, 30).replace(length=jnp.int32(3))},
        "the cache must be empty, got one that holds 3 slots",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_refused(name):
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        jh.generate(tiny_model(), tiny_tokens(1, 12), **{"max_new_tokens": 4, **options})


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="needs at least one token"):
        jh.generate(tiny_model(), np.zeros((1, 0), np.int32), max_new_tokens=4)
    batch = jh.Batch(np.zeros((1, 5), np.int32), np.zeros((1, 5), bool))
    with pytest.raises(ValueError, match="every row needs at least one real token"):
        jh.generate(tiny_model(), batch, max_new_tokens=4)


def test_a_model_that_predicts_no_next_token_is_refused():
    with pytest.raises(ValueError, match="generation needs a causal language model"):
        jh.generate(tiny_model(causal=False), tiny_tokens(1, 12), max_new_tokens=4)
