"""Writes the golden sharding dumps that tests/test_rules.py compares with.

    python scripts/make_sharding_dumps.py

Nothing is computed: shapes come from the parameter tables, so the 70B model costs nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import optax

from jaxheads.edits import Edits
from jaxheads.files import write_text
from jaxheads.model import ModelConfig, parameter_table
from jaxheads.model.parameters import nest
from jaxheads.train.dump import describe
from jaxheads.train.mesh import Mesh, abstract_mesh, check_fit
from jaxheads.train.rules import check_unsharded, shardings
from jaxheads.train.step import start

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "sharding"

SMOLLM2 = ModelConfig(
    n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64, d_model=576, d_mlp=1536,
    vocab_size=49152, context_length=8192,
)  # fmt: skip
LLAMA3_70B = ModelConfig(
    n_layers=80, n_heads=64, n_kv_heads=8, head_dim=128, d_model=8192, d_mlp=28672,
    vocab_size=128256, context_length=8192, tied=False,
)  # fmt: skip
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))


def dumps() -> dict[str, dict[str, Any]]:
    """Name of the file -> the sharding dump."""
    return {
        "smollm2_full": dump(SMOLLM2, Mesh(fsdp=8, tensor=3), 24),
        "smollm2_lofit": dump(SMOLLM2, Mesh(tensor=3), 6, edits=True),
        "llama3_70b": dump(LLAMA3_70B, Mesh(fsdp=16, tensor=8), 128),
        # Eight key/value heads over sixteen devices: they stay whole.
        "llama3_70b_few_kv_heads": dump(LLAMA3_70B, Mesh(fsdp=8, tensor=16), 128),
    }


def dump(config: ModelConfig, settings: Mesh, devices: int, *, edits: bool = False) -> Any:
    """The dump of a `TrainState` of the whole model, or of edits beside the frozen model."""
    mesh = abstract_mesh(settings, devices)
    assert mesh is not None
    check_fit(mesh, batch_size=devices, length=1024, config=config)
    model = nest(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, "float32")
            for path, leaf in parameter_table(config).items()
        }
    )

    def begin(trainable: Any) -> Any:
        return start(trainable, OPTIMIZER)

    if edits:
        offsets = jax.eval_shape(lambda: Edits.identity(config, "z", offset=True))
        tree = {"state": jax.eval_shape(begin, offsets), "frozen": model}
    else:
        tree = {"state": jax.eval_shape(begin, model)}
    check_unsharded(tree, shardings(tree, mesh))
    return describe(tree, mesh)


def text_of(found: dict[str, Any]) -> str:
    """JSON with one line for each leaf."""
    leaves = ",\n".join(
        f"  {json.dumps(path)}: {json.dumps(row)}" for path, row in found["leaves"].items()
    )
    head = "".join(
        f"{json.dumps(k)}: {json.dumps(v)},\n" for k, v in found.items() if k != "leaves"
    )
    return f'{{{head}"leaves": {{\n{leaves}\n}}}}\n'


def main() -> None:
    for name, found in dumps().items():
        write_text(FOLDER / f"{name}.json", text_of(found))
        print(f"{name}: {found['bytes']:,} bytes, {found['bytes_per_device']:,} per device")


if __name__ == "__main__":
    main()
