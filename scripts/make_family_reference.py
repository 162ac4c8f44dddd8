"""Records what Hugging Face computes for tiny random models of every family.

Run with an interpreter that has torch, transformers and ml_dtypes:

    python scripts/make_family_reference.py [--check] [case ...]

Each case writes tests/fixtures/families/CASE.json and CASE.npz; tests/families.py tells what
they hold. `--check` writes nothing: it exits with status 1 if the stored values are not what
is computed now. Names of cases restrict it to them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

import families  # noqa: E402
from family_reference.case import Case  # noqa: E402
from family_reference.cases import CASES  # noqa: E402
from family_reference.measure import (  # noqa: E402
    indices_of,
    inputs_of,
    run,
    sharpness,
    values_of,
)

TOLERANCE = 1e-4
"""Largest accepted norm of a difference, relative to the norm of the stored last axis."""

SHARP = (0.1, 0.9)
"""Bounds of the mean largest weight of a query. Below, a wrong position hides in the
average of many keys; above, softmax magnifies rounding."""

VOCABULARY = 97
"""V of every case that reads text."""

Made = tuple[dict[str, Any], families.Arrays]


def make(case: Case, seed: int) -> Made:
    """What the two files of a case hold."""
    pixels = {"shape": list(case.pixels), "seed": seed} if case.pixels else None
    draw = {"seed": seed} | case.draw
    with tempfile.TemporaryDirectory() as folder:
        model, config, shapes = build(case, draw, Path(folder))
    inputs = inputs_of(case, VOCABULARY, seed)
    full = inputs | ({"pixels": families.random_pixels(**pixels)} if pixels else {})
    seen, output = run(model, case, full)
    tokens = {prefix: site["resid_pre"][0].shape[1] for prefix, site in seen.items()}
    indices = indices_of(case, inputs, tokens, seed)
    for stack in case.stacks:
        report_sharpness(case, stack.prefix, seen[stack.prefix], inputs)
    about = {
        "README": "tests/families.py tells what this file and the .npz of its name hold.",
        "versions": {lib.__name__: lib.__version__ for lib in (torch, transformers)},
        "config": config,
        "tensors": {name: list(shape) for name, shape in shapes.items()},
        "draw": draw,
    }
    about |= {"pixels": pixels} if pixels else {}
    groups = {
        "inputs": inputs,
        "indices": indices,
        "values": values_of(case, seen, output, indices),
    }
    arrays = {f"{g}/{name}": array for g, group in groups.items() for name, array in group.items()}
    return about, arrays


def build(
    case: Case, draw: dict[str, Any], folder: Path
) -> tuple[Any, dict[str, Any], dict[str, tuple[int, ...]]]:
    """The model with our weights, its config.json, and the shapes of its tensors."""
    config = getattr(transformers, case.config)(**case.settings)
    model_class = getattr(transformers, case.model)
    model_class(config).save_pretrained(folder)
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        kinds = {part.get_dtype() for part in slices.values()}
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    if kinds != {"F32"}:
        raise ValueError(f"{case.name}: expected float32 tensors alone, got {kinds}")
    shapes |= case.tensors
    about = folder / "config.json"
    about.write_text(json.dumps(json.loads(about.read_text("utf-8")) | case.written), "utf-8")
    save_file(families.random_tensors(shapes, **draw), path, metadata={"format": "pt"})
    model, report = model_class.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    left = {name: found for name, found in report.items() if found}
    if left:
        raise ValueError(f"{case.name}: transformers did not take the weights as drawn: {left}")
    written = json.loads(about.read_text("utf-8"))
    return model.eval(), written, dict(sorted(shapes.items()))


def report_sharpness(case: Case, prefix: str, seen: Any, inputs: families.Arrays) -> None:
    """Prints how far from uniform attention is; raises where that proves little."""
    for site in ("pattern", "cross.pattern"):
        if site not in seen:
            continue
        length = seen[site][0].shape[-2]
        mask = next((m for n, m in inputs.items() if "mask" in n and m.shape[1] == length), None)
        sharp = sharpness(seen[site], mask)
        print(f"{case.name}: mean largest weight of {prefix}{site} {sharp:.2f}")
        if not SHARP[0] < sharp < SHARP[1]:
            raise ValueError(f"{case.name}: {prefix}{site} is {sharp:.3f}, outside {SHARP}")


def write(case: Case, made: Made) -> None:
    about, arrays = made
    families.FOLDER.mkdir(exist_ok=True)
    path = families.FOLDER / f"{case.name}.npz"
    partial = path.with_name(f".{path.name}")
    with partial.open("wb") as file:
        np.savez_compressed(file, **arrays)
    partial.replace(path)
    text = path.with_suffix(".json")
    partial = text.with_name(f".{text.name}")
    partial.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    partial.replace(text)
    print(f"wrote {path.relative_to(ROOT)} ({path.stat().st_size / 1e3:.0f} kB)")


def check(case: Case, made: Made) -> list[str]:
    """How the stored files differ from what was made now."""
    path = families.FOLDER / f"{case.name}.npz"
    if not path.is_file():
        return [f"{case.name}: not stored"]
    about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    live = json.loads(json.dumps(made[0]))
    problems = [
        f"{case.name}: {key} differs" for key in ("tensors", "draw") if about[key] != live[key]
    ]
    with np.load(path) as stored:
        if sorted(stored.files) != sorted(made[1]):
            return [*problems, f"{case.name}: other arrays are stored"]
        for name, now in made[1].items():
            group = name.partition("/")[0]
            if group != "values":
                if not np.array_equal(stored[name], now):
                    problems.append(f"{case.name}: {name} differs")
                continue
            worst = distance(now, stored[name], name)
            if not worst <= TOLERANCE:
                problems.append(f"{case.name}: {name} differs by {worst:.1e}")
    print(f"{case.name}: {'differs' if problems else 'as stored'}")
    return problems


def distance(now: np.ndarray, stored: np.ndarray, name: str) -> float:
    """Largest norm of a difference along the last axis; relative, except for weights."""
    size = np.linalg.norm(stored.astype(np.float64), axis=-1)
    scale = 1.0 if name.endswith("pattern") else size + 1e-6
    return float((np.linalg.norm(now - stored, axis=-1) / scale).max())


def main() -> int:
    """Runs the command; returns its exit status."""
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("case", nargs="*", help=f"of {', '.join(names)}")
    parser.add_argument("--check", action="store_true", help="compare with what is stored")
    options = parser.parse_args()
    strange = set(options.case) - set(names)
    if strange:
        parser.error(f"no such case: {', '.join(sorted(strange))}; known: {', '.join(names)}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    problems = []
    for case in CASES:
        if options.case and case.name not in options.case:
            continue
        made = make(case, zlib.crc32(case.name.encode()) % 10_000)
        if options.check:
            problems += check(case, made)
        else:
            write(case, made)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
