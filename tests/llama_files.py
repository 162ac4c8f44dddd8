"""Small checkpoints of the family llama, written with numpy, and random models of that size."""

import json
from pathlib import Path

import gguf
import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxheads import ModelConfig, Transformer
from jaxheads.model.parameters import flatten

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
