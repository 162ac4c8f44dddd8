"""Packing: every token once, in order, and no segment that mixes two documents."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import tokenizers
from tiny import close, tiny_model
from tokenizers import decoders, models, pre_tokenizers

from jaxheads import tasks
from jaxheads.data import FileRows, Packing, fill_rows, open_source, pack_source, plan_rows, prepare
from jaxheads.data.source import Source
from jaxheads.metrics import next_token_loss
from jaxheads.tasks import Example
from jaxheads.text import Tokenizer

LENGTHS = (1, 2, 7, 16, 100)


def byte_tokenizer() -> Tokenizer:
    """Every byte is a token; id 256 ends a document."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: number for number, piece in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocab | {"<end>": 256}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, {"eos_token": "<end>"})


def source_of(*items: str | Example) -> Source:
    return Source(
        name="toy",
        kind="text" if isinstance(items[0], str) else "examples",
        count=len(items),
        get=lambda index: items[index],
        label=lambda index: f"toy {index}",
        fingerprint=repr(items),
    )


def random_sizes(seed: int, length: int) -> np.ndarray:
    """Most sequences shorter than a row, some several rows long, some exactly rows."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, max(2, 2 * length), rng.integers(1, 60))
    sizes[rng.random(len(sizes)) < 0.1] *= 3
    sizes[rng.random(len(sizes)) < 0.1] = length
    return sizes


def segments_of(batch) -> list[np.ndarray]:
    """The tokens of every segment, in the order of rows and segments."""
    found = []
    for tokens, numbers in zip(batch.tokens, batch.segments, strict=True):
        real = numbers[numbers > 0]
        assert (np.diff(real) >= 0).all() and (np.diff(real) <= 1).all()
        assert (numbers[len(real) :] == 0).all(), "padding only on the right"
        assert not len(real) or real[0] == 1
        found += [tokens[numbers == n] for n in range(1, int(numbers.max()) + 1)]
    return found


@pytest.mark.parametrize("one_per_row", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("seed", range(8))
def test_every_token_stands_once_and_segments_do_not_mix(seed, length, one_per_row):
    sizes = random_sizes(seed, length)
    # A token tells its document and its place, so a piece is recognised wherever it lands.
    tokens = np.concatenate([1000 * d + np.arange(n) for d, n in enumerate(sizes)])
    targets = tokens % 3 == 0
    plan = plan_rows(sizes, length, one_per_row=one_per_row)
    blocks = list(fill_rows(plan, tokens, targets, block=3))
    pieces = [piece for block in blocks for piece in segments_of(block)]
    assert all((np.diff(piece) == 1).all() for piece in pieces), "a piece is one run of a document"
    np.testing.assert_array_equal(np.sort(np.concatenate(pieces)), np.sort(tokens))
    assert len(pieces) == sum(-(-int(n) // length) for n in sizes), "nothing is cut needlessly"
    for block in blocks:
        np.testing.assert_array_equal(block.mask, block.segments > 0)
        np.testing.assert_array_equal(block.targets, block.mask & (block.tokens % 3 == 0))
        assert not one_per_row or block.segments.max() <= 1
    rows = sum(len(block.tokens) for block in blocks)
    assert rows == plan.rows >= -(-len(tokens) // length)
    assert plan.efficiency == pytest.approx(len(tokens) / (rows * length))


def test_best_fit_fills_rows_that_fit_exactly():
    plan = plan_rows([6, 5, 5, 3, 1], 10)
    assert plan.rows == 2 and plan.efficiency == 1.0
    rows = [sorted(plan.size[plan.row == row].tolist()) for row in range(plan.rows)]
    assert sorted(rows) == [[1, 3, 6], [5, 5]]


def test_packing_wastes_little_of_many_documents():
    sizes = np.random.default_rng(0).integers(10, 400, 2000)
    assert plan_rows(sizes, 512).efficiency > 0.98
    assert plan_rows(sizes, 512, one_per_row=True).efficiency < 0.5


@pytest.mark.parametrize(
    ("sizes", "length", "message"),
    [
        ([], 4, "no sequences to pack"),
        ([3, 0], 4, "sequence 1 is empty"),
        ([3], 0, "length of a row must be at least 1, got 0"),
    ],
)
def test_a_plan_refuses(sizes, length, message):
    with pytest.raises(ValueError, match=message):
        plan_rows(sizes, length)


# Sources, packed.


def test_texts_come_back_from_their_segments():
    tokenizer = byte_tokenizer()
    texts = ["one", "a longer text of many bytes", "zwölf", "x"]
    packing = Packing(16, end=tokenizer.eos_id)
    batch, report = pack_source(source_of(*texts), tokenizer, packing)
    assert batch.targets is None and batch.tokens.shape[1] == 16
    pieces = [tokenizer.decode(piece) for piece in segments_of(batch)]
    whole = [f"{text}<end>" for text in texts if text != texts[1]]
    assert sorted(p for p in pieces if p in whole) == sorted(whole)
    assert {p for p in pieces if p not in whole} == {"a longer text of", " many bytes<end>"}
    assert report.documents == 4 and report.dropped == 0 and report.pieces == 5
    assert report.tokens == sum(len(text.encode()) + 1 for text in texts)
    assert report.targets == report.tokens - report.pieces == batch.target_mask.sum()
    assert report.efficiency == pytest.approx(report.tokens / (report.rows * 16))


def test_targets_are_the_answers_as_in_tasks_encode():
    tokenizer = byte_tokenizer()
    examples = tasks.generate("capitals", 12, seed=0)
    batch, report = pack_source(source_of(*examples), tokenizer, Packing(120))
    assert report.rows < 12 and report.pieces == 12
    answers = sorted(
        tokenizer.decode(row[counted & (numbers == n)])
        for row, counted, numbers in zip(batch.tokens, batch.targets, batch.segments, strict=True)
        for n in range(1, numbers.max() + 1)
    )
    assert answers == sorted(example.answer for example in examples)
    alone, _ = pack_source(source_of(*examples), tokenizer, Packing(120, one_per_row=True))
    encoded = tasks.encode(examples, tokenizer, length=120).batch
    np.testing.assert_array_equal(alone.tokens, encoded.tokens)
    np.testing.assert_array_equal(alone.targets, encoded.targets)
    assert report.targets == encoded.target_mask.sum()


@pytest.mark.slow
def test_a_model_reads_packed_examples_as_it_reads_them_alone():
    model, tokenizer = tiny_model(vocab_size=257, context_length=150), byte_tokenizer()
    source = source_of(*tasks.generate("capitals", 12, seed=0))
    packed, report = pack_source(source, tokenizer, Packing(150))
    alone, _ = pack_source(source, tokenizer, Packing(150, one_per_row=True))
    assert report.rows <= 6
    loss = jax.jit(lambda batch: next_token_loss(model, batch))
    close(loss(packed), loss(alone))
    assert abs(float(loss(packed.replace(segments=None)) - loss(alone))) > 1e-3


def test_a_long_example_is_named_or_dropped_and_counted():
    tokenizer = byte_tokenizer()
    short, long = Example("2+2=", "4"), Example("a" * 20, "b")
    with pytest.raises(ValueError, match="toy 1 has 21 tokens with its answer, a sequence longer"):
        pack_source(source_of(short, long), tokenizer, Packing(10))
    _, report = pack_source(source_of(short, long), tokenizer, Packing(10, drop_long=True))
    assert report.documents == 2 and report.dropped == 1 and report.pieces == 1
    with pytest.raises(ValueError, match="nothing is left of toy: each of its 1 documents"):
        pack_source(source_of(long), tokenizer, Packing(10, drop_long=True))


def test_documents_without_tokens():
    tokenizer = byte_tokenizer()
    _, report = pack_source(source_of("", "text"), tokenizer, Packing(8, end=256))
    assert report.dropped == 1 and report.tokens == 5
    with pytest.raises(ValueError, match="toy 0: the answer has no tokens"):
        pack_source(source_of(Example("p", "")), tokenizer, Packing(8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"length": 1}, "at least 2, got 1"), ({"length": 4, "end": -1}, "-1")],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Packing(**settings)


# Prepared rows.


@pytest.mark.parametrize("spec", ["corpus:python-docs", "task:capitals"])
def test_prepared_rows_equal_those_in_memory(tmp_path, spec):
    tokenizer = byte_tokenizer()
    source, packing = open_source(spec, "held_out"), Packing(300, end=256)
    batch, report = pack_source(source, tokenizer, packing)
    rows = prepare(source, tokenizer, packing, tmp_path)
    assert rows.report == report and len(rows) == len(batch.tokens)
    chosen = np.random.default_rng(0).permutation(len(rows))[:7]
    read = rows[chosen]
    assert (read.targets is None) == (batch.targets is None)
    for name in ("tokens", "mask", "segments", "targets"):
        wanted = getattr(batch, name)
        if wanted is not None:
            assert getattr(read, name).dtype == wanted.dtype
            np.testing.assert_array_equal(getattr(read, name), wanted[chosen])


def test_prepared_once_and_whole_or_absent(tmp_path):
    tokenizer, source = byte_tokenizer(), source_of("first", "second", "third")
    told: list[tuple[int, int]] = []
    once = prepare(source, tokenizer, Packing(8), tmp_path, progress=lambda *d: told.append(d))
    assert told == [(1, 3), (2, 3), (3, 3)]
    again = prepare(source, tokenizer, Packing(8), tmp_path, progress=lambda *d: told.append(d))
    assert again.folder == once.folder and len(told) == 3
    folders = {once.folder}
    other = Tokenizer(byte_tokenizer().backend)
    other.backend.add_tokens(["more"])
    for changed in (
        prepare(source_of("first"), tokenizer, Packing(8), tmp_path),
        prepare(source, tokenizer, Packing(8, end=256), tmp_path),
        prepare(source, tokenizer, Packing(9), tmp_path),
        prepare(source, other, Packing(8), tmp_path),
    ):
        assert changed.folder not in folders
        folders.add(changed.folder)
    bad = source_of(Example("a", "b"), Example("a" * 9, "b"))
    with pytest.raises(ValueError, match="toy 1 has 10 tokens"):
        prepare(bad, tokenizer, Packing(8), tmp_path)
    assert set(tmp_path.iterdir()) == folders, "what fails leaves nothing"


def test_two_that_prepare_at_once_both_get_the_rows(tmp_path):
    tokenizer, source, packing = byte_tokenizer(), source_of("first", "second"), Packing(8)
    inner = []

    def another(done: int, of: int) -> None:
        if not inner:
            inner.append(None)
            inner.append(prepare(source, tokenizer, packing, tmp_path))

    outer = prepare(source, tokenizer, packing, tmp_path, progress=another)
    assert outer.folder == inner[1].folder
    assert list(tmp_path.iterdir()) == [outer.folder]


def test_a_damaged_folder_is_named(tmp_path):
    rows = prepare(source_of("first", "second"), byte_tokenizer(), Packing(8), tmp_path)
    file = rows.folder / "tokens.npy"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=f"{rows.folder} does not hold whole prepared rows"):
        FileRows(rows.folder)
    with pytest.raises(ValueError, match="does not hold whole prepared rows"):
        FileRows(tmp_path / "absent")
