"""GGUF files of the families that llama.cpp stores, against the same tensors as safetensors.

The files are written here as llama.cpp's converters write them: the gguf package maps the names
and names the keys, rows are permuted and norms shifted as in llama.cpp's conversion/*.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.convert.load import load_model
from jaxheads.model.parameters import flatten
from jaxheads.model.rotary import frequencies

DECODERS = {
    # case: what GGUF cannot say otherwise
    "llama_biases": {},
    "llama_linear": {},
    "llama_llama3": {},
    "llama_yarn": {
        "rope_parameters": {
            **families.reference("llama_yarn").config["rope_parameters"],
            "beta_fast": 16.0,
            "beta_slow": 2.0,
        }
    },
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 10},
    "gemma3_text": {"query_pre_attn_scalar": 10},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
}
ARCHITECTURES = {"gemma3_text": "gemma3"}
PERMUTED = ("llama", "smollm3")
SHIFTED = ("gemma2", "gemma3")


def both(case: str, folder: Path) -> tuple[Any, Any]:
    """The model of a case from safetensors and from GGUF."""
    families.materialise(case, folder)
    config = families.reference(case).config | DECODERS[case]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_model(folder), load_model(write_gguf(case, config, folder / "model.gguf"))


def write_gguf(case: str, config: dict[str, Any], path: Path) -> Path:
    """What llama.cpp's converter makes of a case, in float32."""
    stored = families.reference(case)
    architecture = ARCHITECTURES.get(stored.family, stored.family)
    writer = gguf.GGUFWriter(path, architecture)
    add_keys(writer, config, architecture)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config["num_hidden_layers"])
    heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config["num_key_value_heads"],
    }
    for name, tensor in families.random_tensors(stored.shapes, **stored.draw).items():
        map_name = name.split(".")[-2]
        if architecture in PERMUTED and map_name in heads:
            tensor = permuted(tensor, heads[map_name])
        if architecture in SHIFTED and name.endswith("norm.weight"):
            tensor = tensor + np.float32(1)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor)
    if config["rope_parameters"].get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config))
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return path


def add_keys(writer: gguf.GGUFWriter, config: dict[str, Any], architecture: str) -> None:
    """The keys that llama.cpp's converters write."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    rope = config["rope_parameters"].get("full_attention", config["rope_parameters"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast", 32.0))
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow", 1.0))
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if architecture in SHIFTED:
        writer.add_sliding_window(config["sliding_window"])
    if architecture == "gemma3":
        writer.add_sliding_window_pattern([kind[0] == "s" for kind in config["layer_types"]])


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Halves of heads -> interleaved pairs."""
    pairs = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def llama3_factors(config: dict[str, Any]) -> np.ndarray:
    """What every frequency is divided by, float32 [head_dim / 2]."""
    rope = config["rope_parameters"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for feature in range(0, config["head_dim"], 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (feature / config["head_dim"])
        turns = rope["original_max_position_embeddings"] / wavelength
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("case", DECODERS)
def test_a_gguf_decoder_is_the_safetensors_one(case, tmp_path):
    ours, theirs = both(case, tmp_path)
    if case != "llama_llama3":
        assert theirs.config == ours.config
    expected, found = dict(flatten(ours.params)), dict(flatten(theirs.params))
    assert sorted(expected) == sorted(found)
    for path, leaf in expected.items():
        # 1 + w in float32 rounds w to multiples of 2^-24.
        shifted = case.startswith("gemma") and path.endswith("norm/scale")
        np.testing.assert_allclose(found[path], leaf, rtol=0, atol=2**-23 * shifted, err_msg=path)


def test_gguf_factors_of_frequencies_are_llama_3s_scaling(tmp_path):
    ours, theirs = both("llama_llama3", tmp_path)
    assert theirs.config == ours.config.replace(ropes=theirs.config.ropes)
    dim = ours.config.head_dim
    expected, found = (frequencies(m.config.ropes[0], dim) for m in (ours, theirs))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert not np.allclose(expected, frequencies(type(ours.config.ropes[0])(500_000.0), dim))
    tokens = jnp.arange(200)[None] * 7 % ours.config.vocab_size
    difference = jnp.abs(theirs(tokens).logits - ours(tokens).logits)
    assert difference.max() < 1e-4


def test_factors_of_the_wrong_length_are_refused(tmp_path):
    case = "llama_llama3"
    config = families.reference(case).config | {"head_dim": 10}
    path = write_gguf(case, config, tmp_path / "model.gguf")
    whole = path.read_bytes()
    assert whole.count(b"rope_freqs.weight") == 1
    at = whole.index(b"rope_freqs.weight") + len(b"rope_freqs.weight") + 4
    assert int.from_bytes(whole[at : at + 8], "little") == 5
    path.write_bytes(whole[:at] + (4).to_bytes(8, "little") + whole[at + 8 :])
    with pytest.raises(ValueError, match="longrope needs 5 short and long factors, got 4"):
        load_model(path)


JOINT = {
    # case: llama.cpp's architecture
    "gpt2": "gpt2",
    "gpt_neox": "gptneox",
    "phi3": "phi3",
    "phi3_partial": "phi3",
    "phi3_longrope_short": "phi3",
}
"""Cases of the architectures that keep queries, keys and values in one tensor."""


def write_joint_gguf(case: str, path: Path, **changes: Any) -> Path:
    """What llama.cpp's converter makes of a case, in float32; `changes` are further keys."""
    stored, architecture = families.reference(case), JOINT[case]
    writer = gguf.GGUFWriter(path, architecture)
    add_joint_keys(writer, stored.config, architecture)
    for key, value in changes.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], 3)
    for name, tensor in families.random_tensors(stored.shapes, **stored.draw).items():
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = np.ascontiguousarray(tensor.T)
        if "query_key_value" in name:
            tensor = one_after_another(tensor, stored.config["num_attention_heads"])
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor)
    rope = stored.config.get("rope_parameters", {})
    for length in ("long", "short"):
        if f"{length}_factor" in rope:
            factors = np.array(rope[f"{length}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", factors)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return path


def add_joint_keys(writer: gguf.GGUFWriter, config: dict[str, Any], architecture: str) -> None:
    """The keys that llama.cpp's converters write."""
    if architecture == "gpt2":
        writer.add_context_length(config["n_positions"])
        writer.add_embedding_length(config["n_embd"])
        writer.add_block_count(config["n_layer"])
        writer.add_feed_forward_length(config["n_inner"])
        writer.add_head_count(config["n_head"])
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        return
    width, heads = config["hidden_size"], config["num_attention_heads"]
    rope = config["rope_parameters"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_rope_dimension_count(int(rope["partial_rotary_factor"] * width) // heads)
    writer.add_rope_freq_base(rope["rope_theta"])
    if architecture == "gptneox":
        writer.add_parallel_residual(config["use_parallel_residual"])
        writer.add_layer_norm_eps(config["layer_norm_eps"])
        return
    original = config["original_max_position_embeddings"]
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_sliding_window(config["sliding_window"] or 0)
    if "long_factor" in rope:
        scale = config["max_position_embeddings"] / original
        writer.add_rope_scaling_attn_factors((1 + np.log(scale) / np.log(original)) ** 0.5)


def one_after_another(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows (head, q k v, feature) -> (q k v, head, feature)."""
    by_head = np.split(rows, heads)
    thirds = [np.split(head, 3) for head in by_head]
    return np.concatenate([third[i] for i in range(3) for third in thirds])


@pytest.mark.parametrize("case", JOINT)
def test_joint_tensors_of_a_gguf_file_come_apart(case, tmp_path):
    ours = load_model(families.materialise(case, tmp_path))
    theirs = load_model(write_joint_gguf(case, tmp_path / "model.gguf"))
    expected, found = ours.config.to_dict(), theirs.config.to_dict()
    for ropes in (expected.pop("ropes"), found.pop("ropes")):
        # The file keeps the magnitude in float32.
        for rope in filter(None, ropes):
            scaling = rope["scaling"] or {}
            scaling["magnitude"] = round(scaling.get("magnitude", 1.0), 6)
    assert found == expected
    for one, other in zip(ours.config.ropes, theirs.config.ropes, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            size = ours.config.rotated_dim
            np.testing.assert_array_equal(frequencies(one, size), frequencies(other, size))
    leaves = dict(flatten(theirs.params))
    assert sorted(leaves) == sorted(path for path, _ in flatten(ours.params))
    for path, leaf in flatten(ours.params):
        np.testing.assert_array_equal(leaves[path], leaf, err_msg=path)


def test_a_phi3_file_that_does_not_tell_its_window_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf.GGUFWriter, "add_sliding_window", lambda self, size: None)
    path = write_joint_gguf("phi3", tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"missing key phi3.attention.sliding_window"):
        load_model(path)


@pytest.mark.parametrize("case", ["gpt2", "gpt_neox", "phi3"])
def test_an_unknown_key_of_a_gguf_file_is_refused(case, tmp_path):
    path = write_joint_gguf(case, tmp_path / "model.gguf", **{"attention.new_kind": 1})
    with pytest.raises(ValueError, match=rf"unknown key {JOINT[case]}.attention.new_kind = 1"):
        load_model(path)


ENCODERS: dict[str, dict[str, Any]] = {
    # case: what GGUF cannot say otherwise
    "bert": {},
    "bert_backbone": {"hidden_act": "gelu"},
    "distilbert": {},
    "roberta": {},
    "modernbert": {},
    "modernbert_biases": {"layer_types": ["full_attention", "sliding_attention"] * 2},
    "t5": {"relative_attention_max_distance": 128},
    "t5_gated": {"relative_attention_max_distance": 128},
}
ENCODER_ARCHITECTURES = {
    **{"distilbert": "bert", "roberta": "bert", "modernbert": "modern-bert"},
    **{"bert": "bert", "t5": "t5"},
}
HEADS = ("cls.predictions.", "lm_head.", "pooler.", "vocab_", "decoder.bias", "decoder.weight")
"""What llama.cpp's converters leave out of the files of encoders."""


def encoder_tensors(case: str, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of a case under the names, and as, llama.cpp stores them."""
    stored = families.reference(case)
    architecture = ENCODER_ARCHITECTURES[stored.family]
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], 4)
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in families.random_tensors(stored.shapes, **stored.draw).items():
        for prefix in ("bert.", "roberta.", "distilbert.", "model."):
            name = name.removeprefix(prefix)
        if architecture != "t5" and name.startswith(HEADS):
            continue
        if stored.family == "roberta" and "position_embeddings" in name:
            tensor = tensor[config["pad_token_id"] + 1 :]
        found = names.get_name(name, (".weight", ".bias"))
        assert found is not None, name
        tensors[found] = tensor
    return tensors


def encoder_keys(family: str, config: dict[str, Any]) -> dict[str, Any]:
    """The keys that llama.cpp's converters write, without the architecture."""

    def first(*names: str) -> Any:
        return next(config[name] for name in names if name in config)

    keys: dict[str, Any] = {
        "embedding_length": first("hidden_size", "dim", "d_model"),
        "block_count": first("num_hidden_layers", "n_layers", "num_layers"),
        "feed_forward_length": first("intermediate_size", "hidden_dim", "d_ff"),
        "attention.head_count": first("num_attention_heads", "n_heads", "num_heads"),
    }
    if family == "t5":
        return keys | {
            "context_length": 512,
            "decoder_block_count": config["num_decoder_layers"],
            "attention.key_length": config["d_kv"],
            "attention.value_length": config["d_kv"],
            "attention.layer_norm_epsilon": config["layer_norm_epsilon"],
            "attention.layer_norm_rms_epsilon": config["layer_norm_epsilon"],
            "attention.relative_buckets_count": config["relative_attention_num_buckets"],
            "decoder_start_token_id": 0,
        }
    offset = config["pad_token_id"] + 1 if family == "roberta" else 0
    keys |= {
        "context_length": config["max_position_embeddings"] - offset,
        "attention.causal": False,
        "pooling_type": 1,
    }
    if family != "modernbert":
        return keys | {"attention.layer_norm_epsilon": config.get("layer_norm_eps", 1e-12)}
    rope = config["rope_parameters"]
    return keys | {
        "attention.layer_norm_epsilon": config["norm_eps"],
        "attention.layer_norm_rms_epsilon": config["norm_eps"],
        "attention.sliding_window": config["local_attention"],
        "attention.sliding_window_pattern": config["layer_types"][1:].index("full_attention") + 1,
        "rope.scaling.type": "none",
        "rope.freq_base": rope["full_attention"]["rope_theta"],
        "rope.freq_base_swa": rope["sliding_attention"]["rope_theta"],
        "vocab_size": config["vocab_size"],
    }


def write_encoder_gguf(
    case: str,
    path: Path,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    architecture: str | None = None,
) -> Path:
    """What llama.cpp's converter makes of a case, in float32.

    `keys` and `tensors` are further ones; keys that are None are left out.
    """
    stored = families.reference(case)
    config = stored.config | ENCODERS[case]
    architecture = architecture or ENCODER_ARCHITECTURES[stored.family]
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (encoder_keys(stored.family, config) | (keys or {})).items():
        kind = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
        if value is not None:
            getattr(writer, f"add_{kind[type(value)]}")(f"{architecture}.{key}", value)
    for name, tensor in (encoder_tensors(case, config) | (tensors or {})).items():
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return path


def encoder_from_safetensors(case: str, folder: Path) -> Any:
    """The model of a case, with what GGUF cannot say otherwise."""
    families.materialise(case, folder)
    config = families.reference(case).config | ENCODERS[case]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_model(folder)


@pytest.mark.parametrize("case", ENCODERS)
def test_a_gguf_encoder_is_the_safetensors_one(case, tmp_path):
    ours = encoder_from_safetensors(case, tmp_path)
    theirs = load_model(write_encoder_gguf(case, tmp_path / "model.gguf"))
    expected, leaves = ours.config, dict(flatten(ours.params))
    if not case.startswith("t5"):
        expected = expected.replace(head="none", pooler=False)
        heads = ("head/", "unembed/", "pooler/")
        leaves = {path: leaf for path, leaf in leaves.items() if not path.startswith(heads)}
    if case.startswith("modernbert"):  # settings of the head
        expected = expected.replace(head_bias=True, unembed_bias=False)
    if case == "roberta":
        rows = expected.context_length
        assert rows == 512
        expected = expected.replace(family="bert", position_offset=0, n_positions=rows)
        leaves["embed/positions"] = leaves["embed/positions"][2:]
    assert theirs.config == expected
    found = dict(flatten(theirs.params))
    assert sorted(found) == sorted(leaves)
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def test_a_gguf_roberta_computes_what_the_safetensors_one_does(tmp_path):
    ours = encoder_from_safetensors("roberta", tmp_path)
    theirs = load_model(write_encoder_gguf("roberta", tmp_path / "model.gguf"))
    tokens = 3 + jnp.arange(2 * 70).reshape(2, 70) * 7 % (ours.config.vocab_size - 3)
    mask = jnp.arange(70) < jnp.array([70, 41])[:, None]
    expected, found = (model(tokens, mask=mask, taps=["final"]).taps for model in (ours, theirs))
    np.testing.assert_array_equal(found["final"][mask], expected["final"][mask])


def test_a_period_or_a_list_of_windows_mean_the_same(tmp_path):
    slides = {"attention.sliding_window_pattern": [False, True, True, False]}
    one = load_model(write_encoder_gguf("modernbert", tmp_path / "one.gguf"))
    other = load_model(write_encoder_gguf("modernbert", tmp_path / "other.gguf", slides))
    assert one.config == other.config
    assert one.config.windows == (0, 33, 33, 0)


def test_what_llama_cpp_keeps_of_a_head_changes_nothing(tmp_path):
    # An old copy of T5 v1.0's embeddings, and its table of distances that nothing used.
    table = np.ones((16, 5), np.float32)
    tokens = encoder_tensors("t5", families.reference("t5").config)["token_embd.weight"]
    more = {"output.weight": tokens, "dec.blk.0.cross_attn_rel_b.weight": table}
    plain = load_model(write_encoder_gguf("t5", tmp_path / "t5.gguf"))
    copied = load_model(write_encoder_gguf("t5", tmp_path / "copied.gguf", tensors=more))
    assert copied.config == plain.config
    assert plain.config.decoder.logit_scale == 36**-0.5


REFUSALS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    # case, further keys, further tensors of that shape, what the message says
    "causal": ("bert", {"attention.causal": True}, {}, r"bert.attention.causal = true"),
    "unknown key": ("bert", {"new_kind": 1}, {}, r"unknown key bert.new_kind = 1"),
    "classifier": ("bert", {}, {"cls.output.weight": (2, 36)}, r"cls.output.weight: a classifier"),
    "no base": ("modernbert", {"rope.freq_base": None}, {}, r"missing key modern-bert.rope.freq_b"),
    "no local base": (
        *("modernbert", {"rope.freq_base_swa": None}, {}),
        r"missing key modern-bert.rope.freq_base_swa",
    ),
    "two epsilons": (
        *("modernbert", {"attention.layer_norm_rms_epsilon": 0.5}, {}),
        r"layer_norm_epsilon = 0.002 disagrees with",
    ),
    "activation": (
        *("modernbert", {"hidden_activation": "tanh"}, {}),
        r'modern-bert.hidden_activation = "tanh" is not supported',
    ),
    "umT5": ("t5", {}, {"enc.blk.1.attn_rel_b.weight": (16, 5)}, r"in every layer, as umT5 has"),
    "scale": ("t5", {}, {"output.weight": (97, 36)}, r"does not tell whether the logits are scal"),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_an_encoder_that_is_not_the_plain_one_is_refused(why, tmp_path):
    case, keys, shapes, message = REFUSALS[why]
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    path = write_encoder_gguf(case, tmp_path / "model.gguf", keys, tensors)
    with pytest.raises(ValueError, match=message):
        load_model(path)


def test_an_encoder_of_t5_alone_is_refused(tmp_path):
    path = write_encoder_gguf("t5", tmp_path / "model.gguf", architecture="t5encoder")
    with pytest.raises(ValueError, match="t5encoder"):
        load_model(path)
