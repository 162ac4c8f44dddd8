"""The denoiser: its condition as edits, routing of its heads, its training."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import close

import jaxheads as jh
from jaxheads.cli.app import main
from jaxheads.data.rows import ArrayRows
from jaxheads.edits import Edits, mixture_of_heads
from jaxheads.methods.denoiser import (
    Denoiser,
    Sampling,
    Setup,
    denoising_loss,
    starting_condition,
)
from jaxheads.methods.diffusion import NoiseSchedule
from jaxheads.methods.dit import (
    conditioned,
    dit_config,
    from_patches,
    grid_positions,
    new_condition,
    none_of,
    predict_noise,
)
from jaxheads.methods.image_samples import (
    DRAWS,
    ROWS,
    Weights,
    measured_rows,
    row_losses,
    sample,
)
from jaxheads.methods.image_shape import Shape
from jaxheads.methods.measure import apply, in_parts
from jaxheads.methods.method import ImageData, TextData, Tuned
from jaxheads.methods.moh import Routed
from jaxheads.methods.variants import split_variant
from jaxheads.model.config import Image
from jaxheads.model.parameters import flatten
from jaxheads.train.fit import Fit
from jaxheads.train.job import Job
from jaxheads.train.optimizer import Optimizer

SHAPE = Shape(n_layers=2, n_heads=4, d_model=16, d_mlp=32)
CONFIG = dit_config(SHAPE, (8, 8, 1))
TIMES, CLASSES = np.array([0, 400, 999]), np.array([2, 0, 3])


def noise_like(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def weights(*, fresh: bool = False) -> Weights:
    """A denoiser of three classes; unless fresh, with nothing left at zero."""
    condition = new_condition(CONFIG, 3, jax.random.key(1))
    if not fresh:
        leaves, tree = jax.tree.flatten(condition)
        keys = jax.random.split(jax.random.key(2), len(leaves))
        moved = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
        condition = jax.tree.unflatten(tree, moved)
    return Weights(jh.Transformer.random(CONFIG, jax.random.key(0)), condition)


def digits(count: int = 24, seed: int = 0) -> ImageData:
    """Three classes of images that are easy to tell apart."""
    random = np.random.default_rng(seed)
    classes = np.arange(count, dtype=np.int32) % 3
    images = np.full((count, 8, 8, 1), -1, np.float32)
    for image, one in zip(images, classes, strict=True):
        image[2 * one : 2 * one + 3] = 0.9
    images += 0.05 * random.standard_normal(images.shape).astype(np.float32)
    rows = ArrayRows((images, classes))
    return ImageData(rows, rows, 3)


def predicted(w: Weights, times=TIMES, classes=CLASSES, **options):
    return predict_noise(w.model, w.condition, noise_like(3, 8, 8, 1), times, classes, **options)


# --- The condition ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoiseSchedule(steps=0), "noise.steps must be at least 1, got 0"),
        (lambda: NoiseSchedule(first=0.5), "first <= last < 1, got 0.5 and 0.02"),
        (lambda: Denoiser(drop=1.0), r"drop must lie in \[0, 1\), got 1.0"),
        (lambda: Sampling(images=1), "sampling.images must be at least 2, got 1"),
        (lambda: Denoiser(sampling=Sampling(steps=2000)), "1 to 1000 steps, got 2000"),
        (lambda: Shape(n_heads=3), "d_model 64 is not divisible by n_heads 3"),
        (
            lambda: dit_config(Shape(n_heads=3, d_model=18), (8, 8, 1)),
            "d_model 18 is not divisible by 4, for sines and cosines",
        ),
        (lambda: dit_config(Shape(patch=3), (8, 8, 1)), "not cut evenly into patches of 3"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_fresh_denoiser_is_blind_to_timestep_and_class():
    w = weights(fresh=True)
    found, tapped = predicted(w, taps=dict.fromkeys(("embed", "resid_post", "final"), None))
    _, again = predicted(w, np.array([7, 8, 9]), np.array([1, 1, 1]), taps={"final": None})
    np.testing.assert_array_equal(found, np.zeros((3, 8, 8, 1)))
    for layer in tapped["resid_post"]:
        np.testing.assert_array_equal(layer, tapped["embed"])
    np.testing.assert_array_equal(tapped["final"], again["final"])
    # And what it starts with is a plain vision transformer's normalised input.
    x = np.asarray(tapped["embed"])
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    close(tapped["final"], normal)


def test_a_narrow_model_has_a_condition_that_is_not_small():
    w = weights(fresh=True)
    raised = w.condition | {"last": w.condition["last"].at[:, 0].set(jnp.eye(16))}
    shifts = np.asarray(
        conditioned(raised, np.repeat(TIMES, 3), np.tile(CLASSES, 3))["final"].offset
    )
    for parts in (shifts.reshape(3, 3, 16), shifts.reshape(3, 3, 16).swapaxes(0, 1)):
        assert parts.std(axis=0).mean() > 0.1  # Of timesteps, and of classes.


def test_positions_start_as_sines_of_columns_and_rows():
    found = np.asarray(grid_positions(CONFIG)).reshape(4, 4, 16)
    waves = 10_000.0 ** -(np.arange(4) / 4)
    close(found[3, 1], np.concatenate([f(n * waves) for n in (1, 3) for f in (np.sin, np.cos)]))
    source = jh.data.open_source("images:digits", "train")
    model, tokenizer = Denoiser(shape=SHAPE).create(source, 0)
    close(model.params["embed"]["positions"], found.reshape(16, 16))
    assert tokenizer is None and model.config == CONFIG


def test_each_row_has_its_own_timestep_and_class():
    w = weights()
    base = np.asarray(predicted(w)[0])
    changed_time = np.asarray(predicted(w, times=np.array([0, 401, 999]))[0])
    changed_class = np.asarray(predicted(w, classes=np.array([2, 1, 3]))[0])
    for changed in (changed_time, changed_class):
        moved = np.abs(changed - base).max(axis=(1, 2, 3))
        assert moved[1] > 1e-3
        close(changed[[0, 2]], base[[0, 2]])
    assert none_of(w.condition) == 3


def test_a_class_that_is_not_there_gives_nan():
    found = predicted(weights(), classes=np.array([0, 4, 1]))[0]
    assert np.isnan(found[1]).all() and np.isfinite(found[0]).all()


def test_shift_scale_and_gate_are_where_the_paper_has_them():
    """One block by hand: x + gate * f(norm(x) * (1 + scale) + shift)."""
    w = weights()
    taps = dict.fromkeys(("resid_pre", "attn_in", "attn_out", "mlp_in", "mlp_out", "final"), None)
    _, found = predicted(w, taps=taps | {"resid_mid": None, "resid_post": None})
    halves = {site: np.asarray(value) for site, value in found.items()}
    frequencies = np.exp(-np.log(10000) * np.arange(128) / 128)
    angles = TIMES[:, None] * frequencies
    features = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    c = {name: np.asarray(leaf, np.float64) for name, leaf in w.condition.items()}

    def silu(x):
        return x / (1 + np.exp(-x))

    hidden = silu(features @ c["time_in"] + c["time_in_bias"])
    vector = silu(hidden @ c["time_out"] + c["time_out_bias"] + c["classes"][CLASSES])
    parts = np.einsum("bd,ldke->klbe", vector, c["modulation"])
    parts = (parts + np.moveaxis(c["modulation_bias"], 1, 0)[:, :, None])[:, :, :, None]

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    close(halves["attn_in"], norm(halves["resid_pre"]) * (1 + parts[1]) + parts[0], 1e-4)
    close(halves["mlp_in"], norm(halves["resid_mid"]) * (1 + parts[4]) + parts[3], 1e-4)
    # Gates: what a branch adds, over what it adds with the bias of the gate one higher.
    raised = w.condition["modulation_bias"].at[:, 2].add(1.0)
    higher = Weights(w.model, w.condition | {"modulation_bias": raised})
    _, more = predicted(higher, taps={"attn_out": None})
    first = np.asarray(more["attn_out"])[0]
    close(first * parts[2][0], halves["attn_out"][0] * (1 + parts[2][0]), 1e-4)


def test_patches_are_put_together_as_they_were_cut():
    image = Image(4, 6, 2, channels=1, prefix=0)
    pixels = np.arange(24).reshape(1, 4, 6, 1)
    patches = [
        pixels[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].ravel()
        for row in range(2)
        for column in range(3)
    ]
    np.testing.assert_array_equal(from_patches(jnp.asarray(patches)[None], image), pixels)


# --- Routing and other edits ------------------------------------------------------------------


def test_routing_of_all_heads_is_the_dense_denoiser_to_the_last_bit():
    w = weights()
    route = mixture_of_heads(CONFIG, shared=0, top_k=4, gates="straight_through", scores="random",
                             key=jax.random.key(3))  # fmt: skip
    np.testing.assert_array_equal(predicted(w, edits=route)[0], predicted(w)[0])


def test_routing_and_masks_of_heads_compose_with_the_condition():
    w = weights()
    route = mixture_of_heads(CONFIG, jax.random.key(3), shared=1, top_k=1)
    mask = jh.mask_heads(CONFIG, [(0, 0), (1, 2)])
    taps = {"z": None}
    both, tapped = predicted(w, edits=route | mask, taps=taps)
    on = np.abs(np.asarray(tapped["z"])).max(-1) > 0
    assert not on[0, :, :, 0].any() and not on[1, :, :, 2].any()
    assert on[1, :, :, 0].all() and (on[1].sum(-1) <= 2).all() and (on[0].sum(-1) == 1).all()
    assert np.isfinite(both).all()
    # Routing reads what the condition made: another class, other heads.
    other = predicted(w, classes=np.array([0, 1, 2]), edits=route, taps=taps)[1]["z"]
    alone = predicted(w, edits=route, taps=taps)[1]["z"]
    assert ((np.asarray(other) != 0) != (np.asarray(alone) != 0)).any()


# --- Measuring --------------------------------------------------------------------------------


def test_the_measured_loss_is_that_of_each_row():
    w, data = weights(), digits(7)
    rows = measured_rows(*data.held_out[np.arange(7)], NoiseSchedule(), seed=5)
    noisy, classes, times, added = rows
    assert len(times) == 7 * DRAWS and times.min() < 30 and times.max() > 970
    np.testing.assert_array_equal(np.histogram(times, bins=8, range=(0, 1000))[0], 7)
    share = NoiseSchedule().alpha_bars[times[9]]
    image = data.held_out[np.array([2])][0]  # Row 9 is the second time round of image 2.
    close(noisy[9], np.sqrt(share) * image[0] + np.sqrt(1 - share) * added[9])
    losses = in_parts(Job(), row_losses, w, None, rows, ROWS)
    found = predict_noise(w.model, w.condition, noisy[9:10], times[9:10], classes[9:10])[0]
    assert losses.shape == (7 * DRAWS,)
    close(losses[9], np.square(np.asarray(found)[0] - added[9]).mean(), 1e-4)


def test_samples_have_a_seed_a_shape_and_a_class():
    w = weights()
    start, classes = noise_like(4, 8, 8, 1), np.array([0, 1, 2, 0])
    options = {"noise": NoiseSchedule(), "steps": 3, "guidance": 1.5}
    one = np.asarray(sample(w, None, (start, classes), **options))
    assert one.shape == start.shape and np.abs(one).max() <= 1
    np.testing.assert_array_equal(one, sample(w, None, (start, classes), **options))
    other = sample(w, None, (start, np.array([0, 2, 2, 0])), **options)
    moved = np.abs(one - np.asarray(other)).max(axis=(1, 2, 3))
    assert moved[1] > 1e-4
    close(one[[0, 2, 3]], np.asarray(other)[[0, 2, 3]])


# --- Training ---------------------------------------------------------------------------------

SMALL = Denoiser(
    shape=SHAPE,
    routing=Routed(shares=(0.75,), shared=0.5),
    fit=Fit(steps=30, batch_size=12, optimizer=Optimizer(learning_rate=0.01)),
)


def loss_of(tuned: Tuned, model: jh.Transformer, data: ImageData) -> float:
    """Of the images, at fixed timesteps."""
    count, noise = len(data.held_out), NoiseSchedule()
    rows = measured_rows(*data.held_out[np.arange(count)], noise, seed=0)
    w = Weights(apply(model, tuned), tuned.beside)
    return float(row_losses(w, tuned.edits, rows).mean())


def test_classes_are_dropped_in_training_only():
    w, data = weights(), digits()
    setup = Setup(CONFIG, NoiseSchedule(), 0.5)
    moved = w.condition | {"classes": w.condition["classes"].at[-1].add(1.0)}
    both = [
        split_variant({"blocks": w.model.params, "condition": one}, None, setup, None)
        for one in (w.condition, moved)
    ]
    item = data.train[np.arange(12)]
    loss = jax.jit(denoising_loss)
    measured = [float(loss(*one, item, None)[0]) for one in both]
    trained = [float(loss(*one, item, jax.random.key(0))[0]) for one in both]
    assert measured[0] == measured[1] and abs(trained[0] - trained[1]) > 1e-4
    assert float(loss(*both[0], item, None)[1]["weight"]) == 12


@pytest.mark.slow
def test_training_lowers_the_loss_of_every_variant_and_uses_the_condition():
    data = digits()
    model = jh.Transformer.random(CONFIG, jax.random.key(0))
    before = jax.tree.map(np.array, model.params)
    tuned = SMALL.train(Job(), model, None, data)
    assert list(tuned) == ["moh 0.75", "random 0.75", "dense"]
    jax.tree.map(np.testing.assert_array_equal, model.params, before)
    start = loss_of(Tuned(beside=starting_condition(model, 3, 0)), model, data)
    assert start == pytest.approx(1, abs=0.05)  # No noise is predicted yet.
    for name, variant in tuned.items():
        assert loss_of(variant, model, data) < 0.6 * start, name
        assert (variant.edits is None) == (name == "dense")
        for path in ("modulation", "classes", "last", "pixels", "time_in"):
            assert np.abs(variant.beside[path]).max() > 1e-3, (name, path)
    route = tuned["moh 0.75"].edits["z"]
    assert tuned["random 0.75"].edits["z"].gates == route.gates
    assert np.abs(route.balance).max() > 1e-4  # The gates were trained too.
    count = sum(leaf.size for leaf in jax.tree.leaves((model.params, tuned["dense"].beside)))
    assert tuned["dense"].trained == count


def test_what_are_no_images_is_refused():
    rows = digits().train
    with pytest.raises(ValueError, match="learns from images, got TextData"):
        SMALL.train(Job(), weights().model, None, TextData(rows, rows))
    source = jh.data.open_source("corpus:python-docs", "train")
    with pytest.raises(ValueError, match="expected images"):
        SMALL.create(source, 0)


@pytest.mark.slow
def test_a_run_writes_all_that_was_trained(tmp_path):
    config = tmp_path / "run.toml"
    config.write_text(
        """
        [data]
        source = "images:digits"
        limit = 40
        [method]
        name = "denoiser"
        controls = false
        shape = { n_layers = 2, n_heads = 4, d_model = 16, d_mlp = 32 }
        routing = { shares = [0.75], shared = 0.5 }
        sampling = { images = 10, steps = 2 }
        fit = { steps = 2, batch_size = 4, average = 0.5 }
        """
    )
    workdir = tmp_path / "run"
    assert main(["train", "--config", str(config), "--workdir", str(workdir)]) == 0
    results = json.loads((workdir / "results.json").read_text())
    assert list(results["variants"]) == ["frozen", "moh 0.75"]
    for variant in results["variants"].values():
        assert set(variant["held_out"]) == {"loss", "frechet_distance", "class_accuracy"}
    model = jh.load_model(workdir / "model")
    assert model.config.image == Image(8, 8, 2, channels=1, prefix=0)
    beside, edits = (
        load_file(workdir / "beside.safetensors"),
        Edits.load(workdir / "edits.safetensors"),
    )
    fresh = new_condition(model.config, 10, jax.random.key(0))
    assert {path: leaf.shape for path, leaf in beside.items()} == {
        path: leaf.shape for path, leaf in flatten(fresh)
    }
    # What was saved is what was measured.
    examined = json.loads((workdir / "examination.json").read_text())
    assert examined["kind"] == "samples" and len(examined["images"]) == 60
    classes = np.asarray(examined["classes"], np.int32)
    start = np.random.default_rng(0).standard_normal((60, 8, 8, 1)).astype(np.float32)
    made = sample(
        Weights(model, beside), edits, (start, classes), noise=NoiseSchedule(), steps=2,
        guidance=1.5,
    )  # fmt: skip
    np.testing.assert_allclose(np.asarray(examined["images"]), made, atol=0.006)
