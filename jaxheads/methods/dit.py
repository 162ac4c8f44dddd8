"""DiT: a vision transformer conditioned on a timestep and a class by edits of its branches.

Source: Peebles and Xie (2023), "Scalable Diffusion Models with Transformers", the block adaLN-Zero.
With c = MLP(timestep) + class embedding, each layer makes from SiLU(c) a shift, a scale and a gate
for attention and for the MLP: a branch reads norm(x) (1 + scale) + shift, and what it writes is
multiplied by the gate. All are zero at first, so every block starts as the identity. The blocks
are those of any `Transformer`; shift, scale and gate are `Affine` edits made for each row.

Two things differ from the paper. Positions start at its sines and cosines but are learned. And
random weights of the condition are scaled by their width: the paper's standard deviation of 0.02,
made for widths of 384 and more, leaves a narrow model almost without a condition, and it then
learns to ignore it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxheads.edits import Affine, Edits
from jaxheads.methods.image_shape import Shape
from jaxheads.model.config import Image, ModelConfig
from jaxheads.model.context import Edit, Tap
from jaxheads.model.layout import axes_of, contract, divided, gathered, take_rows
from jaxheads.model.parameters import Tree
from jaxheads.model.transformer import Transformer

Array = jax.Array
FREQUENCIES = 256
"""Features that a timestep is first written as."""
PERIOD = 10_000
"""Longest period of them, in timesteps."""


def dit_config(shape: Shape, size: tuple[int, ...]) -> ModelConfig:
    """The config of the blocks, for images of a size: height, width and channels.

    Raises:
      ValueError: sizes that do not fit together.
    """
    if shape.d_model % 4:
        raise ValueError(f"d_model {shape.d_model} is not divisible by 4, for sines and cosines")
    return shape.config(size, prefix=0, vocab_size=0, activation="gelu_tanh", head="none")


def new_condition(config: ModelConfig, classes: int, key: Array) -> Tree:
    """The weights beside the blocks: timestep, classes, modulation, and the map to pixels.

    Args:
      config: of the blocks.
      classes: how many there are; the last row of the table stands for none.
      key: of the random ones.

    Returns:
      "time_in" [256,D] and "time_out" [D,D] with biases [D]; "classes" [classes+1,D];
      "modulation" [L,D,6,D] with "modulation_bias" [L,6,D]: shift, scale and gate of attention,
      then of the MLP; "last" [D,2,D] with "last_bias" [2,D]: shift and scale of `final`;
      "pixels" [D,P*P*C] with its bias. float32; the last three maps are zero.
    """
    layers, width, image = config.n_layers, config.d_model, _image(config)
    pixels = image.patch**2 * image.channels
    keys = iter(jax.random.split(key, 3))

    def normal(rows: int, variance: float) -> Array:
        return variance**0.5 * jax.random.normal(next(keys), (rows, width))

    return {
        "time_in": normal(FREQUENCIES, 1 / FREQUENCIES),
        "time_in_bias": jnp.zeros(width),
        "time_out": normal(width, 1 / width),
        "time_out_bias": jnp.zeros(width),
        "classes": normal(classes + 1, 1.0),
        "modulation": jnp.zeros((layers, width, 6, width)),
        "modulation_bias": jnp.zeros((layers, 6, width)),
        "last": jnp.zeros((width, 2, width)),
        "last_bias": jnp.zeros((2, width)),
        "pixels": jnp.zeros((width, pixels)),
        "pixels_bias": jnp.zeros(pixels),
    }


def grid_positions(config: ModelConfig) -> Array:
    """Sines and cosines of the rows and columns of patches, float32 [T,D].

    The first half of the features tells the column and the second the row; in each the sines
    come first. Periods as those of timesteps.

    Args:
      config: of the blocks; D is a multiple of 4.
    """
    image, quarter = _image(config), config.d_model // 4
    places = np.indices((image.height // image.patch, image.width // image.patch))
    waves = PERIOD ** -(np.arange(quarter) / quarter)
    angles = places[::-1].reshape(2, -1, 1) * waves
    return jnp.asarray(np.concatenate([*map(_sines, angles)], axis=1), jnp.float32)


def _sines(angles: np.ndarray) -> np.ndarray:
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)


def conditioned(condition: Tree, times: Array, classes: Array) -> Edits:
    """What a timestep and a class do to the blocks.

    Args:
      condition: as `new_condition` gives it.
      times: int [B].
      classes: int [B]; NaN for one that the table does not have.

    Returns:
      Edits of `attn_in`, `attn_out`, `mlp_in` and `mlp_out`, leaves [L,B,1,D], and of `final`,
      leaves [B,1,D].
    """
    w = gathered(condition, times, jnp.float32)
    waves = jnp.exp(-jnp.log(PERIOD) * jnp.arange(FREQUENCIES // 2) / (FREQUENCIES // 2))
    angles = times[:, None].astype(jnp.float32) * waves
    features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    hidden = jax.nn.silu(contract("bd,de->be", features, w["time_in"]) + w["time_in_bias"])
    c = contract("bd,de->be", hidden, w["time_out"]) + w["time_out_bias"]
    c = jax.nn.silu(c + take_rows(w["classes"], classes))
    parts = contract("bd,ldke->lbke", c, w["modulation"]) + w["modulation_bias"][:, None]
    last = contract("bd,dke->bke", c, w["last"]) + w["last_bias"]
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (
        parts[:, :, index, None] for index in range(6)
    )
    return Edits(
        attn_in=Affine(1 + scale, shift),
        attn_out=Affine(gate),
        mlp_in=Affine(1 + mlp_scale, mlp_shift),
        mlp_out=Affine(mlp_gate),
        final=Affine(1 + last[:, 1, None], last[:, 0, None]),
    )


def predict_noise(
    model: Transformer,
    condition: Tree,
    images: Array,
    times: Array,
    classes: Array,
    *,
    edits: Mapping[str, Edit] | None = None,
    taps: Mapping[str, Tap] | None = None,
) -> tuple[Array, dict[str, Any]]:
    """The noise in images.

    Args:
      model: the blocks, of `dit_config`.
      condition: as `new_condition` gives it.
      images: float [B,height,width,C].
      times: int [B].
      classes: int [B].
      edits: acting after those of the condition: routing, masks of heads.
      taps: what else to hand back, by result name.

    Returns:
      float32 [B,height,width,C], and what was tapped.
    """
    acting = conditioned(condition, times, classes) | (edits or {})
    wanted = {**(taps or {}), "denoiser": Tap("final")}
    found = dict(model(images, edits=acting, taps=wanted).taps)
    x = found.pop("denoiser").astype(jnp.float32)
    w = gathered(condition, times, jnp.float32)
    patches = contract("btd,de->bte", x, w["pixels"]) + w["pixels_bias"]
    return from_patches(patches, _image(model.config)), found


def none_of(condition: Tree) -> int:
    """The number of the class that stands for none."""
    return int(condition["classes"].shape[0]) - 1


def from_patches(patches: Array, image: Image) -> Array:
    """Images [B,height,width,C] of patches [B,T,P*P*C], row by row."""
    side, channels = image.patch, image.channels
    rows, columns = image.height // side, image.width // side
    x = _shaped(patches, rows, columns, side, side, channels).transpose(0, 1, 3, 2, 4, 5)
    return _shaped(x, image.height, image.width, channels)


def _shaped(x: Array, *shape: int) -> Array:
    """x [B,...] as [B,*shape], its rows divided over devices as before."""
    rows = PartitionSpec(axes_of(x)[0]) if divided(x) else None
    return jax.lax.reshape(x, (x.shape[0], *shape), out_sharding=rows)


def _image(config: ModelConfig) -> Image:
    if config.image is None:
        raise ValueError("a denoiser needs a vision model, config.image is None")
    return config.image
