"""The peer's half of `sweep.py`: TransformerLens on the same weights and tokens.

Runs in an environment of its own, with torch and transformer-lens and without jaxheads. It reads
one JSON request a line from standard input, {"task": NAME, "out": FILE, ...}, does the task, writes
its arrays to FILE (npz) and answers with one line of JSON: the seconds it took. Before the first
request it says how long it took to boot, and its versions. The process lives as long as its input,
so that all but the first call find it warm.

    python benchmarks/transformer_lens_sweep.py FOLDER INPUTS.npz --threads 2

FOLDER holds the model as Hugging Face writes it. INPUTS.npz holds `clean` and `corrupted`, token
ids [B,T], and `answers` [B,2], the right and the wrong next token.

Settings are the fastest that TransformerLens offers for this work: no compatibility mode,
`torch.inference_mode`, no key/value cache and logits of the last position only, both of which the
bridge hands on to the model. (`start_at_layer` saves nothing: the bridge runs the lower blocks and
discards what they computed.) The tasks in `documented_*` are the library's own functions as its
documentation calls them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import numpy as np
import pandas as pd
import torch
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis.attribution_patching import attribution_patch
from transformers import AutoModelForCausalLM

Tensor = torch.Tensor
Arrays = dict[str, np.ndarray]
FAST = {"use_cache": False, "logits_to_keep": 1}
"""Passed on to the model by the bridge."""


@dataclass(frozen=True)
class Peer:
    """The bridge and what it is asked about: token ids [B,T], answers [B,2]."""

    folder: str
    bridge: TransformerBridge
    clean: Tensor
    corrupted: Tensor
    answers: Tensor

    def metric(self, logits: Tensor) -> Tensor:
        """Mean logit difference after the last token, of logits [B,?,V]."""
        rows = torch.arange(len(self.answers))
        last = logits[:, -1]
        return (last[rows, self.answers[:, 0]] - last[rows, self.answers[:, 1]]).mean()


def site(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_z"


def is_z(name: str) -> bool:
    return name.endswith("hook_z")


def zero_head(z: Tensor, hook: Any, *, head: int) -> Tensor:
    z[:, :, head] = 0.0
    return z


def copy_head(z: Tensor, hook: Any, *, position: int, head: int, clean: Tensor) -> Tensor:
    z[:, position, head] = clean[:, position, head]
    return z


# The tasks. Each returns arrays. `cells` are rows [N,2] of (layer, head) or [N,3] of (layer,
# position, head). Effects are changes of the metric by an edit.


@torch.inference_mode()
def ablate(peer: Peer, cells: list[list[int]], **settings: Any) -> Arrays:
    """The effect of setting one head at a time to zero: [N]."""
    base = peer.metric(peer.bridge(peer.clean, **settings))
    effects = []
    for layer, head in cells:
        hooks = [(site(layer), partial(zero_head, head=head))]
        logits = peer.bridge.run_with_hooks(peer.clean, fwd_hooks=hooks, **settings)
        effects.append(float(peer.metric(logits) - base))
    return {"values": np.array(effects)}


def documented_ablate(peer: Peer, cells: list[list[int]]) -> Arrays:
    """The same as its documentation writes it: `run_with_hooks(tokens, fwd_hooks=...)`."""
    return ablate(peer, cells)


def fast_ablate(peer: Peer, cells: list[list[int]]) -> Arrays:
    """The same with what its forward pass can leave out left out."""
    return ablate(peer, cells, **FAST)


@torch.inference_mode()
def patch(peer: Peer, cells: list[list[int]]) -> Arrays:
    """The effect on the corrupted run of one head at one position as in the clean run: [N]."""
    _, cache = peer.bridge.run_with_cache(peer.clean, names_filter=is_z, **FAST)
    base = peer.metric(peer.bridge(peer.corrupted, **FAST))
    effects = []
    for layer, position, head in cells:
        hook = partial(copy_head, position=position, head=head, clean=cache[site(layer)])
        logits = peer.bridge.run_with_hooks(peer.corrupted, fwd_hooks=[(site(layer), hook)], **FAST)
        effects.append(float(peer.metric(logits) - base))
    return {"values": np.array(effects)}


@torch.inference_mode()
def documented_patch(peer: Peer, cells: list[list[int]]) -> Arrays:
    """The same by `transformer_lens.patching`."""
    _, cache = peer.bridge.run_with_cache(peer.clean)
    values = patching.generic_activation_patch(
        peer.bridge,
        peer.corrupted,
        cache,
        peer.metric,
        patching.layer_pos_head_vector_patch_setter,
        "z",
        index_df=pd.DataFrame(cells, columns=["layer", "pos", "head"]),
    )
    return {"values": (values - peer.metric(peer.bridge(peer.corrupted))).numpy()}


def gradients(peer: Peer) -> tuple[Tensor, list[Tensor], tuple[Tensor, ...]]:
    """The corrupted run's metric, its z [B,T,H,Dh] of each layer, the gradient in each of them."""
    found: list[Tensor] = []

    def start(embedded: Tensor, hook: Any) -> Tensor:
        return embedded.detach().requires_grad_()

    def keep(z: Tensor, hook: Any) -> Tensor:
        found.append(z)  # a view; only what is returned goes on into the graph
        return z

    hooks = [("hook_embed", start), (is_z, keep)]
    metric = peer.metric(peer.bridge.run_with_hooks(peer.corrupted, fwd_hooks=hooks, **FAST))
    return metric.detach(), found, torch.autograd.grad(metric, found)


def attribute(peer: Peer) -> Arrays:
    """Attribution patching, (clean - corrupted) . gradient, of all prompts together: [L,T,H]."""
    with torch.inference_mode():
        _, cache = peer.bridge.run_with_cache(peer.clean, names_filter=is_z, **FAST)
    _, corrupted, slopes = gradients(peer)
    with torch.no_grad():
        effects = [
            ((cache[site(layer)] - z) * slope).sum(dim=(0, 3))
            for layer, (z, slope) in enumerate(zip(corrupted, slopes, strict=True))
        ]
        return {"values": torch.stack(effects).numpy()}


def documented_attribute(peer: Peer) -> Arrays:
    """The same by `attribution_patch`, which takes one pair after the other: [L,T,H], their mean.

    It differentiates through the parameters' graph, so they must not be frozen.
    """
    peer.bridge.requires_grad_(True)
    layers, heads = peer.bridge.cfg.n_layers, peer.bridge.cfg.n_heads
    values = np.zeros((layers, peer.clean.shape[1], heads))
    for row in range(len(peer.clean)):
        one = slice(row, row + 1)
        pair = Peer(peer.folder, peer.bridge, peer.clean, peer.corrupted, peer.answers[one])
        scores = attribution_patch(
            peer.bridge, peer.clean[one], peer.corrupted[one], pair.metric
        ).node_scores
        for node, score in scores.items():
            if node.kind == "attn_head_out":
                values[node.layer, node.position, node.head] += score / len(peer.clean)
    peer.bridge.requires_grad_(False)
    return {"values": values}


def forward_backward(peer: Peer) -> Arrays:
    """One forward and one backward pass, the unit in which attribution is counted."""
    metric, _, _ = gradients(peer)
    return {"values": metric.numpy()}


@torch.inference_mode()
def transformers_ablate(peer: Peer, cells: list[list[int]]) -> Arrays:
    """Ablation without TransformerLens: a pre-hook clears the head's slice of o_proj's input."""
    model = AutoModelForCausalLM.from_pretrained(
        peer.folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    size = model.config.hidden_size // model.config.num_attention_heads
    base = peer.metric(model(peer.clean, **FAST).logits)
    effects = []
    for layer, head in cells:

        def clear(module: Any, inputs: tuple[Tensor, ...], head: int = head) -> tuple[Tensor]:
            inputs[0][..., head * size : (head + 1) * size] = 0.0
            return (inputs[0],)

        handle = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(clear)
        effects.append(float(peer.metric(model(peer.clean, **FAST).logits) - base))
        handle.remove()
    return {"values": np.array(effects)}


TASKS: dict[str, Callable[..., Arrays]] = {
    task.__name__: task
    for task in (
        documented_ablate,
        fast_ablate,
        patch,
        documented_patch,
        attribute,
        documented_attribute,
        forward_backward,
        transformers_ablate,
    )
}


def boot(folder: str, inputs: str) -> Peer:
    """Loads the model into a bridge, its parameters frozen."""
    bridge = TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float32)
    bridge.eval().requires_grad_(False)
    with np.load(inputs) as arrays:
        tensors = (torch.tensor(arrays[n]).long() for n in ("clean", "corrupted", "answers"))
        return Peer(folder, bridge, *tensors)


def answer(peer: Peer, request: dict[str, Any]) -> dict[str, Any]:
    """Does one task, timed, and writes its arrays."""
    task, out = TASKS[request.pop("task")], Path(request.pop("out"))
    start = time.perf_counter()
    arrays = task(peer, **request)
    seconds = time.perf_counter() - start
    partial_file = out.with_suffix(".partial.npz")
    np.savez(partial_file, **arrays)
    partial_file.replace(out)
    return {"seconds": seconds}


def main() -> int:
    """Boots, then answers requests until the input ends."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="the model, as Hugging Face writes it")
    parser.add_argument("inputs", help="npz of clean, corrupted and answers")
    parser.add_argument("--threads", type=int, default=2, help="cores and threads")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    torch.set_num_threads(options.threads)
    # The answers have standard output for themselves; what libraries print goes to the errors.
    replies, sys.stdout = sys.stdout, sys.stderr
    start = time.perf_counter()
    peer = boot(options.folder, options.inputs)
    ready = {
        "seconds": time.perf_counter() - start,
        "versions": {name: version(name) for name in ("torch", "transformers", "transformer-lens")},
    }
    print(json.dumps(ready), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(peer, json.loads(line))), file=replies, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
