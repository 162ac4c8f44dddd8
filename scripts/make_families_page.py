"""Writes docs/families.md: the families that can be loaded, and what is verified of each.

    python scripts/make_families_page.py

Everything on the page is read off the code and tests/fixtures/families.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import families  # noqa: E402
from test_families import ADDITIVITY, PATTERN_TOLERANCE, TOLERANCE  # noqa: E402

from jaxheads.convert.families import FAMILIES  # noqa: E402
from jaxheads.convert.kinds import kind_name  # noqa: E402
from jaxheads.convert.schema import Composite, Schema, read_config  # noqa: E402
from jaxheads.convert.table import Family  # noqa: E402
from jaxheads.files import write_text  # noqa: E402
from jaxheads.model.config import ModelConfig  # noqa: E402

PAGE = ROOT / "docs" / "families.md"

INTRO = """\
# Families

Written by `scripts/make_families_page.py` from the code; do not edit. How to add one:
[adding-a-family.md](adding-a-family.md).

`jh.load` reads these, `jh.export` writes the `huggingface` format. A key of a file that a family
does not know is refused by name.

{table}

## What makes them different

Fields of `ModelConfig` that are the same in the whole family and differ from the default; every
other field is read from the file. Families without a row fix none.

{constants}

## What is verified

Each case is a tiny random model with odd shapes, whose values transformers {version} computed in
float32 with eager attention, on rows of about 500 tokens of which one is padded (an image model's
rows are whole). Weights are drawn anew from a seed. `tests/test_families.py` compares, at
sampled positions:

* every stored value, error relative to its norm, at most {tolerance:g}; attention weights,
  absolute, at most {pattern:g};
* `resid_mid` with `resid_pre` + sum of `head_out` + bias, in the family's norm form, at most
  {additivity:g};
* every tensor of a bfloat16 file with the one that is exported again, bit for bit.

`tests/test_family_gguf.py` writes the decoders as llama.cpp stores them, and compares what is
loaded with the model of the case.

`make parity` computes the stored values anew; `jaxheads load MODEL --verify --against hf` compares
any checkpoint with transformers.

{cases}
"""


@dataclass
class Described:
    """A case's config.json with the shapes of its tensors, seen as an open file."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    where: str

    def read(self, name: str) -> np.ndarray:
        """No case has a tensor that holds a setting."""
        raise KeyError(name)


def page() -> str:
    """The whole page."""
    cases = {name: families.reference(name) for name in families.cases()}
    by_family = {
        name: [case for case in cases.values() if case.family == name] for name in sorted(FAMILIES)
    }
    overview = [
        [
            name,
            ", ".join(dict.fromkeys(map(kind_of, of_it))) or "no case",
            ", ".join(formats(FAMILIES[name])),
        ]
        for name, of_it in by_family.items()
    ]
    constants = [
        [name, stack, ", ".join(f"`{field}={value!r}`" for field, value in values.items())]
        for name in by_family
        for stack, values in stacks_of(FAMILIES[name])
        if values
    ]
    verified: dict[tuple[str, ...], list[str]] = {}
    for name, of_it in by_family.items():
        for case in of_it:
            verified.setdefault((name, rows_of(case), sites_of(case.values)), []).append(case.name)
    return INTRO.format(
        table=table(["model_type", "kind", "formats"], overview),
        constants=table(["model_type", "stack", "fields"], constants),
        cases=table(
            ["model_type", "cases", "rows", "stored values"],
            [[name, ", ".join(of_it), *rest] for (name, *rest), of_it in verified.items()],
        ),
        version=", ".join(sorted(set(map(version_of, cases)))),
        tolerance=TOLERANCE,
        pattern=PATTERN_TOLERANCE,
        additivity=ADDITIVITY,
    )


def formats(family: Family) -> Iterator[str]:
    """Names of formats; with the file's name of the family, where it is another."""
    for name, fmt in family.formats.items():
        others = [other for other in fmt.names if other != family.name]
        yield f"{name} ({', '.join(others)})" if others else name


def kind_of(case: families.Reference) -> str:
    """The kind of model that a case is."""
    schema = FAMILIES[case.family].formats["huggingface"].schema
    source = Described(case.config, case.shapes, case.name)
    return kind_name(read_config(schema, source, "float32"))


def stacks_of(family: Family) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each stack's name and the constants of its policy that are not the default."""
    schema = family.formats["huggingface"].schema
    sides: Mapping[str, Schema]
    sides = schema.sides if isinstance(schema, Composite) else {"": schema}
    default = {field.name: field.default for field in fields(ModelConfig)}
    for name, side in sides.items():
        constants = side.constants.items()
        yield (
            name,
            {
                field: value
                for field, value in sorted(constants)
                if field != "family" and value != default[field]
            },
        )


def rows_of(case: families.Reference) -> str:
    """Shapes of what a case is run on."""
    shapes = {
        name: "×".join(map(str, array.shape))
        for name, array in case.inputs.items()
        if not name.endswith("mask")
    }
    return ", ".join(f"{shape} {name.replace('_', ' ')}" for name, shape in shapes.items())


def sites_of(values: Mapping[str, Any]) -> str:
    """The stored values, stack by stack."""
    prefixes = ("encoder.", "text.", "vision.")
    inside: dict[str, list[str]] = {}
    for name in sorted(values):
        prefix = next((p for p in prefixes if name.startswith(p)), "")
        inside.setdefault(prefix.removesuffix("."), []).append(f"`{name.removeprefix(prefix)}`")
    rest = "decoder" if "encoder" in inside else "both"
    shown = {stack or rest: ", ".join(sites) for stack, sites in inside.items()}
    if len(shown) == 1:
        return next(iter(shown.values()))
    return "; ".join(f"{stack}: {sites}" for stack, sites in sorted(shown.items()))


def version_of(case: str) -> str:
    """The version of transformers that a case was made with."""
    path = families.FOLDER / f"{case}.json"
    return json.loads(path.read_text(encoding="utf-8"))["versions"]["transformers"]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    write_text(PAGE, page())
    print(f"wrote {PAGE.relative_to(ROOT)}")
