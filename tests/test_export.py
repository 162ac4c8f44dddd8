"""Models written whole: exports, with a tokenizer, and native checkpoints."""

import json
import shutil

import jax
import numpy as np
import pytest
import tokenizers
from llama_files import DTYPES, random_model, same_trees

from jaxheads import Transformer
from jaxheads.convert import export, load, load_model, save
from jaxheads.model.rotary import Rope
from jaxheads.text import Tokenizer


def tiny_tokenizer() -> Tokenizer:
    vocab = {"<eos>": 0} | {word: index for index, word in enumerate("abcdefghij", 1)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<eos>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return Tokenizer(backend, {"eos_token": "<eos>", "unk_token": "<eos>"})


def test_export_refuses_before_work_and_leaves_nothing_behind(tmp_path, monkeypatch):
    model = random_model()
    with pytest.raises(ValueError, match="unknown export format 'onnx'"):
        export(model, tmp_path / "out", format="onnx")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        export(model, tmp_path / "file")
    with pytest.raises(ValueError, match="cannot write to"):
        export(model, tmp_path / "file" / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    with pytest.raises(ValueError, match="is not empty"):
        export(model, tmp_path / "full")
    monkeypatch.setattr(Tokenizer, "save", lambda *_: 1 / 0)  # the last thing that is written
    with pytest.raises(ZeroDivisionError):
        export(model, tmp_path / "out", tokenizer=tiny_tokenizer())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]


def test_export_with_a_tokenizer_is_a_whole_model(tmp_path):
    model = random_model()
    tokenizer = tiny_tokenizer()
    (tmp_path / "out").mkdir()
    export(model, tmp_path / "out", tokenizer=tokenizer)
    back, again = load(tmp_path / "out")
    same_trees(back.params, model.params)
    assert again.encode("a c b") == tokenizer.encode("a c b") == [1, 3, 2]
    for file in ("config.json", "generation_config.json"):
        keys = json.loads((tmp_path / "out" / file).read_text())
        assert (keys["bos_token_id"], keys["eos_token_id"]) == (None, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_native_checkpoint_comes_back_bit_for_bit(tmp_path, dtype):
    model = random_model(dtype, qkv_bias=True, tied=False)
    save(model, tiny_tokenizer(), tmp_path / "saved")
    back, tokenizer = load(tmp_path / "saved")
    assert back.config == model.config and tokenizer.encode("j") == [10]
    same_trees(back.params, model.params)
    other = load_model(tmp_path / "saved", dtype="float16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(other.params)} == {"float16"}
    with pytest.raises(ValueError, match="is not empty"):
        save(model, None, tmp_path / "saved")
    smaller = random_model(dtype)
    save(smaller, None, tmp_path / "saved", overwrite=True)
    same_trees(load_model(tmp_path / "saved").params, smaller.params)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_native_checkpoint_that_does_not_fit_is_refused(tmp_path):
    save(random_model(), None, tmp_path / "saved")
    path = tmp_path / "saved" / "jaxheads.json"
    whole = json.loads(path.read_text())

    def refuses(message, **changes):
        path.write_text(json.dumps(whole | changes))
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path / "saved")

    config = whole["config"]
    refuses("format 'jaxheads' version 99, .* version 1", version=99)
    refuses("config: missing none; unknown window", config=config | {"window": 4})
    short = {name: value for name, value in config.items() if name != "tied"}
    refuses("config: missing tied; unknown none", config=short)
    refuses(
        r"cannot restore .*blocks/mlp/down has shape \(2, 24, 16\), expected \(2, 48, 16\)",
        config=config | {"d_mlp": 48},
    )
    shutil.rmtree(tmp_path / "saved" / "params")
    refuses("has no params/")


@pytest.mark.peers
@pytest.mark.parametrize("biases", [False, True])
def test_transformers_loads_an_export_and_agrees(tmp_path, biases):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = random_model(qkv_bias=biases, mlp_bias=biases, tied=not biases, ropes=(Rope(500.0),))
    params = jax.tree.map(lambda leaf: leaf + 0.1, model.params)  # biases are drawn as zeros
    model = Transformer(model.config, params)
    export(model, tmp_path / "out", tokenizer=tiny_tokenizer())
    tokens = np.random.default_rng(0).integers(0, 11, (2, 20))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(model(tokens).logits, logits, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a c b").input_ids == [1, 3, 2]
