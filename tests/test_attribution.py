"""First-order attribution against plain gradients, exact sweeps and its own axioms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from tiny import close, mostly_slow, tiny_model, tiny_tokens

import jaxheads as jh
from jaxheads.sites import find_site
from jaxheads.sweep import LogitDifference, Rank, ablate_heads, patch
from jaxheads.sweep.agreement import agreement
from jaxheads.sweep.attribution import (
    _lend,
    attribution_patching,
    head_importance,
    integrated_gradients,
)
from jaxheads.sweep.named import NamedArray
from jaxheads.sweep.strength import Parts, _sums, at_start, measure
from jaxheads.tasks import encode_pairs, ioi

MODEL = tiny_model()
GROUPS = 7
LAYERS, SLOTS, DIFFERENT = 3, 9, 3
"""The runs differ from slot DIFFERENT on, counted with padding on the right."""


def pair(side: str) -> tuple[jh.Batch, jh.Batch]:
    """Rows of 9 and 7 tokens."""
    tokens = tiny_tokens(2, SLOTS)
    other = tokens.copy()
    other[:, DIFFERENT] = (other[:, DIFFERENT] + 5) % 97
    other[1, 5] = (other[1, 5] + 7) % 97
    clean, corrupted = (jh.pack([[*x[0]], [*x[1, :7]]], side=side) for x in (tokens, other))
    return clean, corrupted


def metric_of(batch: jh.Batch) -> LogitDifference:
    return LogitDifference.of(batch, np.array([5, 6]), np.array([[7, 9], [8, -1]]))


CLEAN, CORRUPTED = pair("right")
METRIC = metric_of(CLEAN)
SHAPES = {"z": 5, "mlp_out": 4}
"""Sites with the number of axes of their edits."""
REMOVED = jh.Edits(z=jh.Affine(scale=jnp.zeros((1,) * 5)))


@jax.jit
def gradient_at(model, batch, offset):
    """d metric / d value of a site, by adding an offset there; offset maps site to zeros."""

    def total(offset):
        edits = jh.Edits({site: jh.Affine(offset=leaf) for site, leaf in offset.items()})
        return measure(model, batch, METRIC, edits).sum()

    return jax.grad(total)(offset)


@pytest.mark.parametrize(
    ("site", "over"),
    [
        ("z", ("layer", "head")),
        pytest.param(*("k", ("position", "layer", "head")), marks=pytest.mark.slow),
        pytest.param(*("pattern", ("head", "layer", "position")), marks=pytest.mark.slow),
        ("resid_pre", ("layer", "position")),
        pytest.param(*("mlp_out", ("layer",)), marks=pytest.mark.slow),
        ("neurons", ("neurons", "layer", "position")),
    ],
)
def test_attribution_is_the_difference_of_the_runs_times_the_gradient(site, over):
    found = attribution_patching(
        MODEL, CLEAN, CORRUPTED, METRIC, site, over, neuron_groups=GROUPS, rows=True
    )
    ours, theirs = (MODEL(batch, taps=site).taps[site] for batch in (CORRUPTED, CLEAN))
    slope = gradient_at(MODEL, CORRUPTED, {site: jnp.zeros_like(ours)})[site]
    product = np.asarray((theirs - ours) * slope, np.float64)
    if "neurons" in over:
        ends = np.searchsorted(np.arange(56) * GROUPS // 56, np.arange(GROUPS))
        product = np.add.reduceat(product, ends, axis=-1)
    called = {"L": "layer", "B": "row", "T": "position", "H": "head", "K": "head", "F": "neurons"}
    names = ["layer", *(called.get(axis, "") for axis in find_site(site).axes)]
    kept = (*over, "row")
    product = product.sum(tuple(i for i, name in enumerate(names) if name not in kept))
    names = [name for name in names if name in kept]
    assert found.axes == kept
    close(found.values, product.transpose([names.index(name) for name in kept]))
    assert np.abs(product).max() > 1e-3


def test_attribution_equals_a_forward_derivative():
    found = attribution_patching(MODEL, CLEAN, CORRUPTED, METRIC, rows=True)
    z = MODEL(CLEAN, taps="z").taps["z"]

    def moved(weight):
        edits = jh.Edits(z=jh.Mix(z, weight))
        return measure(MODEL, CORRUPTED, METRIC, edits)

    head = jnp.zeros((3, 1, 1, 6, 1)).at[1, :, :, 4].set(1)
    _, slope = jax.jit(lambda: jax.jvp(moved, (jnp.zeros_like(head),), (head,)))()
    close(found[1, 4], slope)


@pytest.mark.parametrize("direction", mostly_slow(["denoise", "noise"], "noise"))
def test_it_is_exact_where_the_metric_is_linear(direction):
    # Nothing follows the last MLP but the unembedding.
    model = tiny_model(norm_place="branch", final_norm=False)
    options = {"direction": direction, "layers": [2], "normalised": True}
    args = (model, CLEAN, CORRUPTED, METRIC, "mlp_out", ("position", "layer"))
    exact = patch(*args, **options)
    found = attribution_patching(*args, **options)
    assert (found.axes, found.labels) == (exact.axes, exact.labels)
    close(found.values, exact.values)
    np.testing.assert_array_equal(np.isnan(found.values), np.isnan(exact.values))
    assert np.nanmax(np.abs(exact.values)) > 0.1


def test_padding_changes_nothing():
    over = ("layer", "head", "position")
    right = attribution_patching(MODEL, CLEAN, CORRUPTED, METRIC, "z", over, rows=True)
    clean, corrupted = pair("left")
    left = attribution_patching(MODEL, clean, corrupted, metric_of(clean), "z", over, rows=True)
    close(left[..., 0], right[..., 0])
    close(left[..., 2:, 1], right[..., :-2, 1])
    assert not left[..., :2, 1].any() and not right[..., -2:, 1].any()


def test_what_is_the_same_in_both_runs_gets_exactly_nothing():
    over = ("layer", "position")
    found = attribution_patching(MODEL, CLEAN, CORRUPTED, METRIC, "resid_pre", over)
    exact = patch(MODEL, CLEAN, CORRUPTED, METRIC, "resid_pre", over)
    np.testing.assert_array_equal(found.values == 0, exact.values == 0)
    assert not found[:, :DIFFERENT].any() and found[:, DIFFERENT].all()


@pytest.mark.slow
def test_integrated_along_one_layer_the_parts_sum_to_the_exact_effect_of_the_layer():
    errors = []
    z = MODEL(CLEAN, taps="z").taps["z"]
    whole = jh.Edits(z=jh.Mix(z, jnp.zeros((3, 1, 1, 1, 1)).at[1].set(1)))
    unedited, edited = (measure(MODEL, CORRUPTED, METRIC, e) for e in (jh.Edits(), whole))
    for steps in (1, 6):
        found = attribution_patching(
            MODEL, CLEAN, CORRUPTED, METRIC, steps=steps, layers=[1], rows=True
        )
        assert np.isnan(found[[0, 2]]).all()
        errors.append(float(np.abs(found[1].sum(axis=0) - (edited - unedited)).max()))
    assert found.info["unedited"] == pytest.approx(float(unedited.mean()), abs=1e-5)
    assert errors[1] < 1e-5 < 1e-3 < errors[0]


def test_integrated_gradients_are_complete_and_the_gap_falls_with_steps():
    half = {site: jh.Affine(scale=jnp.full((1,) * axes, 0.5)) for site, axes in SHAPES.items()}
    edits = jh.Edits(half)
    gaps = []
    for steps in (1, 8):
        found = integrated_gradients(MODEL, CLEAN, METRIC, edits, steps=steps)
        info = found["z"].info
        change = measure(MODEL, CLEAN, METRIC, edits) - measure(MODEL, CLEAN, METRIC, jh.Edits())
        assert info["edited"] - info["unedited"] == pytest.approx(float(change.mean()), abs=1e-5)
        total = found["z"].values.sum() + found["mlp_out"].values.sum()
        assert info["gap"] == pytest.approx(float(change.mean()) - total, abs=1e-5)
        gaps.append(abs(info["gap"]))
    assert found["z"].axes == ("layer", "head") and found["mlp_out"].axes == ("layer",)
    assert gaps[1] < 1e-5 < 1e-2 < gaps[0]


def test_integrated_gradients_of_the_embedding_are_per_token():
    edits = jh.Edits(embed=jh.Affine(scale=jnp.full((1, 1, 1), 0.5)))
    found = integrated_gradients(MODEL, CLEAN, METRIC, edits, rows=True, steps=8)["embed"]
    assert found.axes == ("position", "row") and found.shape == (SLOTS, 2)
    assert abs(found.info["gap"]) < 1e-4
    assert not found[-2:, 1].any() and np.abs(found[:7]).min() > 0


@pytest.mark.slow
def test_integrated_gradients_are_compared_with_each_part_alone():
    found = integrated_gradients(MODEL, CLEAN, METRIC, REMOVED, steps=8, exact=True)["z"]
    alone = ablate_heads(MODEL, CLEAN, METRIC)
    said, expected = found.info["agreement"], agreement(found, alone).as_dict()
    assert said["largest_error"] == pytest.approx(expected["largest_error"], abs=1e-5)
    assert said["spearman"] == pytest.approx(expected["spearman"])


def test_head_importance_takes_each_row_apart():
    found = head_importance(MODEL, CLEAN, METRIC, exact=True)

    def slope(row: int) -> np.ndarray:
        one = jh.Batch(CLEAN.tokens[row : row + 1], CLEAN.mask[row : row + 1])
        metric = jax.tree.map(lambda leaf: leaf[row : row + 1], METRIC)

        def total(scale):
            return measure(MODEL, one, metric, jh.Edits(z=jh.Affine(scale=scale))).sum()

        return np.asarray(jax.jit(jax.grad(total))(jnp.ones((3, 1, 1, 6, 1))))[:, 0, 0, :, 0]

    slopes = np.stack([slope(row) for row in range(2)])
    close(found.values, np.abs(slopes).mean(axis=0))
    assert np.abs(np.abs(slopes.mean(axis=0)) - found.values).max() > 1e-2
    removed = np.abs(ablate_heads(MODEL, CLEAN, METRIC, rows=True).values).mean(axis=-1)
    assert found.info["agreement"]["mean_error"] == pytest.approx(
        np.abs(removed - found.values).mean(), abs=1e-5
    )
    level = head_importance(MODEL, CLEAN, METRIC, normalised=True)
    close(np.linalg.norm(level.values, axis=1), np.ones(3))
    close(level.values * np.linalg.norm(found.values, axis=1, keepdims=True), found.values)


def test_attribution_patching_reports_its_error():
    args = (MODEL, CLEAN, CORRUPTED, METRIC, "z", ("head", "layer"))
    found = attribution_patching(*args, exact=True)
    expected = agreement(found, patch(*args))
    assert found.info["agreement"] == expected.as_dict()
    assert 0.5 < expected.spearman < 1 and expected.largest_error > 0


def test_all_heads_cost_less_than_two_forward_and_backward_passes():
    def flops(function, *args, **static):
        return function.lower(*args, **static).compile().cost_analysis()["flops"]

    def run(model, batch, offset):
        edits = jh.Edits(embed=jh.Affine(offset=offset))
        return jax.grad(lambda e: measure(model, batch, METRIC, e).sum())(edits)

    once = flops(jax.jit(run), MODEL, CLEAN, jnp.zeros((2, SLOTS, 40)))
    edits = jh.Edits(z=jh.Mix(MODEL(CLEAN, taps="z").taps["z"], jnp.ones((1,) * 5)))
    edits = edits.when(np.asarray(CLEAN.mask))
    parts = (Parts("z", ("layer", "head", "position")),)
    total = flops(_lend, MODEL, CLEAN, METRIC, site="z")
    total += flops(_sums, MODEL, CORRUPTED, METRIC, edits, *at_start(MODEL.config), parts=parts)
    assert total < 2 * once


def test_agreement_counts_what_it_says():
    axes, labels = ("layer", "head"), ((0, 1), (0, 1, 2))
    a = np.array([[3.0, 1.0, 1.0], [-4.0, np.nan, 0.5]])
    b = np.array([[2.0, 1.5, 0.0], [-4.5, 9.0, np.nan]])
    first, second = (NamedArray(name, part, axes, labels) for name, part in (("a", a), ("b", b)))
    found = agreement(first, second, top=2)
    both = np.array([[3, 1, 1, -4], [2, 1.5, 0, -4.5]])
    assert (found.entries, found.top, found.overlap) == (4, 2, 1.0)
    assert found.pearson == pytest.approx(np.corrcoef(both)[0, 1])
    assert found.spearman == pytest.approx(scipy.stats.spearmanr(*both).statistic)
    assert (found.largest_error, found.mean_error) == (1.0, 0.75)
    constant = NamedArray("c", np.full((2, 3), 0.1), axes, labels)
    assert agreement(first, constant).as_dict()["spearman"] is None
    with pytest.raises(ValueError, match="axis 'head'"):
        agreement(first, NamedArray("d", a, axes, ((0, 1), (0, 1, 3))))
    with pytest.raises(ValueError, match="cannot compare axes"):
        agreement(first, NamedArray("d", a.T, axes[::-1], labels[::-1]))
    with pytest.raises(ValueError, match="top must be at least 1"):
        agreement(first, second, top=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "zz"}, "unknown site 'zz'"),
        ({"site": "embed"}, "unknown site 'embed'"),
        ({"site": "resid_pre"}, "has no axis 'head'"),
        ({"over": ("head",)}, "'layer' among them"),
        ({"direction": "back"}, "unknown direction"),
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"layers": [3]}, "layer 3 is out of range"),
        ({"layers": []}, "nothing to patch"),
        ({"site": "neurons", "over": ("layer", "neurons"), "neuron_groups": 57}, "1..56, got 57"),
        ({"metric": Rank.of(CLEAN, np.array([5, 6]))}, "Rank has no derivative"),
        ({"corrupted": CLEAN, "normalised": True}, "cannot normalise"),
        ({"corrupted": jh.pack([[1, 2]])}, "pairs of one shape"),
        ({"metric": lambda logits: jnp.sqrt(logits[:, 0] * 0)}, "derivative .* is NaN at z"),
    ],
)
def test_bad_input_of_attribution_patching(options, message):
    given = {"clean": CLEAN, "corrupted": CORRUPTED, "metric": METRIC} | options
    with pytest.raises(ValueError, match=message):
        attribution_patching(MODEL, **given)


@pytest.mark.parametrize(
    ("edits", "options", "message"),
    [
        (jh.Edits(), {}, "no edits"),
        (REMOVED, {"steps": 0}, "steps must be at least 1, got 0"),
        (REMOVED, {"over": ("layer", "neurons")}, "has no axis 'neurons'"),
        (jh.Edits(logits=jh.Affine()), {}, "unknown site 'logits'"),
        (jh.Edits(embed=jh.Affine()), {"over": ("head",)}, "unknown axis of embed 'head'"),
        (jh.Edits(embed=jh.Affine()), {"exact": True}, "unknown site 'embed'"),
    ],
)
def test_bad_input_of_integrated_gradients(edits, options, message):
    with pytest.raises(ValueError, match=message):
        integrated_gradients(MODEL, CLEAN, METRIC, edits, **options)


def test_a_model_that_gives_nan_is_told_where():
    params = jax.tree.map(lambda leaf: leaf, MODEL.params)
    params["blocks"]["attn"]["v"] = params["blocks"]["attn"]["v"].at[1, :, 1].set(jnp.nan)
    broken = jh.Transformer(MODEL.config, params)
    with pytest.raises(ValueError, match="first in layer 1, head 3"):
        head_importance(broken, CLEAN, METRIC)


@pytest.fixture(scope="module")
def ioi_pairs(smollm2):
    model, tokenizer = smollm2
    pairs = encode_pairs(ioi(4, seed=0, template="went"), tokenizer)
    metric = LogitDifference.of(pairs.clean, pairs.answers, pairs.wrong)
    return model, pairs.clean, pairs.corrupted, metric


@pytest.mark.slow
def test_smollm2_heads_are_ranked_as_by_patching(ioi_pairs):
    found = attribution_patching(*ioi_pairs, exact=True).info["agreement"]
    assert found["entries"] == 270
    assert found["spearman"] > 0.95 and found["pearson"] > 0.95 and found["overlap"] >= 0.8


@pytest.mark.slow
def test_smollm2_integrated_gradients_mend_what_a_saturated_norm_breaks(ioi_pairs):
    options = {"site": "resid_pre", "over": ("layer", "position"), "layers": [4, 12, 20]}
    plain, path = (
        attribution_patching(*ioi_pairs, **options, steps=steps, exact=True).info["agreement"]
        for steps in (0, 5)
    )
    assert path["mean_error"] < 0.2 * plain["mean_error"]
    assert path["pearson"] > 0.95 > 0.5 > plain["pearson"]


@pytest.mark.slow
def test_smollm2_important_heads_matter_more_than_random_ones(ioi_pairs):
    model, clean, _, metric = ioi_pairs
    best = [labels for labels, _ in head_importance(model, clean, metric).top(10)]
    others = [(n // 9, n % 9) for n in range(270) if (n // 9, n % 9) not in best]
    rng = np.random.default_rng(0)
    random = [[others[n] for n in rng.choice(len(others), 10, False)] for _ in range(5)]

    def change(heads):
        edits = jh.mask_heads(model.config, heads)
        return float(abs(measure(model, clean, metric, edits).mean() - unedited))

    unedited = measure(model, clean, metric, jh.Edits()).mean()
    assert change(best) > 1.5 * max(change(heads) for heads in random)


def test_agreement_of_plain_numbers():
    exact = np.array([1.0, 2.0, 3.0, 4.0])
    assert agreement(2 * exact, exact).pearson == pytest.approx(1)
    assert agreement(-np.exp(exact), exact).spearman == pytest.approx(-1)
    # Ties share the mean of their ranks: 1.5, 1.5, 3 against 1, 2, 3.
    assert agreement(np.array([5.0, 5, 9]), exact[:3]).spearman == pytest.approx(0.8660254)
    with pytest.raises(ValueError, match="cannot compare shapes"):
        agreement(exact, exact[:3])
