"""What a compiled program costs, against what its layout says on paper.

Fake devices need a process of their own, which runs this file as a script.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxheads.train.hlo import read_program
from jaxheads.train.mesh import Mesh, make_mesh
from jaxheads.train.rules import parse_rules
from jaxheads.train.topology import Topology, abstract, abstract_state, compile_for, report

ROOT = Path(__file__).resolve().parent.parent
L, B, D, F = 3, 16, 32, 64
MESHES = {"data": {}, "fsdp": {"fsdp": 8}, "tensor": {"tensor": 8}}


def loss(params: Any, x: Any) -> Any:
    """A scan over layers of two matrix products each."""

    def layer(x: Any, weights: Any) -> Any:
        hidden = jnp.tanh(x @ weights["gate"])
        return x + hidden @ weights["down"], None

    return jnp.mean(jax.lax.scan(layer, x, params["mlp"])[0] ** 2)


def costs(topology: str) -> dict[str, Any]:
    """Layout -> the report of a step of gradient descent."""
    devices = Topology.parse(topology).devices()
    params = {"mlp": {"gate": jax.ShapeDtypeStruct((L, D, F), "float32"),
                      "down": jax.ShapeDtypeStruct((L, F, D), "float32")}}  # fmt: skip
    rules = parse_rules({"rows": "data+fsdp, -"})
    optimizer = optax.sgd(0.1)

    def step(state: Any, x: Any) -> Any:
        gradient = jax.grad(loss)(state.trainable, x)
        updates, kept = optimizer.update(gradient, state.optimizer)
        return state.replace(
            trainable=optax.apply_updates(state.trainable, updates), optimizer=kept
        )

    found = {}
    for name, sizes in MESHES.items():
        mesh = make_mesh(Mesh(**sizes, mode="auto"), devices)
        state = abstract_state(params, optimizer, mesh)
        rows = {"rows": jax.ShapeDtypeStruct((B, D), "float32")}
        batch = abstract(rows, mesh, rules)["rows"]
        jitted = jax.jit(
            step, donate_argnums=0, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, state)
        )
        found[name] = report(compile_for(jitted, state, batch, mesh=mesh, device=devices[0]))
    alone = [jax.eval_shape(lambda x: x, tree) for tree in (params, rows)]
    single = jax.jit(lambda p, x: jax.grad(loss)(p, x["rows"]))
    found["single"] = report(compile_for(single, *alone, mesh=None, device=devices[0]))
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "cpu:8"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# Forward two products of each layer; backward two for each of them, less the gradient of the
# first layer's input, which a scan computes all the same.
PAPER = 3 * 2 * L * (2 * B * D * F)
WEIGHTS = 4 * 2 * L * D * F
"""Bytes of all weights."""


def test_operations_per_device_are_those_of_the_layout(found):
    assert found["single"]["flops"] == PAPER
    for name in MESHES:
        assert found[name]["devices"] == 8
        assert found[name]["flops"] == PAPER // 8, name
        assert found[name]["loops_of_unknown_length"] == 0


def test_collectives_are_those_of_the_layout(found):
    assert found["single"]["collectives"] == {}
    # Data: gradients are summed, each weight once. A few bytes more for nothing else.
    data = found["data"]["collectives"]
    assert set(data) == {"all-reduce"}
    assert data["all-reduce"]["bytes"] == WEIGHTS
    # Fully sharded: weights are gathered for use, forward and backward, gradients summed.
    fsdp = found["fsdp"]["collectives"]
    assert fsdp["all-gather"]["bytes"] == 2 * WEIGHTS
    assert fsdp["all-reduce"]["bytes"] == WEIGHTS  # XLA's CPU has no reduce-scatter
    # Tensor: one sum of [B,D] forward and one backward in each layer; no weight moves.
    tensor = found["tensor"]["collectives"]
    assert set(tensor) == {"all-reduce"}
    assert tensor["all-reduce"] == {"count": 2 * L, "bytes": 2 * L * 4 * B * D}


def test_memory_per_device_is_that_of_the_layout(found):
    rows = 4 * B * D
    for name, weights, batch in (
        ("data", WEIGHTS, rows // 8), ("fsdp", WEIGHTS // 8, rows // 8),
        ("tensor", WEIGHTS // 8, rows),
    ):  # fmt: skip
        memory = found[name]["memory"]
        # The state's step and flag, which nothing here reads, are arguments of a few bytes.
        assert weights + batch <= memory["arguments"] <= weights + batch + 16, name
        assert memory["outputs"] < 1024, name  # donated
        assert memory["total"] == sum(v for k, v in memory.items() if k != "total")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU compiler"
)
def test_the_tpu_compiler_needs_no_tpu():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    )
    command = [sys.executable, __file__, "v5e:2x4"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name in MESHES:
        assert found[name]["devices"] == 8
        assert found[name]["flops"] == PAPER // 8, name
        assert found[name]["loops_of_unknown_length"] == 0
    collectives = {name: found[name]["collectives"] for name in MESHES}
    assert collectives["data"]["all-reduce"]["bytes"] == WEIGHTS
    assert collectives["fsdp"]["all-gather"]["bytes"] == 2 * WEIGHTS
    assert collectives["tensor"]["all-reduce"] == {"count": 2 * L, "bytes": 2 * L * 4 * B * D}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cpu:0", r"topology 'cpu:0': expected cpu:N"),
        ("cpu", "expected cpu:N"),
        ("h100:8", "'h100:8' cannot be compiled here: a GPU program needs that GPU"),
        ("v9:2x2", r"unknown topology 'v9:2x2'.*TPUs: v2, v3"),
        ("v5e:16", r"topology 'v5e:16': expected the chips along each axis, e\.g\. v5e:2x2"),
    ],
)
def test_topologies_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        Topology.parse(text)


def test_fake_devices_come_before_anything_else():
    assert len(Topology.parse("cpu:1").devices()) == 1
    count = len(jax.devices("cpu")) + 1
    with pytest.raises(ValueError, match=rf"cpu:{count} needs {count} fake devices, but JAX has"):
        Topology.parse(f"cpu:{count}").devices()


# The text of programs, as the compilers write it.

TEXT = """\
HloModule step, num_partitions=8

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0:T(8,128)}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %w = f32[8,8]{1,0} constant({...})
  %d = f32[4,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %r = f32[4,8]{1,0} all-reduce(%d), channel_id=1, replica_groups=[4,2]<=[8], to_apply=%add
  %g = (f32[4,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%r), channel_id=2, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
  %c = f32[4,8]{1,0} collective-permute(%r), channel_id=3, source_target_pairs={{0,1},{1,0}}
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%x, %c)
}

%below (p: (s32[], f32[4,8])) -> pred[] {
  %n = s32[] constant(5)
  %p = (s32[], f32[4,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%all-reduce-scatter.1 (q: bf16[16,8]) -> bf16[4,8] {
  %q = bf16[16,8]{1,0} parameter(0)
  ROOT %s = bf16[16,8]{1,0} all-reduce(%q), channel_id=4, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
}

ENTRY %main (a: bf16[16,8]) -> f32[] {
  %a = bf16[16,8]{1,0} parameter(0)
  %init = (s32[], f32[4,8]{1,0}) tuple(%a, %a)
  %loop = (s32[], /*index=1*/f32[4,8]{1,0:T(8,128)S(1)}) while(%init), condition=%below, body=%body
  %f = bf16[4,8]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
  %k = bf16[2,2,6,3]{3,2,1,0} constant({...})
  %m = bf16[2,2,3,5]{3,2,1,0} constant({...})
  %batched = bf16[2,2,6,5]{3,2,1,0} convolution(%k, %m), window={size=2x2 stride=2x2 pad=1_1x1_1 rhs_reversal=1x1}, dim_labels=01bf_01io->01bf
  ROOT %e = f32[] constant(0)
}
"""  # noqa: E501


def test_reading_a_program():
    program = read_program(TEXT)
    seen = {(c.kind, c.bytes, c.group, c.times) for c in program.collectives()}
    assert seen == {
        ("all-reduce", 128, 2, 5), ("all-gather", 512, 4, 5), ("collective-permute", 128, 0, 5),
        ("reduce-scatter", 256, 4, 1),
    }  # fmt: skip
    # A product in a loop of five turns; a batched one, whose four windows meet one element each.
    assert program.flops() == 5 * 2 * 4 * 8 * 8 + 2 * (6 * 5) * 3 * 4
    assert (program.devices, program.endless) == (8, 0)
    unknown = read_program(TEXT.replace("direction=LT", "direction=NE"))
    assert unknown.endless == 1
    with pytest.raises(ValueError, match="not the text of a compiled HLO module"):
        read_program("ENTRY")


if __name__ == "__main__":
    print(json.dumps(costs(sys.argv[1])))
