"""Ways to keep keys and values, by name: each makes a policy of a budget.

The budget is the share of the tokens of a full cache that is kept, at the end of an answer: what is
kept of the context and all slots of the answer count for every method. So methods are compared at
equal numbers of tokens; bytes are measured from the arrays (`jaxheads.evaluate.measure`).
"long_heads" keeps every token, and its budget is what a query sees of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType

import numpy as np

from jaxheads.decode.kinds import HeadKinds
from jaxheads.decode.policies import SELECTIONS, Chunks, Full, HeadWise, Policy, Selected
from jaxheads.methods import razor_attention
from jaxheads.methods.head_scores import score_heads
from jaxheads.model.config import ModelConfig
from jaxheads.model.transformer import Transformer
from jaxheads.names import choose
from jaxheads.text import Tokenizer


@dataclass(frozen=True)
class KindOptions:
    """What streaming heads keep; see `jaxheads.decode.kinds.HeadKinds`.

    Raises:
      ValueError: as `HeadKinds`.
    """

    sinks: int = 4
    recent: int = 32
    compensate: bool = False
    bits: int | None = None
    prefill: str = "streaming"

    def __post_init__(self) -> None:
        self.kinds((1, 1))

    def kinds(self, shape: tuple[int, int]) -> HeadKinds:
        """Kinds of heads [L,K] that all stream."""
        return HeadKinds(np.zeros(shape, bool), **asdict(self))


@dataclass(frozen=True)
class Setting:
    """What a policy is made for.

    Attributes:
      shape: (L, K), layers and key/value heads of the model.
      budget: share of the tokens of a full cache, in (0, 1].
      length: tokens of a context.
      room: slots for the answer.
      options: of kinds of heads.
      scores: [L,K] of a head-wise method, how much each head needs the whole context.
    """

    shape: tuple[int, int]
    budget: float
    length: int
    room: int
    options: KindOptions
    scores: np.ndarray | None = None

    @property
    def size(self) -> int:
        """Tokens in the end."""
        return self.length + self.room

    @property
    def kept(self) -> int:
        """Of them, how many the budget allows a head."""
        return int(self.budget * self.size + 1e-9)


Scored = Callable[[Transformer, Tokenizer, int], np.ndarray]


@dataclass(frozen=True)
class CacheMethod:
    """One way to keep keys and values.

    Attributes:
      meaning: one line for people, with the source.
      policy: of a setting.
      by_head: whether it makes some heads full, by scores.
      scored: the scores [L,K] of a model, of (model, tokenizer, seed); None where there is nothing
        to measure, and `by_head` needs them from a file.
      compensate: whether heads that stream always keep what they drop as one token.
    """

    meaning: str
    policy: Callable[[Setting], Policy]
    by_head: bool = False
    scored: Scored | None = None
    compensate: bool = False


def _full(setting: Setting) -> Policy:
    return Full()


def _streaming(setting: Setting) -> Policy:
    options = setting.options
    recent = setting.kept - options.sinks
    if recent < 1:
        raise ValueError(
            f"budget {setting.budget:g} of {setting.size} tokens is {setting.kept} a head, which "
            f"leaves none beside the {options.sinks} sinks"
        )
    return HeadWise(replace(options, recent=recent).kinds(setting.shape))


def _head_wise(setting: Setting) -> Policy:
    none = setting.options.kinds(setting.shape)
    assert setting.scores is not None
    return HeadWise(none.keeping(setting.scores, budget=setting.budget, length=setting.size))


def _compensated(setting: Setting) -> Policy:
    return _head_wise(replace(setting, options=replace(setting.options, compensate=True)))


def _selected(rule: str, setting: Setting, **options: int) -> Policy:
    selection = SELECTIONS[rule]
    kept = setting.kept - setting.room
    least = 1 if selection.values or selection.window is None else selection.window
    if kept < least:
        raise ValueError(
            f"budget {setting.budget:g} of {setting.size} tokens is {setting.kept} a head, of "
            f"which the answer takes {setting.room}: {rule} keeps at least the last {least}"
        )
    return Selected(rule, tokens=kept, bits=setting.options.bits, options=options)


def _snapkv(setting: Setting) -> Policy:
    return _selected("snapkv", setting)


def _h2o(setting: Setting) -> Policy:
    return _selected("h2o", setting)


def _adakv(setting: Setting) -> Policy:
    return _selected("adakv", setting)


def _task_kv(setting: Setting) -> Policy:
    options = setting.options
    return _selected("task_kv", setting, sinks=options.sinks, recent=options.recent)


def _long_heads(setting: Setting) -> Policy:
    """Chunks as in the paper, 16 of at most 256 tokens, but wide enough for an answer."""
    width = min(max(setting.kept // 16, setting.room), 256)
    if setting.kept < 3 * width:
        raise ValueError(
            f"budget {setting.budget:g} of {setting.size} tokens is {setting.kept} a query, which "
            f"sees at least 3 chunks of {width}"
        )
    return Chunks(width, setting.kept // width)


def _razor(model: Transformer, tokenizer: Tokenizer, seed: int) -> np.ndarray:
    length = min(120, (model.config.context_length - 1) // 4, model.config.vocab_size - 1)
    return razor_attention.scores(model, length=length, seed=seed, first_id=tokenizer.bos_id or 0)


def _of_query_heads(name: str) -> Scored:
    """A key/value head has the highest score of the query heads that read it."""

    def scored(model: Transformer, tokenizer: Tokenizer, seed: int) -> np.ndarray:
        found = score_heads(model, tokenizer, [name], count=8, seed=seed)[name].values
        config = model.config
        return np.asarray(found).reshape(config.n_layers, config.n_kv_heads, -1).max(axis=-1)

    return scored


METHODS: Mapping[str, CacheMethod] = MappingProxyType(
    {
        "full": CacheMethod("every head keeps every token", _full),
        "streaming": CacheMethod(
            "every head keeps sinks and recent tokens (StreamingLLM, Xiao et al. 2023)", _streaming
        ),
        "razor": CacheMethod(
            "induction and echo heads are full, the others compensate "
            "(RazorAttention, Tang et al. 2024)",
            _compensated,
            by_head=True,
            scored=_razor,
            compensate=True,
        ),
        "duo": CacheMethod(
            "heads of the highest trained gates are full (DuoAttention, Xiao et al. 2024)",
            _head_wise,
            by_head=True,
        ),
        "induction": CacheMethod(
            "heads of the highest induction score are full",
            _head_wise,
            by_head=True,
            scored=_of_query_heads("induction"),
        ),
        "retrieval": CacheMethod(
            "heads of the highest retrieval score are full (Wu et al. 2024)",
            _head_wise,
            by_head=True,
            scored=_of_query_heads("retrieval"),
        ),
        "random": CacheMethod("random heads are full: the control", _head_wise, by_head=True),
        "snapkv": CacheMethod(
            "tokens that the last ones attend to (SnapKV, Li et al. 2024)", _snapkv
        ),
        "h2o": CacheMethod(
            "recent tokens, and those that all attend to (H2O, Zhang et al. 2023)", _h2o
        ),
        "adakv": CacheMethod(
            "SnapKV, with budgets divided among the heads of a layer (Feng et al. 2024)", _adakv
        ),
        "task_kv": CacheMethod(
            "heads unlike the others of their layer are full, for each prompt "
            "(Task-KV, He et al. 2025)",
            _task_kv,
        ),
        "long_heads": CacheMethod(
            "each query sees the chunks that fit it best; the budget is what it sees, and every "
            "token is kept (LongHeads, Lu et al. 2024)",
            _long_heads,
        ),
    }
)
"""Methods by name."""


def method_scores(
    name: str, model: Transformer, tokenizer: Tokenizer, *, seed: int = 0
) -> np.ndarray:
    """The scores of a head-wise method, measured.

    Args:
      name: a name of `METHODS`.
      model: a causal language model.
      tokenizer: its tokenizer.
      seed: of what they are measured on.

    Returns:
      float [L,K], higher for heads that need the whole context.

    Raises:
      ValueError: an unknown method, or one whose scores are not measured.
    """
    scored = METHODS[choose("cache method", name, METHODS)].scored
    if scored is None:
        raise ValueError(f"cache method {name!r} has no scores that can be measured")
    return scored(model, tokenizer, seed)


def policy_of(
    name: str,
    config: ModelConfig,
    *,
    budget: float,
    length: int,
    room: int,
    options: KindOptions | None = None,
    scores: np.ndarray | None = None,
) -> Policy:
    """A policy for contexts of a length.

    Args:
      name: a name of `METHODS`.
      config: of the model.
      budget: share of the tokens of a full cache that may be kept, in (0, 1]; "full" keeps all.
      length: tokens of a context.
      room: slots for what follows.
      options: of the kinds of heads; None for the defaults.
      scores: [L,K], for a head-wise method.

    Raises:
      ValueError: an unknown method; a budget out of range or too small for the method; no scores
        where they are needed, or of another shape.
    """
    method = METHODS[choose("cache method", name, METHODS)]
    if not 0 < budget <= 1:
        raise ValueError(f"budget must lie in (0, 1], got {budget}")
    if method.by_head and scores is None:
        raise ValueError(f"cache method {name!r} chooses heads by scores [L,K], got none")
    shape = (config.n_layers, config.n_kv_heads)
    options = KindOptions() if options is None else options
    return method.policy(Setting(shape, budget, length, room, options, scores))
