"""Sources: what they hold, that splits are disjoint, and every way in which they refuse."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from jaxheads import tasks
from jaxheads.data import corpus, corpus_size, open_source, python_docs
from jaxheads.data.division import in_split
from jaxheads.tasks import Example

FULL = Example(
    "P", " a", group="g", wrong=" b", corrupted="C", answers=(" a", " z"), wrongs=(" b",)
)


def write(path, *lines: object):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


# The corpus.


def test_the_corpus_is_what_it_says():
    sizes = {split: corpus_size(split) for split in ("train", "held_out", "all")}
    whole = sizes["all"]
    assert whole.bytes > 300_000 and whole.documents > 50
    for part in ("documents", "characters", "bytes"):
        assert getattr(sizes["train"], part) + getattr(sizes["held_out"], part) == getattr(
            whole, part
        )
    assert 0.03 < sizes["held_out"].characters / whole.characters < 0.3
    titles = [document.title for document in python_docs()]
    assert titles == sorted(titles) and "assert" in titles
    assert len(corpus.fingerprint()) == 64


def test_no_paragraph_of_the_corpus_is_on_both_sides_or_lost():
    def long(texts) -> list[str]:
        found = [corpus.same_text(p) for text in texts for p in corpus.paragraphs(text)]
        return [paragraph for paragraph in found if len(paragraph) >= corpus.REPEATED]

    train, held = (long(d.text for d in python_docs(split)) for split in ("train", "held_out"))
    assert train and held and not set(train) & set(held)
    from pydoc_data.topics import topics

    assert set(train) | set(held) == set(long(topics.values()))


def test_a_side_is_decided_by_the_hash_alone():
    keys = [f"document {n}" for n in range(4000)]
    held = {key for key in keys if in_split(key, "held_out", 0.1)}
    assert 0.08 < len(held) / len(keys) < 0.12
    assert {key for key in keys if not in_split(key, "train", 0.1)} == held
    assert held < {key for key in keys if in_split(key, "held_out", 0.3)}
    digests = {key: int(hashlib.sha256(key.encode()).hexdigest(), 16) for key in keys}
    assert held == {key for key in keys if digests[key] < 0.1 * 2**256}


# Tasks.


def test_a_task_is_divided_by_group():
    options = {"count": 40, "seed": 3, "held_out": 0.5}
    sides = {
        split: open_source("task:ioi", split, options=options).examples()
        for split in ("train", "held_out", "all")
    }
    assert sides["all"] == tasks.generate("ioi", 40, 3)
    assert (sides["train"], sides["held_out"]) == tasks.split(sides["all"], 0.5, 3)
    swapped = open_source("task:ioi", "all", options={"corruption": "swap"})
    assert swapped.fingerprint != open_source("task:ioi", "all").fingerprint
    with pytest.raises(ValueError, match="holds prompts with answers, expected texts"):
        swapped.texts()


# Files.


def test_one_text_per_file(tmp_path):
    for name, text in (("b.txt", "second"), ("a.txt", "first\n\nblock"), ("sub/c.txt", "zwölf")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    source = open_source(f"text:{tmp_path}/*.txt", "all")
    assert source.texts() == ["first\n\nblock", "second"]
    assert source.label(1) == f"{tmp_path}/b.txt"
    deep = open_source(f"text:{tmp_path}/**/*.txt", "all")
    assert deep.texts() == ["first\n\nblock", "second", "zwölf"]
    blocks = open_source(f"text:{tmp_path}/a.txt", "all", options={"unit": "block"})
    assert blocks.texts() == ["first", "block"] and blocks.label(1).endswith("a.txt block 2")
    assert len({s.fingerprint for s in (source, deep, blocks)}) == 3
    with pytest.raises(ValueError, match="holds texts, expected prompts with answers"):
        source.examples()


def test_lines_of_texts_and_of_examples(tmp_path):
    texts = write(tmp_path / "t.jsonl", {"text": "one\nline", "more": 1}, {"text": "zwölf"})
    source = open_source(f"jsonl:{texts}", "all")
    assert source.texts() == ["one\nline", "zwölf"] and source.label(1) == f"{texts}:2"
    fields = {name: getattr(FULL, name) for name in ("prompt", "answer", "wrong", "corrupted")}
    several = {"group": "g", "answers": [" a", " z"], "wrongs": [" b"]}
    lines = write(tmp_path / "e.jsonl", fields | several, {"prompt": "2+2=", "answer": "4"})
    examples = open_source(f"jsonl:{lines}", "all")
    assert examples.examples() == [FULL, Example("2+2=", "4")]
    with pytest.raises(IndexError):
        examples[2]


def test_the_splits_of_a_file_are_disjoint_and_read_at_random(tmp_path):
    lines = [{"prompt": f"p{n}", "answer": "a", "group": f"g{n % 40}"} for n in range(200)]
    path = write(tmp_path / "e.jsonl", *lines)
    sides = [
        open_source(f"jsonl:{path}", split, options={"held_out": 0.3})
        for split in ("train", "held_out")
    ]
    groups = [{example.group for example in side.examples()} for side in sides]
    assert not groups[0] & groups[1] and len(groups[0] | groups[1]) == 40
    assert sum(len(side) for side in sides) == 200
    some = sides[0]
    for index in np.random.default_rng(0).permutation(len(some))[:20]:
        number = int(some.label(index).rpartition(":")[2])
        assert some[index] == Example(**lines[number - 1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "{file} is empty, expected one JSON object per line"),
        (b'{"text": "a"}\n\n{"text": "b"}\n', "{file}:2: the line is empty"),
        (b'{"text": "a"}\n{"text": \n', "{file}:2: not JSON: Expecting value (column "),
        (b'{"text": "a"}\n["b"]\n', "{file}:2: expected a JSON object, got list"),
        (b'{"text": "a"}\n{"prompt": "b"}\n', "{file}:2: no field 'text'; it has prompt"),
        (b'{"body": "a"}\n', "{file}:1: no field 'prompt' (or text); it has body"),
        (b'{"prompt": "a"}\n', "{file}:1: no field 'answer' (or text); it has prompt"),
        (b'{"text": ""}\n', "{file}:1: text must be a text that is not empty, got ''"),
        (b'{"text": 5}\n', "{file}:1: text must be a text that is not empty, got 5"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "{file}:2 is not UTF-8: byte 24 of the file"),
        (b'{"text": "\\ud800"}\n', "{file}:1: holds half of a surrogate pair"),
        (b"[" * 100_000 + b"\n", "{file}:1: not JSON: nested too deeply"),
        (b'{"prompt": "a", "answer": "b", "wrong": 1}\n', "{file}:1: wrong must be a text, got 1"),
        (b'{"prompt": "a", "answer": "b", "answers": "b"}\n', "{file}:1: answers must be a list"),
        (b'{"prompt": "a", "answer": "b", "answers": ["c"]}\n', "{file}:1: answers ('c',) must"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value[:60],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(tmp_path, content, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        open_source(f"jsonl:{path}", "all")
    assert str(caught.value).startswith(message.replace("{file}", str(path)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "{file} is empty, expected text"),
        (b" \n\n", "{file} is empty, expected text"),
        (b"abc\xe9def", "{file} is not UTF-8: byte 3 of the file (invalid continuation byte)"),
    ],
)
def test_what_is_wrong_in_a_text_is_named(tmp_path, content, message):
    path = tmp_path / "data.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        open_source(f"text:{path}", "all")
    assert str(caught.value) == message.replace("{file}", str(path))


def test_files_that_are_not_there(tmp_path):
    for spec, message in (
        (f"text:{tmp_path}/none.txt", "there is no file"),
        (f"jsonl:{tmp_path}/none.jsonl", "there is no file"),
        (f"text:{tmp_path}/*.txt", "no file matches"),
        (f"text:{tmp_path}", "is a folder, expected a file"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(spec, "all")
    path = write(tmp_path / "one.jsonl", {"text": "alone"})
    empty = "held_out" if open_source(f"jsonl:{path}", "train") else "train"
    with pytest.raises(ValueError, match=f"split '{empty}' of jsonl:.* is empty: none of its 1"):
        open_source(f"jsonl:{path}", empty)


@pytest.mark.parametrize(
    ("spec", "split", "options", "message"),
    [
        ("python-docs", "all", {}, "'python-docs' is not of the form KIND:WHICH"),
        ("file:x", "all", {}, "unknown kind of data source 'file'"),
        ("corpus:python-doc", "all", {}, "unknown corpus 'python-doc'. Did you mean 'python-docs'"),
        ("corpus:python-docs", "test", {}, "unknown split 'test'. Known: train, held_out, all"),
        ("corpus:python-docs", "all", {"count": 2}, "unknown option of 'corpus' sources: 'count'"),
        ("task:io", "train", {}, "unknown task 'io'. Did you mean 'ioi'"),
        ("task:ioi", "validation", {}, "unknown split 'validation'"),
        ("task:ioi", "train", {"colour": 1}, "unknown option of task 'ioi': 'colour'"),
        ("task:ioi", "train", {"held_out": 1.5}, "held_out must lie strictly between 0 and 1"),
        ("jsonl:x", "all", {"held_out": 0}, "held_out must lie strictly between 0 and 1, got 0"),
        ("jsonl:x", "all", {"heldout": 0.1}, "Did you mean 'held_out'"),
        ("text:x", "all", {"unit": "line"}, "unknown unit of text 'line'"),
    ],
)
def test_what_is_unknown_is_said_first(spec, split, options, message):
    with pytest.raises(ValueError) as caught:
        open_source(spec, split, options=options)
    assert message in str(caught.value)


@pytest.mark.slow
def test_a_source_needs_neither_tensorflow_nor_tfds():
    code = (
        "import sys; from jaxheads.data import open_source; "
        "open_source('corpus:python-docs', 'all'); "
        "print([m for m in ('tensorflow', 'tensorflow_datasets', 'torch') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"
