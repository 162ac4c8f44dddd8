"""Weights in and out, against files that the tests write with numpy themselves."""

import json
import shutil
from pathlib import Path

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from jaxheads import ModelConfig, Transformer
from jaxheads.convert import FAMILIES, export, load, load_model, save
from jaxheads.convert.safetensors_files import SafetensorsReader
from jaxheads.convert.table import slots
from jaxheads.model.parameters import flatten, parameter_table
from jaxheads.model.rotary import Rope
from jaxheads.text import Tokenizer

SHAPES = {
    "mha": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "gqa": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "mqa-biases": {
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "untied": {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False},
}
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def hf_config(**changes) -> dict:
    return {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "vocab_size": 11,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
    } | changes


def hf_tensors(config: dict, dtype=np.float32) -> dict[str, np.ndarray]:
    """Random tensors in the layout of Hugging Face's LlamaForCausalLM."""
    rng = np.random.default_rng(0)
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    size = config.get("head_dim") or d // config["num_attention_heads"]
    q, k = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, d)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        shapes[block + "input_layernorm.weight"] = (d,)
        shapes[block + "post_attention_layernorm.weight"] = (d,)
        attention = {"q": (q, d), "k": (k, d), "v": (k, d), "o": (d, q)}
        mlp = {"gate": (f, d), "up": (f, d), "down": (d, f)}
        for part, maps, bias in (
            ("self_attn", attention, config["attention_bias"]),
            ("mlp", mlp, config["mlp_bias"]),
        ):
            for name, shape in maps.items():
                shapes[f"{block}{part}.{name}_proj.weight"] = shape
                if bias:
                    shapes[f"{block}{part}.{name}_proj.bias"] = shape[:1]
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write_hf(folder: Path, config: dict, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_gguf(path: Path, config: dict, tensors: dict[str, np.ndarray], **extra) -> Path:
    """The same model as llama.cpp's convert_hf_to_gguf.py writes it."""
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    size = config.get("head_dim") or config["hidden_size"] // heads["q"]
    writer = gguf.GGUFWriter(path, extra.pop("architecture", "llama"))
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads["q"])
    writer.add_head_count_kv(heads["k"])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(extra.pop("rope_dimensions", size))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    for key, value in extra.pop("uint32", {}).items():
        writer.add_uint32(key, value)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, array in (tensors | extra.pop("added", {})).items():
        for n in [part for part in heads if f".{part}_proj." in name]:
            # LlamaModel.permute of convert_hf_to_gguf.py, word for word.
            array = (
                array.reshape(heads[n], 2, array.shape[0] // heads[n] // 2, *array.shape[1:])
                .swapaxes(1, 2)
                .reshape(array.shape)
            )
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, np.ascontiguousarray(array))
    assert not extra
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def same_trees(first, second) -> None:
    first, second = dict(flatten(first)), dict(flatten(second))
    assert first.keys() == second.keys()
    for path in first:
        assert first[path].dtype == second[path].dtype, path
        np.testing.assert_array_equal(np.asarray(first[path]), np.asarray(second[path]), path)


def random_model(dtype: str = "float32", **changes) -> Transformer:
    shape = {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "d_model": 16}
    other = {"d_mlp": 24, "vocab_size": 11, "context_length": 32, "dtype": dtype}
    config = ModelConfig(**shape | other | changes)
    return Transformer.random(config, jax.random.key(0), dtype)


def tiny_tokenizer() -> Tokenizer:
    vocab = {"<eos>": 0} | {word: index for index, word in enumerate("abcdefghij", 1)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<eos>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return Tokenizer(backend, {"eos_token": "<eos>", "unk_token": "<eos>"})


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


# Writing.


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
