"""`jaxheads generate`: continue a prompt."""

from __future__ import annotations

from typing import Annotated

import tyro

from jaxheads.cli.options import Dtype, Edit, EditOptions, Model, load_model, parse
from jaxheads.cli.terminal import say


def main(argv: list[str]) -> None:
    """Parses and runs."""
    parse(generate, "generate", argv)


def generate(
    model: Model,
    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT")],
    edit: Edit = EditOptions(),  # noqa: B008 - frozen
    chat: bool = False,
    compare: bool = False,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    dtype: Dtype | None = None,
) -> None:
    """Continue a prompt, with or without edits; the likeliest token each time by default.

    Example: jaxheads generate smollm2-135m-instruct "The code is 4711. The code is"
    --mask 18.6,17.3 --compare

    Args:
        model: A name, a directory or a .gguf file.
        prompt: The text to continue.
        edit: What to change.
        chat: Put the prompt into the model's chat template, as a user's message.
        compare: Also print what the model says without the edits.
        max_new_tokens: Tokens to generate at most; the model may stop earlier.
        temperature: 0 takes the likeliest token; higher draws more widely.
        top_k: Draw among the k likeliest tokens only.
        top_p: Draw among the fewest tokens that reach this probability only.
        seed: Of the draws.
        dtype: Of parameters and activations.
    """
    if not prompt:
        raise ValueError("the prompt is empty: expected some text")
    if compare and edit.edits is None and edit.mask is None:
        raise ValueError("--compare needs something to compare: give --edits or --mask")
    edit.check()
    import jax

    import jaxheads

    loaded, tokenizer = load_model(model, dtype)
    edits = edit.build(loaded.config)
    text = tokenizer.chat([{"role": "user", "content": prompt}]) if chat else prompt
    batch = tokenizer(text, add_special_tokens=not chat)

    def continued(edits: jaxheads.Edits | None) -> str:
        out = jaxheads.generate(
            loaded,
            batch,
            max_new_tokens=max_new_tokens,
            edits=edits,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            key=jax.random.key(seed),
            stop=() if tokenizer.eos_id is None else (tokenizer.eos_id,),
        )
        return tokenizer.decode(out.rows()[0], skip_special=True)

    if not compare:
        say(continued(edits))
        return
    say(f"[unedited]{continued(None)}\n")
    say(f"[edited]{continued(edits)}")
