"""`RoutingView`: what a router does, as arrays on the host and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

import numpy as np

KIND = "routing"
"""What the JSON of a `RoutingView` says it is, under "kind"."""


@dataclass(frozen=True)
class Lift:
    """A token at a head.

    Attributes:
      token: its text.
      count: how often it occurs.
      lift: P(on | token) / P(on).
    """

    token: str
    count: int
    lift: float


@dataclass(frozen=True)
class Speciality:
    """The tokens at which a head is on more often than elsewhere.

    Attributes:
      layer: of the head.
      head: index in its layer.
      tokens: those with the highest lift, best first.
      shuffled: the highest lift of any token, in each shuffle.
    """

    layer: int
    head: int
    tokens: tuple[Lift, ...]
    shuffled: tuple[float, ...]

    @property
    def beyond(self) -> float:
        """The highest lift minus the highest in any shuffle."""
        return self.tokens[0].lift - max(self.shuffled)


@dataclass(frozen=True)
class Sentence:
    """The routing of one sentence.

    Attributes:
      tokens: T strings.
      chosen: bool [L,T,H], the heads that are on.
      gates: float32 [L,T,H], 0 where a head is off.
    """

    tokens: tuple[str, ...]
    chosen: np.ndarray
    gates: np.ndarray


@dataclass(frozen=True)
class RoutingView:
    """What a router does. Arrays are numpy's; NaN where there is nothing to measure.

    Attributes:
      tokens: number of real tokens that were looked at.
      load: float32 [L,H], share of the tokens at which a head is on.
      shared: bool [L,H], heads that are always on.
      top_k: int32 [L], K, how many of the others are on at a token.
      entropy: float32 [L], mean entropy of the router's probabilities, nats.
      overlap: float32 [L-1,2], with the next layer, and by chance; see
        `jaxheads.routing.overlap`.
      gates: float32 [L,H], mean gate where a head is on.
      sentence: the routing of one sentence.
      minimum: least occurrences of a token that has a lift.
      specialities: of the routed heads that are neither always on nor never; none where no token
        occurs often enough.
      categories: C names of kinds of tokens.
      category_tokens: int32 [C], how many tokens are of each kind.
      category_load: float32 [C,L,H], share of these at which a head is on.
      category_chance: float32 [C], the greatest difference between that share and `load` at any
        head in any shuffle.
    """

    tokens: int
    load: np.ndarray
    shared: np.ndarray
    top_k: np.ndarray
    entropy: np.ndarray
    overlap: np.ndarray
    gates: np.ndarray
    sentence: Sentence
    minimum: int
    specialities: tuple[Speciality, ...]
    categories: tuple[str, ...]
    category_tokens: np.ndarray
    category_load: np.ndarray
    category_chance: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values, with "kind", which says what it is; NaN as None."""
        return {"kind": KIND} | {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> RoutingView:
        """What `to_json` gave.

        Raises:
          ValueError: it is not that; the message names what is missing or wrong.
        """
        names = [field.name for field in fields(cls)]
        if missing := [name for name in ("kind", *names) if name not in raw]:
            raise ValueError(f"an examination of routing lacks {', '.join(missing)}")
        if raw["kind"] != KIND:
            raise ValueError(f"an examination is of kind {raw['kind']!r}, expected {KIND!r}")
        given = {name: raw[name] for name in names}
        try:
            layers, heads = np.shape(raw["load"])
            sizes = {"L": layers, "H": heads, "C": len(raw["categories"])}
            sizes |= {"T": len(raw["sentence"]["tokens"])}
            for name, (kind, axes) in _ARRAYS.items():
                given[name] = _array(name, raw[name], kind, axes, sizes)
            told = raw["sentence"]
            chosen = _array("sentence.chosen", told["chosen"], bool, "LTH", sizes)
            gates = _array("sentence.gates", told["gates"], np.float32, "LTH", sizes)
            given["sentence"] = Sentence(tuple(told["tokens"]), chosen, gates)
            given["specialities"] = tuple(map(_speciality, raw["specialities"]))
            given["categories"] = tuple(raw["categories"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"an examination of routing cannot be read: {error}") from error
        return cls(**given)


_ARRAYS: Mapping[str, tuple[type, str]] = MappingProxyType(
    {
        "load": (np.float32, "LH"),
        "shared": (bool, "LH"),
        "top_k": (np.int32, "L"),
        "entropy": (np.float32, "L"),
        "overlap": (np.float32, "M2"),
        "gates": (np.float32, "LH"),
        "category_tokens": (np.int32, "C"),
        "category_load": (np.float32, "CLH"),
        "category_chance": (np.float32, "C"),
    }
)
"""Types and axes; M is L - 1."""


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Sentence | Speciality | Lift):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if value != value else value


def _array(name: str, values: Any, kind: type, axes: str, sizes: Mapping[str, int]) -> np.ndarray:
    known = {**sizes, "M": sizes["L"] - 1, "2": 2}
    shape = tuple(known[axis] for axis in axes)
    # An empty list of lists has lost its axes.
    array: np.ndarray = np.asarray(values, np.float64).astype(kind)
    if array.shape != shape and not array.size == np.prod(shape) == 0:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    return array.reshape(shape)


def _speciality(raw: Mapping[str, Any]) -> Speciality:
    lifts = tuple(Lift(**lift) for lift in raw["tokens"])
    return Speciality(raw["layer"], raw["head"], lifts, tuple(raw["shuffled"]))
