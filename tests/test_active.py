"""Which layers a stack of edits changes, for each kind of edit."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from tiny import tiny_model

import jaxheads as jh
from jaxheads.edits.active import active_layers

CONFIG = tiny_model().config
MASK = np.ones((2, 14), bool)


@struct.dataclass
class Own:
    """A kind of somebody's own."""

    leaf: jnp.ndarray

    def __call__(self, value, context):
        return value


def one(edits: jh.Edits) -> np.ndarray:
    stacked = jh.Edits.stack([edits, edits])
    (edit,) = stacked.values()
    found = active_layers(edit, 3)
    assert found.shape == (2, 3) and (found[0] == found[1]).all()
    return found[0]


@pytest.mark.parametrize(
    "edits, expected",
    [
        (jh.mask_heads(CONFIG, [(1, 2)]), [0, 1, 0]),
        (jh.mask_heads(CONFIG, [(1, 2)], "uniform"), [0, 1, 0]),
        (jh.mask_heads(CONFIG, [(0, 2)], "mean", means=np.zeros((3, 6, 8))), [1, 0, 0]),
        (jh.steer(CONFIG, {2: np.ones(40)}), [0, 0, 1]),
        (jh.project_out(CONFIG, np.ones(40), layers=[1, 2]), [0, 1, 1]),
        (jh.project_out(CONFIG, np.ones(40)), [1, 1, 1]),
        (jh.attend_to(CONFIG, [(2, 1)], "first"), [0, 0, 1]),
        (jh.mask_heads(CONFIG, [(1, 2)], when=MASK), [0, 1, 0]),
        (jh.mask_heads(CONFIG, [(1, 2)], when="decode"), [0, 0, 0]),
        (jh.mask_heads(CONFIG, [(0, 2)]) | jh.mask_heads(CONFIG, [(1, 2)]), [1, 1, 0]),
        (jh.Edits(z=jh.Affine(scale=jnp.full((1, 1, 1, 1, 1), 2.0))), [1, 1, 1]),
        (jh.Edits(z=Own(jnp.zeros((3, 1, 1, 1, 1)))), [1, 1, 1]),
        (jh.Edits.identity(CONFIG, "z"), [0, 0, 0]),
    ],
)
def test_active_layers(edits, expected):
    np.testing.assert_array_equal(one(edits), np.array(expected, bool))
