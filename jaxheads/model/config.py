"""`ModelConfig`: everything about a transformer that is not an array."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads.names import choose

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelConfig:
    """The shape and the numerics of a decoder of the Llama family.

    Attributes:
      n_layers: L, blocks.
      n_heads: H, query heads of a block.
      n_kv_heads: K, key/value heads; H is a multiple of K (MHA: K = H, MQA: K = 1).
      head_dim: Dh, size of a head; need not be d_model / n_heads.
      d_model: D, width of the residual stream.
      d_mlp: F, hidden width of the gated MLP.
      vocab_size: V, rows of the embedding.
      context_length: longest sequence the model was trained for, in tokens.
      rope_base: base (theta) of the rotary frequencies.
      norm_eps: epsilon inside the RMS norms.
      activation: name of the MLP gate's activation, a key of `ACTIVATIONS`.
      qkv_bias: whether queries, keys and values have a bias.
      o_bias: whether the output projection has a bias.
      mlp_bias: whether the MLP's three maps have a bias.
      tied: whether the unembedding is the embedding, transposed.
      dtype: dtype of the activations. Norms, softmax and logits are always
        reduced in float32. Parameters keep the dtype they are stored in and are
        cast where they are used.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_model: int
    d_mlp: int
    vocab_size: int
    context_length: int
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    activation: str = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tied: bool = True
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _check_type(field.name, value, field.type)
            if field.type in (int, float) and not value > 0:
                raise ValueError(f"config.{field.name} must be positive, got {value!r}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"config.n_heads ({self.n_heads}) must be a multiple of "
                f"config.n_kv_heads ({self.n_kv_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"config.head_dim must be even for rotary, got {self.head_dim}")
        choose("config.activation", self.activation, ACTIVATIONS)
        choose("config.dtype", self.dtype, DTYPES)

    @property
    def group_size(self) -> int:
        """G, query heads that share one key/value head."""
        return self.n_heads // self.n_kv_heads

    @property
    def compute_dtype(self) -> jnp.dtype:
        """`dtype` as a numpy dtype."""
        return jnp.dtype(self.dtype)

    def replace(self, **changes: object) -> "ModelConfig":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def _check_type(name: str, value: object, wanted: Any) -> None:
    accepted = (int, float) if wanted is float else wanted
    # True is an int to Python, but not a number of layers.
    if not isinstance(value, accepted) or (isinstance(value, bool) and wanted is not bool):
        raise ValueError(f"config.{name} must be {wanted.__name__}, got {value!r}")
