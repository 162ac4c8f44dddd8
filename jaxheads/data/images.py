"""Images of classes: the handwritten digits that ship with scikit-learn.

Source: Alpaydin and Kaynak (1998), "Optical Recognition of Handwritten Digits", UCI Machine
Learning Repository: 1,797 images of 8 x 8 pixels with 17 grey levels, 10 classes.
"""

from __future__ import annotations

import numpy as np

from jaxheads.data.division import SPLITS, check_held_out
from jaxheads.data.source import Source, digest
from jaxheads.names import choose

IMAGES = ("digits",)


def open_images(name: str, split: str, *, held_out: float = 0.2, seed: int = 0) -> Source:
    """Images [8,8,1] in -1 to 1 with their class, divided at random with equal shares of classes.

    Args:
      name: one of `IMAGES`.
      split: "train", "held_out" or "all".
      held_out: share of the images that is held out.
      seed: of the division.

    Raises:
      ValueError: an unknown name or split, a share outside (0, 1), a seed that is no number
        from 0, scikit-learn is not installed.
    """
    choose("set of images", name, IMAGES)
    choose("split", split, SPLITS)
    check_held_out(held_out)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be an integer of at least 0, got {seed!r}")
    try:
        from sklearn.datasets import load_digits  # an extra
    except ImportError as error:
        raise ValueError(
            "images:digits needs scikit-learn, which is not installed: pip install "
            "'jaxheads[images]'"
        ) from error
    found = load_digits()
    images = (found.images / 8 - 1).astype(np.float32)[..., None]
    classes = found.target.astype(np.int32)
    chosen = np.arange(len(images))
    if split != "all":
        mine = _held_out(classes, held_out, seed)
        chosen = np.flatnonzero(mine if split == "held_out" else ~mine)
    return Source(
        name=f"images:{name} ({split})",
        kind="images",
        count=len(chosen),
        get=lambda index: (images[chosen[index]], int(classes[chosen[index]])),
        label=lambda index: f"image {chosen[index]} of {name}",
        fingerprint=digest(["images", name, split, held_out, seed, images.tobytes()]),
    )


def _held_out(classes: np.ndarray, share: float, seed: int) -> np.ndarray:
    """bool [N], True at images that are held out: the same share of every class."""
    random = np.random.default_rng(seed)
    mask = np.zeros(len(classes), bool)
    for one in np.unique(classes):
        members = random.permutation(np.flatnonzero(classes == one))
        mask[members[: round(share * len(members))]] = True
    return mask
