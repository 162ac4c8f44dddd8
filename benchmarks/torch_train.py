"""The peer's half of `train.py`: training steps of PyTorch and transformers.

Runs in an environment of its own, with torch and transformers and without jaxheads. It loads the
model, says that it is ready and answers each line of standard input with one line of JSON: the
seconds of one training step, its loss, and the largest memory that the process has had so far.

    python benchmarks/torch_train.py FOLDER INPUTS.npz WORKLOAD --threads 2

FOLDER holds the model as Hugging Face writes it. INPUTS.npz holds `tokens` [B,T], `heads` [N,2]
(layer, head), `offsets` [N,Dh] and `factors` [L,H,Dh], where training starts, and the scalars
`l1` and `rate_WORKLOAD`. Workloads:

- offsets: LoFiT's second stage. A forward pre-hook on `o_proj` adds an offset to each chosen head.
- importance: LoFiT's first stage. A pre-hook on every `o_proj` scales all heads.
- full: fine-tuning of all parameters.

Settings are meant to be the fastest for this work: fused attention (`sdpa`), no key/value cache,
no gradients of frozen weights, hooks only on layers that have a chosen head (autograd then leaves
out all that lies below the lowest of them), labels shifted instead of logits, which saves a copy
of the logits, and AdamW in its fused form. With --compile the model goes through `torch.compile`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import numpy as np
import torch
from transformers import AutoModelForCausalLM

Tensor = torch.Tensor
Arrays = dict[str, np.ndarray]


def add_to_heads(module: Any, inputs: tuple[Tensor, ...], *, heads: Tensor, offsets: Tensor) -> Any:
    """Adds offsets [N,Dh] to the slices of the given heads [N] of z [B,T,H*Dh]."""
    z = inputs[0]
    change = z.new_zeros(z.shape[-1] // offsets.shape[-1], offsets.shape[-1])
    return (z + change.index_put((heads,), offsets).flatten(), *inputs[1:])


def scale_heads(module: Any, inputs: tuple[Tensor, ...], *, factors: Tensor) -> Any:
    """Multiplies z [B,T,H*Dh] by 1 + factors [H,Dh]."""
    return (inputs[0] * (1 + factors.flatten()), *inputs[1:])


def start_offsets(model: Any, arrays: Arrays) -> list[Tensor]:
    """Hooks for the offsets of the chosen heads; returns what is trained."""
    trained = []
    for layer in np.unique(arrays["heads"][:, 0]):
        here = arrays["heads"][:, 0] == layer
        offsets = torch.tensor(arrays["offsets"][here], requires_grad=True)
        heads = torch.tensor(arrays["heads"][here, 1])
        hook = partial(add_to_heads, heads=heads, offsets=offsets)
        model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(hook)
        trained.append(offsets)
    return trained


def start_importance(model: Any, arrays: Arrays) -> list[Tensor]:
    """Hooks for the factors of all heads; returns what is trained."""
    trained = []
    for layer, values in zip(model.model.layers, arrays["factors"], strict=True):
        factors = torch.tensor(values, requires_grad=True)
        hook = partial(scale_heads, factors=factors)
        layer.self_attn.o_proj.register_forward_pre_hook(hook)
        trained.append(factors)
    return trained


def start_full(model: Any, arrays: Arrays) -> list[Tensor]:
    """All parameters."""
    model.requires_grad_(True)
    return list(model.parameters())


WORKLOADS: dict[str, Callable[[Any, Arrays], list[Tensor]]] = {
    "offsets": start_offsets,
    "importance": start_importance,
    "full": start_full,
}


def peak_bytes() -> int:
    """The largest memory that this process has had, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def make_step(folder: str, inputs: str, workload: str, compiled: bool) -> Callable[[], Tensor]:
    """One training step as a function that returns its loss."""
    with np.load(inputs) as file:
        arrays = {name: file[name] for name in file.files}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.train().requires_grad_(False)
    trained = WORKLOADS[workload](model, arrays)
    optimizer = torch.optim.AdamW(
        trained, lr=float(arrays[f"rate_{workload}"]), weight_decay=0.0, fused=True
    )
    tokens = torch.tensor(arrays["tokens"]).long()
    labels = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100).flatten()
    penalty = float(arrays["l1"]) if workload == "importance" else 0.0
    run = torch.compile(model) if compiled else model

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        logits = run(tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels)
        if penalty:
            loss = loss + penalty * sum(factors.abs().sum() for factors in trained)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def main() -> int:
    """Loads, then takes one step for each line of the input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="the model, as Hugging Face writes it")
    parser.add_argument("inputs", help="npz of the batch and of where training starts")
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--threads", type=int, default=2, help="cores and threads")
    parser.add_argument("--compile", action="store_true", help="by torch.compile")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    torch.set_num_threads(options.threads)
    # The answers have standard output for themselves; what libraries print goes to the errors.
    replies, sys.stdout = sys.stdout, sys.stderr
    step = make_step(options.folder, options.inputs, options.workload, options.compile)
    versions = {name: version(name) for name in ("torch", "transformers")}
    print(json.dumps({"versions": versions, "peak_bytes": peak_bytes()}), file=replies, flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter(), time.process_time()
        reply: dict[str, Any] = {"loss": float(step())}
        reply["seconds"] = time.perf_counter() - begun[0]
        reply["processor_seconds"] = time.process_time() - begun[1]
        reply["peak_bytes"] = peak_bytes()
        print(json.dumps(reply), file=replies, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
