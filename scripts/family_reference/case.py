"""`Case`: a tiny model of a family; `Stack`: where its sites are in transformers' module."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LENGTH = 500
"""T, tokens of a row."""

REAL = 437
"""Real tokens of the padded row."""


@dataclass(frozen=True)
class Stack:
    """A stack of blocks in a transformers model.

    Attributes:
      layers: path of the list of blocks in the model.
      mid: the boundary between attention and MLP in a block: "input:PATH" or
        "output:PATH" of a module; "sum" for the block's input plus what `o` returns,
        where the two branches are parallel.
      attention: path in a block of the module that returns attention weights.
      o: path in a block of the output projection of attention.
      final: path in the model of the last norm; "" where there is none.
      cross: as `attention`, for the attention to an encoder; "" for none.
      cross_o: as `o`, for the attention to an encoder.
      cross_pre: as `mid`, the boundary between the two kinds of attention.
      prefix: what the names of its sites begin with.
      side: on which side the short row is padded; "" for images, which are whole.
      length: tokens of a row.
      end: the token that ends a row, and stands nowhere else in it; 0 for none.
    """

    layers: str
    mid: str
    attention: str = "self_attn"
    o: str = "self_attn.o_proj"
    final: str = ""
    cross: str = ""
    cross_o: str = ""
    cross_pre: str = ""
    prefix: str = ""
    side: str = "left"
    length: int = LENGTH
    end: int = 0


@dataclass(frozen=True)
class Case:
    """A tiny model.

    Attributes:
      name: names the two files of the case.
      model: class of transformers.
      config: class of its config.
      settings: of the config.
      stacks: the stacks of blocks it has.
      window: reach of its windows, if any; keys near its end are sampled.
      draw: keyword arguments of `random_tensors` beside the seed.
      pixels: shape [B,H,W,C] of its images, if it sees any.
      tensors: name -> shape of tensors that published files have and transformers, though it
        reads them, would not write.
      written: keys that published config.json have, in place of those that transformers writes.
      outputs: name -> path of the module whose result is stored under it.
    """

    name: str
    model: str
    config: str
    settings: dict[str, Any]
    stacks: tuple[Stack, ...]
    window: int = 0
    draw: dict[str, float] = field(default_factory=dict)
    pixels: tuple[int, ...] = ()
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    written: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
