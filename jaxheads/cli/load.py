"""`jaxheads load`: what a model is, and whether it computes what it should."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxheads.cli.options import Dtype, Model, load_any, parse
from jaxheads.cli.terminal import print_table, say
from jaxheads.files import check_target, write_json

if TYPE_CHECKING:
    from jaxheads.convert.certificate import Row
    from jaxheads.model import Transformer
    from jaxheads.model.models import Model as AnyModel
    from jaxheads.text import Tokenizer

Against = Literal["self", "hf"]


def main(argv: list[str]) -> None:
    """Parses and runs."""
    parse(load, "load", argv)


def load(
    model: Model,
    dtype: Dtype | None = None,
    save: Path | None = None,
    verify: bool = False,
    against: Against | None = None,
    json: Path | None = None,
) -> None:
    """Load a model of any kind, say what it is, and check what it computes.

    Example: jaxheads load smollm2-135m-instruct --verify --save models/smollm2

    A causal language model's perplexity on a known text is measured. With --verify, the model
    is compared with itself, along ways that must agree, or with transformers on the same
    files; what is further off than the tolerance in the table ends with exit code 1, and
    nothing is saved.

    Args:
        model: A name, a directory or a .gguf file.
        dtype: Of parameters and activations; default float32, or as a checkpoint was saved.
        save: Write a native checkpoint here, which loads fastest; must not exist yet.
        verify: Print what was compared, on how many tokens, and how far off it is.
        against: self (default), or hf: transformers in float32, which needs torch installed.
        json: Save the comparisons here.
    """
    if not verify and (against or json):
        raise ValueError(f"{'--against' if against else '--json'} is for --verify: give both")
    check_target(json)
    if against == "hf":
        from jaxheads.convert.verify_hf import load_peers

        load_peers()  # Missing packages are told before the model is read.
    from jaxheads.convert import save as save_checkpoint
    from jaxheads.convert.files import fresh_directory
    from jaxheads.convert.kinds import is_causal_lm

    # Entered first: a folder that cannot be written is told before the model is read.
    with fresh_directory(save) if save else nullcontext() as folder:
        started = time.perf_counter()
        loaded, tokenizer = load_any(model, dtype)
        seconds = time.perf_counter() - started
        _describe(model, loaded, tokenizer, seconds)
        if tokenizer and is_causal_lm(loaded):
            say(perplexity_line(model, loaded, tokenizer))
        if verify:
            rows = certify(model, loaded, tokenizer, against or "self")
            _certificate(model, loaded, against or "self", rows, json)
            if not all(row.passed for row in rows):
                raise SystemExit(1)
        if folder:
            save_checkpoint(loaded, tokenizer, folder)
    if save:
        say(f"saved to {save}")


def certify(name: str, model: AnyModel, tokenizer: Tokenizer | None, against: Against) -> list[Row]:
    """The comparisons of a loaded model on the sample text, or random tokens and pixels.

    Raises:
      ValueError: as `verify_hf.against_hf`.
    """
    from jaxheads.convert.load import find_model
    from jaxheads.convert.verify import against_self, sample_inputs
    from jaxheads.text import sample_text

    ids = tokenizer.encode(sample_text()) if tokenizer else None
    inputs = sample_inputs(model, ids)
    if against == "hf":
        from jaxheads.convert.verify_hf import against_hf

        return against_hf(model, find_model(name, None, None)[0], inputs)
    exact = None if model.config.dtype == "float32" else load_any(name, "float32")[0]
    return against_self(model, inputs, exact)


def _certificate(
    name: str, model: AnyModel, against: Against, rows: list[Row], json: Path | None
) -> None:
    from jaxheads.convert.certificate import KL_TOLERANCE, TOLERANCE

    def row_of(row: Row) -> tuple[Any, ...]:
        kl = "" if row.kl is None else f"{row.kl:.1e}"
        top1 = "" if row.top1 is None else f"{100 * row.top1:.0f} %"
        errors = f"{row.max_error:.1e}", f"{row.mean_error:.1e}"
        verdict = "ok" if row.passed else "BAD"
        return row.check, row.value, f"{row.tokens:,}", *errors, kl, top1, verdict

    dtype = model.config.dtype
    allowed = f"{TOLERANCE[dtype]:.0e}", "", f"{KL_TOLERANCE[dtype]:.0e}"
    table = [*map(row_of, rows), ("allowed", "", "", *allowed, "", "")]
    columns = ("check", "value", "tokens", "max", "mean", "KL", "top 1", "")
    print_table(f"{name} in {dtype} against {against}", columns, table)
    say(
        "max, mean: error relative to the norm of the reference at that token; KL: nats a token; "
        "top 1: same likeliest entry"
    )
    failed = sum(not row.passed for row in rows)
    say(f"{failed} of {len(rows)} comparisons failed" if failed else "all within tolerance")
    if json:
        about = {"model": name, "dtype": model.config.dtype, "against": against}
        write_json(json, about | {"passed": not failed, "rows": [row.to_dict() for row in rows]})
        say(f"certificate in {json}")


def _describe(name: str, model: AnyModel, tokenizer: Tokenizer | None, seconds: float) -> None:
    import jax

    from jaxheads.convert.kinds import kind_name
    from jaxheads.model import ModelConfig

    sides = {
        name: side for name, side in vars(model.config).items() if isinstance(side, ModelConfig)
    }
    leaves = jax.tree.leaves(model.params)
    facts = {
        "kind": kind_name(model.config),
        **(_prefixed(sides) or vars(model.config)),
        "parameters": sum(math.prod(leaf.shape) for leaf in leaves),
        "stored as": "/".join(sorted({str(leaf.dtype) for leaf in leaves})),
        "megabytes": round(sum(leaf.nbytes for leaf in leaves) / 1e6),
        "tokenizer entries": tokenizer.vocab_size if tokenizer else "none",
        "seconds to load": f"{seconds:.1f}",
    }
    shown = [(key, f"{v:,}" if type(v) is int else str(v)) for key, v in facts.items()]
    print_table(name, ("", "value"), shown)


def _prefixed(sides: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the configs of several stacks, as "encoder.n_layers"."""
    return {
        f"{side}.{name}": value
        for side, config in sides.items()
        for name, value in vars(config).items()
    }


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
