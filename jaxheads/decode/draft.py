"""`DraftHeads`: small networks that guess the tokens after the next from one hidden state.

h is the normalised last stream at the newest token that the model has read, x_1 the token that
the model says comes next, and draft head i = 1, 2, ... guesses x_{i+1}:

    u = h                            Medusa
    u = [h; E(x_1); ...; E(x_i)]     Hydra: conditioned on what was drafted before it
    r = R u + SiLU(A u + a)          R is the identity where it may be
    logits = W P r

A starts at zero, R passes h on and P starts as the identity, so that a new head's logits are
those of the model for x_1. Hydra++ replaces h by the output of one more decoder block over all
hidden states, with a cache of its own, and has several residual layers.

Sources: Cai et al. (2024), "Medusa: Simple LLM Inference Acceleration Framework with Multiple
Decoding Heads", section 2.1.1; Ankner et al. (2024), "Hydra: Sequentially-Dependent Draft Heads
for Medusa Decoding", sections 3 and 4. Here W, the model's unembedding, is frozen and shared, and
P [D,D] is trained instead of a W for each head, which would have more parameters than SmolLM2 has
blocks; E is the model's embedding scaled to mean square 1; layers after the first have weights of
their own (Hydra's code applies one of them repeatedly); the block of Hydra++ starts as the identity
and has no norm after it. Heads may draft from the most frequent tokens only (Zhao et al. 2025,
"FR-Spec"), because on a small model the unembedding is most of their cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from safetensors.numpy import load_file, save_file

from jaxheads.model.config import ModelConfig
from jaxheads.model.embedding import embed_tokens
from jaxheads.model.parameters import (
    Tree,
    check_parameters,
    flatten,
    nest,
    parameter_table,
    random_parameters,
)
from jaxheads.model.tower import Tower
from jaxheads.model.transformer import Transformer, Unembedding
from jaxheads.names import choose

Array = jax.Array
KINDS = ("medusa", "hydra", "hydra++")


@struct.dataclass
class Residual:
    """R u + SiLU(A u + a).

    Attributes:
      kernel: A, [E,D].
      bias: a, [D].
      skip: R, [E,D]; None for the identity, where E = D.
    """

    kernel: Array
    bias: Array
    skip: Array | None = None

    def __call__(self, u: Array) -> Array:
        """Maps u [...,E] to [...,D]."""
        passed = u if self.skip is None else u @ self.skip.astype(u.dtype)
        return passed + jax.nn.silu(u @ self.kernel.astype(u.dtype) + self.bias.astype(u.dtype))


@struct.dataclass
class DraftHead:
    """The network of one draft head.

    Attributes:
      layers: the first reads u, each other what the one before it made.
      readout: P, [D,D].
    """

    layers: tuple[Residual, ...]
    readout: Array

    def __call__(self, h: Array, drafted: Array) -> Array:
        """What is to be unembedded.

        Args:
          h: [...,D], the state that all heads share.
          drafted: [...,i,D], vectors of the tokens from the next to the one before the head's.

        Returns:
          [...,D].
        """
        width = h.shape[-1]
        u = h
        if self.layers[0].kernel.shape[0] != width:
            u = jnp.concatenate([h, drafted.reshape(*h.shape[:-1], -1)], axis=-1)
        for layer in self.layers:
            u = layer(u)
        return u @ self.readout.astype(u.dtype)


@struct.dataclass
class DraftHeads:
    """All draft heads of a model: a pytree.

    Attributes:
      heads: one for each token after the next.
      prefix: the parameters of the block of Hydra++, as those of a stack of one; else None.
      vocabulary: int32 [M], ascending, the tokens that are drafted; None for all.
    """

    heads: tuple[DraftHead, ...]
    prefix: Tree | None = None
    vocabulary: Array | None = None

    @classmethod
    def new(
        cls,
        config: ModelConfig,
        kind: str,
        count: int,
        key: Array,
        *,
        vocabulary: Array | None = None,
    ) -> DraftHeads:
        """Heads as they are before training, float32.

        Args:
          config: of the model.
          kind: "medusa", "hydra" or "hydra++" (four layers each, as published).
          count: draft heads.
          key: random key of the block of Hydra++.
          vocabulary: int32 [M], the tokens that are drafted.

        Raises:
          ValueError: an unknown kind, no head.
        """
        choose("kind", kind, KINDS)
        if count < 1:
            raise ValueError(f"count must be at least 1 draft head, got {count}")
        d = config.d_model

        def head(number: int) -> DraftHead:
            if kind == "medusa":
                return DraftHead((Residual(jnp.zeros((d, d)), jnp.zeros(d)),), jnp.eye(d))
            size = (number + 1) * d
            first = Residual(jnp.zeros((size, d)), jnp.zeros(d), jnp.eye(size, d))
            rest = [Residual(jnp.zeros((d, d)), jnp.zeros(d))] * (3 if kind == "hydra++" else 0)
            return DraftHead((first, *rest), jnp.eye(d))

        heads = tuple(head(number) for number in range(1, count + 1))
        return cls(heads, _new_block(config, key) if kind == "hydra++" else None, vocabulary)

    @classmethod
    def of(cls, params: Mapping[str, Any], config: ModelConfig) -> DraftHeads:
        """The heads that `params` describes.

        Raises:
          ValueError: they were made for another model.
        """
        found = [params["heads"][str(n)] for n in range(len(params.get("heads", {})))]
        if not found:
            raise ValueError("no draft heads: expected parameters heads/0/...")
        heads = tuple(
            DraftHead(
                tuple(Residual(**h["layers"][str(n)]) for n in range(len(h["layers"]))),
                h["readout"],
            )
            for h in found
        )
        made = cls(heads, params.get("prefix"), params.get("vocabulary"))
        made.check(config)
        return made

    @property
    def params(self) -> Tree:
        """The arrays as a nested dict, e.g. of "heads/0/layers/0/kernel"."""
        heads = {}
        for number, head in enumerate(self.heads):
            layers = {
                str(n): {name: leaf for name, leaf in vars(layer).items() if leaf is not None}
                for n, layer in enumerate(head.layers)
            }
            heads[str(number)] = {"layers": layers, "readout": head.readout}
        parts = {"heads": heads, "prefix": self.prefix, "vocabulary": self.vocabulary}
        return {name: part for name, part in parts.items() if part is not None}

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError where heads do not fit a model of this config."""
        d = config.d_model
        for number, head in enumerate(self.heads, 1):
            shape, read = jnp.shape(head.layers[0].kernel), {d, (number + 1) * d}
            if shape[1] != d or shape[0] not in read:
                raise ValueError(
                    f"draft head {number} has a kernel of {shape}, expected [{sorted(read)}, {d}] "
                    "of this model: it was made for another one"
                )
        if self.prefix is not None:
            check_parameters(_block_config(config), {"blocks": self.prefix} | _ends(config))
        known = self.vocabulary
        if known is not None and not isinstance(known, jax.core.Tracer):
            ids = np.asarray(known)
            if ids.min() < 0 or ids.max() >= config.vocab_size:
                raise ValueError(
                    f"draft vocabulary spans {ids.min()}..{ids.max()}, expected ids of this "
                    f"model, 0..{config.vocab_size - 1}"
                )

    def block(self, config: ModelConfig) -> Tower | None:
        """The block of Hydra++ as a stack of one over a model's hidden states, or None."""
        return (
            None if self.prefix is None else Tower(_block_config(config), {"blocks": self.prefix})
        )

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, whole or not at all."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        save_file({name: np.asarray(leaf) for name, leaf in flatten(self.params)}, partial)
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path, config: ModelConfig) -> DraftHeads:
        """Reads what `save` wrote, or the beside.safetensors of a run of the method.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: as `of`.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no draft heads at {path}")
        leaves = {name: jnp.asarray(leaf) for name, leaf in load_file(path).items()}
        return cls.of(nest(leaves), config)


@struct.dataclass
class Ends:
    """What draft heads take from a model, frozen.

    Attributes:
      tokens: [V,D], the embedding.
      unembed: of the drafted tokens.
      config: static.
    """

    tokens: Array
    unembed: Unembedding
    config: ModelConfig = struct.field(pytree_node=False)

    @classmethod
    def of(cls, model: Transformer, vocabulary: Array | None) -> Ends:
        """Those of a model; `vocabulary` int32 [M] as in `DraftHeads`."""
        assert model.unembed is not None, "a model without a head has no logits"
        assert model.embed.tokens is not None, "a language model has an embedding"
        table = model.embed.tokens[...]
        parts = {"kernel": table if model.unembed.kernel is None else model.unembed.kernel[...]}
        if model.unembed.bias is not None:
            parts["bias"] = model.unembed.bias[...]
        if vocabulary is not None:
            parts = {name: leaf[vocabulary] for name, leaf in parts.items()}
        return cls(table, Unembedding(parts), model.config)

    def vectors(self, tokens: Array) -> Array:
        """E of ids [B,...]: [B,...,D]."""
        x = embed_tokens(self.tokens, tokens.reshape(tokens.shape[0], -1), self.config)
        square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(square + 1e-12).astype(x.dtype)
        return x.reshape(*tokens.shape, -1)

    def logits(self, x: Array) -> Array:
        """Logits of the drafted tokens, float32 [B,T,M], of x [B,T,D]."""
        return self.unembed(x, None, self.config)


def _block_config(config: ModelConfig) -> ModelConfig:
    """One block over hidden states, which needs no ends."""
    return config.replace(
        n_layers=1, ropes=config.ropes[:1], windows=(), relative_buckets=0, final_norm=False,
        vocab_size=1, n_positions=0, n_token_types=0, embed_norm=False, tied=True,
        unembed_bias=False,
    )  # fmt: skip


def _ends(config: ModelConfig) -> Tree:
    """What a stack has beside its blocks, as shapes."""
    table = parameter_table(_block_config(config))
    ends = {path: leaf for path, leaf in table.items() if not path.startswith("blocks/")}
    return nest({path: jax.ShapeDtypeStruct(leaf.shape, "float32") for path, leaf in ends.items()})


def _new_block(config: ModelConfig, key: Array) -> Tree:
    """A random block that writes nothing yet."""
    small = _block_config(config)
    leaves = dict(flatten(random_parameters(small, key)["blocks"]))
    for path in ("attn/o", "mlp/down"):
        leaves[path] = jnp.zeros_like(leaves[path])
    return nest(leaves)
