"""`jaxheads load`: what a model is, and whether it computes what it should."""

from __future__ import annotations

import dataclasses
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from jaxheads.cli.options import Dtype, Model, load_model, parse
from jaxheads.cli.terminal import print_table, say

if TYPE_CHECKING:
    from jaxheads.model import Transformer
    from jaxheads.text import Tokenizer


def main(argv: list[str]) -> None:
    """Parses and runs."""
    parse(load, "load", argv)


def load(model: Model, dtype: Dtype | None = None, save: Path | None = None) -> None:
    """Load a model, say what it is, and measure its perplexity on a known text.

    Example: jaxheads load smollm2-135m-instruct --save models/smollm2

    Args:
        model: A name, a directory or a .gguf file.
        dtype: Of parameters and activations; default float32, or as a checkpoint was saved.
        save: Write a native checkpoint here, which loads fastest; must not exist yet.
    """
    from jaxheads.convert import save as save_checkpoint
    from jaxheads.convert.files import fresh_directory

    # Entered first: a folder that cannot be written is told before the model is read.
    with fresh_directory(save) if save else nullcontext() as folder:
        started = time.perf_counter()
        loaded, tokenizer = load_model(model, dtype)
        seconds = time.perf_counter() - started
        _describe(model, loaded, tokenizer, seconds)
        say(perplexity_line(model, loaded, tokenizer))
        if folder:
            save_checkpoint(loaded, tokenizer, folder)
    if save:
        say(f"saved to {save}")


def _describe(name: str, model: Transformer, tokenizer: Tokenizer, seconds: float) -> None:
    import jax

    leaves = jax.tree.leaves(model.params)
    facts = {
        **dataclasses.asdict(model.config),
        "parameters": sum(math.prod(leaf.shape) for leaf in leaves),
        "stored as": "/".join(sorted({str(leaf.dtype) for leaf in leaves})),
        "megabytes": round(sum(leaf.nbytes for leaf in leaves) / 1e6),
        "tokenizer entries": tokenizer.vocab_size,
        "seconds to load": f"{seconds:.1f}",
    }
    shown = [(key, f"{v:,}" if type(v) is int else str(v)) for key, v in facts.items()]
    print_table(name, ("", "value"), shown)


def perplexity_line(name: str, model: Transformer, tokenizer: Tokenizer) -> str:
    """Perplexity on jaxheads/text/sample.txt, beside the known value of a named model."""
    import jaxheads
    from jaxheads.convert import NAMED_MODELS
    from jaxheads.text import sample_text

    ids = tokenizer.encode(sample_text())[: model.config.context_length]
    found = float(jaxheads.perplexity(model, jaxheads.pack([ids])))
    line = f"perplexity {found:.2f} on {len(ids)} tokens of English"
    known = NAMED_MODELS[name].perplexity if name in NAMED_MODELS else None
    return line if known is None else f"{line} (reference {known:.2f})"
