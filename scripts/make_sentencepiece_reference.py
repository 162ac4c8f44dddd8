"""Trains small SentencePiece models and records what SentencePiece makes of varied texts.

Run with an interpreter that has sentencepiece and protobuf:

    python scripts/make_sentencepiece_reference.py

It writes tests/fixtures/sentencepiece_reference.json: of each model the settings, pieces, scores
and types that a GGUF file of it would hold, and for each text the ids and the decoded text. The
models are trained on docs/*.md, so a new run gives new ones: the file documents itself.

    python scripts/make_sentencepiece_reference.py --model tokenizer.model --output other.json

records a model that exists instead of training any.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

ROOT = Path(__file__).resolve().parent.parent
FIXTURE = ROOT / "tests" / "fixtures" / "sentencepiece_reference.json"
TIE = -1e9
"""The score that Llama 2 and Mistral give to every run of spaces."""

RULES = {"\t": " ", "\n": " ", "Ａ": "A", "Ｂ": "B", "ﬁ": "fi", "…": "...", "\u3000": " "}
RULES |= {"é": "e\u0301", "\u200b": ""}
SHARED: dict[str, Any] = {
    "character_coverage": 0.999,
    "max_sentence_length": 20000,
    "num_threads": 1,
    "minloglevel": 2,
}
BPE: dict[str, Any] = SHARED | {
    "model_type": "bpe",
    "vocab_size": 900,
    "byte_fallback": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "remove_extra_whitespaces": False,
    "normalization_rule_name": "identity",
}
MODELS: dict[str, dict[str, Any]] = {
    "as Llama 2": BPE,
    "as Gemma": BPE
    | {
        "add_dummy_prefix": False,
        "user_defined_symbols": ["\n", "\n\n", "\t", "▁▁", "▁▁▁", "▁▁▁▁", "<start_of_turn>"],
    },
    "as T5": SHARED | {"model_type": "unigram", "vocab_size": 400, "pad_id": 3, "bos_id": -1},
    "unigram with bytes": SHARED
    | {
        "model_type": "unigram",
        "vocab_size": 700,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
}

TEXTS = [
    "",
    " ",
    "  ",
    "   ",
    " " * 7,
    " " * 20,
    " " * 37 + "x",
    "a",
    " a",
    "  a",
    "a ",
    "a  ",
    " a b  c   d    e     f ",
    "Hello world",
    "Hello, world!",
    "hello HELLO HeLLo",
    "The attention heads of a transformer are explicit arrays.",
    "A model is one pure function of (tokens, edits).",
    "\n",
    "\n\n",
    "\n\n\n\n\n",
    "one\ntwo\n\nthree\n\n\nfour\n",
    "\r\nwindows\r\nlines\r\n",
    "\tindented\t\twith\ttabs\n\t\t",
    " \n \n  \n",
    "0",
    "7 42 123 2024 1234567890",
    "3.14159, -2.5e-10, 1,000,000 and 0x1F",
    "12:30 on 2024-01-31",
    "def f(x):\n    if x > 0:\n        return x ** 2\n    return None\n",
    "for (int i = 0; i < n; ++i) { sum += a[i]; }",
    '{"key": [1, 2, {"nested": null}], "other": "va\\"lue"}',
    "<p class='a'>text &amp; more</p>",
    "SELECT * FROM heads WHERE layer = 3;",
    "x_1 = W_Q @ resid[:, -1, :] # [B, T, D]",
    "```python\nimport jax\n```",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "=" * 30 + "\n" + "-" * 17,
    "#" * 9 + " heading",
    "....... !!!! ???? ,,,, ;;;",
    "aaaaaaaaaaaaaaaaaaaaa",
    "abababababababab",
    "eeee nnnnn ttttttt sssss oooooooooo",
    "tetetetete nininini ninin inini",
    "don't can't it's we'll I'd you've",
    "https://example.org/path?query=1&other=two#part",
    "name@example.org",
    "café naïve Ångström",
    "cafe\u0301 with a combining accent",
    "Ａ Ｂ ﬁne … full\u3000width",
    "Привет, мир",
    "你好，世界",
    "日本語のテキスト と カナ",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "ελληνικά",
    "한국어 문장",
    "🙂",
    "a🙂b 👩‍👩‍👧 🇫🇷",
    "∑ x² ≤ √y → ∞",
    "zero\u200bwidth and no\u00a0break",
    "a▁b ▁ literal",
    "\x00 \x01 \x7f control",
    "“quotes” ‘single’ — dash – en",
    "ß ẞ ı İ ǆ",
    "\U0001f600\U00050000 \ufffd",
    "mixed 中文 and English 123 текст",
    " leading and trailing ",
    "\n leading newline and space",
    "word" * 40,
    "supercalifragilisticexpialidocious",
    "[INST] not special [/INST]",
]


def train(settings: dict[str, Any], folder: Path) -> bytes:
    """The serialised model that these settings give on the documentation."""
    lines = [
        line
        for file in sorted((ROOT / "docs").glob("*.md"))
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    if "normalization_rule_name" not in settings:
        rules = folder / "rules.tsv"
        codes = [
            "\t".join(" ".join(f"{ord(c):X}" for c in text) for text in rule)
            for rule in RULES.items()
        ]
        rules.write_text("\n".join(codes) + "\n", encoding="utf-8")
        settings = settings | {"normalization_rule_tsv": str(rules)}
    prefix = folder / "model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(prefix), **settings
    )
    return prefix.with_suffix(".model").read_bytes()


def tie_spaces(serialised: bytes) -> bytes:
    """The same model with equal scores for all runs of spaces, of every length to 15."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(serialised)
    normal = sentencepiece_model_pb2.ModelProto.SentencePiece.NORMAL
    present = {piece.piece for piece in proto.pieces}
    for piece in proto.pieces:
        if len(piece.piece) > 1 and set(piece.piece) == {"▁"}:
            piece.score = TIE
    for length in range(2, 16):
        if "▁" * length not in present:
            proto.pieces.add(piece="▁" * length, score=TIE, type=normal)
    return proto.SerializeToString()


def record(serialised: bytes, texts: Sequence[str]) -> dict[str, Any]:
    """The model's fields under the names of GGUF, and what it makes of the texts."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(serialised)
    model = sentencepiece.SentencePieceProcessor(model_proto=serialised)
    unigram = proto.trainer_spec.model_type == 1
    rules = proto.normalizer_spec
    user_defined = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
    return {
        "model": "t5" if unigram else "llama",
        "add_space_prefix": rules.add_dummy_prefix,
        "remove_extra_whitespaces": rules.remove_extra_whitespaces,
        "precompiled_charsmap": base64.b64encode(rules.precompiled_charsmap).decode(),
        "unknown_token_id": model.unk_id(),
        "bos_token_id": model.bos_id(),
        "eos_token_id": model.eos_id(),
        # As in GGUF files, a user-defined piece is spelled as the text that it matches.
        "tokens": [
            piece.piece.replace("▁", " ") if piece.type == user_defined else piece.piece
            for piece in proto.pieces
        ],
        "scores": [piece.score for piece in proto.pieces],
        "types": [piece.type for piece in proto.pieces],
        "texts": [[text, ids, model.decode(ids)] for text in texts for ids in [model.encode(text)]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a .model file to record; default: train")
    parser.add_argument("--output", type=Path, default=FIXTURE)
    options = parser.parse_args()
    if options.model is not None:
        models = {options.model.name: record(options.model.read_bytes(), TEXTS)}
    else:
        models = {}
        for name, settings in MODELS.items():
            with tempfile.TemporaryDirectory() as folder:
                serialised = train(settings, Path(folder))
            if name == "as Llama 2":
                serialised = tie_spaces(serialised)
            models[name] = record(serialised, TEXTS)
    result = {"made with": f"sentencepiece {sentencepiece.__version__}", "models": models}
    partial = options.output.with_name(f".{options.output.name}.{os.getpid()}")
    partial.write_text(json.dumps(result, ensure_ascii=True, indent=None) + "\n", encoding="utf-8")
    partial.replace(options.output)


if __name__ == "__main__":
    main()
