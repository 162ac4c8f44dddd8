"""What generation refuses before it computes anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from jaxheads.decode.contrast import Contrasted, DoLa, Model
from jaxheads.decode.prefill import check_chunked
from jaxheads.model.batch import Batch
from jaxheads.model.cache import Cache, KVCache
from jaxheads.model.checks import check_tokens
from jaxheads.model.context import Tap
from jaxheads.model.sight import Sight, check_sight
from jaxheads.model.transformer import Transformer

Array = jax.Array


def check_request(
    model: Model,
    prompts: Batch,
    *,
    max_new_tokens: int,
    samples: int,
    chunk: int | None,
    cache: Cache | None,
    stop: Sequence[int],
    prompt_taps: Mapping[str, Tap],
    policy: object | None = None,
    prefix: Array | np.ndarray | None = None,
) -> None:
    """Raises ValueError for what `start` cannot do; the arguments are its own."""
    known = isinstance(model, Transformer | Contrasted | DoLa)
    if not known or not model.config.causal or model.config.head != "lm":
        raise ValueError(f"generation needs a causal language model, got {model!r}")
    if prompts.segments is not None:
        raise ValueError("prompts must have a row each, got a Batch with packed segments")
    check_tokens(model.config, prompts.tokens, prompts.mask)
    if not _is_traced(prompts.mask) and not np.asarray(prompts.mask).any(1).all():
        raise ValueError("a prompt is empty: every row needs at least one real token")
    rows, width = prompts.tokens.shape
    numbers = {"max_new_tokens": max_new_tokens, "samples": samples, "chunk": chunk}
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    total = width + max_new_tokens
    told = f"{width} prompt tokens and {max_new_tokens} new ones"
    if total > model.config.context_length:
        raise ValueError(f"{told} exceed the model's context of {model.config.context_length}")
    for token in stop:
        if not 0 <= token < model.config.vocab_size:
            raise ValueError(
                f"stop token {token} is outside the vocabulary of {model.config.vocab_size}"
            )
    if chunk is not None:
        check_chunked(prompt_taps)
    if prefix is not None:
        _check_prefix(model, prompts, prefix, chunk=chunk, cache=cache, policy=policy)
    if policy is not None:
        _check_policy(model, prompts, cache, prompt_taps)
    if cache is not None:
        _check_cache(cache, rows, total, told)


def _check_prefix(
    model: Model,
    prompts: Batch,
    prefix: Array | np.ndarray,
    *,
    chunk: int | None,
    cache: Cache | None,
    policy: object | None,
) -> None:
    rows, width = prompts.tokens.shape
    if not isinstance(model, Transformer):
        raise ValueError(f"prefix needs a plain model, got {type(model).__name__}")
    if policy is not None:
        raise ValueError("prefix needs the prompt whole, and a policy reads it in chunks")
    if chunk is not None and chunk < width:
        raise ValueError(
            f"prefix needs the prompt whole, got chunk={chunk} for {width} prompt tokens: a chunk "
            "cannot see the ones after it"
        )
    if cache is not None and not isinstance(cache, KVCache):
        raise ValueError(
            f"prefix needs a KVCache, got a {type(cache).__name__}, whose heads see what they keep"
        )
    check_sight(model.config, Sight(prefix=prefix), (rows, width), None, "prefill")


def _check_policy(
    model: Model, prompts: Batch, cache: Cache | None, prompt_taps: Mapping[str, Tap]
) -> None:
    if cache is not None:
        raise ValueError("give one of cache and policy: a policy makes its own cache")
    if prompt_taps:
        raise ValueError("a policy reads the prompts itself and hands back no prompt_taps")
    if not isinstance(model, Transformer):
        raise ValueError(f"a policy reads a plain model, got {type(model).__name__}")
    if _is_traced(prompts.tokens) or _is_traced(prompts.mask):
        raise ValueError("a policy looks at the prompts and cannot be used under jit: give cache=")


def _check_cache(cache: Cache, rows: int, total: int, told: str) -> None:
    if cache.mask.shape[0] != rows:
        raise ValueError(
            f"a cache of {cache.mask.shape[0]} rows does not fit {rows} prompts: expected a row "
            "for each (samples share it)"
        )
    if cache.size < total:
        raise ValueError(f"{told} do not fit a cache of {cache.size} slots")
    if not _is_traced(cache.length) and int(cache.length):
        raise ValueError(f"the cache must be empty, got one that holds {int(cache.length)} slots")


def _is_traced(x: object) -> bool:
    return isinstance(x, jax.core.Tracer)
