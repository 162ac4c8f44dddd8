"""The shape of a small vision transformer; what it ends in is its method's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from jaxheads.model.config import Image, ModelConfig


@dataclass(frozen=True)
class Shape:
    """The shape of a model of images; their size is that of the data.

    Attributes:
      n_layers: L, blocks.
      n_heads: H, heads of a block.
      d_model: D, width of the residual stream.
      d_mlp: F, hidden width of the MLP.
      patch: pixels along the side of a patch.

    Raises:
      ValueError: a size below 1, a width that heads do not divide.
    """

    n_layers: int = 4
    n_heads: int = 8
    d_model: int = 64
    d_mlp: int = 128
    patch: int = 2

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            if getattr(self, one.name) < 1:
                raise ValueError(f"{one.name} must be at least 1, got {getattr(self, one.name)}")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}")

    def config(self, size: tuple[int, ...], *, prefix: int, **more: Any) -> ModelConfig:
        """The config of a bidirectional stack of pre-norm blocks (Dosovitskiy et al. 2021, ViT).

        Args:
          size: of the images: height, width and channels.
          prefix: learned tokens before the patches.
          more: further fields of the config: the activation, the head, ...

        Raises:
          ValueError: an image that is not cut evenly into patches.
        """
        height, width, channels = size
        image = Image(height, width, self.patch, channels, prefix)
        return ModelConfig(
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            n_kv_heads=self.n_heads,
            head_dim=self.d_model // self.n_heads,
            d_model=self.d_model,
            d_mlp=self.d_mlp,
            context_length=image.tokens,
            n_positions=image.tokens,
            causal=False,
            ropes=(None,),
            norm="layer",
            norm_eps=1e-6,
            qkv_bias=True,
            o_bias=True,
            gated=False,
            mlp_bias=True,
            image=image,
            **more,
        )
