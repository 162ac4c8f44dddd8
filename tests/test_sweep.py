"""A sweep equals as many whole forward passes, whatever it shares between them."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import mostly_slow, tiny_model

import jaxheads as jh
from jaxheads.sweep import engine, plan
from jaxheads.sweep.metrics import as_metric
from jaxheads.sweep.pairs import first_difference
from jaxheads.sweep.points import Points
from jaxheads.sweep.step import Step, Stream

LENGTHS = (9, 12, 12)
DIFFERS = -4
"""The token, counted from the end, in which clean and corrupted prompts differ."""


def pair(side: str = "left") -> tuple[jh.Batch, jh.Batch]:
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 97, length) for length in LENGTHS]
    others = [
        np.concatenate([r[:DIFFERS], [(r[DIFFERS] + 5) % 97], r[DIFFERS + 1 :]]) for r in rows
    ]
    return jh.pack(rows, side=side), jh.pack(others, side=side)


CLEAN, CORRUPTED = pair()
METRIC = jh.LogitDifference.of(CLEAN, [1, 2, 3], [4, 5, 6])


@jax.jit
def measure(model: jh.Transformer, batch: jh.Batch, metric: jh.Metric, edits: jh.Edits | None):
    """The metric by a whole forward pass."""
    logits = model(batch, edits=edits, logits_at=metric.slots).logits
    if metric.tokens is not None:
        logits = jnp.take_along_axis(logits, jnp.asarray(metric.tokens)[:, None], axis=2)
    return metric(logits)


def changes(model, batch, metric, edits) -> np.ndarray:
    """float32 [N,B] by N whole forward passes."""
    unedited = measure(model, batch, metric, None)
    many = jax.jit(jax.vmap(lambda e: measure(model, batch, metric, e)))
    return np.asarray(many(jh.Edits.stack(edits)) - unedited)


HEADS = [(layer, head) for layer in range(3) for head in range(6)]


@pytest.mark.parametrize("how", ["zero", "mean", "resample", "uniform"])
@pytest.mark.parametrize("kind", mostly_slow(["mha", "gqa", "mqa"], "gqa"))
def test_ablating_heads_equals_whole_forward_passes(kind, how):
    if kind != "gqa" and how in ("mean", "resample"):
        pytest.skip("does not depend on the number of key/value heads")
    model = tiny_model(kind, windows=(0, 3, 0))
    source = CORRUPTED if how == "resample" else None
    found = jh.ablate_heads(model, CLEAN, METRIC, how, source=source, rows=True)
    if how == "resample":
        value = model(CORRUPTED, taps="z").taps["z"]
        edits = [jh.set_activation(model.config, "z", value, heads=[h]) for h in HEADS]
    else:
        means = jh.mean_activation(model, [CLEAN]) if how == "mean" else None
        edits = [jh.mask_heads(model.config, [h], how, means=means) for h in HEADS]
    expected = changes(model, CLEAN, METRIC, edits).reshape(3, 6, 3)
    assert found.axes == ("layer", "head", "row")
    np.testing.assert_allclose(found.values, expected, atol=1e-5)
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize("how", mostly_slow(["zero", "mean", "uniform"], "zero"))
def test_slots_that_all_rows_begin_with_are_computed_once(how):
    model = tiny_model(windows=(0, 3, 0))
    tokens = np.asarray(CLEAN.tokens).copy()
    tokens[:, :9] = tokens[1, :9]
    batch = jh.pack(tokens.tolist())
    assert engine.common_slots(batch) == 9
    assert engine.common_slots(CLEAN) == 0  # padding is nobody's
    metric = jh.TokenLoss.of(jh.Batch(tokens, batch.mask, np.arange(12) >= [[11], [10], [11]]))
    assert plan.worth_sharing(3, 9, "cpu") and not plan.worth_sharing(3, 1, "cpu")
    found = jh.ablate_heads(model, batch, metric, how, rows=True)
    means = jh.mean_activation(model, [batch]) if how == "mean" else None
    edits = [jh.mask_heads(model.config, [h], how, means=means) for h in HEADS]
    expected = changes(model, batch, metric, edits).reshape(3, 6, 3)
    np.testing.assert_allclose(found.values, expected, atol=1e-5)


METRICS = {
    "difference": METRIC,
    "divergence": lambda model: jh.Divergence.of(model, CLEAN),
    "token loss": lambda model: jh.TokenLoss.of(CLEAN),
    "function": lambda model: lambda logits: jax.nn.logsumexp(logits, axis=-1),
}


@pytest.mark.parametrize("name", mostly_slow(METRICS, "divergence", "function"))
def test_every_metric_is_that_of_whole_forward_passes(name):
    model = tiny_model()
    metric = METRICS[name] if name == "difference" else METRICS[name](model)
    found = jh.ablate_heads(model, CLEAN, metric, heads=[(0, 1), (2, 5)], rows=True)
    made = as_metric(model, CLEAN, metric)
    edits = [jh.mask_heads(model.config, [head]) for head in [(0, 1), (2, 5)]]
    got = np.stack([found.values[0, 1], found.values[2, 5]])
    np.testing.assert_allclose(got, changes(model, CLEAN, made, edits), atol=1e-5)
    assert np.isnan(found.values[1]).all()


PATCHES = {
    "z": ("layer", "head", "position"),
    "resid_pre": ("position", "layer"),
    "k": ("layer", "head"),
    "pattern": ("layer", "head", "position"),
    "neurons": ("layer", "neurons"),
    "attn_out": ("layer",),
}


@pytest.mark.parametrize("direction", mostly_slow(["noise", "denoise"], "noise"))
@pytest.mark.parametrize("site", mostly_slow(PATCHES, "z", "neurons"))
def test_patching_equals_whole_forward_passes(site, direction):
    model, over = tiny_model(windows=(0, 3, 0)), PATCHES[site]
    if direction == "denoise" and site not in ("z", "resid_pre"):
        pytest.skip("the direction swaps the runs, whatever the site")
    found = jh.patch(
        model, CLEAN, CORRUPTED, METRIC, site, over, direction=direction, neuron_groups=7, rows=True
    )
    run, source = (CLEAN, CORRUPTED) if direction == "noise" else (CORRUPTED, CLEAN)
    value = model(source, taps=site).taps[site]
    rng = np.random.default_rng(1)
    picked = [tuple(int(rng.integers(n)) for n in found.shape[:-1]) for _ in range(10)]
    edits = [jh.Edits({site: jh.Mix(value, weight(site, value, over, at))}) for at in picked]
    expected = changes(model, run, METRIC, edits)
    np.testing.assert_allclose([found.values[at] for at in picked], expected, atol=1e-5)
    assert np.abs(found.values).max() > 1e-2
    if "position" in over:
        same = first_difference(CLEAN, CORRUPTED, True)
        assert same > 0 and not np.take(found.values, range(same), over.index("position")).any()


def weight(site: str, value: jax.Array, over: tuple[str, ...], at: tuple[int, ...]) -> jax.Array:
    """1 at the part that is patched."""
    axes = ("L", *jh.SITES[site].axes)
    where = [slice(None)] * value.ndim
    for axis, index in zip(over, at, strict=True):
        if axis == "neurons":
            features = np.arange(value.shape[-1])
            where[-1] = np.flatnonzero(features * 7 // len(features) == index)
        else:
            names = {"layer": "L", "position": "T", "head": "HK"}[axis]
            where[next(i for i, a in enumerate(axes) if a in names)] = index
    return jnp.zeros(value.shape).at[tuple(where)].set(1)


def test_normalised_patching_of_everything_gives_the_other_run():
    model = tiny_model()
    found = jh.patch(model, CLEAN, CORRUPTED, METRIC, "resid_pre", ("layer",), normalised=True)
    np.testing.assert_allclose(found.values, 1, atol=1e-4)
    assert found.info["source"] == pytest.approx(
        float(measure(model, CLEAN, METRIC, None).mean()), abs=1e-5
    )


@pytest.mark.slow
def test_right_padding_gives_what_left_padding_gives():
    model = tiny_model()
    clean, corrupted = pair("right")
    metric = jh.LogitDifference.of(clean, [1, 2, 3], [4, 5, 6])
    for call in (jh.ablate_heads, None):
        if call is None:
            left = jh.patch(model, CLEAN, CORRUPTED, METRIC)
            right = jh.patch(model, clean, corrupted, metric)
        else:
            left, right = call(model, CLEAN, METRIC), call(model, clean, metric)
        np.testing.assert_allclose(left.values, right.values, atol=1e-5)


STRENGTHS = [0.5, -1.0, 2.0]


def mixed_edits(config: jh.ModelConfig) -> list[jh.Edits]:
    """Edits that begin in different layers, act in several, and outside the stack."""
    made = []
    for layer, strength in enumerate(STRENGTHS):
        vector = np.linspace(-1, 1, config.d_model)
        made.append(
            jh.steer(config, {layer: vector}, strength=strength)
            | jh.mask_heads(config, [(2, layer)])
            | jh.Edits(final=jh.Affine(scale=jnp.full((1, 1, 1), 1 + strength / 10)))
            | jh.Edits(logits=jh.Affine(offset=jnp.arange(97.0)[None, None] * strength / 100))
        )
    return made


def test_any_stack_of_edits():
    model = tiny_model()
    edits = mixed_edits(model.config)
    found = jh.sweep(model, CLEAN, METRIC, edits, labels=STRENGTHS, rows=True)
    expected = changes(model, CLEAN, METRIC, edits)
    np.testing.assert_allclose(found.values, expected, atol=1e-5)
    assert found.labels[0] == tuple(STRENGTHS)
    embedded = [jh.Edits(embed=jh.Affine(offset=jnp.full((1, 1, 1), s))) for s in STRENGTHS]
    found = jh.sweep(model, CLEAN, METRIC, jh.Edits.stack(embedded), rows=True)
    np.testing.assert_allclose(found.values, changes(model, CLEAN, METRIC, embedded), atol=1e-5)


@pytest.mark.slow
def test_edits_restricted_to_tokens_and_projections_sweep_too():
    model = tiny_model()
    tokens = np.zeros((3, 12), bool)
    tokens[:, -2:] = True
    edits = [
        jh.project_out(model.config, np.eye(40)[layer], layers=[layer]).when(tokens)
        for layer in range(3)
    ]
    found = jh.sweep(model, CLEAN, METRIC, edits, rows=True)
    np.testing.assert_allclose(found.values, changes(model, CLEAN, METRIC, edits), atol=1e-5)


def test_an_edit_that_changes_nothing_has_no_effect():
    model = tiny_model()
    found = jh.sweep(model, CLEAN, METRIC, [jh.Edits.identity(model.config, "z")] * 2)
    np.testing.assert_allclose(found.values, 0, atol=1e-6)


def test_a_sweep_over_layers_starts_where_the_edits_do(monkeypatch):
    model = tiny_model()
    waves = []
    monkeypatch.setattr(
        engine, "plan", lambda *a, **k: waves.extend(plan.plan(*a, **k)) or waves[-1:]
    )
    jh.sweep(model, CLEAN, METRIC, [jh.mask_heads(model.config, [(2, h)]) for h in range(6)])
    (wave,) = waves
    assert list(wave.steps) == [(2, 0, 6)]


OTHER_BLOCKS = ("bidirectional", "post", "parallel", "learned positions")


@pytest.mark.parametrize("family", mostly_slow(OTHER_BLOCKS, "bidirectional"))
def test_other_blocks(family):
    fields = {
        "bidirectional": {"causal": False, "head": "mlm"},
        "post": {"norm_place": "post", "norm": "layer", "norm_bias": True, "final_norm": False},
        "parallel": {"parallel": True, "norm": "layer", "norm_bias": True},
        "learned positions": {"n_positions": 64, "ropes": (None,)},
    }[family]
    model = tiny_model("mha", **fields)
    found = jh.ablate_heads(model, CLEAN, METRIC, heads=[(1, 2), (2, 3)], rows=True)
    edits = [jh.mask_heads(model.config, [head]) for head in [(1, 2), (2, 3)]]
    got = np.stack([found.values[1, 2], found.values[2, 3]])
    np.testing.assert_allclose(got, changes(model, CLEAN, METRIC, edits), atol=1e-5)


def test_one_program_for_every_layer_and_batch(monkeypatch):
    model = tiny_model()
    chex.clear_trace_counter()
    counted = {
        name: jax.jit(
            chex.assert_max_traces(getattr(engine, name).__wrapped__, n=1), static_argnames=static
        )
        for name, static in {
            "_move": ("start", "chunk", "mesh"),
            "_read": ("start", "chunk", "reads", "mesh"),
        }.items()
    }
    for name, function in counted.items():
        monkeypatch.setattr(engine, name, function)
    first = jh.ablate_heads(model, CLEAN, METRIC)
    metric = jh.LogitDifference.of(CORRUPTED, [7, 8, 9], [1, 2, 3])
    second = jh.ablate_heads(model, CORRUPTED, metric)
    assert not np.allclose(first.values, second.values)


def test_a_small_budget_gives_the_same_in_more_waves():
    model = tiny_model()
    shape = engine.shape_of(model, CLEAN, METRIC)
    small = 5 * shape.stream_bytes(12) + 2 * shape.step_bytes(12)
    whole = jh.ablate_heads(model, CLEAN, METRIC)
    parts = jh.ablate_heads(model, CLEAN, METRIC, memory_budget=small)
    np.testing.assert_allclose(parts.values, whole.values, atol=1e-6)
    layer = np.repeat(np.arange(3), 6)
    waves = plan.plan(layer, 0 * layer, shape, budget=small, lanes=1, platform="cpu")
    assert len(waves) > 1
    for wave in waves:
        held = wave.grid.size * shape.stream_bytes(12) + wave.chunk * shape.step_bytes(12)
        assert held <= small


def test_every_point_is_in_the_plan_once():
    rng = np.random.default_rng(0)
    layer, slot = rng.integers(0, 3, 50), rng.integers(0, 12, 50)
    shape = engine.shape_of(tiny_model(), CLEAN, METRIC)
    for lanes in (1, 4):
        waves = plan.plan(layer, slot, shape, budget=2**30, lanes=lanes, platform="cpu")
        assert len({wave.start for wave in waves}) <= plan.WINDOWS
        found = np.concatenate([wave.grid[wave.real] for wave in waves])
        np.testing.assert_array_equal(np.sort(found), np.arange(50))
        for wave in waves:
            edges = np.cumsum(wave.entering)
            for row in range(edges[-1]):
                real = wave.real[:, row]
                begins = np.searchsorted(edges, row, side="right")
                assert (layer[wave.grid[real, row]] == begins).all()
            assert (slot[wave.grid[wave.real]] >= min(wave.start, 11)).all()


def test_flops_of_the_program_are_those_on_paper():
    """One step on a chunk costs what the plan says, by XLA's own count."""
    model = tiny_model(d_model=64, d_mlp=256, n_heads=4, n_kv_heads=2, head_dim=16)
    shape = engine.shape_of(model, CLEAN, METRIC)
    prefix = engine.run_prefix(model, CLEAN, METRIC, windowed=False)
    none = np.zeros(0, np.int32)
    points = Points(none, none, none, entering=lambda *_: {})
    step = Step.at(model, prefix, points, jnp.asarray(1), 0)
    x = jnp.zeros((5, 3, 12, 64))
    cost = (
        jax.jit(jax.vmap(lambda x: step.through(Stream(x), None)))
        .lower(x)
        .compile()
        .cost_analysis()
    )
    assert cost["flops"] == pytest.approx(5 * shape.block_flops(12), rel=0.15)


def broken_model(layer: int) -> jh.Transformer:
    """Scaling the queries of this layer by zero makes a NaN there and nowhere else."""
    model = tiny_model()
    params = jax.tree.map(lambda leaf: leaf, model.params)
    params["blocks"]["mlp"]["down"] = params["blocks"]["mlp"]["down"].at[layer].set(jnp.nan)
    return jh.Transformer(model.config, params)


def test_a_nan_names_where_it_appears():
    with pytest.raises(ValueError, match=r"unedited model gives NaN.*layer 1, in the MLP"):
        jh.ablate_heads(broken_model(1), CLEAN, METRIC)
    model = tiny_model()
    scale = np.ones((3, 6), np.float32)
    scale[1, 4] = np.nan
    edits = [jh.scale_heads(model.config, np.ones((3, 6))), jh.scale_heads(model.config, scale)]
    with pytest.raises(ValueError, match=r"1 of 2 edits.*appears first in layer 1, head 4 \(z\)"):
        jh.sweep(model, CLEAN, METRIC, edits)
    with pytest.raises(ValueError, match="finite logits"):
        jh.ablate_heads(model, CLEAN, lambda logits: jnp.log(logits[:, 0] * 0 - 1))


def wrong(call, message: str):
    return pytest.param(call, message, id=message[:40])


MODEL = tiny_model()
SHORT = jh.pack([[1, 2, 3]] * 3)


@pytest.mark.parametrize(
    "call, message",
    [
        wrong(lambda: jh.sweep(MODEL, CLEAN, METRIC, []), "no edits"),
        wrong(lambda: jh.sweep(MODEL, CLEAN, METRIC, jh.Edits()), "empty or not stacked"),
        wrong(
            lambda: jh.sweep(MODEL, CLEAN, METRIC, jh.mask_heads(MODEL.config, [(0, 0)])),
            "without the leading axis of 3 does not fit",
        ),
        wrong(
            lambda: jh.sweep(
                MODEL, CLEAN, METRIC, [jh.mask_heads(MODEL.config, [(0, 0)])], labels=["a", "b"]
            ),
            "2 labels were given for 1 edits",
        ),
        wrong(lambda: jh.ablate_heads(MODEL, CLEAN, METRIC, heads=[]), "no heads"),
        wrong(lambda: jh.ablate_heads(MODEL, CLEAN, METRIC, heads=[(0, 1)] * 2), "named twice"),
        wrong(lambda: jh.ablate_heads(MODEL, CLEAN, METRIC, heads=[(0, 9)]), "out of range"),
        wrong(lambda: jh.ablate_heads(MODEL, CLEAN, METRIC, "zeros"), "Did you mean 'zero'"),
        wrong(lambda: jh.ablate_heads(MODEL, CLEAN, METRIC, "resample"), "source is needed"),
        wrong(
            lambda: jh.ablate_heads(MODEL, CLEAN, METRIC, "mean", means=np.zeros((3, 6))),
            "means has shape",
        ),
        wrong(
            lambda: jh.ablate_heads(MODEL, CLEAN, METRIC, memory_budget=1000), "too small: one edit"
        ),
        wrong(lambda: jh.ablate_heads(MODEL, CLEAN, lambda logits: logits), "one float per row"),
        wrong(lambda: jh.ablate_heads(MODEL, CLEAN, lambda logits: logits.sum()), "one float per"),
        wrong(lambda: jh.ablate_heads(MODEL, SHORT, METRIC), "reads slot 11 of rows of 3"),
        wrong(lambda: jh.LogitDifference.of(CLEAN, [1, 2]), "answers must be token ids"),
        wrong(lambda: jh.LogitDifference.of(CLEAN, [1, 2, -1]), "no token for row 2"),
        wrong(
            lambda: jh.ablate_heads(MODEL, CLEAN, jh.LogitDifference.of(CLEAN, [1, 2, 97])),
            "outside the vocabulary",
        ),
        wrong(lambda: jh.patch(MODEL, CLEAN, SHORT, METRIC), "pairs of one shape"),
        wrong(
            lambda: jh.patch(
                MODEL, CLEAN, dataclasses.replace(CLEAN, mask=CLEAN.mask | True), METRIC
            ),
            "row 0 has 9 and 12 tokens",
        ),
        wrong(lambda: jh.patch(MODEL, CLEAN, CORRUPTED, METRIC, "zz"), "unknown site 'zz'"),
        wrong(lambda: jh.patch(MODEL, CLEAN, CORRUPTED, METRIC, "embed"), "unknown site 'embed'"),
        wrong(lambda: jh.patch(MODEL, CLEAN, CORRUPTED, METRIC, over=("layers",)), "unknown axis"),
        wrong(lambda: jh.patch(MODEL, CLEAN, CORRUPTED, METRIC, over=("head",)), "'layer' among"),
        wrong(
            lambda: jh.patch(MODEL, CLEAN, CORRUPTED, METRIC, "attn_out", ("layer", "head")),
            "has no axis 'head'",
        ),
        wrong(
            lambda: jh.patch(MODEL, CLEAN, CORRUPTED, METRIC, heads=[(0, 6)]), "head 0.6 is out of"
        ),
        wrong(lambda: jh.patch(MODEL, CLEAN, CORRUPTED, METRIC, positions=[1]), "positions can be"),
        wrong(lambda: jh.patch(MODEL, CLEAN, CORRUPTED, METRIC, layers=[3]), "layer 3 is out of"),
        wrong(lambda: jh.patch(MODEL, CLEAN, CLEAN, METRIC, normalised=True), "in both runs"),
        wrong(
            lambda: jh.patch(
                MODEL, CLEAN, CORRUPTED, METRIC, "neurons", ("layer", "neurons"), neuron_groups=0
            ),
            "neuron_groups",
        ),
    ],
)
def test_wrong_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_progress_is_told_to_the_end():
    seen = []
    jh.ablate_heads(
        MODEL, CLEAN, METRIC, on_progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
