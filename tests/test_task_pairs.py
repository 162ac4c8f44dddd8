"""Clean and corrupted pairs: what they ask is answered right, and only what should differ does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from test_docs import table_rows
from test_tasks import tokenizer  # noqa: F401  (a fixture)

from jaxheads import tasks
from jaxheads.metrics import last_logits
from jaxheads.tasks import Example, encode_pairs, generate, same_length, single_token, split
from jaxheads.tasks.capitals import COUNTRIES
from jaxheads.tasks.geography import CAPITALS
from jaxheads.tasks.pronouns import HE, SHE
from jaxheads.tasks.successors import SEQUENCES

WORDS = {"values": "word", "pairs": 4, "shots": 2, "digits": 2}
PAIRED = {
    "arithmetic": {},
    "capitals": {},
    "colored_objects": {},
    "contradicted_capitals": {},
    "greater_than": {},
    "ioi": {},
    "lookup": WORDS,
    "pronouns": {},
    "successors": {},
}


def asked_sum(prompt: str) -> str:
    *worked, last = prompt.split("\n")
    for line in worked:
        a, b, total = map(int, re.fullmatch(r"(\d) \+ (\d) = (\d)", line).groups())
        assert a + b == total
    return str(sum(map(int, re.fullmatch(r"(\d) \+ (\d) = ", last).groups())))


def asked_color(prompt: str) -> str:
    scenes = [
        (dict(re.findall(r"an? (\w+) (\w+)[,.]", scene)), thing, color)
        for scene, thing, color in re.findall(
            r"Q: (On the .*\.) What color is the (\w+)\?\nA:(.*)", prompt
        )
    ]
    assert len(scenes) == 3 and all(len(colors) == 3 for colors, _, _ in scenes)
    found = []
    for colors, thing, _ in scenes:
        of = {thing: color for color, thing in colors.items()}
        found.append(f" {of[thing].capitalize()}")
    assert [color for _, _, color in scenes] == [*found[:-1], ""]
    return found[-1]


def asked_value(prompt: str) -> str:
    table = json.loads(prompt[prompt.index("{") : prompt.index("}") + 1])
    *worked, key = re.findall(r'Key: "(\w+)"', prompt)
    assert key not in worked
    assert [table[k] for k in worked] == re.findall(r'Value: "(\w+)"', prompt)
    return table[key]


def next_element(prompt: str) -> str:
    shown = prompt.removeprefix("In order: ").removesuffix(",").split(", ")
    (elements,) = (e for e in SEQUENCES.values() if set(shown) <= set(e))
    ring = elements * 2
    (start, *_) = (i for i in range(len(elements)) if ring[i : i + len(shown)] == tuple(shown))
    return f" {ring[start + len(shown)]}"


ANSWERS = {
    "arithmetic": asked_sum,
    "capitals": lambda prompt: " " + CAPITALS[re.search(r"of (\w+) is", prompt)[1]],
    "colored_objects": asked_color,
    "contradicted_capitals": lambda prompt: re.search(r"is( \w+)\.", prompt)[1],
    "lookup": asked_value,
    "pronouns": lambda prompt: " she" if prompt.split()[1] in SHE else " he",
    "successors": next_element,
}
"""The right answer, read off a prompt again, of tasks whose corrupted prompt has one too."""


@pytest.mark.parametrize("name", ANSWERS)
def test_each_half_of_a_pair_has_its_answer(name):
    for example in generate(name, 60, seed=1, **PAIRED[name]):
        assert ANSWERS[name](example.prompt) == example.answer
        assert ANSWERS[name](example.corrupted) == example.wrong
        assert example.answer != example.wrong
        if example.needle is not None and name != "lookup":
            start, end = example.needle
            assert example.prompt[start:end].capitalize() == example.answer[1:]


@pytest.mark.parametrize("name", sorted(set(PAIRED) - {"lookup", "successors"}))
def test_pairs_differ_in_one_token(name, tokenizer):  # noqa: F811
    examples = generate(name, 60, seed=2)
    assert single_token(examples, tokenizer) == examples
    pairs = encode_pairs(examples, tokenizer)
    differing = (pairs.clean.tokens != pairs.corrupted.tokens).sum(axis=1)
    assert (differing == 1).all()


def test_years_and_digits(tokenizer):  # noqa: F811
    tens = set()
    for example in generate("greater_than", 60, seed=0):
        start, century = re.search(r"year (\d{4}) to the year (\d\d)$", example.prompt).groups()
        assert start.startswith(century)
        digit = int(start[2])
        tens.add(digit)
        assert set(map(int, example.answers)) == {d for d in range(10) if d > digit}
        assert set(map(int, example.wrongs)) == {d for d in range(10) if d < digit}
        assert (int(example.answer), int(example.wrong)) == (digit + 1, digit - 1)
        zero = f"{start[:2]}0{start[3]}"
        assert example.corrupted == example.prompt.replace(start, zero)
    assert tens == set(range(1, 9))


def test_roles_are_balanced():
    pronouns = [e.answer for e in generate("pronouns", 40, seed=0)]
    assert pronouns.count(" she") == pronouns.count(" he") == 20
    everybody = generate("pronouns", 256, seed=0)
    assert len({e.prompt for e in everybody}) == 256
    assert not set(SHE) & set(HE) and len({e.group for e in everybody}) == len(SHE) == len(HE)

    def second_changed(example: Example) -> bool:
        return example.prompt.split()[-4] == example.corrupted.split()[-4]

    share = np.mean([second_changed(e) for e in generate("arithmetic", 400, seed=0)])
    assert 0.4 < share < 0.6


def test_worked_sums_do_not_give_the_answer_away():
    for example in generate("arithmetic", 200, seed=3, shots=4):
        *worked, clean = ({*line.split()[0:3:2]} for line in example.prompt.split("\n"))
        corrupted = {*example.corrupted.split("\n")[-1].split()[0:3:2]}
        assert len(worked) == 4
        assert clean not in worked and corrupted not in worked


@pytest.mark.parametrize(("name", "options"), PAIRED.items())
def test_groups_can_be_split(name, options):
    examples = generate(name, 60, seed=0, **options)
    assert len({e.prompt for e in examples}) == 60
    train, held_out = split(examples, 0.3, seed=0)
    assert train and held_out and len(train) + len(held_out) == 60
    assert not {e.group for e in train} & {e.group for e in held_out}
    if name.endswith("capitals"):

        def countries(side: list[Example]) -> set[str]:
            text = " ".join(e.prompt + " " + e.corrupted for e in side)
            return {c for c in COUNTRIES if c in text or CAPITALS[c] in text}

        assert not countries(train) & countries(held_out)


def test_the_sequences_can_be_asked_for_alone():
    for name, elements in SEQUENCES.items():
        runs = len(elements) - (0 if name in ("days", "months") else 2)
        examples = generate("successors", runs, 0, sequence=name, shown=2)
        assert len({e.prompt for e in examples}) == runs
        assert {e.answer[1:] for e in examples} <= set(elements)
        assert len(split(examples, 0.5, seed=0)[0]) == runs - round(runs / 2)


def test_lookup_has_a_pair_where_a_key_is_left():
    (example,) = generate("lookup", 1, 0, pairs=3, shots=2)
    assert example.corrupted is None and example.wrong is None
    (more,) = generate("lookup", 1, 0, pairs=4, shots=2)
    assert asked_key(more.corrupted) != asked_key(more.prompt)
    assert more.wrong in more.prompt


def asked_key(prompt: str) -> str:
    return re.findall(r'Key: "(\w+)"', prompt)[-1]


@pytest.mark.parametrize(("name", "options"), PAIRED.items())
@pytest.mark.parametrize("side", ["left", "right"])
def test_encoded_pairs_say_where_and_what(name, options, side, tokenizer):  # noqa: F811
    examples = single_token(generate(name, 24, 0, **options), tokenizer)
    pairs = encode_pairs(examples, tokenizer, side=side, length=140)
    rows = np.arange(len(examples))
    assert pairs.clean.tokens.shape == pairs.corrupted.tokens.shape == (len(examples), 140)
    np.testing.assert_array_equal(pairs.clean.mask, pairs.corrupted.mask)
    slots = pairs.answer_slot
    assert pairs.clean.mask[rows, slots].all() and slots.dtype == np.int32
    if side == "left":
        assert (slots == 139).all()
    else:
        assert not pairs.clean.mask[rows, slots + 1].any()
    for row, example in enumerate(examples):
        for batch, text in ((pairs.clean, example.prompt), (pairs.corrupted, example.corrupted)):
            assert batch.tokens[row, batch.mask[row]].tolist() == tokenizer.encode(text)
        for ids, main, several in (
            (pairs.answers[row], example.answer, example.answers or (example.answer,)),
            (pairs.wrong[row], example.wrong, example.wrongs or (example.wrong,)),
        ):
            assert tokenizer.decode(ids[:1].tolist()) == main
            assert {tokenizer.decode([i]) for i in ids[ids >= 0].tolist()} == set(several)
            assert (ids[len(several) :] == -1).all()
    assert pairs.answers.dtype == pairs.wrong.dtype == np.int32
    assert len(jax.tree.leaves(pairs)) == 7


def test_encode_pairs_refuses(tokenizer):  # noqa: F811
    good = Example("Monday, Tuesday,", " Wednesday", wrong=" Friday", corrupted="Friday, Monday,")
    for example, message in [
        (Example("a", " b", wrong=" c"), "example 1 has no corrupted prompt: 'a'"),
        (Example("a", " b", corrupted=" c"), "example 1 has no wrong answer: 'a'"),
        (
            Example("In Paris", " b", wrong=" c", corrupted="In Buenos Aires"),
            r"differ in length, 2 and \d tokens: 'In Paris' and 'In Buenos.* \(example 1\)",
        ),
        (Example("", " b", wrong=" c", corrupted=""), r"no tokens: '' \(example 1\)"),
        (
            Example("a", " Buenos Aires", wrong=" c", corrupted="b"),
            r"answer ' Buenos Aires' must be a single token, got \d: \[\d+, .*\(example 1\)",
        ),
        (Example("a", " c", wrong="", corrupted="b"), "answer '' must be a single token, got 0"),
        (Example("a", " c", wrong=" c", corrupted="b"), "both a right and a wrong answer"),
        (
            Example("a", " c", wrong=" d", corrupted="b", wrongs=(" d", " c")),
            "both a right and a wrong answer",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            encode_pairs([good, example], tokenizer)
    with pytest.raises(ValueError, match="no examples"):
        encode_pairs([], tokenizer)
    with pytest.raises(ValueError, match="side must be"):
        encode_pairs([good], tokenizer, side="up")
    with pytest.raises(ValueError, match="more than length=2"):
        encode_pairs([good], tokenizer, length=2)


def test_answers_hold_the_answer():
    Example("a", "b", answers=("c", "b"))
    with pytest.raises(ValueError, match=r"answers \('c',\) must hold answer, which is 'b'"):
        Example("a", "b", answers=("c",))
    with pytest.raises(ValueError, match=r"wrongs .* must hold wrong, which is None"):
        Example("a", "b", wrongs=("c",))


def test_single_token_keeps_what_can_be_encoded(tokenizer):  # noqa: F811
    examples = generate("lookup", 60, 0, **WORDS)
    kept = single_token(examples, tokenizer)
    assert 0 < len(kept) < 60
    assert kept == [e for e in examples if e in kept]  # the same order
    encode_pairs(kept, tokenizer)
    for example in examples:
        if example not in kept:
            with pytest.raises(ValueError, match="differ in length"):
                encode_pairs([example], tokenizer)
    assert single_token([], tokenizer) == []
    with pytest.raises(ValueError, match=r"none of 3 .* the first: .*(single token|in length)"):
        single_token(generate("lookup", 3, 0), tokenizer)
    with pytest.raises(ValueError, match="example 0 has no corrupted prompt"):
        single_token(generate("true_capitals", 3, 0), tokenizer)


def test_same_length_needs_no_padding(tokenizer):  # noqa: F811
    examples = generate("ioi", 60, 0)
    kept = same_length(examples, tokenizer)
    assert 0 < len(kept) < 60
    assert encode_pairs(kept, tokenizer).clean.mask.all()
    assert not encode_pairs(examples, tokenizer).clean.mask.all()
    short, long = Example("one", "a"), Example("one two", "a")
    assert same_length([long, short], tokenizer) == [short]  # a tie
    assert same_length([long, short, long], tokenizer) == [long, long]
    assert same_length([], tokenizer) == []


@pytest.mark.parametrize(
    ("name", "count", "options", "message"),
    [
        ("arithmetic", 1, {"shots": 0}, "shots must be at least 1, got 0"),
        ("arithmetic", 2000, {"shots": 1}, "count is 2000, but after 1[0-9]+ different draws"),
        ("capitals", 1, {"template": "capitel"}, "unknown template 'capitel'.*mean 'capital'"),
        ("capitals", 30, {"template": "city"}, "only 29 different choices"),
        ("contradicted_capitals", 113, {}, "only 112 different pairs"),
        ("colored_objects", 1, {"shots": -1}, "shots must be at least 0, got -1"),
        ("greater_than", 13441, {}, "only 13440 different choices of noun and year"),
        ("lookup", 1, {"values": "wrods"}, "unknown values 'wrods'.*mean 'word'"),
        ("lookup", 1, {"values": "word", "pairs": 25}, "pairs is 25, .* only 24 words"),
        ("pronouns", 257, {}, "only 256 different choices of name and noun"),
        ("successors", 1, {"sequence": "day"}, "unknown sequence 'day'. Did you mean 'days'"),
        ("successors", 1, {"shown": 0}, "shown must be at least 1, got 0"),
        ("successors", 1, {"shown": 6}, "shown must be at most 5 for sequence='all', got 6"),
        ("successors", 8, {"sequence": "days"}, "only 7 different runs of 3 elements"),
    ],
)
def test_bad_options_are_named(name, count, options, message):
    with pytest.raises(ValueError, match=message):
        generate(name, count, 0, **options)


PAGE = (Path(__file__).resolve().parent.parent / "docs" / "tasks.md").read_text()


def test_the_page_lists_every_task():
    assert [row[0].strip("`") for row in table_rows(PAGE, "## Tasks with pairs")] == list(PAIRED)
    assert {row[0].strip("`") for row in table_rows(PAGE, "## Other tasks")} == {
        name for name in tasks.TASKS if name not in PAIRED
    }


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), PAIRED.items())
def test_the_page_has_the_numbers_of_smollm2(name, options, smollm2):
    model, tokenizer = smollm2  # noqa: F811
    (row,) = (r for r in table_rows(PAGE, "## SmolLM2 on them") if r[0].strip("`") == name)
    kept = single_token(generate(name, 60, 0, **options), tokenizer)
    pairs = encode_pairs(kept[:32], tokenizer)
    clean, corrupted = (
        np.asarray(last_logits(model, batch)) for batch in (pairs.clean, pairs.corrupted)
    )
    measured = [
        len(kept) / 60,
        pairs.clean.tokens.shape[1],
        difference(clean, pairs),
        difference(corrupted, pairs),
        preferred(clean, pairs),
        preferred(corrupted, pairs),
        np.mean([row.argmax() in ids for row, ids in zip(clean, pairs.answers, strict=True)]),
    ]
    print(name, *(f"{number:.2f}" for number in measured), sep=" | ")
    # One of 32 prompts may be too close to call on another machine.
    tolerance = [0.005, 0, 0.02, 0.02, 0.04, 0.04, 0.04]
    assert (np.abs(np.array(measured) - [float(cell) for cell in row[1:]]) <= tolerance).all()


def difference(logits: np.ndarray, pairs: tasks.Pairs) -> float:
    """Mean logit of the right answers minus that of the wrong ones, averaged over rows."""
    rows = zip(logits, pairs.answers, pairs.wrong, strict=True)
    return float(np.mean([row[a[a >= 0]].mean() - row[w[w >= 0]].mean() for row, a, w in rows]))


def preferred(logits: np.ndarray, pairs: tasks.Pairs) -> float:
    """Share of rows in which the best right answer has a higher logit than any wrong one."""
    rows = zip(logits, pairs.answers, pairs.wrong, strict=True)
    return float(np.mean([row[a[a >= 0]].max() > row[w[w >= 0]].max() for row, a, w in rows]))
