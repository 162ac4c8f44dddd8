"""Decoding a few steps at a time, with a look at the text in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from jaxheads.decode.contrast import Model
from jaxheads.decode.state import State, advance
from jaxheads.decode.text import Tokenizer, find_stop, text_so_far

OnText = Callable[[int, str], None]

LOOK_EVERY = 4
"""Steps between looks: few enough to read along, and to waste few past a stop string."""


class Reader:
    """Reads the rows of a state as text.

    Attributes:
      texts: of each row what is certain; all of it where the row has ended.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], rows: int) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._ended = [False] * rows
        self.texts = [""] * rows

    def look(self, state: State, *, last: bool = False) -> State:
        """Brings the texts up to date, and ends rows in which a stop string occurs.

        Args:
          state: to read.
          last: whether nothing follows, so that no end of a text is held back.
        """
        p = state.progress
        tokens, lengths, alive = (np.array(x) for x in (p.tokens, p.lengths, p.alive))
        cut = False
        for row, ended in enumerate(self._ended):
            if ended:
                continue
            ids = tokens[row, : lengths[row]].tolist()
            ending = find_stop(self._tokenizer, ids, self._stops)
            if ending is not None:
                lengths[row], self.texts[row] = ending
                alive[row], cut = False, True
            elif last or not alive[row]:
                self.texts[row] = self._tokenizer.decode(ids, skip_special=True)
            else:
                self.texts[row] = text_so_far(self._tokenizer, ids, self._stops)
            self._ended[row] = last or not alive[row]
        if not cut:
            return state
        progress = replace(
            p, lengths=jnp.minimum(p.lengths, lengths), alive=p.alive & jnp.asarray(alive)
        )
        return replace(state, progress=progress)


def decode_with_text(
    model: Model,
    state: State,
    tokenizer: Tokenizer,
    stops: Sequence[str],
    on_text: OnText | None,
) -> tuple[State, tuple[str, ...], bool]:
    """Decodes to the end, and tells what is new.

    Args:
      model: the model that started.
      state: as it started; its cache is consumed.
      tokenizer: makes text of tokens.
      stops: strings before which a row's text ends.
      on_text: told (row, new text); Ctrl-C then ends the decoding. Without it Ctrl-C raises.

    Returns:
      The last state, the text of each row, and whether Ctrl-C ended it.
    """
    rows = state.progress.tokens.shape[0]
    reader, told = Reader(tokenizer, stops, rows), [0] * rows

    def tell() -> None:
        for row, text in enumerate(reader.texts):
            new, told[row] = text[told[row] :], len(text)
            if new and on_text is not None:
                on_text(row, new)

    try:
        while not state.done:
            state = reader.look(state)
            tell()
            state = advance(model, state, LOOK_EVERY)
    except KeyboardInterrupt:
        if on_text is None:
            raise
        return reader.look(state, last=True), tuple(reader.texts), True
    state = reader.look(state, last=True)
    tell()
    return state, tuple(reader.texts), False
