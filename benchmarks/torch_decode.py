"""Decodes with transformers and kvpress, in a process of its own; called by decode.py.

Prints what jaxheads_decode.py prints. It runs in the peers' environment: no part of jaxheads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache


def press_of(engine: str, model: Any, job: dict[str, Any]) -> Any:
    """The press of kvpress that an engine's name stands for; None for transformers alone."""
    if engine == "transformers":
        return None
    from kvpress import DuoAttentionPress, StreamingLLMPress

    length, kept = len(job["tokens"]), job["sinks"] + job["recent"]
    if engine == "kvpress streaming":
        return StreamingLLMPress(compression_ratio=max(1 - kept / length, 0), n_sink=job["sinks"])
    full = np.asarray(job["full"], bool)

    class OurHeads(DuoAttentionPress):
        """The heads are given: the pattern files of the press are those of other models."""

        def load_attention_pattern(self, _model: Any) -> tuple[int, int, np.ndarray]:
            return job["sinks"], job["recent"], full.astype(float)

    press = OurHeads(head_compression_ratio=float((~full).mean()))
    press.post_init_from_model(model)
    return press


def peak_mb(reset: bool = False) -> float:
    """The largest memory of this process so far, or from now on, in MB. On Linux."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        if line.startswith("VmHWM")
    )
    return float(line.split()[1]) / 1e3


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--job", required=True)
    options = parser.parse_args()
    with open(options.job, encoding="utf-8") as file:
        job = json.load(file)
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(
        options.checkpoint, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    before = peak_mb(reset=True)
    press = press_of(job["engine"], model, job)
    cache = DynamicCache()
    prompt, produced = torch.tensor([job["tokens"]]), []
    with torch.inference_mode():
        began = time.perf_counter()
        with contextlib.nullcontext() if press is None else press(model):
            out = model(prompt, past_key_values=cache, logits_to_keep=1)
        read = time.perf_counter() - began
        position = prompt.shape[1]

        def step(out: Any, position: int) -> Any:
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            produced.append(int(token))
            # Keys that were dropped leave positions as they are.
            place = torch.tensor([[position]])
            return model(token, past_key_values=cache, position_ids=place, cache_position=place[0])

        seconds = []
        for _ in range(job["repeats"] + 1):
            began = time.perf_counter()
            for _ in range(job["steps"]):
                out = step(out, position)
                position += 1
            seconds.append(time.perf_counter() - began)
    held = sum(
        x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values)
    )
    grown = peak_mb() - before
    found = {
        "read": read,
        "seconds": seconds[1:],
        "bytes": int(held),
        "slots": position,
        "tokens": produced[: job["steps"]],
        "grown_mb": grown,
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
