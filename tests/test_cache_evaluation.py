"""What caches lose: contexts of exact lengths, losses over what is kept, comparisons by name."""

from __future__ import annotations

import json
from collections import Counter

import jax
import numpy as np
import pytest
import tokenizers
from tiny import close, mostly_slow, tiny_model

import jaxheads as jh
from jaxheads.decode.kinds import HeadKinds
from jaxheads.decode.policies import Chunks, Full, HeadWise, Selected
from jaxheads.evaluate import (
    ANSWER,
    METHODS,
    TASKS,
    Contexts,
    KindOptions,
    Plan,
    Request,
    contexts_of,
    full_bytes,
    measure,
    method_scores,
    policy_of,
    run_study,
)
from jaxheads.evaluate.scores import load_scores
from jaxheads.report import Report, render
from jaxheads.report.cache import add_cache, cache_rows
from jaxheads.tasks.hops import hops
from jaxheads.tasks.passkeys import passkeys
from jaxheads.text import Tokenizer

LENGTH, BUDGET = 88, 0.6
"""One shape for all tests, so that they share programs."""
OPTIONS = {"sinks": 2, "recent": 6}
TEXT = "The quick brown fox jumps over the lazy dog, and nobody is surprised. " * 20


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """A token for each word, with the space before it, and each other character."""
    known = ["<s>", *"\n .,?:'"]
    found = Counter()
    for sample in (
        *(e.prompt + e.answer for e in jh.tasks.needle(200, seed=0)),
        *(e.prompt + e.answer for e in hops(60, seed=0, chains=60)),
        *(e.prompt + e.answer for e in passkeys(40, seed=0)),
        TEXT,
    ):
        found.update(sample.replace("\n", " ").replace(".", " ").split())
    known += [*found, *(f" {word}" for word in found)]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(known))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<s>"))
    pattern = tokenizers.Regex(r" ?\w+|.|\n")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(backend, {"bos_token": "<s>"}, None)


def request(words: Tokenizer, **changed) -> Request:
    settings = {"length": 200, "count": 6, "text": TEXT} | changed
    return Request(words, words.vocab_size, **settings)


def some(length: int = LENGTH) -> Contexts:
    rng = np.random.default_rng(0)
    answers = [rng.integers(0, 97, size).tolist() for size in (5, 1, 3)]
    return Contexts.of(rng.integers(0, 97, (3, length)).tolist(), answers, [0.0, 0.5, 1.0])


# Contexts.


@pytest.mark.parametrize("task", TASKS)
def test_contexts_have_exactly_the_length_and_hold_their_answer(words, task):
    found = contexts_of(task, request(words))
    assert found.prompts.shape == (6, 200) and found.answers.shape == (6, ANSWER)
    assert found.mask.any(axis=1).all() and (np.diff(found.mask.astype(int), axis=1) <= 0).all()
    again = contexts_of(task, request(words))
    np.testing.assert_array_equal(found.prompts, again.prompts)
    if task != "text":
        other = contexts_of(task, request(words, seed=1))
        assert (found.prompts != other.prompts).any()
    assert (found.depths is not None) == TASKS[task].placed
    if task in ("text", "hops"):
        return
    # The answer stands in the context, at about its depth.
    for row, answer, mask, depth in zip(
        found.prompts, found.answers, found.mask, found.depths, strict=True
    ):
        wanted = answer[mask].tolist()
        places = [at for at in range(len(row)) if row[at : at + len(wanted)].tolist() == wanted]
        assert len(places) == 1
        if task != "passkey":  # Their places are random, in order.
            assert abs(places[0] / 200 - depth) < 0.25


def test_passkeys_are_asked_for_in_turn(words):
    found = contexts_of("passkey", request(words, count=5, length=300))
    at = [
        next(i for i in range(300) if row[i : i + 5].tolist() == answer[:5].tolist())
        for row, answer in zip(found.prompts, found.answers, strict=True)
    ]
    assert np.argsort(found.depths).tolist() == list(range(5))
    assert np.corrcoef(at, found.depths)[0, 1] > 0.5


def test_hops_are_followed_from_fact_to_fact():
    one = hops(1, seed=3, chains=5, hops=3)[0]
    facts = dict(
        sentence.removeprefix("The password of ").split(" is ")
        for sentence in one.prompt.split("\n")[0].rstrip(".").split(". ")
    )
    assert len(facts) == 15
    person = one.prompt.rsplit("The password of ", 1)[1].removesuffix(" is")
    for _ in range(3):
        value = facts[person]
        person = value.removeprefix("that of ")
    assert f" {value}" == one.answer != one.wrong
    start, end = one.needle
    assert one.prompt[start:end] == value


@pytest.mark.parametrize(
    ("task", "changed", "message"),
    [
        ("nedle", {}, "unknown task 'nedle'. Did you mean 'needle'"),
        ("needle", {"length": 20}, "length 20 is too short for task 'needle', which needs"),
        ("copy", {"length": 60}, "length 60 is too short for task 'copy'"),
        ("text", {"length": 9000}, "fewer than a context of 9000"),
        ("hops", {"length": 20_000}, "length 20000 is too long for task 'hops'"),
        ("needle", {"depths": (1.5,)}, "depths must be one or more numbers from 0 to 1"),
        ("copy", {"count": 0}, "count must be at least 1"),
    ],
)
def test_rows_that_cannot_be_made(words, task, changed, message):
    with pytest.raises(ValueError, match=message):
        contexts_of(task, request(words, **changed))


def test_hops_that_cannot_be_made():
    with pytest.raises(ValueError, match="need 402 people, but there are only 400"):
        hops(1, seed=0, chains=201)


def test_an_answer_too_long_for_its_slots():
    with pytest.raises(ValueError, match=f"1 to {ANSWER} tokens, got {ANSWER + 1}"):
        Contexts.of([[1]], [[2] * (ANSWER + 1)])


# Measuring.


def model() -> jh.Transformer:
    return tiny_model(context_length=256)


@pytest.mark.parametrize("rows", [2, 8])
def test_the_loss_of_a_full_cache_is_the_plain_model_s(rows):
    contexts, seen = some(), []
    edits = jh.mask_heads(model().config, [(1, 2)])
    found = measure(
        model(), Full(), contexts, edits=edits, rows=rows, chunk=60, on_rows=seen.append
    )
    assert seen[-1] == 3
    tokens = np.concatenate([contexts.prompts, contexts.answers], axis=1)
    logits = model()(tokens, edits=edits).logits[:, LENGTH - 1 : -1]
    logp = np.asarray(jax.nn.log_softmax(logits))
    for row in range(3):
        answer = contexts.answers[row][contexts.mask[row]]
        close(found.loss[row], -logp[row, np.arange(len(answer)), answer].mean())
    assert found.share == 1


def test_exact_is_what_greedy_decoding_gives():
    contexts = some()
    greedy = jh.generate(model(), contexts.prompts, max_new_tokens=5).rows()
    wrong = [greedy[0], [*greedy[1][:4], (greedy[1][4] + 1) % 97], greedy[2][:2]]
    known = Contexts.of(contexts.prompts.tolist(), wrong)
    assert measure(model(), Full(), known).exact.tolist() == [True, False, True]


def test_what_streaming_heads_dropped_is_not_seen():
    contexts = some()
    # Three layers of reach 6: the last token depends on the last 3 * 5 + 1 tokens.
    policy = HeadWise(HeadKinds.all_streaming(model().config, sinks=0, recent=6))
    changed = contexts.prompts.copy()
    changed[:, 0] = (changed[:, 0] + 1) % 97
    other = Contexts(changed, contexts.answers, contexts.mask)
    same = [measure(model(), policy, each).loss for each in (contexts, other)]
    np.testing.assert_array_equal(*same)
    moved = [measure(model(), Full(), each).loss for each in (contexts, other)]
    assert (np.abs(moved[1] - moved[0]) > 1e-5).all()


def test_contexts_that_do_not_fit():
    with pytest.raises(ValueError, match="contexts of 240 tokens and 32 of answers exceed"):
        measure(model(), Full(), some(240))
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        measure(model(), Full(), some(), rows=0)


# Methods.


def share_of(name: str, bits: int | None = None) -> float:
    policy = policy_of(
        name, model().config, budget=BUDGET, length=LENGTH, room=ANSWER,
        options=KindOptions(**OPTIONS, bits=bits), scores=np.random.default_rng(0).random((3, 2)),
    )  # fmt: skip
    found = measure(model(), policy, some())
    assert found.full_nbytes == full_bytes(model().config, LENGTH + ANSWER)
    assert np.isfinite(found.loss).all()
    return found.share


@pytest.mark.parametrize(
    "name",
    mostly_slow([name for name in METHODS if name != "long_heads"], "full", "razor", "adakv"),
)
def test_every_method_keeps_what_its_budget_says(name):
    share = share_of(name)
    if name == "full":
        assert share == 1
    elif name == "task_kv":  # One of two heads keeps everything, the other at least its sinks.
        assert 0.5 < share < 0.9
    else:
        # Heads are whole, of six: at most one too few. Beside keys and values (64 bytes a token)
        # lie owners (4) or the sums of compensation.
        assert BUDGET - 1 / 6 < share < BUDGET * (1 + 4 / 64) + 0.01


def test_long_heads_sees_what_its_budget_says_and_keeps_all():
    sizes = {"length": 224, "room": ANSWER}
    config = model().config
    policies = [policy_of("long_heads", config, budget=budget, **sizes) for budget in (0.5, 1.0)]
    assert policies == [Chunks(32, 4), Chunks(32, 8)]
    few, every = (measure(model(), policy, some(224)) for policy in policies)
    assert few.share == every.share > 1
    plain = measure(model(), Full(), some(224)).loss
    close(every.loss, plain)
    assert (np.abs(few.loss - plain) > 1e-4).all()


@pytest.mark.parametrize("name", mostly_slow(("razor", "adakv"), "adakv"))
def test_bits_are_taken_off_the_bytes(name):
    # int8 and a float32 scale for 8 dimensions, in the place of 32 bytes; the rest as before.
    assert 12 / 32 < share_of(name, 8) / share_of(name) < 14 / 32


def test_the_highest_scores_are_full_and_razor_compensates():
    given = np.array([[0.0, 5.0], [1.0, 0.0], [0.0, 9.0]])
    for name, compensate in (("duo", False), ("razor", True)):
        policy = policy_of(
            name, model().config, budget=0.5, length=LENGTH, room=ANSWER,
            options=KindOptions(**OPTIONS), scores=given,
        )  # fmt: skip
        assert isinstance(policy, HeadWise)
        assert np.argwhere(policy.kinds.full).tolist() == [[0, 1], [2, 1]]
        assert policy.kinds.compensate == compensate
    snapkv = policy_of("snapkv", model().config, budget=BUDGET, length=LENGTH, room=ANSWER)
    assert isinstance(snapkv, Selected) and snapkv.tokens == int(0.6 * 120) - ANSWER


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("razr", {}, "unknown cache method 'razr'. Did you mean 'razor'"),
        ("razor", {"budget": 0}, r"budget must lie in \(0, 1\], got 0"),
        ("razor", {"scores": None}, "'razor' chooses heads by scores"),
        ("razor", {"scores": np.zeros((2, 2))}, r"scores must be \[3, 2\] without NaN"),
        ("razor", {"budget": 0.05}, "less than the 4 sinks and 32 recent tokens"),
        ("streaming", {"budget": 0.02}, "leaves none beside the 4 sinks"),
        ("long_heads", {}, "is 66 a query, which sees at least 3 chunks of 32"),
        ("snapkv", {"budget": 0.3}, "of which the answer takes 32: snapkv keeps at least the last"),
    ],
)
def test_policies_that_cannot_be(name, changed, message):
    settings = {"budget": 0.5, "length": 100, "room": ANSWER, "scores": np.zeros((3, 2))} | changed
    with pytest.raises(ValueError, match=message):
        policy_of(name, model().config, **settings)


# Plans and studies.


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"methods": ("razr",)}, "unknown cache method 'razr'"),
        ({"tasks": ("nedle",)}, "unknown task 'nedle'"),
        ({"methods": ()}, "methods must be one or more, got none"),
        ({"lengths": (64, 64)}, "lengths: 64 is given twice"),
        ({"budgets": (1.5,)}, r"budget must lie in \(0, 1\], got 1.5"),
        ({"budgets": (0.25, 0.05)}, "razor at length 512: budget 0.05 of 544 tokens is 27.2"),
        ({"methods": ("snapkv",), "lengths": (128,)}, "snapkv at length 128: budget 0.25"),
        ({"controls": 0}, "controls must be at least 1"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"depths": ()}, "depths must be one or more"),
        ({"options": {"bits": 4}}, "bits must be 8 or None"),
        ({"options": {"recent": 0}}, "recent must be at least 1"),
    ],
)
def test_plans_that_cannot_be(changed, message):
    with pytest.raises(ValueError, match=message):
        if "options" in changed:
            changed = {"options": KindOptions(**changed["options"])}
        Plan(**changed)


def test_controls_have_the_options_of_what_they_control():
    both = Plan(methods=("razor", "induction"), controls=5)
    names = Counter(variant.name for variant in both.variants())
    assert names == {"full": 1, "razor": 1, "induction": 1, "random": 5, "random+c": 5}
    assert "random" not in {v.method for v in Plan(methods=("snapkv",)).variants()}
    alike = Plan(methods=("razor", "induction"), options=KindOptions(compensate=True))
    assert {v.name for v in alike.variants()} == {"full", "razor", "induction+c", "random+c"}


def test_scores_and_contexts_of_another_model():
    config = tiny_model().config
    plan = Plan(methods=("duo",))
    with pytest.raises(ValueError, match=r"'duo' needs the scores of a file.*duo=RUN/scores.json"):
        plan.check_scores({})
    with pytest.raises(ValueError, match="head-wise method with scores: 'snapkv'"):
        plan.check_scores({"duo": np.zeros((3, 2)), "snapkv": np.zeros((3, 2))})
    with pytest.raises(ValueError, match="length 512 and 32 tokens of an answer exceed"):
        plan.check_model(config, {})
    short = Plan(methods=("duo",), lengths=(32,), budgets=(0.7,))
    with pytest.raises(ValueError, match=r"\[2, 2\], expected \[3, 2\] of this model"):
        short.check_model(config, {"duo": np.zeros((2, 2))})


def test_scores_in_files(tmp_path):
    path = tmp_path / "scores.json"
    values = [[1.0, 2.0], [3.0, 4.0]]
    for held in (values, {"values": values}, {"scores": {"duo": values, "razor": [[0]]}}):
        path.write_text(json.dumps(held))
        assert load_scores(path, "duo").tolist() == values
    for held, message in (
        ("[[1, 2], [3]]", "must be a list"),
        ('[["a"]]', "must be a list"),
        ("[[NaN]]", "finite"),
        ("{}", "must be a list"),
        ("[1", "is not JSON"),
        ('{"scores": {"razor": [[0]]}}', "no scores of 'duo', only of razor"),
    ):
        path.write_text(held)
        with pytest.raises(ValueError, match=message):
            load_scores(path, "duo")


def test_a_study(words):
    tiny = tiny_model("mqa", vocab_size=words.vocab_size, context_length=256)
    given = np.array([[1.0], [0.0], [9.0]])
    plan = Plan(
        methods=("duo",), budgets=(0.5,), lengths=(72,), tasks=("copy", "text"), count=3,
        depths=(0.0, 1.0), controls=5, options=KindOptions(**OPTIONS), rows=3,
    )  # fmt: skip
    told = []
    study = run_study(
        tiny, words, plan, scores={"duo": given}, text=TEXT,
        on_progress=lambda *progress: told.append(progress),
    )  # fmt: skip
    assert told[-1] == ("rows", 42, 42)
    assert len(study.runs) == 7 * 2
    found = json.loads(json.dumps(study.to_json(), allow_nan=False))
    assert found["scores"]["duo"] == given.tolist()
    (duo,) = (row for row in found["full_heads"] if row["method"] == "duo")
    assert duo["heads"] == [[2, 0]]
    drawn = [row["heads"] for row in found["full_heads"] if row["method"] == "random"]
    assert len(drawn) == 5 and all(len(heads) == 1 for heads in drawn)
    assert any(heads != drawn[0] for heads in drawn)
    copy = study.groups("copy", 72)
    assert [len(group.runs) for group in copy] == [1, 1, 5]
    losses = copy[0].one.measured.loss
    assert copy[0].loss_at(0.0) == pytest.approx((losses[0] + losses[2]) / 2)
    columns, rows = cache_rows(study, "copy", 72)
    assert [row[0] for row in rows] == ["full", "duo", "random mean", "random best", "random worst"]
    mean, best, worst = (dict(zip(columns, row, strict=True)) for row in rows[2:])
    assert best["loss"] < mean["loss"] < worst["loss"]
    page = render(add_cache(Report("Caches"), study))
    for text in ("copy at 72 tokens", "copy by length and depth", "duo: key/value heads"):
        assert text in page
    assert "text by length" not in page


def test_the_scores_of_methods_are_measured(words):
    tiny = tiny_model(vocab_size=words.vocab_size, context_length=512)
    for name in ("razor", "retrieval"):
        found = method_scores(name, tiny, words)
        assert found.shape == (3, 2) and np.isfinite(found).all()
    with pytest.raises(ValueError, match="'snapkv' has no scores"):
        method_scores("snapkv", tiny, words)
