"""Images as a source: what they hold, how they are divided, and every way in which they refuse."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from jaxheads.data import open_source
from jaxheads.data.source import Source
from jaxheads.methods.data import DataSettings, encode_splits, open_splits
from jaxheads.methods.method import ImageData

DIGITS = "images:digits"


def opened(split: str, **options: object) -> Source:
    return open_source(DIGITS, split, options=options)


def labels_of(source: Source) -> set[str]:
    return {source.label(index) for index in range(len(source))}


def test_the_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    images, classes = opened("all").images()
    assert images.shape == (1797, 8, 8, 1) and images.dtype == np.float32
    assert images.min() == -1 and images.max() == 1
    np.testing.assert_array_equal((images[..., 0] + 1) * 8, load_digits().images)
    np.testing.assert_array_equal(classes, load_digits().target)
    assert classes.dtype == np.int32


@pytest.mark.parametrize("held_out", [0.2, 0.37])
def test_sides_are_disjoint_and_have_equal_shares_of_every_class(held_out):
    train, held = (opened(split, held_out=held_out) for split in ("train", "held_out"))
    assert not labels_of(train) & labels_of(held)
    assert labels_of(train) | labels_of(held) == labels_of(opened("all"))
    counts = np.bincount(opened("all").images()[1])
    np.testing.assert_array_equal(np.bincount(held.images()[1]), np.round(held_out * counts))


def test_the_division_is_decided_by_its_seed():
    first, again, other = (opened("held_out", seed=seed) for seed in (0, 0, 1))
    assert labels_of(first) == labels_of(again) and first.fingerprint == again.fingerprint
    assert labels_of(first) != labels_of(other) and first.fingerprint != other.fingerprint
    assert opened("train").fingerprint != first.fingerprint


def test_they_are_rows_of_images_and_classes():
    settings = DataSettings(source=DIGITS, limit=20)
    data = encode_splits(settings, open_splits(settings, seed=7), None)
    assert isinstance(data, ImageData) and data.classes == 10
    assert len(data.train) == len(data.held_out) == 20
    images, classes = data.held_out[np.array([3, 0])]
    for row, index in enumerate((3, 0)):
        image, label = opened("held_out")[index]
        np.testing.assert_array_equal(images[row], image)
        assert classes[row] == label


@pytest.mark.parametrize(
    ("spec", "split", "options", "message"),
    [
        ("images:digit", "train", {}, r"unknown set of images 'digit'\. Did you mean 'digits'"),
        (DIGITS, "trian", {}, r"unknown split 'trian'\. Did you mean 'train'"),
        (DIGITS, "train", {"held_out": 1.5}, r"held_out must lie strictly .* got 1\.5"),
        (DIGITS, "train", {"held_out": "half"}, "held_out must lie strictly .* got 'half'"),
        (DIGITS, "train", {"seed": -1}, "seed must be an integer of at least 0, got -1"),
        (DIGITS, "train", {"seed": 0.5}, r"seed must be an integer of at least 0, got 0\.5"),
        (DIGITS, "train", {"sed": 1}, "unknown option of 'images' sources: 'sed'.*'seed'"),
    ],
)
def test_bad_settings_are_refused(spec, split, options, message):
    with pytest.raises(ValueError, match=message):
        open_source(spec, split, options=options)


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # as Python marks what is absent
    with pytest.raises(ValueError, match=r"needs scikit-learn.*pip install 'jaxheads\[images\]'"):
        opened("train")


def test_a_source_of_one_kind_is_not_read_as_another():
    with pytest.raises(ValueError, match=r"images:digits \(train\) holds images, expected texts"):
        opened("train").texts()
    with pytest.raises(ValueError, match="holds images, expected prompts with answers"):
        opened("train").examples()
    with pytest.raises(ValueError, match="holds prompts with answers, expected images"):
        open_source("task:counterfactual_capitals", "train").images()
