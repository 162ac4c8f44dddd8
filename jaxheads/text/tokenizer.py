"""`Tokenizer`: text to token ids and back, as the model's authors published it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from tokenizers import decoders

from jaxheads.model.batch import Array, Batch, pack
from jaxheads.names import choose
from jaxheads.text.chat import Message, default_template, render_chat
from jaxheads.text.frame import frame

if TYPE_CHECKING:
    from gguf import GGUFReader

_ROLES = (
    *("bos_token", "eos_token", "pad_token", "unk_token"),
    *("cls_token", "sep_token", "mask_token"),
)


class Tokenizer:
    """A tokenizer with its special tokens and its chat template.

    Text that spells a special token, such as "<|im_start|>", becomes that token. A
    beginning-of-sequence token is added only where the model's own files say so.
    Characters that a vocabulary cannot express at all are left out, as its authors'
    tokenizer does (SmolLM2: six control characters and the unassigned planes).

    Attributes:
      backend: the `tokenizers` object that does the work.
      special_tokens: text of the tokens in the roles "bos_token", "eos_token",
        "pad_token", "unk_token", "cls_token", "sep_token" and "mask_token"; a role the
        model does not have is absent.
      chat_template: jinja2 source, or None.
      vocab_size: number of tokens, added ones included. A model may have more
        embedding rows.
      bos_id, eos_id, pad_id: ids of the tokens in these roles, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        """Wraps a `tokenizers` object.

        Raises:
          ValueError: an unknown role, or a special token outside the vocabulary.
        """
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template
        for role, token in self.special_tokens.items():
            choose("special token", role, _ROLES)
            if backend.token_to_id(token) is None:
                raise ValueError(f"{role} {token!r} is not in the vocabulary")
        ids = {role: backend.token_to_id(token) for role, token in self.special_tokens.items()}
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.bos_id: int | None = ids.get("bos_token")
        self.eos_id: int | None = ids.get("eos_token")
        self.pad_id: int | None = ids.get("pad_token")

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Reads a Hugging Face `tokenizer.json` and the files beside it.

        Args:
          path: the directory, or its tokenizer.json. tokenizer_config.json,
            special_tokens_map.json and chat_template.jinja are read when present.

        Raises:
          FileNotFoundError: there is no tokenizer.json.
          ValueError: the file is not a tokenizer.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"no tokenizer.json at {file}")
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # The library raises bare Exception.
            raise ValueError(f"{file} is not a tokenizer: {error}") from error
        # Stored settings meant for training batches; here they would cut text unasked.
        backend.no_truncation()
        backend.no_padding()
        config = _read_json(file.with_name("tokenizer_config.json"))
        named = {**_read_json(file.with_name("special_tokens_map.json")), **config}
        special = {
            role: token if isinstance(token, str) else token["content"]
            for role, token in named.items()
            if role in _ROLES and token
        }
        if "add_bos_token" in config or "add_eos_token" in config:
            first = special.get("bos_token") if config.get("add_bos_token") else None
            last = special.get("eos_token") if config.get("add_eos_token") else None
            frame(backend, first, last)
        template = file.with_name("chat_template.jinja")
        text = template.read_text(encoding="utf-8") if template.is_file() else None
        return cls(backend, special, text or default_template(config.get("chat_template")))

    @classmethod
    def from_gguf(cls, source: str | os.PathLike[str] | GGUFReader) -> Tokenizer:
        """Builds the tokenizer that a GGUF file describes.

        Args:
          source: the file, or an open `gguf.GGUFReader`.

        Raises:
          ValueError: the file has a tokenizer other than byte-level BPE, SentencePiece
            (BPE or Unigram) and WordPiece, names a pre-tokenizer that is not known
            here, or lacks fields.
        """
        from jaxheads.text.gguf_tokenizer import gguf_tokenizer

        if isinstance(source, str | os.PathLike):
            from gguf import GGUFReader

            source = GGUFReader(source)
        backend, special = gguf_tokenizer(source)
        template = source.get_field("tokenizer.chat_template")
        return cls(backend, special, template.contents() if template is not None else None)

    def __call__(
        self,
        texts: str | Sequence[str],
        *,
        side: str = "right",
        length: int | None = None,
        add_special_tokens: bool = True,
    ) -> Batch:
        """Tokens of one or several texts as a padded rectangle.

        Args:
          texts: one text, or one per row.
          side: the side that is padded, "right" or "left".
          length: T; default the longest row.
          add_special_tokens: as in `encode`.

        Returns:
          A `Batch` of numpy arrays: tokens int32 [B,T] and mask bool [B,T].

        Raises:
          ValueError: no texts, a text without any token, something that is not
            text, an unknown side, or a text longer than `length`.
        """
        rows = [texts] if isinstance(texts, str) else list(texts)
        for index, text in enumerate(rows):
            if not isinstance(text, str):
                raise ValueError(f"text {index} must be a str, got {type(text).__name__}: {text!r}")
        encodings = self.backend.encode_batch(rows, add_special_tokens=add_special_tokens)
        for index, encoding in enumerate(encodings):
            if not encoding.ids:
                raise ValueError(f"text {index} has no tokens, a prompt needs one: {rows[index]!r}")
        ids = [encoding.ids for encoding in encodings]
        return pack(ids, side=side, length=length, pad=self.pad_id or 0)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of one text; [] for an empty one.

        Args:
          text: any text.
          add_special_tokens: whether to add the tokens that the model expects around
            a text, if any (Llama 3: a BOS). False for text that has them written
            out, such as the result of `chat`, and for a piece of a prompt.
        """
        return self.encode_with_offsets(text, add_special_tokens=add_special_tokens)[0]

    def encode_with_offsets(
        self, text: str, *, add_special_tokens: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and for each the (start, end) characters of `text` it stands for.

        Tokens that are parts of one character all have the offsets of that character;
        added tokens have (0, 0).
        """
        encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int] | Array, *, skip_special: bool = False) -> str:
        """The text of token ids [T]. Bytes that are not UTF-8 become U+FFFD.

        Raises:
          ValueError: `ids` is not one row of integers of the vocabulary.
        """
        row, _ = self._tokens(ids)
        return self.backend.decode(row, skip_special_tokens=skip_special)

    def pieces(self, ids: Sequence[int] | Array) -> list[str]:
        r"""Readable text of each token of [T] alone, for display.

        Bytes that are only part of a character read like "\xf0\x9f". Raises as `decode`.
        """
        row, tokens = self._tokens(ids)
        if not isinstance(self.backend.decoder, decoders.ByteLevel):
            return [_fallback_byte(token) or token.replace("▁", " ") for token in tokens]
        added = self.backend.get_added_tokens_decoder()
        return [
            token if index in added else _readable(token)
            for index, token in zip(row, tokens, strict=True)
        ]

    def token_id(self, text: str) -> int:
        """The id of the one token that `text` is, such as " Paris".

        Raises:
          ValueError: it is not one token; the message shows how it splits.
        """
        ids = self.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(
                f"{text!r} is not one token but {len(ids)}: {self.pieces(ids)} with ids {ids}"
            )
        return ids[0]

    def chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """A conversation as the prompt the model was tuned on, through its chat template.

        Args:
          messages: the turns, e.g. [{"role": "user", "content": "Hello"}].
          add_generation_prompt: whether to open the model's next turn.
          **variables: anything else the template reads, e.g. `tools`.

        Returns:
          Text with its special tokens written out: encode it with
          `add_special_tokens=False`.

        Raises:
          ValueError: the model has no chat template, or the template refuses.
        """
        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat template: pass plain text instead")
        return render_chat(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            variables={**self.special_tokens, **variables},
        )

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes files that `from_file` and transformers' AutoTokenizer read.

        tokenizer.json, tokenizer_config.json and special_tokens_map.json.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self.special_tokens,
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        for name, text in {
            "tokenizer.json": self.backend.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False),
            "special_tokens_map.json": json.dumps(self.special_tokens, indent=2),
        }.items():
            partial = directory / f".{name}.{os.getpid()}"
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(directory / name)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, special_tokens={self.special_tokens})"

    def _tokens(self, ids: Sequence[int] | Array) -> tuple[list[int], list[str]]:
        row = np.asarray(ids)
        if row.size == 0:
            return [], []
        if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
            raise ValueError(
                f"ids must be one row of integers, got shape {row.shape} and dtype {row.dtype}"
            )
        tokens = []
        for index in row.tolist():
            # The library itself overflows on ids that are not 32-bit unsigned.
            token = self.backend.id_to_token(index) if 0 <= index < 2**32 else None
            if token is None:
                raise ValueError(f"token id {index} is not in the vocabulary of {self.vocab_size}")
            tokens.append(token)
        return row.tolist(), tokens


# Hugging Face files.


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


# Text of tokens alone.


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte (Radford et al. 2019), inverted."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    moved = {chr(256 + rank): byte for rank, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | moved


_BYTES = _byte_of_character()


def _readable(token: str) -> str:
    """The text of one byte-level token, with bytes that are not text escaped."""
    if any(character not in _BYTES for character in token):
        return token
    return bytes(_BYTES[character] for character in token).decode("utf-8", "backslashreplace")


def _fallback_byte(token: str) -> str | None:
    """The text of a SentencePiece token such as <0x0A>, which is one byte; else None."""
    found = re.fullmatch("<0x([0-9A-F]{2})>", token)
    return found and bytes.fromhex(found[1]).decode("utf-8", "backslashreplace")
