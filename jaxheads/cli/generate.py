"""`jaxheads generate`: continue a prompt."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jaxheads.cli.options import Dtype, Edit, EditOptions, Model, load_model, parse, parse_heads
from jaxheads.cli.terminal import print_table, say

if TYPE_CHECKING:
    from collections.abc import Callable

    import jaxheads
    from jaxheads.text import Tokenizer


@dataclass(frozen=True)
class DecodingOptions:
    """How tokens are chosen, and when to stop."""

    temperature: float = 0.0
    """0 takes the likeliest token; higher draws more widely."""
    top_k: int | None = None
    """Draw among the k likeliest tokens only."""
    top_p: float | None = None
    """Draw among the fewest tokens that reach this probability only."""
    min_p: float | None = None
    """Draw among tokens at least this many times as likely as the likeliest only."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that already occurred less likely."""
    stop: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="TEXT")] = ()
    """Ends before this text; may be given several times."""

    def check(self, tokenizer: Tokenizer) -> None:
        """Finds mistakes before anything is generated.

        Raises:
          ValueError: an option out of range, or a stop string that cannot be one.
        """
        from jaxheads.decode import Sampler
        from jaxheads.decode.text import check_stops

        options = asdict(self)
        check_stops(tokenizer, options.pop("stop"))
        Sampler.of(tokenizer.vocab_size, **options)

    def keywords(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Arguments of `jaxheads.generate`; it also stops where the model ends its text."""
        end = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        return asdict(self) | {"stop": (*self.stop, *end), "tokenizer": tokenizer}


Decoding = Annotated[DecodingOptions, tyro.conf.arg(name="")]


def main(argv: list[str]) -> None:
    """Parses and runs."""
    parse(generate, "generate", argv)


def generate(
    model: Model,
    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT")],
    edit: Edit = EditOptions(),  # noqa: B008 - frozen
    decoding: Decoding = DecodingOptions(),
    dola: Literal["low", "high"] | None = None,
    contrast: str | None = None,
    contrast_strength: float = 1.0,
    chat: bool = False,
    compare: bool = False,
    max_new_tokens: int = 64,
    samples: int = 1,
    logprobs: bool = False,
    chunk: int | None = None,
    seed: int = 0,
    dtype: Dtype | None = None,
) -> None:
    """Continue a prompt, with or without edits; the likeliest token each time by default.

    The text is printed as it comes; Ctrl-C keeps what is there.

    Example: jaxheads generate smollm2-135m-instruct "The code is 4711. The code is"
    --mask 18.6,17.3 --compare

    Args:
        model: A name, a directory or a .gguf file.
        prompt: The text to continue.
        edit: What to change.
        decoding: How tokens are chosen, and when to stop.
        dola: Choose tokens by contrast with early layers of the lower or upper half (DoLa).
        contrast: Choose tokens by contrast with the model without these heads, 18.6,17.3.
        contrast_strength: How much of the other model's log-probabilities is subtracted.
        chat: Put the prompt into the model's chat template, as a user's message.
        compare: Also print what the model says without the edits.
        max_new_tokens: Tokens to generate at most; the model may stop earlier.
        samples: Continuations to draw; several are printed when all are complete.
        logprobs: Also print each token with the logarithm of its probability.
        chunk: Read the prompt so many tokens at a time, in less memory.
        seed: Of the draws.
        dtype: Of parameters and activations.
    """
    if not prompt:
        raise ValueError("the prompt is empty: expected some text")
    if compare and edit.edits is None and edit.mask is None:
        raise ValueError("--compare needs something to compare: give --edits or --mask")
    if dola is not None and contrast is not None:
        raise ValueError("--dola and --contrast are two ways to choose a token: give one")
    if not 0 <= contrast_strength < math.inf:
        raise ValueError(f"--contrast-strength must be 0 or more, got {contrast_strength}")
    against = None if contrast is None else parse_heads(contrast)
    edit.check()
    import jax

    import jaxheads
    from jaxheads.decode.contrast import Contrasted, DoLa

    loaded, tokenizer = load_model(model, dtype)
    decoding.check(tokenizer)
    edits = edit.build(loaded.config)
    talking: Any = loaded
    if dola is not None:
        talking = DoLa.of(loaded, dola)
    if against is not None:
        amateur = jaxheads.mask_heads(loaded.config, against)
        talking = Contrasted(loaded, amateur, contrast_strength)
    text = tokenizer.chat([{"role": "user", "content": prompt}]) if chat else prompt
    batch = tokenizer(text, add_special_tokens=not chat)

    def continued(edits: jaxheads.Edits | None, label: str = "") -> None:
        run = partial(
            jaxheads.generate, talking, batch, max_new_tokens=max_new_tokens, edits=edits,
            samples=samples, chunk=chunk, key=jax.random.key(seed), **decoding.keywords(tokenizer),
        )  # fmt: skip
        if samples == 1:
            out = streamed(run, label)
        else:
            out = run()
            for index, found in enumerate(out.texts or ()):
                say(f"{label}[sample {index + 1}]{found}")
        if logprobs:
            for index, row in enumerate(out.rows()):
                _print_logprobs(tokenizer.pieces(row), out.logprobs[index].tolist())
        if out.interrupted:
            raise KeyboardInterrupt

    if not compare:
        continued(edits)
        return
    continued(None, "[unedited]")
    say("")
    continued(edits, "[edited]")


def streamed(run: Callable[..., jaxheads.Generated], label: str = "") -> jaxheads.Generated:
    """Prints the text of one row as it comes, and the end of its line.

    Args:
      run: generates, and takes `on_text`.
      label: printed before the text.
    """
    told = ""

    def show(_: int, text: str) -> None:
        nonlocal told
        first, told = not told, told + text  # before it is printed: Ctrl-C may come then
        print(label + text if first else text, end="", flush=True)

    out = run(on_text=show)
    assert out.texts is not None
    # After Ctrl-C there may be more than was shown.
    print(out.texts[0][len(told) :] if told else label + out.texts[0])
    return out


def _print_logprobs(pieces: list[str], logprobs: list[float]) -> None:
    rows = [(repr(piece), value) for piece, value in zip(pieces, logprobs, strict=False)]
    print_table("natural logarithm of each token's probability", ("token", "log-prob"), rows)
