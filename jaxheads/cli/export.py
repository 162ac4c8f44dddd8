"""`jaxheads export`: edits into the weights, the model out to other tools."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jaxheads.cli.options import Dtype, Edit, EditOptions, Model, load_any, load_model, parse
from jaxheads.cli.terminal import say
from jaxheads.files import write_text
from jaxheads.sites import SITES

if TYPE_CHECKING:
    from jaxheads.edits import Edits
    from jaxheads.model import Transformer
    from jaxheads.text import Tokenizer

MOVED = {
    "q": ("q_pre",),
    "k": ("k_pre",),
    "z": ("head_out",),
    "attn_out": ("head_out",),
    "resid_mid": ("attn_out",),
    "resid_post": ("mlp_out",),
}
"""Sites whose values change when an edit of the key is folded: an edit left there would act
on other values, so the two stay together."""

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
"""How far the exported model's logits may lie from the edited one's, relative to the largest."""


def main(argv: list[str]) -> None:
    """Parses and runs."""
    parse(export, "export", argv)


def export(
    model: Model,
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")],
    edit: Edit = EditOptions(),  # noqa: B008 - frozen
    dtype: Dtype | None = None,
) -> None:
    """Fold edits into the weights and write a directory that transformers loads.

    Without edits, a model of any kind is written; edits are for causal language models here.

    Example: jaxheads export smollm2-135m-instruct tuned --edits runs/lofit/edits.safetensors

    Edits that no weight can express are written beside the weights, in edits.safetensors, with
    a note that says how to apply them.

    Args:
        model: A name, a directory or a .gguf file.
        out: The directory to write; new or empty.
        edit: What to bake in.
        dtype: Of the exported weights.
    """
    edit.check()
    import jaxheads
    from jaxheads.convert.files import fresh_directory

    # Entered first: a folder that cannot be written is told before the model is read.
    with fresh_directory(out) as folder:
        if edit.edits is None and edit.mask is None:
            loaded, tokenizer = load_any(model, dtype)
            jaxheads.export(loaded, folder, tokenizer=tokenizer)
        else:
            inside, outside = _export_edited(model, edit, dtype, folder)
            if inside:
                say(f"folded into the weights: {', '.join(inside)}")
            for site, why in outside.items():
                say(f"not folded, kept in {out / 'edits.safetensors'}: {site} ({why})")
    say(f"exported to {out}")


def _export_edited(
    model: str, edit: EditOptions, dtype: Dtype | None, folder: Path
) -> tuple[Edits, dict[str, str]]:
    """Writes a model with edits; returns those that are in its weights, and why others are not."""
    import jaxheads

    loaded, tokenizer = load_model(model, dtype)
    edits = edit.build(loaded.config) or jaxheads.Edits()
    inside, outside = split_edits(loaded, edits)
    folded = jaxheads.fold(loaded, inside)
    rest = jaxheads.Edits(_only(edits, outside))
    _check_same(loaded, edits, folded, rest, tokenizer)
    jaxheads.export(folded, folder, tokenizer=tokenizer)
    if outside:
        rest.save(folder / "edits.safetensors")
        write_text(folder / "README.md", _note(outside))
    return inside, outside


def split_edits(model: Transformer, edits: Edits) -> tuple[Edits, dict[str, str]]:
    """Divides edits into those that fold together and the rest.

    Returns:
      The edits that fold, and for each site that does not, why.
    """
    import jaxheads

    outside = dict(jaxheads.unfoldable(edits, model.config))
    for site in edits:
        if site in outside:
            continue
        try:  # Whether an edit is exact can depend on its values.
            jaxheads.fold(model, {site: edits[site]})
        except ValueError as error:
            outside[site] = str(error)
    while True:
        held = {
            site: f"acts after the edit of {other}, which does not fold"
            for site, others in MOVED.items()
            for other in others
            if site in edits and site not in outside and other in outside
        }
        if not held:
            inside = [site for site in edits if site not in outside]
            return jaxheads.Edits(_only(edits, inside)), outside
        outside |= held


def _only(edits: Edits, sites: Collection[str]) -> dict[str, Any]:
    """Last site first: what a site writes is folded before what the sites before it add."""
    return {site: edits[site] for site in reversed(list(SITES)) if site in edits and site in sites}


def _check_same(
    model: Transformer, edits: Edits, folded: Transformer, rest: Edits, tokenizer: Tokenizer
) -> None:
    import numpy as np

    from jaxheads.text import sample_text

    tokens = np.asarray([tokenizer.encode(sample_text())[: min(64, model.config.context_length)]])
    wanted = np.asarray(model(tokens, edits=edits).logits)
    found = np.asarray(folded(tokens, edits=rest).logits)
    error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    allowed = TOLERANCE[model.config.dtype]
    say(f"logits of the exported model differ by {error:.1e} of the largest")
    if not error <= allowed:
        raise ValueError(
            f"the folded model does not compute what the edits do: its logits differ by {error:.1e}"
            f" of the largest, at most {allowed:g} is expected. Nothing is written"
        )


def _note(outside: dict[str, str]) -> str:
    listed = "\n".join(f"* `{site}`: {why}" for site, why in outside.items())
    return f"""# A model with edits beside it

These weights are not all: the edits below cannot be expressed as weights, and are in
`edits.safetensors`. Other tools load the weights without them.

{listed}

To use both:

```sh
jaxheads generate . "A prompt" --edits edits.safetensors
```

```python
import jaxheads as jh

model, tokenizer = jh.load(".")
out = model(tokenizer("A prompt"), edits=jh.Edits.load("edits.safetensors"))
```
"""
