"""The noise schedule, the sampler, and the distance between sets of images."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import close

from jaxheads.methods.diffusion import NoiseSchedule, ddim, guided, noised
from jaxheads.methods.image_samples import frechet_distance


def noise_like(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_an_image_fades_from_almost_itself_to_almost_noise():
    shares = NoiseSchedule().alpha_bars
    assert shares.shape == (1000,) and shares.dtype == np.float32
    assert (np.diff(shares) < 0).all()
    # The product of 1 - beta by hand, in two places.
    assert shares[1] == pytest.approx((1 - 1e-4) * (1 - (1e-4 + (0.02 - 1e-4) / 999)), rel=1e-6)
    assert shares[-1] == pytest.approx(4.0e-5, rel=0.02)
    clean, noise = np.ones((2, 8, 8, 1), np.float32), noise_like(2, 8, 8, 1)
    first, last = noised(clean, noise, jnp.asarray(shares)[np.array([0, 999])])
    close(first, clean[0], 0.04)
    close(last, noise[1], 0.01)


def test_noised_images_keep_a_variance_of_one():
    clean, noise = noise_like(4, 50, 50, 1), noise_like(4, 50, 50, 1, seed=1)
    found = noised(clean, noise, jnp.array([1.0, 0.7, 0.2, 0.0]))
    np.testing.assert_array_equal(found[0], clean[0])
    np.testing.assert_array_equal(found[3], noise[3])
    np.testing.assert_allclose(np.asarray(found).var(axis=(1, 2, 3)), 1, atol=0.06)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_sampling_with_the_true_noise_gives_the_image(steps: int):
    schedule, image = NoiseSchedule(steps=50), np.clip(noise_like(8, 8, 1), -1, 1)
    shares = jnp.asarray(schedule.alpha_bars)

    def true_noise(x, times):
        share = shares[times][:, None, None, None]
        return (x - jnp.sqrt(share) * image) / jnp.sqrt(1 - share)

    made = ddim(true_noise, noise_like(2, 8, 8, 1, seed=1), schedule, steps)
    close(made, np.stack([image, image]), 1e-4)


def test_timesteps_of_a_sampler_run_from_the_last_to_zero():
    schedule = NoiseSchedule(steps=10)
    np.testing.assert_array_equal(schedule.spaced(10), np.arange(9, -1, -1))
    np.testing.assert_array_equal(schedule.spaced(4), [9, 6, 3, 0])
    for count in (0, 11):
        with pytest.raises(ValueError, match=f"1 to 10 steps, got {count}"):
            schedule.spaced(count)


def test_guidance_of_one_and_zero_are_the_two_predictions():
    with_class, without = noise_like(2, 4), noise_like(2, 4, seed=1)
    close(guided(with_class, without, 1.0), with_class)
    np.testing.assert_array_equal(guided(with_class, without, 0.0), without)


def test_the_frechet_distance_of_known_gaussians():
    random = np.random.default_rng(0)
    one = random.standard_normal((40_000, 3))
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(one, one + 2) == pytest.approx(12)
    # Variances a and b along each axis: (sqrt a - sqrt b)^2.
    assert frechet_distance(one, 3 * one) == pytest.approx(3 * (1 - 3) ** 2, rel=0.05)
    turned = one * [1, 1, 4] @ np.linalg.qr(random.standard_normal((3, 3)))[0]
    assert frechet_distance(one, turned) == pytest.approx(9, rel=0.05)
    assert frechet_distance(turned, one) == pytest.approx(frechet_distance(one, turned))
    with pytest.raises(ValueError, match="two vectors of one size"):
        frechet_distance(one, one[:, :2])
