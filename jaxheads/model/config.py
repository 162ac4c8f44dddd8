"""`ModelConfig`: everything about a transformer that is not an array."""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads.model.rotary import SCALINGS, LongRope, Rope
from jaxheads.names import choose


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": _quick_gelu,
    "relu": jax.nn.relu,
}

DTYPES = ("float32", "bfloat16", "float16")
NORMS = ("rms", "layer")
NORM_PLACES = ("pre", "post", "branch", "sandwich")
QK_NORMS = ("none", "head", "all")
HEADS = ("lm", "mlm", "classes", "none")
PROJECTED = ("first", "eos", "highest")


@dataclass(frozen=True)
class Image:
    """The input of a vision model, cut into square patches.

    Attributes:
      height: pixels.
      width: pixels.
      channels: colours.
      patch: pixels along the side of a patch.
      prefix: learned tokens before the patches (class and distillation tokens).
      bias: whether the patch embedding has a bias.
    """

    height: int
    width: int
    patch: int
    channels: int = 3
    prefix: int = 1
    bias: bool = True

    def __post_init__(self) -> None:
        for name in ("height", "width", "patch", "channels", "prefix"):
            if getattr(self, name) < (name != "prefix"):
                raise ValueError(f"image.{name} must be positive, got {getattr(self, name)}")
        if self.height % self.patch or self.width % self.patch:
            raise ValueError(
                f"an image of {self.height} x {self.width} pixels is not cut evenly into patches "
                f"of {self.patch}"
            )

    @property
    def tokens(self) -> int:
        """T: patches and learned tokens."""
        return self.prefix + (self.height // self.patch) * (self.width // self.patch)


@dataclass(frozen=True)
class ModelConfig:
    """The shape and the numerics of a stack of transformer blocks and its two ends.

    Attributes:
      n_layers: L, blocks.
      n_heads: H, query heads of a block.
      n_kv_heads: K, key/value heads; H is a multiple of K (MHA: K = H, MQA: K = 1).
      head_dim: Dh, size of a head; need not be d_model / n_heads.
      d_model: D, width of the residual stream.
      d_mlp: F, hidden width of the MLP.
      vocab_size: V, rows of the embedding; for images, the classes (0 without a classifier).
      context_length: longest sequence the model was trained for, in tokens.
      family: name of the converter table that exports it.

      causal: whether a token sees only those before it.
      windows: for each layer, how far a token sees: keys at a distance below this many
        tokens, on either side where not causal; 0 for no limit. () for no limit anywhere.
      ropes: the rotary encoding, one for all layers or one for each; None rotates nothing.
      rotary_dim: features of a head that rotate, the first ones; None for all.
      n_positions: rows of the table of learned positions, 0 for none.
      position_offset: the row of the first token.
      relative_buckets: rows of the table of relative position biases (T5), 0 for none.
      relative_distance: the distance from which they are all one bucket.

      norm: "rms" or "layer".
      norm_eps: epsilon inside the norms.
      norm_bias: whether layer norms have a bias.
      norm_plus_one: whether the scale of a norm is stored minus one (Gemma).
      norm_place: "pre" normalises what a branch reads; "post" the sum of stream and branch
        (BERT); "branch" what a branch writes (OLMo 2); "sandwich" what it reads and writes.
      embed_norm: whether embeddings are normalised.
      first_attn_norm: whether the first block normalises what attention reads.
      final_norm: whether the last residual stream is normalised.

      qkv_bias: whether queries, keys and values have a bias.
      o_bias: whether the output projection has a bias.
      qk_norm: "head" normalises each query and key head, "all" all heads of a token
        together, before position encoding; "none".
      attn_scale: factor of the attention logits; None for head_dim ** -0.5.
      attn_softcap: logits become cap * tanh(logits / cap); None for no cap.
      cross: whether blocks attend to an encoder's output too.

      activation: name of the MLP's activation, a key of `ACTIVATIONS`.
      gated: whether the activation multiplies a second map (Shazeer 2020).
      mlp_bias: whether the MLP's maps have a bias.
      parallel: whether the MLP reads the stream before attention (GPT-NeoX).
      branch_scale: whether a learned vector multiplies what a branch writes (layer scale).

      image: what a vision model looks at; None for text.
      embed_scale: factor of the token embeddings.
      n_token_types: rows of the table of token types, 0 for none.
      head: what makes logits: "lm" the unembedding; "mlm" a dense layer and norm before
        it (BERT); "classes" a classifier of the first token; "none".
      head_bias: whether the dense layer of "mlm" has a bias.
      tied: whether the unembedding is the embedding, transposed.
      unembed_bias: whether logits have a bias.
      logit_scale: factor of what is unembedded.
      logit_softcap: as attn_softcap, for the logits.
      pooler: whether there is a dense layer with tanh over the first token.
      projection: Z, size of the vector that one token of the last residual stream is mapped
        to, 0 for none (CLIP).
      projected: which token: the "first", the first "eos", or that of the "highest" id.
      eos_id: id of the token that "eos" means.

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
    family: str = "llama"

    causal: bool = True
    windows: tuple[int, ...] = ()
    ropes: tuple[Rope | None, ...] = (Rope(),)
    rotary_dim: int | None = None
    n_positions: int = 0
    position_offset: int = 0
    relative_buckets: int = 0
    relative_distance: int = 128

    norm: str = "rms"
    norm_eps: float = 1e-5
    norm_bias: bool = False
    norm_plus_one: bool = False
    norm_place: str = "pre"
    embed_norm: bool = False
    first_attn_norm: bool = True
    final_norm: bool = True

    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: str = "none"
    attn_scale: float | None = None
    attn_softcap: float | None = None
    cross: bool = False

    activation: str = "silu"
    gated: bool = True
    mlp_bias: bool = False
    parallel: bool = False
    branch_scale: bool = False

    image: Image | None = None
    embed_scale: float = 1.0
    n_token_types: int = 0
    head: str = "lm"
    head_bias: bool = True
    tied: bool = True
    unembed_bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    pooler: bool = False
    projection: int = 0
    projected: str = "first"
    eos_id: int = 0

    dtype: str = "float32"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _check_type(field.name, value, field.type)
            may_be_zero = field.default == 0 or (field.name == "vocab_size" and self.image)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and not (value > 0 or (may_be_zero and value == 0)):
                raise ValueError(f"config.{field.name} must be positive, got {value!r}")
        choose("config.activation", self.activation, ACTIVATIONS)
        choose("config.dtype", self.dtype, DTYPES)
        choose("config.norm", self.norm, NORMS)
        choose("config.norm_place", self.norm_place, NORM_PLACES)
        choose("config.qk_norm", self.qk_norm, QK_NORMS)
        choose("config.head", self.head, HEADS)
        choose("config.projected", self.projected, PROJECTED)
        problem = self._contradiction()
        if problem:
            raise ValueError(problem)

    def _contradiction(self) -> str | None:
        """What makes the fields impossible together, if anything does."""
        if self.n_heads % self.n_kv_heads:
            return (
                f"config.n_heads ({self.n_heads}) must be a multiple of "
                f"config.n_kv_heads ({self.n_kv_heads})"
            )
        rotated, half = self.rotated_dim, self.rotated_dim // 2
        if self.rotates and (rotated % 2 or rotated > self.head_dim):
            return (
                "config.rotary_dim (default head_dim) must be even and at most head_dim "
                f"({self.head_dim}), got {rotated}"
            )
        if len(self.ropes) not in (1, self.n_layers):
            return f"config.ropes must have 1 or {self.n_layers} entries, got {len(self.ropes)}"
        for rope in self.ropes:
            if rope is None:
                continue
            if not rope.base > 0:
                return f"config.ropes: base must be positive, got {rope.base!r}"
            long = rope.scaling
            if isinstance(long, LongRope) and not len(long.short) == len(long.long) == half:
                return (
                    f"config.ropes: longrope needs {half} short and long factors, got "
                    f"{len(long.short)} and {len(long.long)}"
                )
        if len(self.windows) not in (0, self.n_layers) or any(w < 0 for w in self.windows):
            return (
                f"config.windows must have {self.n_layers} entries, none negative, or none, "
                f"got {self.windows}"
            )
        if self.n_positions and self.n_positions < self.context_length + self.position_offset:
            return (
                f"config.n_positions ({self.n_positions}) is less than context_length "
                f"({self.context_length}) + position_offset ({self.position_offset})"
            )
        if self.parallel and self.norm_place != "pre":
            return f"config.parallel needs norm_place 'pre', got {self.norm_place!r}"
        if self.norm_bias and self.norm == "rms":
            return "config.norm_bias is only for norm 'layer', got norm 'rms'"
        if self.image is not None and self.image.tokens != self.context_length:
            return (
                f"config.context_length must be the {self.image.tokens} tokens of the image, "
                f"got {self.context_length}"
            )
        return None

    @property
    def group_size(self) -> int:
        """G, query heads that share one key/value head."""
        return self.n_heads // self.n_kv_heads

    @property
    def rotates(self) -> bool:
        """Whether any layer rotates."""
        return any(rope is not None for rope in self.ropes)

    @property
    def rotated_dim(self) -> int:
        """Features of a head that rotate."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def compute_dtype(self) -> jnp.dtype:
        """`dtype` as a numpy dtype."""
        return jnp.dtype(self.dtype)

    def part(self, path: str) -> "ModelConfig":
        """The config of the stack that a parameter belongs to: this one."""
        return self

    def replace(self, **changes: object) -> "ModelConfig":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """The fields as values that JSON can hold; `from_dict` reads them back."""
        fields = dataclasses.asdict(self)
        fields["ropes"] = [None if rope is None else _rope_to_dict(rope) for rope in self.ropes]
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ModelConfig":
        """The config that `to_dict` described.

        Raises:
          ValueError: a field is missing, unknown or of the wrong type.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in known if name not in fields]
        extra = [name for name in fields if name not in known]
        if missing or extra:
            raise ValueError(
                f"config: missing {', '.join(missing) or 'none'}; "
                f"unknown {', '.join(extra) or 'none'}"
            )
        values = dict(fields)
        try:
            values["windows"] = tuple(fields["windows"])
            values["ropes"] = tuple(rope and _rope_from_dict(rope) for rope in fields["ropes"])
            values["image"] = fields["image"] and Image(**fields["image"])
        except (TypeError, KeyError) as error:
            raise ValueError(f"config: windows, ropes or image is not readable: {error}") from error
        return cls(**values)


def _rope_to_dict(rope: Rope) -> dict[str, Any]:
    fields = dataclasses.asdict(rope)
    if rope.scaling is not None:
        kind = next(name for name, cls in SCALINGS.items() if isinstance(rope.scaling, cls))
        fields["scaling"] = {"kind": kind} | fields["scaling"]
    return fields


def _rope_from_dict(fields: Mapping[str, Any]) -> Rope:
    scaling = fields["scaling"]
    if scaling is not None:
        kind = SCALINGS[choose("rotary scaling", scaling["kind"], SCALINGS)]
        values = {name: value for name, value in scaling.items() if name != "kind"}
        # JSON has no tuples.
        values = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
        scaling = kind(**values)
    return Rope(fields["base"], scaling)


def _check_type(name: str, value: object, wanted: Any) -> None:
    if not is_of_type(value, wanted):
        kind = getattr(wanted, "__name__", None) if isinstance(wanted, type) else None
        raise ValueError(f"config.{name} must be {kind or wanted}, got {value!r}")


def is_of_type(value: object, wanted: Any) -> bool:
    """Whether a value fits the type of a field; an int counts as a float, a bool as no int."""
    if isinstance(wanted, types.UnionType):
        return any(is_of_type(value, option) for option in typing.get_args(wanted))
    if typing.get_origin(wanted) is tuple:
        item = typing.get_args(wanted)[0]
        return isinstance(value, tuple) and all(is_of_type(part, item) for part in value)
    # True is an int to Python, but not a number of layers.
    if isinstance(value, bool):
        return wanted is bool
    return isinstance(value, (int, float) if wanted is float else wanted)
