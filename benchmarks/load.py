"""Loads a sharded checkpoint onto eight fake devices, beside transformers' from_pretrained.

    python benchmarks/load.py [--json] [--gigabytes 4] [--folder FOLDER] [--repeats 3]

A synthetic Llama in bfloat16, in several safetensors files, is written once. Each load runs in a
process of its own, in turn, with the files in the page cache. transformers maps the files and
leaves the reading to whoever uses the weights, so it is timed at three points: when
from_pretrained returns, when every page of the weights has been touched, and when the weights
are in memory of their own, which is what our load leaves. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

RESULTS = Path(__file__).resolve().parent / "results" / "load.json"
D, F, V, H, K, DH = 4096, 11008, 32000, 32, 8, 128  # of a Llama of 7 B with grouped queries
FILES = 5


# The checkpoint.


def tensors(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes, as LlamaForCausalLM stores them."""
    block = {
        "input_layernorm": (D,),
        "post_attention_layernorm": (D,),
        "self_attn.q_proj": (H * DH, D),
        "self_attn.k_proj": (K * DH, D),
        "self_attn.v_proj": (K * DH, D),
        "self_attn.o_proj": (D, H * DH),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
    }
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for layer in range(layers):
        found |= {f"model.layers.{layer}.{name}.weight": s for name, s in block.items()}
    return found | {"model.norm.weight": (D,), "lm_head.weight": (V, D)}


def nbytes(layers: int) -> int:
    return 2 * sum(math.prod(shape) for shape in tensors(layers).values())


def write(folder: Path, layers: int) -> None:
    """Writes the checkpoint, unless it is there; one file at a time is in memory."""
    from safetensors.numpy import save_file

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": D,
        "intermediate_size": F,
        "vocab_size": V,
        "max_position_embeddings": 2048,
        "num_attention_heads": H,
        "num_key_value_heads": K,
        "head_dim": DH,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(V * D, np.float32).astype(ml_dtypes.bfloat16)
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in tensors(layers).items():
        if size > len(groups) * nbytes(layers) / FILES:
            groups.append([])
        groups[-1].append(name)
        size += 2 * math.prod(shape)
    weight_map = {}
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        shapes = {name: tensors(layers)[name] for name in names}
        # Each tensor is its own stretch of the noise, so that a mix-up would show.
        arrays = {
            name: np.roll(noise, i)[: math.prod(shape)].reshape(shape)
            for i, (name, shape) in enumerate(shapes.items())
        }
        save_file(arrays, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    text = json.dumps({"metadata": {"total_size": nbytes(layers)}, "weight_map": weight_map})
    index.with_suffix(".partial").write_text(text)
    index.with_suffix(".partial").replace(index)  # last, so that it says the rest is whole


# Each of these runs in a process of its own.


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) << 10


def load_ours(folder: str) -> dict[str, float]:
    """Onto a mesh of eight fake devices: seconds, peak growth of memory, bytes they hold."""
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    import jaxheads.model.transformer  # noqa: F401  (imports are no part of loading)
    from jaxheads.convert import load_model

    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=auto)
    before, start = status("VmRSS"), time.perf_counter()
    model = load_model(folder, dtype="bfloat16", mesh=mesh)
    jax.block_until_ready(jax.tree.leaves(model.params))
    seconds = time.perf_counter() - start
    shards = [s.data for leaf in jax.tree.leaves(model.params) for s in leaf.addressable_shards]
    # Copies of one part on several fake devices share memory: count it once.
    held = {shard.unsafe_buffer_pointer(): shard.nbytes for shard in shards}
    return {
        "loaded": seconds,
        "peak": status("VmHWM") - before,
        "held": sum(held.values()),
        "started": seconds_since_start(),
    }


def load_theirs(folder: str) -> dict[str, float]:
    """As load_ours, by transformers; with the three points in time."""
    import torch
    from transformers import LlamaForCausalLM

    before, start = status("VmRSS"), time.perf_counter()
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    returned = time.perf_counter() - start
    started = seconds_since_start()
    page = 4096 // 2
    sum(float(leaf.detach().view(-1)[::page].float().sum()) for leaf in model.parameters())
    touched = time.perf_counter() - start
    peak = status("VmHWM") - before
    start = time.perf_counter()
    for leaf in model.parameters():
        leaf.data = leaf.data.clone()
    copied = time.perf_counter() - start
    return {
        "returned": returned,
        "touched": touched,
        "copied": returned + copied,
        "peak": peak,
        "held": sum(leaf.nbytes for leaf in model.parameters()),
        "started": started,
    }


def seconds_since_start() -> float:
    """Wall-clock seconds since this process began."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def write_memory(folder: str) -> dict[str, float]:
    """Takes as much new memory as the weights need and writes it once: what no copy can beat."""
    size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    start = time.perf_counter()
    for part in (blocks := [np.empty(size // 16, np.uint8) for _ in range(16)]):
        part.fill(1)
    seconds = time.perf_counter() - start
    return {"written": seconds, "held": sum(part.nbytes for part in blocks)}


LOADERS = {"memory": write_memory, "jaxheads": load_ours, "transformers": load_theirs}


def alone(name: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--only", name, "--folder", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"loading with {name} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


# What is reported.


def measure(folder: Path, layers: int, repeats: int) -> dict[str, Any]:
    """Everything, as it goes to the JSON file."""
    write(folder, layers)
    for file in folder.iterdir():  # into the page cache
        with file.open("rb") as opened:
            while opened.read(1 << 24):
                pass
    names = ["memory", "jaxheads"]
    if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        names.append("transformers")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    load = os.getloadavg()[0]
    for _ in range(repeats):
        for name in names:
            runs[name].append(alone(name, folder))
    middle = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for name, found in runs.items()
    }
    ours = middle["jaxheads"]
    result: dict[str, Any] = {
        "bytes": nbytes(layers),
        "files": len(list(folder.glob("*.safetensors"))),
        "dtype": "bfloat16",
        "mesh": {"fsdp": 2, "tensor": 4},
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_average_before": load,
        "versions": {name: version(name) for name in ("jax", "safetensors", *names[2:])},
        "runs": runs,
        "median": middle,
        "peak_of_held": ours["peak"] / ours["held"],
    }
    if "transformers" in middle:
        result["ratio"] = {
            key: middle["transformers"][key] / ours["loaded"]
            for key in ("returned", "touched", "copied")
        }
        result["ratio"]["from_start"] = middle["transformers"]["started"] / ours["started"]
    return result


def show(found: dict[str, Any]) -> None:
    """Prints the medians."""
    ours, theirs = found["median"]["jaxheads"], found["median"].get("transformers")
    print(f"{found['bytes'] / 1e9:.2f} GB of bfloat16 in {found['files']} files; medians")
    print(f"  jaxheads, sharded over eight devices   {ours['loaded']:6.2f} s")
    print(f"  new memory of that size, written once  {found['median']['memory']['written']:6.2f} s")
    print(f"  peak growth of memory: {found['peak_of_held']:.3f} of what the devices hold")
    if theirs is None:
        print("  torch and transformers are not installed: nothing to compare with")
        return
    lines = {
        "returned": "from_pretrained returned (files mapped)",
        "touched": "and every page touched",
        "copied": "or all copied to memory of its own",
    }
    for key, label in lines.items():
        ratio = found["ratio"][key]
        print(f"  transformers, {label:40} {theirs[key]:6.2f} s  = {ratio:.2f} of ours")
    print(
        f"  from the start of the process, with imports: ours {ours['started']:.2f} s, theirs "
        f"(returned) {theirs['started']:.2f} s = {found['ratio']['from_start']:.2f} of ours"
    )


def main() -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="also write results/load.json")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the weights")
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoint is kept; default is to delete it"
    )
    parser.add_argument("--repeats", type=int, default=3, help="loads of each")
    parser.add_argument("--only", choices=LOADERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(LOADERS[options.only](str(options.folder))))
        return 0
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    layers = round((options.gigabytes * 1e9 - nbytes(0)) / (nbytes(1) - nbytes(0)))
    if layers < 1:
        parser.error(f"--gigabytes must be at least 0.9, got {options.gigabytes}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)) / f"llama-{layers}"
        parent = next(path for path in folder.absolute().parents if path.exists())
        free = shutil.disk_usage(parent).free
        if not folder.exists() and free < 1.1 * nbytes(layers):
            print(f"skipped: {parent} has {free / 1e9:.1f} GB free, the checkpoint needs more")
            return 0
        found = measure(folder, layers, options.repeats)
    show(found)
    if options.json:
        RESULTS.parent.mkdir(exist_ok=True)
        partial = RESULTS.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        partial.replace(RESULTS)
        print(f"wrote {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
