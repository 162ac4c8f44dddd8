"""`EncoderDecoder`: two stacks, the second attending to what the first made of a source."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxheads.model.cache import Cache
from jaxheads.model.checks import check_sites, check_slots, check_tokens
from jaxheads.model.config import ModelConfig
from jaxheads.model.context import Edit, Tap, TapsLike, as_taps
from jaxheads.model.embedding import Embedding, embed_tokens
from jaxheads.model.pair import PairConfig
from jaxheads.model.parameters import (
    Parameter,
    Tree,
    check_parameters,
    nest,
    parameter_table,
    random_parameters,
)
from jaxheads.model.tower import Tower
from jaxheads.model.transformer import Output, Unembedding, read_at
from jaxheads.sites import ENCODER, find_site

Array = jax.Array

SHARED = ("embed/tokens", "unembed/kernel", "unembed/bias")
"""Parameters that belong to neither stack."""


@dataclass(frozen=True)
class EncoderDecoderConfig(PairConfig):
    """The configs of the two stacks.

    Attributes:
      encoder: of the stack that reads the source; it makes no logits.
      decoder: of the stack that writes the target; its blocks have cross-attention.
    """

    encoder: ModelConfig
    decoder: ModelConfig

    def __post_init__(self) -> None:
        if not self.decoder.cross or self.encoder.cross:
            raise ValueError("config.decoder must have cross-attention, config.encoder none")
        for name in ("d_model", "vocab_size", "dtype", "family"):
            one, other = getattr(self.encoder, name), getattr(self.decoder, name)
            if one != other:
                raise ValueError(
                    f"config.encoder.{name} is {one!r}, config.decoder.{name} {other!r}"
                )


@parameter_table.register
def _(config: EncoderDecoderConfig) -> dict[str, Parameter]:
    sides = {name: parameter_table(side) for name, side in config.sides.items()}
    table = {path: sides["decoder"][path] for path in SHARED if path in sides["decoder"]}
    for side, leaves in sides.items():
        table |= {f"{side}/{path}": leaf for path, leaf in leaves.items() if path not in SHARED}
    return table


class EncoderDecoder(nnx.Module):
    """A pytree whose leaves are the parameters, as `Transformer` is.

    Sites of the decoder have their plain names, its attention to the encoder those under
    "cross.", and the encoder's own those under "encoder.", e.g. "encoder.z".
    """

    def __init__(self, config: EncoderDecoderConfig, params: Mapping[str, Any]) -> None:
        """Wraps a parameter tree.

        Args:
          config: the model's config.
          params: nested dict of arrays as listed by `parameter_table(config)`.

        Raises:
          ValueError: a parameter is missing, unexpected or of the wrong shape.
        """
        check_parameters(config, params)
        self.config = config
        self.embed = Embedding(params["embed"])
        self.encoder = Tower(config.encoder, params["encoder"])
        self.decoder = Tower(config.decoder, params["decoder"])
        self.unembed = Unembedding(params.get("unembed", {}))

    @classmethod
    def random(
        cls, config: EncoderDecoderConfig, key: Array, dtype: str = "float32"
    ) -> EncoderDecoder:
        """A randomly initialised model."""
        return cls(config, random_parameters(config, key, dtype))

    @property
    def params(self) -> Tree:
        """The parameters as a nested dict of arrays."""

        def leaf(path: str) -> Array:
            node: Any = self
            for name in path.split("/"):
                node = getattr(node, name)
            return node[...]

        return nest({path: leaf(path) for path in parameter_table(self.config)})

    def encode(
        self,
        source: Array | np.ndarray,
        mask: Array | np.ndarray | None = None,
        *,
        edits: Mapping[str, Edit] | None = None,
        taps: TapsLike = (),
    ) -> tuple[Array, dict[str, Any]]:
        """The memory [B,S,D] that the decoder attends to, and what was tapped.

        Args:
          source: int [B,S], token ids.
          mask: bool [B,S], True at real tokens; None when all are real.
          edits: edits of sites under "encoder."; others are left alone.
          taps: taps of such sites.

        Raises:
          ValueError: as for `Transformer.__call__`.
        """
        inside, _ = split_sides(edits)
        wanted = {name: _inner(name, tap) for name, tap in as_taps(taps).items()}
        check_tokens(self.config.encoder, source, mask)
        check_sites(self.config.encoder, inside, wanted)
        return _encode(self, jnp.asarray(source), mask, inside, wanted)

    def decode(
        self,
        target: Array | np.ndarray,
        memory: Array,
        mask: Array | np.ndarray | None = None,
        memory_mask: Array | np.ndarray | None = None,
        *,
        edits: Mapping[str, Edit] | None = None,
        taps: TapsLike = (),
        cache: Cache | None = None,
        phase: str = "prefill",
        logits_at: Array | np.ndarray | None = None,
    ) -> Output:
        """Logits of the token after each of `target`, given a memory.

        Args:
          target: int [B,T], token ids, the start token first.
          memory: [B,S,D], as `encode` returns it.
          mask: bool [B,T], True at real tokens of the target; None when all are real.
          memory_mask: bool [B,S], the mask of the source.
          edits: edits of the decoder's sites; those under "encoder." are left alone.
          taps: taps of the decoder's sites.
          cache: as for `Transformer.__call__`; of the decoder's own attention.
          phase: "prefill" or "decode".
          logits_at: int [B,N], slots at which logits are computed.

        Raises:
          ValueError: as for `Transformer.__call__`.
        """
        _, outside = split_sides(edits)
        wanted = as_taps(taps)
        check_tokens(self.config.decoder, target, mask, cache)
        check_slots(logits_at, *jnp.shape(target))
        check_sites(self.config.decoder, outside, wanted)
        target = jnp.asarray(target)
        return _decode(
            self, target, mask, memory, memory_mask, outside, wanted, cache, logits_at, phase=phase
        )

    def __call__(
        self,
        source: Array | np.ndarray,
        target: Array | np.ndarray,
        source_mask: Array | np.ndarray | None = None,
        target_mask: Array | np.ndarray | None = None,
        *,
        edits: Mapping[str, Edit] | None = None,
        taps: TapsLike = (),
        logits_at: Array | np.ndarray | None = None,
    ) -> Output:
        """`encode`, then `decode`; edits and taps of both stacks.

        Raises:
          ValueError: as for `Transformer.__call__`.
        """
        wanted = as_taps(taps)
        first = {name: tap for name, tap in wanted.items() if tap.site.startswith(ENCODER)}
        second = {name: tap for name, tap in wanted.items() if name not in first}
        memory, found = self.encode(source, source_mask, edits=edits, taps=first)
        out = self.decode(
            target, memory, target_mask, source_mask, edits=edits, taps=second, logits_at=logits_at
        )
        return dataclasses.replace(out, taps={**found, **out.taps})


def split_sides(edits: Mapping[str, Edit] | None) -> tuple[dict[str, Edit], dict[str, Edit]]:
    """The edits of the encoder, by their names there, and those of the decoder."""
    encoder: dict[str, Edit] = {}
    decoder: dict[str, Edit] = {}
    for site, edit in (edits or {}).items():
        find_site(site)
        if site.startswith(ENCODER):
            encoder[site.removeprefix(ENCODER)] = edit
        else:
            decoder[site] = edit
    return encoder, decoder


def _inner(name: str, tap: Tap) -> Tap:
    if not tap.site.startswith(ENCODER):
        raise ValueError(f"tap {name!r}: {tap.site!r} is no site of the encoder")
    needs = tuple(site.removeprefix(ENCODER) for site in tap.needs)
    return dataclasses.replace(tap, site=tap.site.removeprefix(ENCODER), needs=needs)


@jax.jit
def _encode(
    model: EncoderDecoder,
    tokens: Array,
    mask: Array | None,
    edits: Mapping[str, Edit],
    taps: dict[str, Tap],
) -> tuple[Array, dict[str, Any]]:
    tower, config = model.encoder, model.config.encoder
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    context, _ = tower.begin(mask, None, "prefill", edits, taps)
    x = embed_tokens(_table(model), tokens, config)
    x, context = context.visit("embed", tower.embed(x, context.positions, None, config))
    x, tapped, _ = tower.run(x, context, edits, None)
    x, context = tower.finish(x, context)
    return x, {**context.tapped, **tapped}


@partial(jax.jit, static_argnames=("phase",))
def _decode(
    model: EncoderDecoder,
    tokens: Array,
    mask: Array | None,
    memory: Array,
    memory_mask: Array | None,
    edits: Mapping[str, Edit],
    taps: dict[str, Tap],
    cache: Cache | None,
    logits_at: Array | None,
    *,
    phase: str,
) -> Output:
    tower, config = model.decoder, model.config.decoder
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    real = jnp.ones(memory.shape[:2], bool) if memory_mask is None else memory_mask
    context, cache = tower.begin(mask, cache, phase, edits, taps)
    context = dataclasses.replace(context, memory=memory, memory_allowed=real[:, None, None, :])
    x = embed_tokens(_table(model), tokens, config)
    x, context = context.visit("embed", tower.embed(x, context.positions, None, config))
    x, tapped, cache = tower.run(x, context, edits, cache)
    if logits_at is not None:
        context = read_at(context, logits_at)
        x = jnp.take_along_axis(x, jnp.asarray(logits_at)[..., None], axis=1)
    x, context = tower.finish(x, context)
    logits, context = context.visit("logits", model.unembed(x, _table(model), config))
    return Output(logits, {**context.tapped, **tapped}, cache)


def _table(model: EncoderDecoder) -> Array:
    assert model.embed.tokens is not None, "both stacks read token embeddings"
    return model.embed.tokens[...]
