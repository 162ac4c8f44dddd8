"""Options that several commands share: models, heads, edits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jaxheads.cli.terminal import progress_bar

if TYPE_CHECKING:
    from jaxheads.convert.place import Placement
    from jaxheads.edits import Edits
    from jaxheads.model import ModelConfig, Transformer
    from jaxheads.model.models import Model as AnyModel
    from jaxheads.text import Tokenizer

Dtype = Literal["float32", "bfloat16", "float16"]
Model = Annotated[
    tyro.conf.Positional[str],
    tyro.conf.arg(metavar="MODEL", help="A name, a directory or a .gguf file."),
]


def parse(command: Any, name: str, argv: list[str]) -> Any:
    """Parses arguments and calls a command with them."""
    return tyro.cli(
        command, prog=f"jaxheads {name}", args=argv, config=(tyro.conf.FlagCreatePairsOff,)
    )


def load_model(
    name: str, dtype: str | None = None, placement: Placement | None = None
) -> tuple[Transformer, Tokenizer]:
    """Loads a causal language model with a progress bar, divided over devices if told how.

    Raises:
      ValueError: as `jaxheads.load`, and a model of another kind; the message names it.
    """
    from jaxheads.convert.kinds import is_causal_lm, kind_name

    model, tokenizer = load_any(name, dtype, placement)
    if not is_causal_lm(model):
        raise ValueError(
            f"{name}: this command needs a causal language model, got kind "
            f"{kind_name(model.config)!r}; `jaxheads load` takes any"
        )
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer.json, which this command needs")
    return model, tokenizer


def load_any(
    name: str, dtype: str | None = None, placement: Placement | None = None
) -> tuple[AnyModel, Tokenizer | None]:
    """Loads a model of any kind with a progress bar, and its tokenizer if it has one.

    Raises:
      ValueError: as `jaxheads.load`.
    """
    from jaxheads.convert.load import find_model
    from jaxheads.convert.load import load as load_both
    from jaxheads.convert.load import load_model as load_weights

    path, kind = find_model(name, dtype, None)
    bare = kind != "gguf" and not (path / "tokenizer.json").is_file()
    with progress_bar() as progress:
        task = progress.add_task(f"loading {name}", total=None)

        def show(done: int, total: int, _: str) -> None:
            progress.update(task, completed=done, total=total)

        if bare:
            return load_weights(path, dtype=dtype, place=placement, on_progress=show), None
        return load_both(path, dtype=dtype, place=placement, on_progress=show)


def parse_heads(text: str) -> list[tuple[int, int]]:
    """Heads written like "18.6,17.3" as (layer, head) pairs.

    Raises:
      ValueError: something else; whether a model has them is checked with the model.
    """
    pairs = []
    for word in text.split(","):
        layer, _, head = word.strip().partition(".")
        if not (layer.isdecimal() and head.isdecimal()):
            raise ValueError(f"head {word.strip()!r} is not LAYER.HEAD: write heads like 18.6,17.3")
        pairs.append((int(layer), int(head)))
    return pairs


def head_name(head: tuple[int, int]) -> str:
    """(18, 6) as "18.6"."""
    return f"{head[0]}.{head[1]}"


@dataclass(frozen=True)
class EditOptions:
    """What to change in the model; both may be given, the file acts first."""

    edits: Path | None = None
    """Edits to apply: a file that a training run or `Edits.save` wrote."""
    mask: str | None = None
    """Heads to silence, LAYER.HEAD with commas between: 18.6,17.3."""
    how: Literal["zero", "uniform"] = "uniform"
    """How --mask silences: no output, or attention spread evenly."""

    def check(self) -> None:
        """Finds mistakes that need no model.

        Raises:
          ValueError: heads that cannot be read.
          FileNotFoundError: no such file of edits.
        """
        if self.mask is not None:
            parse_heads(self.mask)
        if self.edits is not None and not self.edits.is_file():
            raise FileNotFoundError(f"no edits at {self.edits}")

    def build(self, config: ModelConfig) -> Edits | None:
        """The edits, or None if none were asked for.

        Raises:
          ValueError: heads out of range, a file that is not one of edits, or edits of a
            model of another shape.
        """
        from jaxheads.edits import Edits, mask_heads

        if self.edits is None and self.mask is None:
            return None
        edits = Edits() if self.edits is None else Edits.load(self.edits)
        _check_fit(edits, config, self.edits)
        if self.mask is not None:
            edits = edits | mask_heads(config, parse_heads(self.mask), self.how)
        return edits


def _check_fit(edits: Edits, config: ModelConfig, source: Path | None) -> None:
    """A model of that shape is traced with the edits, without computing anything."""
    import jax
    import jax.numpy as jnp

    from jaxheads.model import Transformer

    tokens = jnp.zeros((1, 2), jnp.int32)
    try:
        jax.eval_shape(
            lambda key: Transformer.random(config, key)(tokens, edits=edits).logits,
            jax.random.key(0),
        )
    except ValueError as error:
        raise ValueError(f"{source} does not fit this model: {error}") from error


Edit = Annotated[EditOptions, tyro.conf.arg(name="")]
