"""tfds data sets: ours are built and read, others are found, all without TensorFlow."""

from __future__ import annotations

import importlib.util
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from jaxheads import tasks
from jaxheads.data import build, corpus, open_source, python_docs
from jaxheads.data.builders import python_docs_builder, task_builder
from jaxheads.data.records import from_record, to_record
from jaxheads.tasks import Example

no_tensorflow = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow is installed"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data directory with two configs of our task data set and the corpus, really built."""
    tfds.disable_progress_bar()
    path = tmp_path_factory.mktemp("tfds")
    task_builder("needle", path, count=12, seed=1).download_and_prepare()
    task_builder("ioi", path, count=30, held_out=0.5, corruption="swap").download_and_prepare()
    python_docs_builder(path).download_and_prepare()
    return path


def configs(folder, name: str) -> list[str]:
    return sorted(path.name for path in (folder / name).iterdir() if path.is_dir())


def test_a_task_is_read_back_as_it_was_generated(folder):
    wanted = tasks.generate("needle", 12, 1)
    assert any(example.needle for example in wanted)
    train, held_out = tasks.split(wanted, 0.25, 1)
    for split, examples in (("train", train), ("held_out", held_out)):
        source = open_source("tfds:jaxheads_tasks/needle-12-seed1", split, data_dir=folder)
        assert source.kind == "examples"
        # tfds shuffles what it stores.
        assert sorted(map(repr, source.examples())) == sorted(map(repr, examples))


def test_options_have_a_config_of_their_own(folder):
    (found,) = [name for name in configs(folder, "jaxheads_tasks") if name.startswith("ioi")]
    assert found.startswith("ioi-30-seed0-")
    source = open_source(f"tfds:jaxheads_tasks/{found}", "train", data_dir=folder)
    train, _ = tasks.split(tasks.generate("ioi", 30, 0, corruption="swap"), 0.5, 0)
    assert sorted(map(repr, source.examples())) == sorted(map(repr, train))


def test_the_corpus_is_read_back_and_its_config_tells_its_version(folder):
    (config,) = configs(folder, "jaxheads_python_docs")
    assert config == (
        f"python{sys.version_info.major}.{sys.version_info.minor}-{corpus.fingerprint()[:8]}"
    )
    for split in ("train", "held_out"):
        source = open_source(f"tfds:jaxheads_python_docs/{config}", split, data_dir=folder)
        assert sorted(source.texts()) == sorted(d.text for d in python_docs(split))
    titles = open_source(
        f"tfds:jaxheads_python_docs/{config}", "train", data_dir=folder, options={"text": "title"}
    )
    assert sorted(titles.texts()) == [d.title for d in python_docs("train")]


def test_part_of_a_split(folder):
    whole = open_source("tfds:jaxheads_tasks/needle-12-seed1", "train", data_dir=folder)
    half = open_source("tfds:jaxheads_tasks/needle-12-seed1", "train[:50%]", data_dir=folder)
    assert 0 < len(half) < len(whole) and half.fingerprint != whole.fingerprint
    assert half.examples() == whole.examples()[: len(half)]


@no_tensorflow
def test_tensorflow_is_never_imported(folder):
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    "example",
    [
        Example("p", " a"),
        Example("p é", " a", (0, 1), "g", " w", "c", (" a", " b"), (" w", " v")),
    ],
)
def test_records_keep_everything(example):
    record = to_record(example)
    assert from_record(record) == example
    as_bytes = {k: v.encode() if isinstance(v, str) else v for k, v in record.items()}
    assert from_record(as_bytes | {"needle": np.array(record["needle"])}) == example


class Questions(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Anyone's data set: fields of other names, and a builder that tfds is not told about."""

    VERSION = tfds.core.Version("2.0.0")

    def _info(self):
        text = tfds.features.Text
        fields = {"question": text(), "reply": text(), "page": text(), "year": np.int64}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(fields))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(5), "validation": self._generate_examples(2)}

    def _generate_examples(self, count):
        for n in range(count):
            yield n, {"question": f"q{n}", "reply": f"é{n}", "page": f"page {n}", "year": n}


@pytest.fixture(scope="module")
def questions(folder):
    Questions(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def test_any_data_set_that_is_there_by_its_fields(questions):
    names = {"prompt": "question", "answer": "reply"}
    examples = open_source("tfds:questions", "train", data_dir=questions, options=names)
    assert sorted(map(repr, examples)) == sorted(repr(Example(f"q{n}", f"é{n}")) for n in range(5))
    page = {"text": "page"}
    pages = open_source("tfds:questions", "validation", data_dir=questions, options=page)
    assert sorted(pages.texts()) == ["page 0", "page 1"]
    assert pages.label(1) == "item 1 of tfds:questions (validation)"
    for options, split, message in (
        ({}, "train", "'questions' has no field 'text'; name one .* page, question, reply, year"),
        ({"text": "pag"}, "train", "unknown field of 'questions': 'pag'. Did you mean 'page'"),
        ({"text": "page"}, "valid", "unknown split of 'questions': 'valid'. .*Known: train, val"),
        ({"text": "year"}, "train", "item 0 of tfds:questions .train.: expected a text, got int"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source("tfds:questions", split, data_dir=questions, options=options)


def test_what_is_stored_as_tfrecord_is_refused(questions, tmp_path):
    shutil.copytree(questions / "questions", tmp_path / "questions")
    info = tmp_path / "questions/2.0.0/dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="is stored as tfrecord, expected array_record"):
        open_source("tfds:questions", "train", data_dir=tmp_path, options={"text": "page"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("squda", "unknown tfds data set 'squda'. Did you mean 'squad'"),
        ("squad/v9", "unknown config of 'squad': 'v9'. Known: v1.1, v2.0."),
        ("squad", "data set 'squad' is not built in "),
        ("glue/cola", "data set 'glue/cola' is not built in "),  # tfds alone does not find it
    ],
)
def test_what_tfds_does_not_have(tmp_path, name, message):
    with pytest.raises(ValueError) as caught:
        open_source(f"tfds:{name}", "train", data_dir=tmp_path)
    assert str(caught.value).startswith(message)


@no_tensorflow
@pytest.mark.parametrize("name", ["goemotions", "super_glue/copa"])
def test_a_data_set_that_needs_tensorflow_says_so(tmp_path, name):
    message = f"data set '{name}' needs TensorFlow, .* pip install 'jaxheads.tensorflow.'"
    with pytest.raises(ValueError, match=message):
        open_source(f"tfds:{name}", "train", data_dir=tmp_path)
    with pytest.raises(ValueError, match=message):
        build(name, tmp_path)


def test_how_a_data_set_is_read_is_checked(folder):
    with pytest.raises(ValueError, match="by prompt and answer together"):
        open_source("tfds:squad", "train", data_dir=folder, options={"prompt": "question"})
    with pytest.raises(ValueError, match="unknown option of 'tfds' sources: 'field'"):
        open_source("tfds:squad", "train", data_dir=folder, options={"field": "question"})
    known = "unknown split of 'jaxheads_tasks/needle-12-seed1': 'test'. Known: held_out, train"
    with pytest.raises(ValueError, match=known):
        open_source("tfds:jaxheads_tasks/needle-12-seed1", "test", data_dir=folder)


def test_a_builder_is_checked_before_it_builds(tmp_path):
    with pytest.raises(ValueError, match="unknown option of task 'ioi': 'colour'"):
        task_builder("ioi", tmp_path, count=3, colour=1)
    with pytest.raises(ValueError, match="held_out must lie strictly between 0 and 1, got 2"):
        task_builder("ioi", tmp_path, count=3, held_out=2)
