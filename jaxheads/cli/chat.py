"""`jaxheads chat`: talk with a model, and switch edits between turns."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxheads.cli.generate import Decoding, DecodingOptions, streamed
from jaxheads.cli.options import Dtype, Edit, EditOptions, Model, load_model, parse
from jaxheads.cli.terminal import fail, say
from jaxheads.names import choose

if TYPE_CHECKING:
    from jaxheads import Edits, ModelConfig
    from jaxheads.model.batch import Batch
    from jaxheads.text import Tokenizer

WIDTHS = 256
"""Prompts are padded to a multiple of this, so that few turns compile anew."""

COMMANDS = {
    "/edits": "off, on, or a FILE of edits to switch on; alone, tells which",
    "/reset": "forget the conversation",
    "/help": "these lines",
    "/quit": "end, as Ctrl-D does",
}


def main(argv: list[str]) -> None:
    """Parses and runs."""
    parse(chat, "chat", argv)


def chat(
    model: Model,
    edit: Edit = EditOptions(),  # noqa: B008 - frozen
    decoding: Decoding = DecodingOptions(),  # noqa: B008 - frozen
    system: str | None = None,
    max_new_tokens: int = 256,
    seed: int = 0,
    dtype: Dtype | None = None,
) -> None:
    """Talk with a model through its chat template; edits can be switched between turns.

    Ctrl-C ends an answer and keeps what is there. Commands: /edits off, /edits on,
    /edits FILE, /reset, /help, /quit.

    Example: jaxheads chat smollm2-135m-instruct --mask 18.6,17.3 --temperature 0.7

    Args:
        model: A name, a directory or a .gguf file.
        edit: What to change, from the first turn on.
        decoding: How tokens are chosen, and when to stop.
        system: The first message, which tells the model how to answer.
        max_new_tokens: Tokens of an answer at most; the model may stop earlier.
        seed: Of the draws.
        dtype: Of parameters and activations.
    """
    edit.check()
    import jax

    import jaxheads

    loaded, tokenizer = load_model(model, dtype)
    decoding.check(tokenizer)
    edits = edit.build(loaded.config)
    room = loaded.config.context_length - max_new_tokens
    if not 1 <= max_new_tokens < loaded.config.context_length:
        raise ValueError(
            f"--max-new-tokens must lie in 1..{loaded.config.context_length - 1}, got "
            f"{max_new_tokens}"
        )
    talk = Talk(loaded.config, system, edits, on=edits is not None)
    talk.asking(tokenizer, "Hello", room)  # A model without a template is told at once.
    for turn, line in enumerate(_lines()):
        if line.startswith("/"):
            try:
                if not talk.command(line):
                    return
            except (OSError, ValueError) as error:
                fail(str(error))
            continue
        try:
            run = partial(
                jaxheads.generate, loaded, talk.asking(tokenizer, line, room),
                max_new_tokens=max_new_tokens, edits=talk.edits if talk.on else None,
                key=jax.random.fold_in(jax.random.key(seed), turn), **decoding.keywords(tokenizer),
            )  # fmt: skip
            out = streamed(run)
        except ValueError as error:
            fail(str(error))
            continue
        except KeyboardInterrupt:  # Before the answer began.
            fail("interrupted: the question is forgotten")
            continue
        assert out.texts is not None
        talk.answered(line, out.texts[0])


@dataclass
class Talk:
    """A conversation and the edits in reach.

    Attributes:
      config: of the model.
      system: the first message, or None.
      edits: what `/edits on` switches on, or None.
      on: whether they act.
      messages: the turns so far.
    """

    config: ModelConfig
    system: str | None
    edits: Edits | None
    on: bool
    messages: list[Mapping[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets every turn."""
        system = {"role": "system", "content": self.system}
        self.messages = [] if self.system is None else [system]

    def asking(self, tokenizer: Tokenizer, line: str, room: int) -> Batch:
        """The conversation with one more question, padded to one of few widths up to `room`.

        Raises:
          ValueError: it has more than `room` tokens, or the template refuses it.
        """
        from jaxheads.model.batch import pack

        text = tokenizer.chat([*self.messages, {"role": "user", "content": line}])
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) > room:
            raise ValueError(
                f"the conversation has {len(ids)} tokens, more than the {room} that leave room "
                "for an answer: ask less, or /reset"
            )
        return pack([ids], side="left", length=min(-(-len(ids) // WIDTHS) * WIDTHS, room))

    def answered(self, line: str, text: str) -> None:
        """Keeps a turn."""
        self.messages.append({"role": "user", "content": line})
        self.messages.append({"role": "assistant", "content": text})

    def command(self, line: str) -> bool:
        """Does what a line like "/edits off" says.

        Returns:
          Whether the conversation goes on.

        Raises:
          ValueError: an unknown command, or edits that do not fit the model.
          FileNotFoundError: no such file of edits.
        """
        name, _, rest = line.strip().partition(" ")
        name = choose("command", name, COMMANDS)
        if name == "/edits":
            self._switch(rest.strip())
        elif name == "/reset":
            self.reset()
            say("(a new conversation)")
        elif name == "/help":
            for known, meaning in COMMANDS.items():
                say(f"{known:8}{meaning}")
        return name != "/quit"

    def _switch(self, to: str) -> None:
        if to == "on" and self.edits is None:
            raise ValueError("there are no edits to switch on: name a file, /edits FILE")
        if to not in ("", "on", "off"):
            options = EditOptions(edits=Path(to))
            options.check()
            self.edits = options.build(self.config)
        if to:
            self.on = to != "off"
        say(f"(edits {'on' if self.on else 'off'})")


def _lines() -> Iterator[str]:
    """What is typed, line by line; empty lines are passed over."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line:
            yield line
