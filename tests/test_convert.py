"""Weights in and out, against files that the tests write with numpy themselves."""

import json

import numpy as np
import pytest
from llama_files import (
    DTYPES,
    SHAPES,
    hf_config,
    hf_tensors,
    random_model,
    same_trees,
    write_gguf,
    write_hf,
)
from safetensors.numpy import load_file

from jaxheads import ModelConfig
from jaxheads.convert import FAMILIES, export, load_model
from jaxheads.convert.safetensors_files import SafetensorsReader
from jaxheads.convert.table import slots
from jaxheads.model.parameters import flatten, parameter_table
from jaxheads.model.rotary import Rope


@pytest.fixture
def hf(tmp_path):
    """A loadable directory, its config and its tensors."""
    config = hf_config(**SHAPES["gqa"])
    tensors = hf_tensors(config)
    return write_hf(tmp_path / "hf", config, tensors), config, tensors


# The table.


@pytest.mark.parametrize("kind", ["huggingface", "gguf"])
def test_every_parameter_has_a_row_whose_axes_are_those_of_the_tree(kind):
    config = random_model(qkv_bias=True, o_bias=True, mlp_bias=True, tied=False).config
    rows = FAMILIES["llama"].formats[kind].rows
    table = parameter_table(config)
    assert rows.keys() == table.keys()
    for path, row in rows.items():
        axes = row.sides[1].replace("(two half)", "Dh").split()
        assert ("L",) * ("{L}" in row.name) + tuple(axes) == table[path].axes, path
    named = [
        slot.name
        for group in slots(FAMILIES["llama"].formats[kind], config).values()
        for slot in group
    ]
    assert len(named) == len(set(named))


# Hugging Face, in and out.


def test_the_tree_is_the_stored_tensors_with_heads_as_an_axis(tmp_path):
    config = hf_config(**SHAPES["mqa-biases"])
    tensors = hf_tensors(config)
    blocks = load_model(write_hf(tmp_path / "hf", config, tensors)).params["blocks"]
    layer = "model.layers.1."
    q = tensors[layer + "self_attn.q_proj.weight"]  # rows: head 0, then head 1, ...
    o = tensors[layer + "self_attn.o_proj.weight"]
    for head in range(4):
        rows = slice(6 * head, 6 * head + 6)
        np.testing.assert_array_equal(blocks["attn"]["q"][1, :, head], q[rows].T)
        np.testing.assert_array_equal(blocks["attn"]["o"][1, head], o[:, rows].T)
    bias = tensors[layer + "self_attn.q_proj.bias"]
    np.testing.assert_array_equal(blocks["attn"]["q_bias"][1], bias.reshape(4, 6))
    for name in ("gate", "up", "down"):
        stored = tensors[f"{layer}mlp.{name}_proj.weight"]
        np.testing.assert_array_equal(blocks["mlp"][name][1], stored.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_in_and_out_is_bit_exact(tmp_path, shape, dtype):
    config = hf_config(**SHAPES[shape])
    tensors = hf_tensors(config, DTYPES[dtype])
    model = load_model(write_hf(tmp_path / "in", config, tensors), dtype=dtype)
    export(model, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, array in tensors.items():
        assert written[name].dtype == array.dtype
        np.testing.assert_array_equal(written[name].view(np.uint8), array.view(np.uint8), name)
    keys = json.loads((tmp_path / "out" / "config.json").read_text())
    assert keys.items() >= config.items() and keys["torch_dtype"] == dtype
    assert load_model(tmp_path / "out", dtype=dtype).config == model.config


def test_shards_are_written_and_read_with_their_index(tmp_path):
    model = random_model(tied=False)
    export(model, tmp_path / "out", max_shard_bytes=4000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert not (tmp_path / "out" / "model.safetensors").exists()
    stored = {name: a for f in files for name, a in load_file(tmp_path / "out" / f).items()}
    assert stored.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in stored.values())
    same_trees(load_model(tmp_path / "out").params, model.params)
    (tmp_path / "out" / files[1]).unlink()
    with pytest.raises(ValueError, match=f"lacks shards that its index names: {files[1]}"):
        load_model(tmp_path / "out")


@pytest.mark.parametrize("have", ["qkv_bias", "o_bias"])
def test_biases_that_share_a_flag_are_filled_with_zeros(tmp_path, have):
    model = random_model(**{have: True})
    export(model, tmp_path / "out")
    back = load_model(tmp_path / "out")
    assert back.config == model.config.replace(qkv_bias=True, o_bias=True)
    ours, theirs = dict(flatten(model.params)), dict(flatten(back.params))
    added = {path for path in theirs if path not in ours}
    names = {"qkv_bias": {"o_bias"}, "o_bias": {"q_bias", "k_bias", "v_bias"}}[have]
    assert added == {f"blocks/attn/{name}" for name in names}
    assert all(not np.any(theirs[path]) for path in added)


def test_both_spellings_of_the_rotary_base(hf):
    folder, config, tensors = hf
    new = {k: v for k, v in config.items() if k != "rope_theta"} | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "dtype": "bfloat16",
    }
    old = load_model(folder).config
    assert load_model(write_hf(folder, new, tensors)).config == old and old.ropes == (Rope(5000.0),)
    with pytest.raises(ValueError, match=r"rope_theta = 1\.0 disagrees with rope_parameters"):
        load_model(write_hf(folder, new | {"rope_theta": 1.0}, tensors))


def test_a_stored_head_of_a_tied_model_must_be_the_embedding(hf):
    folder, config, tensors = hf
    copy = tensors["model.embed_tokens.weight"].copy()
    assert load_model(write_hf(folder, config, tensors | {"lm_head.weight": copy})).config.tied
    copy[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"lm_head.weight is not the copy of embed/tokens"):
        load_model(write_hf(folder, config, tensors | {"lm_head.weight": copy}))


# GGUF.


@pytest.mark.parametrize("shape", SHAPES)
def test_gguf_and_safetensors_give_the_same_model(tmp_path, shape):
    config = hf_config(**SHAPES[shape])
    tensors = hf_tensors(config)
    first = load_model(write_hf(tmp_path / "hf", config, tensors))
    second = load_model(write_gguf(tmp_path / "m.gguf", config, tensors))
    assert second.config == first.config
    same_trees(second.params, first.params)


GGUF_ERRORS = {
    "architecture": ({"architecture": "gemma"}, "unknown general.architecture 'gemma'.*llama"),
    "key": ({"uint32": {"llama.logit_thing": 3}}, "unknown key llama.logit_thing = 3"),
    "experts": ({"uint32": {"llama.expert_count": 8}}, "llama.expert_count = 8 is not supported"),
    "rotary": ({"rope_dimensions": 4}, r"rope.dimension_count is 4, expected 8 \(= head_dim\)"),
    "tensor": (
        {"added": {"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}},
        "no place in the model: blk.0.attn_q_norm.weight",
    ),
}


@pytest.mark.parametrize("case", GGUF_ERRORS)
def test_gguf_of_something_else_is_refused(tmp_path, case):
    extra, message = GGUF_ERRORS[case]
    config = hf_config(**SHAPES["gqa"])
    path = write_gguf(tmp_path / "m.gguf", config, hf_tensors(config), **extra)
    with pytest.raises(ValueError, match=message):
        load_model(path)


# Bad Hugging Face directories.

CONFIG_ERRORS = {
    "family": ({"model_type": "lama"}, "unknown model_type 'lama'. Did you mean 'llama'.*adding-a"),
    "no family": ({"model_type": None}, "missing key model_type"),
    "dynamic rope": (
        {"rope_scaling": {"type": "dynamic", "factor": 2}},
        "rope_type 'dynamic' is not supported",
    ),
    "llama3 rope": (
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5000.0}},
        "rope_type 'llama3' lacks the setting",
    ),
    "rope factor": (
        {"rope_scaling": {"factor": 2.0}},
        "unknown settings of rope_type 'default': factor",
    ),
    "interleaved": ({"rope_interleaved": True}, "rope_interleaved = true is not supported"),
    "activation": ({"hidden_act": "mish"}, 'hidden_act = "mish" is not supported'),
    "slices": ({"pretraining_tp": 2}, "pretraining_tp = 2 is not supported"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "unknown": ({"residual_multiplier": 0.5}, "unknown key residual_multiplier = 0.5"),
    "missing": ({"rms_norm_eps": None}, "missing key rms_norm_eps"),
    "type": ({"num_hidden_layers": "2"}, 'num_hidden_layers must be .* int, got "2"'),
    "groups": ({"num_key_value_heads": 3}, "must be a multiple"),
    "shape": ({"intermediate_size": 25}, r"gate_proj.weight has shape \(24, 16\).*\(25, 16\)"),
    "layers": ({"num_hidden_layers": 3}, "missing tensors: model.layers.2"),
    "fewer layers": ({"num_hidden_layers": 1}, "no place in the model: model.layers.1"),
    "bias": ({"mlp_bias": True}, "missing tensors: model.layers.0.mlp.gate_proj.bias"),
    "untied": ({"tie_word_embeddings": False}, "missing tensors: lm_head.weight"),
}


@pytest.mark.parametrize("case", CONFIG_ERRORS)
def test_a_config_that_is_not_understood_is_refused(hf, case, monkeypatch):
    folder, config, tensors = hf
    changes, message = CONFIG_ERRORS[case]
    write_hf(folder, config | changes, tensors)
    monkeypatch.setattr(SafetensorsReader, "read", lambda *_: pytest.fail("read before checking"))
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_one_error_names_every_problem(hf):
    folder, config, tensors = hf
    write_hf(folder, config | {"a_new_key": 1, "pretraining_tp": 4, "hidden_size": None}, tensors)
    with pytest.raises(ValueError) as error:
        load_model(folder)
    assert all(key in str(error.value) for key in ("a_new_key", "pretraining_tp", "hidden_size"))


def test_weights_that_are_no_plain_floats_are_named(hf):
    folder, config, tensors = hf
    name = "model.layers.0.self_attn.q_proj.weight"
    packed = tensors | {name: np.zeros(tensors[name].shape, np.int8)}
    with pytest.raises(ValueError, match=rf"not plain floats: {name} \(I8\)"):
        load_model(write_hf(folder, config, packed))


def test_harmless_keys_and_buffers_are_ignored(hf):
    folder, config, tensors = hf
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4) for i in range(2)}
    keys = {"use_cache": True, "torch_dtype": "bfloat16", "rope_scaling": None, "_name_or_path": ""}
    plain = load_model(folder)
    same_trees(load_model(write_hf(folder, config | keys, tensors | buffers)).params, plain.params)


def test_progress_counts_every_tensor(hf):
    folder, _, tensors = hf
    calls = []
    load_model(folder, on_progress=lambda *call: calls.append(call))
    assert [done for done, _, _ in calls] == list(range(1, len(tensors) + 1))
    assert {total for _, total, _ in calls} == {len(tensors)}
    assert {name for *_, name in calls} == tensors.keys()


# The real model.


def test_smollm2_is_what_its_authors_published(smollm2):
    model, tokenizer = smollm2
    assert model.config == ModelConfig(
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        head_dim=64,
        d_model=576,
        d_mlp=1536,
        vocab_size=49152,
        context_length=8192,
        ropes=(Rope(100_000.0),),
        norm_eps=1e-5,
        tied=True,
    )
    prompt = "When Mary and John went to the store, John gave a drink to"
    logits = model(tokenizer(prompt)).logits[0, -1]
    assert logits[tokenizer.token_id(" Mary")] - logits[tokenizer.token_id(" John")] > 2
