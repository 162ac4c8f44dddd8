"""Speculative decoding: the tokens are those of ordinary decoding, whatever the heads guess."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import close, mostly_slow, tiny_model, tiny_tokens

import jaxheads as jh
from jaxheads.decode.accept import Greedy, Typical
from jaxheads.decode.draft import DraftHeads, Ends
from jaxheads.decode.speculative import draft, speculate
from jaxheads.decode.tree import Tree
from jaxheads.model import empty_cache

CONFIG = tiny_model().config
ROWS = [tiny_tokens(1, 12)[0].tolist(), tiny_tokens(1, 7, 1)[0].tolist()]
NEW = 10
TREE = Tree.of_widths((4, 2, 1))


def heads(kind="hydra", config=CONFIG, **options):
    """Heads that guess badly, and sometimes well."""
    made = DraftHeads.new(config, kind, 3, jax.random.key(0), **options)
    params = {name: leaf for name, leaf in made.params.items() if name != "vocabulary"}
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    known = {} if made.vocabulary is None else {"vocabulary": made.vocabulary}
    return DraftHeads.of(jax.tree.unflatten(tree, moved) | known, config)


# The same tokens as ordinary decoding


@pytest.mark.parametrize("kind", mostly_slow(["medusa", "hydra", "hydra++"], "hydra++"))
@pytest.mark.parametrize("attention", mostly_slow(["mha", "gqa", "mqa"], "gqa"))
@pytest.mark.parametrize("side", mostly_slow(["left", "right"], "left"))
def test_greedy_equals_ordinary_decoding(kind, attention, side):
    model, batch = tiny_model(attention), jh.pack(ROWS, side=side)
    guess = heads(kind, model.config)
    made = speculate(model, guess, batch, max_new_tokens=NEW, tree=TREE)
    assert made.rows() == jh.generate(model, batch, max_new_tokens=NEW).rows()
    # The heads are right sometimes, or nothing was tested.
    assert made.accepted[:, 0].sum() > 0
    np.testing.assert_array_equal(made.lengths, made.steps + made.accepted.sum(1))
    assert made.tokens_per_step == pytest.approx(2 * NEW / made.steps.sum())
    assert (np.diff(made.acceptance) <= 0).all()


EDITS = {
    "mask": jh.mask_heads(CONFIG, [(0, 1), (2, 3)]),
    "decode": jh.offset_heads(CONFIG, np.full((3, 6, 8), 2.0, np.float32)).when("decode"),
    "prompt": jh.offset_heads(CONFIG, np.full((3, 6, 8), 2.0, np.float32)).when(
        np.arange(12) < np.array([[12], [7]])
    ),
    "logits": jh.Edits(logits=jh.Affine(offset=jnp.zeros((1, 1, 97)).at[..., 3].set(4.0))),
}


@pytest.mark.parametrize("name", mostly_slow(EDITS, "decode", "logits"))
def test_edits_act_as_in_ordinary_decoding(name):
    batch, edits = jh.pack(ROWS), EDITS[name]
    made = speculate(
        tiny_model(), heads(), batch, max_new_tokens=NEW, tree=TREE, edits=edits
    ).rows()
    assert made == jh.generate(tiny_model(), batch, max_new_tokens=NEW, edits=edits).rows()
    assert made != jh.generate(tiny_model(), batch, max_new_tokens=NEW).rows()


def test_learned_positions_end_where_the_context_ends():
    model = tiny_model(ropes=(None,), n_positions=20, context_length=20)
    prompt = tiny_tokens(1, 10)
    made = speculate(model, heads(), prompt, max_new_tokens=10, tree=Tree.of_widths((2, 1, 1)))
    assert made.rows() == jh.generate(model, prompt, max_new_tokens=10).rows()


def test_a_stop_token_ends_its_row_only():
    batch = jh.pack(ROWS)
    plain = jh.generate(tiny_model(), batch, max_new_tokens=NEW).rows()
    stop = plain[0][3]
    made = speculate(tiny_model(), heads(), batch, max_new_tokens=NEW, tree=TREE, stop=[stop])
    expected = jh.generate(tiny_model(), batch, max_new_tokens=NEW, stop=[stop])
    assert made.rows() == expected.rows()
    assert made.rows()[0] == plain[0][: plain[0].index(stop) + 1]
    np.testing.assert_array_equal(made.lengths, made.steps + made.accepted.sum(1))


@pytest.mark.parametrize("kind", mostly_slow(["medusa", "hydra", "hydra++"], "hydra++"))
def test_each_step_drafts_from_the_states_of_the_text_so_far(kind):
    """Steps counted by hand, with a whole forward pass and fresh states for each."""
    model, guess, tree, width = tiny_model(), heads(kind), Tree.of_widths((3, 1)), 40
    made = speculate(model, guess, np.asarray([ROWS[0]]), max_new_tokens=NEW, tree=tree)
    tokens, ends, block = made.rows()[0], Ends.of(model, None), guess.block(CONFIG)
    row, steps, accepted = list(ROWS[0]), 0, [0, 0]
    while tokens:
        mask = np.arange(width)[None] < len(row)
        out = model(np.asarray([row + [0] * (width - len(row))]), mask, taps="final")
        states = out.taps["final"]
        if block is not None:
            context, _ = block.begin(jnp.asarray(mask), None, "prefill", {}, {})
            states, _, _ = block.run(states, context, {}, None)
        last = len(row) - 1
        root = jnp.argmax(out.logits[:, last], axis=-1)
        nodes = np.asarray(draft(guess, ends, tree, root, states[:, last]))[0]
        ends_at = zip(tree.lines, tree.depth, strict=True)
        lines = [nodes[line[: depth + 1]].tolist() for line, depth in ends_at]
        kept = max(len(line) for line in lines if tokens[: len(line)] == line)
        steps += 1
        for head in range(kept - 1):
            accepted[head] += 1
        row, tokens = row + tokens[:kept], tokens[kept:]
    assert int(made.steps[0]) == steps < NEW
    assert made.accepted[0].tolist() == accepted


def test_a_small_draft_vocabulary_changes_the_drafts_only():
    vocabulary = jnp.arange(0, 97, 3)
    guess = heads(vocabulary=vocabulary)
    root, hidden = jnp.array([5]), jax.random.normal(jax.random.key(0), (1, 40))
    nodes = np.asarray(draft(guess, Ends.of(tiny_model(), vocabulary), TREE, root, hidden))
    assert nodes[0, 0] == 5 and set(nodes[0, 1:]) <= set(np.asarray(vocabulary).tolist())
    batch = jh.pack(ROWS)
    made = speculate(tiny_model(), guess, batch, max_new_tokens=NEW, tree=TREE)
    assert made.rows() == jh.generate(tiny_model(), batch, max_new_tokens=NEW).rows()


# Rules of acceptance


def test_typical_acceptance_follows_its_formula():
    logits = 3 * jax.random.normal(jax.random.key(0), (1, 3, 5))
    tokens, parent = jnp.array([[0, 1, 2]]), np.array([0, 0, 1])
    accepted, score = Typical()(logits, tokens, parent)
    p = np.asarray(jax.nn.softmax(logits, axis=-1))[0]
    for node in (1, 2):
        before = p[parent[node]]
        bound = min(0.09, 0.3 * np.exp((before * np.log(before)).sum()))
        assert bool(accepted[0, node]) == (before[tokens[0, node]] > bound)
        close(score[0, node], np.log(before[tokens[0, node]]))
    assert Typical() == Typical(epsilon=0.09, alpha=0.3, temperature=1.0)


def test_lenient_acceptance_keeps_whole_lines_and_takes_the_likeliest():
    made = speculate(
        tiny_model(), heads(), jh.pack(ROWS), max_new_tokens=12, tree=TREE,
        accept=Typical(epsilon=1e-9, alpha=1e-9),
    )  # fmt: skip
    assert made.tokens_per_step == 4 and made.steps.tolist() == [3, 3]
    # Of the eight whole lines of the first step, the likeliest under the model.
    row = ROWS[0] + made.rows()[0][:4]
    out = jax.nn.log_softmax(tiny_model()(np.asarray([row])).logits[0])
    states = tiny_model()(np.asarray([ROWS[0]]), taps="final").taps["final"][:, -1]
    ends = Ends.of(tiny_model(), None)
    nodes = np.asarray(draft(heads(), ends, TREE, jnp.asarray(row[12:13]), states))[0]
    scores = []
    for line in nodes[TREE.lines[TREE.depth == 3]]:
        given = jax.nn.log_softmax(tiny_model()(np.asarray([ROWS[0] + line.tolist()])).logits[0])
        scores.append(sum(float(given[11 + i, line[i]]) for i in (1, 2, 3)))
    mine = sum(float(out[11 + i, row[12 + i]]) for i in (1, 2, 3))
    assert mine == pytest.approx(max(scores), abs=1e-4) and len(set(scores)) > 1


def test_a_step_is_compiled_once():
    from jaxheads.decode import speculative

    guess, before = heads(), speculative._speculate._cache_size()
    for seed in (0, 1):
        prompt = tiny_tokens(1, 9, seed)
        speculate(tiny_model(), guess, prompt, max_new_tokens=4, tree=Tree.of_widths((2,)))
    assert speculative._speculate._cache_size() == before + 1


# The tree


def test_a_tree_knows_its_lines():
    tree = Tree(((0,), (), (1,), (0, 0), (1, 2)))
    assert tree.paths == ((), (0,), (1,), (0, 0), (1, 2))
    assert tree.depth.tolist() == [0, 1, 1, 2, 2]
    assert tree.parent.tolist() == [0, 0, 0, 1, 2]
    assert tree.lines.tolist() == [[0, 0, 0], [0, 1, 1], [0, 2, 2], [0, 1, 3], [0, 2, 4]]
    assert tree.ancestors.astype(int).tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1],
    ]  # fmt: skip
    second = tree.levels()[1]
    assert second.lines.tolist() == [[0, 1], [0, 2]]
    assert second.parents.tolist() == [0, 1] and second.ranks.tolist() == [0, 2]


def test_the_likeliest_tree():
    accuracies = np.array([[0.6, 0.2], [0.5, 0.1]])
    assert Tree.most_likely(accuracies, 4).paths == ((), (0,), (1,), (0, 0))
    assert Tree.most_likely(accuracies, 7).size == 7
    with pytest.raises(ValueError, match=r"size must lie in 1\.\.7, got 8"):
        Tree.most_likely(accuracies, 8)


# What the model is told: who sees whom


def test_a_tree_in_one_pass_equals_its_lines_alone():
    model, tree = tiny_model(), Tree.of_widths((2, 2))
    prompt, nodes = tiny_tokens(1, 5), tiny_tokens(1, tree.size, 2)
    cache = model(prompt, cache=empty_cache(CONFIG, 1, 20)).cache
    out = model(nodes, cache=cache, positions=5 + tree.depth[None], sees=tree.ancestors)
    for node, (line, depth) in enumerate(zip(tree.lines, tree.depth, strict=True)):
        alone = model(np.concatenate([prompt, nodes[:, line[: depth + 1]]], axis=1))
        close(out.logits[0, node], alone.logits[0, -1])


def test_a_prefix_sees_itself_and_what_follows_is_causal():
    model, tokens = tiny_model(), tiny_tokens(2, 9)
    plain = model(tokens).logits
    close(model(tokens, prefix=np.array([0, 1])).logits, plain)
    both = model(tokens, prefix=np.array([4, 9])).logits
    changed = tokens.copy()
    changed[:, 6] = (changed[:, 6] + 1) % 97
    moved = np.abs(model(changed, prefix=np.array([4, 9])).logits - both).max(-1) > 1e-6
    assert moved.tolist() == [[False] * 6 + [True] * 3, [True] * 9]
    # A prefix over all is a model that is not causal.
    free = jh.Transformer(CONFIG.replace(causal=False), model.params)
    close(both[1], free(tokens).logits[1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prefix_counts_real_tokens_and_is_cached(side):
    batch, prefix = jh.pack(ROWS, side=side), np.array([5, 7])
    cached = tiny_model()(batch, prefix=prefix, cache=empty_cache(CONFIG, 2, 20))
    for row, (tokens, count) in enumerate(zip(ROWS, prefix, strict=True)):
        alone = tiny_model()(np.asarray([tokens]), prefix=np.array([count])).logits[0]
        close(cached.logits[row][batch.mask[row]], alone)
    more = tiny_model()(np.full((2, 1), 8), cache=cached.cache, phase="decode").logits[:, 0]
    for row, (tokens, count) in enumerate(zip(ROWS, prefix, strict=True)):
        alone = tiny_model()(np.asarray([[*tokens, 8]]), prefix=np.array([count])).logits[0, -1]
        close(more[row], alone)


# Mistakes


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 60}, "exceed the model's context of 64"),
        ({"tree": Tree.of_widths((1,) * 4)}, "depth 4 needs as many heads, got 3"),
        ({"tree": Tree.of_widths((98,))}, "rank 97 of the tree is outside the 97 tokens"),
        ({"stop": [97]}, "stop token 97"),
        ({"heads": DraftHeads.new(CONFIG.replace(d_model=32), "hydra", 2, jax.random.key(0))},
         r"kernel of \(64, 32\), expected .* made for another one"),
        ({"model": tiny_model(windows=(4, 0, 4))}, r"without windows .* \[0, 4\]"),
    ],
)  # fmt: skip
def test_mistakes_are_named(change, told):
    given = {"model": tiny_model(), "heads": heads(), "prompts": tiny_tokens(1, 6)}
    with pytest.raises(ValueError, match=told):
        speculate(**(given | {"max_new_tokens": 4} | change))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Tree(((0,),)), "needs its root"),
        (lambda: Tree(((), (0, 0))), r"path \(0, 0\) has no parent"),
        (lambda: Tree(((), (-1,))), "ranks must be at least 0"),
        (lambda: Tree(((), ())), "paths must differ"),
        (lambda: Tree.of_widths((2, 0)), "widths must be at least 1"),
        (lambda: Typical(epsilon=0), "epsilon must be above 0 and at most 1, got 0"),
        (lambda: Typical(temperature=0), "temperature must be above 0, got 0"),
        (lambda: DraftHeads.new(CONFIG, "hydro", 2, jax.random.key(0)), "unknown kind 'hydro'"),
        (lambda: DraftHeads.new(CONFIG, "hydra", 0, jax.random.key(0)), "at least 1 draft head"),
    ],
)
def test_impossible_trees_rules_and_heads_are_named(make, told):
    with pytest.raises(ValueError, match=told):
        make()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"prefix": np.array([3])}, r"prefix has shape \(1,\), expected \(2,\)"),
        ({"prefix": np.array([3.0, 1.0])}, "prefix must be integers"),
        ({"prefix": np.array([3, 10])}, r"prefix must lie in 0\.\.9, got 3 to 10"),
        ({"prefix": np.array([3, 3]), "phase": "decode"}, "needs the prompt whole"),
        ({"prefix": np.array([3, 3]), "sees": np.eye(9, dtype=bool)}, "must not both be given"),
        ({"sees": np.eye(8, dtype=bool)}, r"sees has shape \(8, 8\)"),
        ({"sees": np.eye(9)}, "sees must be bool"),
        ({"positions": np.full((2, 9), 64)}, r"positions must lie in 0\.\.63"),
    ],
)
def test_impossible_sights_are_named(options, told):
    with pytest.raises(ValueError, match=told):
        tiny_model()(tiny_tokens(2, 9), **options)


def test_a_prefix_over_a_cache_with_tokens_is_refused():
    cache = tiny_model()(tiny_tokens(2, 4), cache=empty_cache(CONFIG, 2, 20)).cache
    with pytest.raises(ValueError, match="a cache that holds 4 slots: tokens that were read"):
        tiny_model()(tiny_tokens(2, 4), cache=cache, prefix=np.array([2, 2]))


def test_greedy_takes_the_most_likely_token():
    logits = jnp.array([[[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]]])
    accepted, _ = Greedy()(logits, jnp.array([[0, 1]]), np.array([0, 0]))
    assert accepted[0, 1]
