"""The vocabulary and the special tokens that a GGUF file describes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import tokenizers
from gguf import TokenType
from tokenizers import AddedToken

from jaxheads.names import choose

if TYPE_CHECKING:
    from gguf import GGUFReader

ROLES = {
    "bos_token": "bos",
    "eos_token": "eos",
    "pad_token": "padding",
    "unk_token": "unknown",
    "cls_token": "cls",
    "sep_token": "seperator",  # As the key is spelled.
    "mask_token": "mask",
}
# What a file that does not say means, in llama.cpp (src/llama-vocab.cpp).
_DEFAULT_IDS: Mapping[str, Mapping[str, int]] = {
    "gpt2": {},
    "llama": {"unk_token": 0, "bos_token": 1, "eos_token": 2},
    "bert": {"pad_token": 0, "unk_token": 100, "bos_token": 101, "sep_token": 102}
    | {"mask_token": 103},
    "t5": {"pad_token": 0, "eos_token": 1, "unk_token": 2},
}


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer fields of a GGUF file, checked.

    Attributes:
      model: "gpt2", "llama", "bert" or "t5".
      architecture: the model's, such as "llama"; "" where the file does not say.
      tokens: text of each token, as its authors spell it; no two are equal.
      types: `gguf.TokenType` of each token.
      special: text of the token in each role.
      fields: the fields under "tokenizer.", by the rest of their names.
    """

    model: str
    architecture: str
    tokens: list[str]
    types: list[int]
    special: Mapping[str, str]
    fields: Mapping[str, Any] = field(repr=False)

    def flag(self, name: str, default: bool) -> bool:
        """The file's choice "tokenizer.ggml.`name`"."""
        return bool(self.fields.get(f"ggml.{name}", default))

    def scores(self) -> list[float]:
        """The score of each token.

        Raises:
          ValueError: the file has none, or not one per token.
        """
        return _per_token(self.fields, "scores", len(self.tokens))

    def of_type(self, *types: TokenType) -> list[str]:
        """The tokens of these types, in the order of their ids."""
        return [token for token, kind in zip(self.tokens, self.types, strict=True) if kind in types]

    def role(self, name: str) -> str:
        """The token in a role, such as "bos_token".

        Raises:
          ValueError: the file names no token of the vocabulary for it.
        """
        if name not in self.special:
            key = f"tokenizer.ggml.{ROLES[name]}_token_id"
            raise ValueError(f"this tokenizer needs a {name}, and the GGUF file has no {key}")
        return self.special[name]


def read_vocabulary(reader: GGUFReader) -> Vocabulary:
    """The vocabulary of an open file.

    Raises:
      ValueError: the file has no tokenizer, one of an unknown model, a token twice, or
        lists of different lengths.
    """
    fields = {
        name.removeprefix("tokenizer."): item.contents()
        for name, item in reader.fields.items()
        if name.startswith("tokenizer.")
    }
    try:
        model = choose("GGUF tokenizer", fields.get("ggml.model", "(not named)"), _DEFAULT_IDS)
    except ValueError as error:
        raise ValueError(f"{error} Load the model's tokenizer.json instead.") from None
    if "ggml.tokens" not in fields:
        raise ValueError("the GGUF file has no tokenizer.ggml.tokens")
    # llama.cpp's name for a token without text, of which there may be several.
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(fields["ggml.tokens"])]
    if model == "gpt2" and "ggml.token_type" not in fields:
        types = [int(TokenType.NORMAL)] * len(tokens)
    else:
        types = _per_token(fields, "token_type", len(tokens))
    found = reader.get_field("general.architecture")
    architecture = found.contents() if found is not None else ""
    if architecture in ("t5", "t5encoder"):
        tokens, types = _sentinels(tokens, types)
    if model == "bert":
        tokens = [_bert_spelling(token, kind) for token, kind in zip(tokens, types, strict=True)]
    ids: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if ids.setdefault(token, index) != index:
            raise ValueError(f"token {token!r} has two ids in the file, {ids[token]} and {index}")
    return Vocabulary(model, architecture, tokens, types, _special(model, tokens, fields), fields)


def add_tokens(
    backend: tokenizers.Tokenizer,
    vocabulary: Vocabulary,
    *,
    normalized: bool = False,
    takes_space_before: frozenset[str] = frozenset(),
    takes_space_after: frozenset[str] = frozenset(),
) -> None:
    """Makes the backend match control and user-defined tokens whole, before all else.

    Args:
      backend: a tokenizer whose model has these tokens.
      vocabulary: where they are from. Control tokens and the unknown token are special.
      normalized: whether user-defined tokens match the normalized text, not the raw one.
      takes_space_before: tokens that swallow the white space on their left.
      takes_space_after: tokens that swallow the white space on their right.
    """

    def added(*types: TokenType, normalized: bool = False) -> list[AddedToken]:
        return [
            AddedToken(
                token,
                normalized=normalized,
                lstrip=token in takes_space_before,
                rstrip=token in takes_space_after,
            )
            for token in vocabulary.of_type(*types)
        ]

    backend.add_special_tokens(added(TokenType.CONTROL, TokenType.UNKNOWN))
    backend.add_tokens(added(TokenType.USER_DEFINED, normalized=normalized))


def _per_token(fields: Mapping[str, Any], name: str, count: int) -> list[Any]:
    values = fields.get(f"ggml.{name}")
    if values is None:
        raise ValueError(f"the GGUF file has no tokenizer.ggml.{name}")
    if len(values) < count:
        raise ValueError(f"tokenizer.ggml.{name} has {len(values)} entries for {count} tokens")
    return list(values[:count])


def _special(model: str, tokens: list[str], fields: Mapping[str, Any]) -> dict[str, str]:
    stored = {
        role: fields[f"ggml.{name}_token_id"]
        for role, name in ROLES.items()
        if f"ggml.{name}_token_id" in fields
    }
    ids = {**_DEFAULT_IDS[model], **stored}
    if model == "bert":
        # llama.cpp's BOS of a BERT is the token that BERT calls CLS, and it has no BOS.
        ids = {"cls_token": ids.pop("bos_token"), **ids}
    # Files exist that name a padding token which the vocabulary lacks: they have none.
    return {role: tokens[index] for role, index in ids.items() if 0 <= index < len(tokens)}


def _sentinels(tokens: list[str], types: list[int]) -> tuple[list[str], list[int]]:
    """T5's blanks by their names: converters store <extra_id_99>, ... 0 as padding tokens."""
    tokens, types = list(tokens), list(types)
    padding = [index for index, token in enumerate(tokens) if re.fullmatch(r"\[PAD\d+\]", token)]
    for number, index in zip(range(99, -1, -1), padding, strict=False):
        tokens[index], types[index] = f"<extra_id_{number}>", int(TokenType.CONTROL)
    return tokens, types


def _bert_spelling(token: str, kind: int) -> str:
    """A piece of BERT's vocabulary as BERT spells it.

    GGUF files have ▁ before the start of a word, and no ## before the rest of one.
    """
    if token.startswith("▁"):
        return token[1:]
    whole = kind in (TokenType.CONTROL, TokenType.UNKNOWN)
    return token if whole or re.fullmatch(r"\[.+\]", token) else f"##{token}"
