"""`generate`: continues prompts, at once or with a look at the text every few steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import struct

from jaxheads.decode.contrast import Model
from jaxheads.decode.live import OnText, decode_with_text
from jaxheads.decode.policies import Policy
from jaxheads.decode.sampling import Sampler
from jaxheads.decode.state import State, advance, start
from jaxheads.decode.text import Tokenizer, check_stops
from jaxheads.model.batch import Batch
from jaxheads.model.cache import Cache
from jaxheads.model.context import Edit, TapsLike

Array = jax.Array


@struct.dataclass
class Generated:
    """New tokens of each row; with `samples` n, rows i*n to i*n+n-1 continue prompt i.

    Entries of a row past its length mean nothing.

    Attributes:
      tokens: int32 [B,N], the generated ids.
      lengths: int32 [B], generated tokens of each row, its stop token included.
      logprobs: float32 [B,N], natural logarithm of each token's probability under the model
        as it is edited, at temperature 1: before the repetition penalty, the temperature
        and the filters.
      taps: what was tapped of decode steps, [N-1,...] in front of the site's axes (T = 1):
        entry i is of the pass that read new token i and chose token i+1. The last token is
        never read.
      prompt_taps: what was tapped of the pass over the prompts, one row for each prompt.
      texts: the text of each row without special tokens, cut before a stop string; None
        without a tokenizer.
      interrupted: whether Ctrl-C ended it.
    """

    tokens: Array
    lengths: Array
    logprobs: Array
    taps: dict[str, Any]
    prompt_taps: dict[str, Any]
    texts: tuple[str, ...] | None = struct.field(pytree_node=False, default=None)
    interrupted: bool = struct.field(pytree_node=False, default=False)

    def rows(self) -> list[list[int]]:
        """The ids of each row as plain lists."""
        tokens, lengths = np.asarray(self.tokens), np.asarray(self.lengths)
        return [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]


def generate(
    model: Model,
    prompts: Batch | Array | np.ndarray,
    *,
    max_new_tokens: int,
    edits: Mapping[str, Edit] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    key: Array | None = None,
    samples: int = 1,
    stop: Sequence[int | str] = (),
    tokenizer: Tokenizer | None = None,
    on_text: OnText | None = None,
    taps: TapsLike = (),
    prompt_taps: TapsLike = (),
    prefix: Array | np.ndarray | None = None,
    chunk: int | None = None,
    cache: Cache | None = None,
    policy: Policy | None = None,
) -> Generated:
    """Continues prompts.

    Edits act in the prefill over the prompt and in every decode step alike, unless they are
    restricted with `when=`. Compiled once per shape of the prompts and structure of the
    edits; the values of edits and of the sampling options do not recompile.

    Args:
      model: a causal language model, or one that contrasts (`jaxheads.decode.contrast`).
      prompts: `Batch` or int [B,T]; rows of different lengths may be padded on either side.
      max_new_tokens: N, tokens to generate at most.
      edits: what to change. With `samples`, leaves with a row axis do not fit the decode
        steps unless B is 1: gate them to the prefill, or repeat the prompts instead.
      temperature: 0 takes the most likely token; otherwise logits are divided by it.
      top_k: sample among the k most likely tokens only.
      top_p: sample among the fewest tokens whose probability reaches p only.
      min_p: sample among tokens at least min_p times as likely as the most likely one only
        (Nguyen et al. 2024).
      repetition_penalty: of tokens in the prompt or the output, positive logits are divided
        by it and negative ones multiplied (Keskar et al. 2019); 1 changes nothing.
      key: random key, required when temperature > 0.
      samples: n, continuations of each prompt, which is read once.
      stop: token ids after which a row ends, and strings before which its text does.
      tokenizer: makes texts of the tokens; required by stop strings and `on_text`.
      on_text: told (row, new text) every few steps; the pieces of a row, joined, are its
        text. Ctrl-C then returns what is there.
      taps: what to hand back of every decode step; see `Generated.taps`.
      prompt_taps: what to hand back of the pass over the prompts. `final` and `logits`
        exist at each row's last token only.
      prefix: int [B], how many first tokens of each prompt see one another in both directions
        (a prefix language model); the prompt is then read whole.
      chunk: prompt tokens read at a time; None for all at once. The values are the same,
        the memory of the pass is less.
      cache: empty, of B rows and at least T+N slots; consumed: its buffers are reused. None
        for one of that size with every key and value.
      policy: keeps a part of the prompts' keys and values, as `jaxheads.decode.policies` says;
        it reads them itself, 512 tokens at a time unless `chunk` says otherwise, outside of jit.

    Raises:
      ValueError: an option out of range, no key to sample with, prompts that with their
        continuation exceed the model's context or the cache, stop strings without a
        tokenizer, taps that chunks do not have, a prefix with chunks or a policy.
    """
    tokens, strings = _stops(stop)
    if tokenizer is None and (strings or on_text is not None):
        what = f"stop string {strings[0]!r}" if strings else "on_text"
        raise ValueError(f"{what} needs the text of the tokens: pass tokenizer=")
    if tokenizer is not None:
        check_stops(tokenizer, strings)
    sampler = Sampler.of(
        model.config.vocab_size, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty,
    )  # fmt: skip
    state = start(
        model, prompts, max_new_tokens=max_new_tokens, sampler=sampler, key=key, stop=tokens,
        edits=edits, taps=taps, prompt_taps=prompt_taps, samples=samples, prefix=prefix,
        chunk=chunk, cache=cache, policy=policy,
    )  # fmt: skip
    if tokenizer is None:
        return _result(advance(model, state, max_new_tokens - 1))
    state, texts, interrupted = decode_with_text(model, state, tokenizer, strings, on_text)
    return _result(state, texts=texts, interrupted=interrupted)


def _stops(stop: Sequence[int | str]) -> tuple[list[int], list[str]]:
    if isinstance(stop, str):
        raise ValueError(f"stop must be a sequence of token ids and strings, got {stop!r}")
    strings = [item for item in stop if isinstance(item, str)]
    return [item for item in stop if not isinstance(item, str)], strings


def _result(state: State, **text: Any) -> Generated:
    p = state.progress
    return Generated(p.tokens, p.lengths, p.logprobs, p.taps, state.prompt_taps, **text)
