"""A certificate that a loaded model computes what it should: what was compared, and how far off.

Here a model is compared with itself, along two ways that must agree; `verify_hf` compares it
with transformers.

Axes: L layers, B rows, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.convert.certificate import Row, Values, compare
from jaxheads.model.cache import empty_cache
from jaxheads.model.clip import Clip
from jaxheads.model.config import ModelConfig
from jaxheads.model.encoder_decoder import EncoderDecoder
from jaxheads.model.models import Model
from jaxheads.model.tower import Tower
from jaxheads.model.transformer import Transformer
from jaxheads.sites import ENCODER

Reducer = Callable[[jax.Array, Any], jax.Array]

LENGTH = 160
"""Most tokens of a row."""

DECODED = 4
"""Tokens that are read one by one where a cache is compared."""

_LOWEST_ID = 3
"""Random token ids start here: those below are padding and the like in most vocabularies."""


@dataclass(frozen=True)
class Inputs:
    """What a model is run on.

    Attributes:
      tokens: int [B,T], or None for a model of images. An encoder and its decoder get the same.
      mask: bool [B,T], True at real tokens.
      pixels: float32 [B,height,width,C], or None for a model of text.
    """

    tokens: np.ndarray | None = None
    mask: np.ndarray | None = None
    pixels: np.ndarray | None = None


def text_config(model: Model) -> ModelConfig | None:
    """The config of the stack that reads tokens (the decoder of two), or None."""
    if isinstance(model, EncoderDecoder):
        return model.config.decoder
    config = model.config.text if isinstance(model, Clip) else model.config
    return None if config.image is not None else config


def sample_inputs(model: Model, ids: Sequence[int] | None = None, seed: int = 0) -> Inputs:
    """One row of text, cut to `LENGTH` and to the model's context, and two random images.

    Args:
      model: the model that will read it.
      ids: token ids of a text; None for random ones.
      seed: of what is random.
    """
    rng, config = np.random.default_rng(seed), text_config(model)
    vision = model.config.vision if isinstance(model, Clip) else model.config
    image = getattr(vision, "image", None)
    inputs = Inputs()
    if image is not None:
        shape = (2, image.height, image.width, image.channels)
        inputs = replace(inputs, pixels=rng.standard_normal(shape).astype(np.float32))
    if config is None:
        return inputs
    length = min(LENGTH, config.context_length, len(ids) if ids is not None else LENGTH)
    lowest = min(_LOWEST_ID, config.vocab_size - 1)
    drawn = rng.integers(lowest, config.vocab_size, length) if ids is None else ids[:length]
    row = _ended(np.array(drawn), config)[None]
    return replace(inputs, tokens=row, mask=np.ones(row.shape, bool))


def _ended(row: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The row with the token at its end, and there alone, that a projection looks for."""
    if not config.projection or config.projected == "first":
        return row
    end = config.eos_id if config.projected == "eos" else config.vocab_size - 1
    row = np.where(row == end, row[0], row)
    return np.append(row[:-1], end)


def padded(inputs: Inputs, sides: Sequence[str], config: ModelConfig, pad: int = 0) -> Inputs:
    """The row, and beneath it one of three quarters of its length, once padded on each side."""
    assert inputs.tokens is not None, "images are not padded"
    whole = inputs.tokens[0]
    short = shortened(inputs, config).tokens
    assert short is not None
    rows, masks = [whole], [np.ones(len(whole), bool)]
    for side in sides:
        place = slice(len(whole) - short.size, None) if side == "left" else slice(short.size)
        row, mask = np.full(len(whole), pad, whole.dtype), np.zeros(len(whole), bool)
        row[place], mask[place] = short[0], True
        rows.append(row)
        masks.append(mask)
    return replace(inputs, tokens=np.stack(rows), mask=np.stack(masks))


def shortened(inputs: Inputs, config: ModelConfig) -> Inputs:
    """The first three quarters of the row."""
    assert inputs.tokens is not None, "images are not cut"
    row = _ended(inputs.tokens[0, : max(1, 3 * inputs.tokens.shape[1] // 4)], config)[None]
    return replace(inputs, tokens=row, mask=np.ones(row.shape, bool))


def towers(model: Model) -> dict[str, Tower]:
    """The stacks of blocks of a model, by what the names of their sites begin with."""
    if isinstance(model, EncoderDecoder):
        return {ENCODER: model.encoder, "": model.decoder}
    return (
        {"text.": model.text, "vision.": model.vision} if isinstance(model, Clip) else {"": model}
    )


def forward(
    model: Model, inputs: Inputs, sites: Sequence[str], reduce: Mapping[str, Reducer] | None = None
) -> dict[str, Any]:
    """One pass over a model of any kind.

    Args:
      model: the model.
      inputs: what it is run on.
      sites: sites of every stack; those under "cross." only of stacks that have them.
      reduce: site -> its reducer.

    Returns:
      The values of the sites, "logits" and "pooled", by names with the prefix of the stack.
    """

    def taps(prefix: str, tower: Tower) -> dict[str, Reducer | None]:
        cross = tower.config.cross
        wanted = [site for site in sites if cross or not site.startswith("cross.")]
        return {prefix + site: (reduce or {}).get(site) for site in wanted}

    if isinstance(model, Clip):
        found: dict[str, Any] = {}
        for prefix, inside in (
            ("text.", replace(inputs, pixels=None)),
            ("vision.", replace(inputs, tokens=None, mask=None)),
        ):
            tower = model.text if prefix == "text." else model.vision
            values = forward(tower, inside, sites, reduce)
            found |= {prefix + name: value for name, value in values.items()}
        return found
    wanted = {
        k: v for prefix, tower in towers(model).items() for k, v in taps(prefix, tower).items()
    }
    if isinstance(model, EncoderDecoder):
        assert inputs.tokens is not None
        given, mask = inputs.tokens, inputs.mask
        out = model(given, given, mask, mask, taps=wanted)
    elif inputs.tokens is None:
        assert inputs.pixels is not None
        out = model(inputs.pixels, taps=wanted)
    else:
        out = model(inputs.tokens, inputs.mask, taps=wanted)
    outputs = {"logits": out.logits, "pooled": out.pooled}
    return out.taps | {name: value for name, value in outputs.items() if value is not None}


def against_self(model: Model, inputs: Inputs, exact: Model | None = None) -> list[Row]:
    """Compares ways through one model that must agree.

    Each check applies where a model has what it compares:

    * "dense": attention against attention whose maps are asked for;
    * "heads": resid_pre + sum of head_out + bias, with the norms that the config has,
      against resid_mid;
    * "pad left", "pad right": a row in a padded batch against the row alone;
    * "cache": tokens read one by one through a cache against all at once;
    * "float32": the model against itself in float32.

    Args:
      model: the model.
      inputs: one row of text, or images, as `sample_inputs` makes them.
      exact: the same model loaded in float32, if `model` is not in float32.
    """
    dtype = model.config.dtype
    plain = forward(model, inputs, ("resid_pre", "resid_mid", "resid_post", "cross.resid_pre"))
    shown = ("resid_post",)
    rows = list(compare("dense", _dense(model, inputs), plain, dtype))
    rows += _additivity(model, inputs, plain)
    config = text_config(model)
    if config is not None and inputs.tokens is not None and inputs.tokens.shape[1] > 1:
        batch = padded(inputs, ("left", "right"), config)
        alone = forward(model, shortened(inputs, config), shown)
        together = forward(model, batch, shown)
        for index, side in enumerate(("left", "right"), 1):
            assert batch.mask is not None
            row = {n: _row(v, index, batch.mask[index]) for n, v in together.items()}
            row = {n: v for n, v in row.items() if not n.startswith("vision.")}
            rows += compare(f"pad {side}", alone, row, dtype)
        if isinstance(model, Transformer) and config.causal and config.head == "lm":
            found = {"logits": _cached_logits(model, inputs.tokens)}
            rows += compare("cache", plain, found, dtype)
    if exact is not None:
        reference = forward(exact, inputs, shown)
        rows += compare("float32", reference, plain, dtype)
    return rows


def _dense(model: Model, inputs: Inputs) -> dict[str, Any]:
    """Asking for the weights forbids fused attention; the sums are dropped."""
    patterns = ("pattern", "cross.pattern")
    reduce: dict[str, Reducer] = {site: lambda value, context: value.sum() for site in patterns}
    found = forward(model, inputs, ("resid_post", *patterns), reduce)
    return {name: value for name, value in found.items() if not name.endswith("pattern")}


def _additivity(model: Model, inputs: Inputs, plain: Values) -> Iterator[Row]:
    """resid_mid against resid_pre + sum of head_out + bias, with the norms the config has."""
    sites = ("head_out", "cross.head_out")
    wide: dict[str, Reducer] = {
        site: lambda value, context: value.astype(jnp.float32).sum(axis=2) for site in sites
    }
    dtype = model.config.dtype
    written = forward(model, inputs, sites, wide)
    for prefix, tower in towers(model).items():
        block, config = tower.blocks, tower.config
        cross = block.cross is not None
        pairs = [("resid_pre", "head_out", "attn", "cross.resid_pre" if cross else "resid_mid")]
        pairs += [("cross.resid_pre", "cross.head_out", "cross", "resid_mid")] * cross
        for before, writes, branch, after in pairs:
            stream = jnp.asarray(plain[prefix + before], jnp.float32)
            summed = _stream_after(config, block, branch, stream, written[prefix + writes])
            reference, found = {prefix + after: plain[prefix + after]}, {prefix + after: summed}
            yield from compare("heads", reference, found, dtype)


def _stream_after(
    config: ModelConfig, block: Any, branch: str, stream: jax.Array, out: jax.Array
) -> jax.Array:
    """The stream after a branch, from what its heads wrote in sum; both [L,B,T,D]."""

    def normed(name: str, x: jax.Array) -> jax.Array:
        return jax.vmap(lambda norm, x: norm(x, config))(getattr(block, name), x)

    bias = getattr(block, branch).o_bias
    out = out if bias is None else out + bias[...][:, None, None].astype(jnp.float32)
    if config.norm_place == "branch":
        out = normed(f"{branch}_norm", out)
    if config.norm_place == "sandwich":
        out = normed(f"{branch}_post_norm", out)
    if config.branch_scale:
        out = out * getattr(block, f"{branch}_scale")[...][:, None, None].astype(jnp.float32)
    whole = stream + out
    return normed(f"{branch}_norm", whole) if config.norm_place == "post" else whole


def _cached_logits(model: Transformer, tokens: np.ndarray) -> jax.Array:
    """Logits of tokens [1,T] of which the last are read one by one."""
    start = max(1, tokens.shape[1] - DECODED)
    cache = empty_cache(model.config, 1, tokens.shape[1])
    out = model(tokens[:, :start], cache=cache)
    parts = [out.logits]
    for slot in range(start, tokens.shape[1]):
        out = model(tokens[:, slot : slot + 1], cache=out.cache, phase="decode")
        parts.append(out.logits)
    return jnp.concatenate(parts, axis=1)


def _row(value: Any, index: int, mask: np.ndarray) -> np.ndarray:
    """One row of [L,B,T,D], [B,T,D] or [B,D], its real tokens alone; the axes remain."""
    value = np.asarray(value)
    if value.ndim == 2:
        return value[index : index + 1]
    row = value[..., index : index + 1, :, :]
    return row[..., mask, :] if row.shape[-2] == len(mask) else row
