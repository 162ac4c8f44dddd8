"""What the names of pre-tokenizers in GGUF files mean.

A GGUF file only names its pre-tokenizer; a reader has to know the name. The names, the split
expressions, `ignore_merges` and `adds_bos` are those of llama.cpp (src/llama-vocab.cpp, where
an expression is given as in the model's tokenizer.json, that one). What llama.cpp leaves out,
the NFC normalizer and the mask token that takes the space before it, is as in the tokenizers
that the models' authors publish.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tokenizers import Regex, pre_tokenizers

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_LLAMA3 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_QWEN35 = (
    rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}|{_REST_SLASH}"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}?"
    rf"|\p{{N}}{{1,3}}|{_REST_SLASH}"
)


@dataclass(frozen=True)
class Pre:
    """One pre-tokenizer of byte-level BPE.

    Attributes:
      split: cuts text into words and writes them in GPT-2's stand-ins for bytes.
      ignore_merges: whether a word that is a token is that token, however it merges.
      adds_bos: whether a text gets a BOS in a file that does not say.
      nfc: whether text is brought to Unicode's composed form first.
      mask: the mask token, where it takes the white space before it; None elsewhere.
    """

    split: pre_tokenizers.PreTokenizer
    ignore_merges: bool = False
    adds_bos: bool = False
    nfc: bool = False
    mask: str | None = None


def _words(expression: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_GPT2 = Pre(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
_NEOX = replace(_GPT2, nfc=True)
_DIGITS = Pre(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2.split]))
_LLAMA3_BOS = Pre(_words(_LLAMA3), ignore_merges=True, adds_bos=True)

PRE: Mapping[str, Pre] = {
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "roberta-bpe": replace(_GPT2, mask="<mask>"),
    "mpt": _NEOX,  # GPT-NeoX and Pythia have no name of their own
    "olmo": _NEOX,
    "modern-bert": replace(_NEOX, mask="[MASK]"),
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "llama-bpe": _LLAMA3_BOS,
    "llama3": _LLAMA3_BOS,
    "llama-v3": _LLAMA3_BOS,
    "smaug-bpe": Pre(_words(_LLAMA3)),  # SmolLM3
    "dbrx": Pre(_words(_LLAMA3)),  # OLMo 2, Phi-4
    "qwen2": Pre(_words(_QWEN2), nfc=True),
    "qwen35": Pre(_words(_QWEN35), nfc=True),
    "deepseek-r1-qwen": Pre(_words(_QWEN2)),
    "stablelm2": Pre(_words(_QWEN2)),
    "tekken": Pre(_words(_TEKKEN), ignore_merges=True, adds_bos=True),  # Mistral Nemo
    "gpt-4o": Pre(_words(_GPT4O)),
    "llama4": Pre(_words(_GPT4O)),
}
