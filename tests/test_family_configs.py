"""The keys of each family's config.json: every one counts, is ignored, or is refused by name."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
from family_keys import LENGTHS, OTHER_VALUES, OVERRULED, REFUSED, SAME, WRITTEN
from safetensors.numpy import load_file, save_file

from jaxheads.convert.export import export
from jaxheads.convert.families import FAMILIES
from jaxheads.convert.load import load_model
from jaxheads.convert.schema import Schema, flatten_keys, read_config, write_config
from jaxheads.model.config import ModelConfig
from jaxheads.model.parameters import flatten

TOKENS = 260
"""Longer than the windows and the first contexts of the cases."""


@dataclass
class Described:
    """A config.json with the shapes of the tensors beside it."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    where: str = "the case"

    def read(self, name: str) -> np.ndarray:
        """No tensor of these families holds a setting."""
        raise KeyError(name)


def schema_of(case: str) -> Schema:
    """How the config.json of a case is read."""
    return FAMILIES[families.reference(case).family].formats["huggingface"].schema


def changed(case: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a case with other values; a dot leads into a mapping."""
    config = json.loads(json.dumps(families.reference(case).config))
    for key, value in changes.items():
        outer, _, inner = key.rpartition(".")
        (config.setdefault(outer, {}) if outer else config)[inner] = value
    return config


def described(case: str, changes: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a case with other values."""
    source = Described(changed(case, changes), families.reference(case).shapes)
    return read_config(schema_of(case), source, "float32")


def loaded(case: str, changes: Mapping[str, Any], folder: Path) -> Any:
    """The model of a case with other values in its config.json."""
    if not folder.exists():
        families.materialise(case, folder)
    (folder / "config.json").write_text(json.dumps(changed(case, changes)), encoding="utf-8")
    return load_model(folder)


def keys_by_kind(case: str) -> tuple[set[str], set[str]]:
    """The keys of a case that set fields, and those that are ignored."""
    schema, keys = schema_of(case), set(flatten_keys(families.reference(case).config))
    used = {name for key in schema.used for name in key.names}
    globs = [glob for part in schema.parts for glob in part.keys]
    count = {k for k in keys if k in used or any(fnmatch.fnmatchcase(k, g) for g in globs)}
    known = {schema.family_key, *schema.fixed, *schema.equal}
    return count, keys - count - known


def answer(model: Any) -> np.ndarray:
    """What a model makes of a fixed input: its logits, or what it has instead."""
    config = model.config
    if config.image is not None:
        shape = [1, config.image.height, config.image.width, config.image.channels]
        given = families.random_pixels(shape, seed=0)
    else:
        given = np.arange(TOKENS)[None] * 7 % (config.vocab_size - 1)
    out = model(given, taps=("final",))
    return np.asarray(out.taps["final"] if out.logits is None else out.logits)


# The rest costs a program for every key: `make test-slow`.
QUICK = ("gpt2", "llama_llama3", "bert", "vit")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c not in QUICK)) for c in OTHER_VALUES]
)
def test_every_key_that_sets_a_field_changes_the_output_or_is_refused(case, tmp_path):
    count, _ = keys_by_kind(case)
    assert set(OTHER_VALUES[case]) == count
    expected = answer(loaded(case, {}, tmp_path / "model"))
    silent = []
    for key, value in OTHER_VALUES[case].items():
        try:
            model = loaded(case, {key: value}, tmp_path / "model")
        except ValueError:
            continue
        if np.array_equal(answer(model), expected):
            silent.append(key)
    known = (*LENGTHS, *OVERRULED.get(case, ()))
    assert [key for key in silent if key not in known] == []


@pytest.mark.parametrize("case", OTHER_VALUES)
def test_ignored_keys_change_nothing(case):
    _, ignored = keys_by_kind(case)
    assert described(case, dict.fromkeys(ignored, "something else")) == described(case, {})


@pytest.mark.parametrize("case", OTHER_VALUES)
def test_fixed_keys_are_refused_with_any_other_value(case):
    schema = schema_of(case)
    for key in schema.fixed:
        with pytest.raises(ValueError, match=rf'{key} = "something else" is not supported'):
            described(case, {key: "something else"})
    for key in schema.equal:
        with pytest.raises(ValueError, match=rf"{key} is 'something else', expected"):
            described(case, {key: "something else"})


@pytest.mark.parametrize(("case", "changes", "message"), REFUSED)
def test_what_the_block_cannot_do_is_refused_by_name(case, changes, message):
    with pytest.raises(ValueError, match=message):
        described(case, changes)


@pytest.mark.parametrize(("case", "changes"), SAME)
def test_other_spellings_describe_the_same_model(case, changes):
    assert described(case, changes) == described(case, {})


@pytest.mark.parametrize(("case", "changes"), WRITTEN)
def test_what_is_written_is_read_back(case, changes):
    config, schema = described(case, {}).replace(**changes), schema_of(case)
    keys = json.loads(json.dumps(write_config(schema, config)))
    assert read_config(schema, Described(keys, {}), "float32") == config


BUFFERS = {
    # case: what the names of a bare model lack, buffers of old files
    "gpt2": ("transformer.", ["h.0.attn.bias", "h.0.attn.masked_bias"]),
    "gpt_neo": ("transformer.", ["h.1.attn.attention.bias", "h.1.attn.attention.masked_bias"]),
    "gpt_neox": (
        "gpt_neox.",
        [
            "layers.0.attention.bias",
            "layers.0.attention.masked_bias",
            "layers.0.attention.rotary_emb.inv_freq",
        ],
    ),
    "opt": ("model.", []),
    "phi3": ("model.", ["layers.0.self_attn.rotary_emb.inv_freq"]),
    "llama_biases": ("model.", ["layers.0.self_attn.rotary_emb.inv_freq"]),
    "gemma3_text": ("model.", []),
    "bert": ("bert.", ["embeddings.position_ids", "embeddings.token_type_ids"]),
    "roberta": ("roberta.", ["embeddings.position_ids"]),
    "distilbert": ("distilbert.", ["embeddings.position_ids"]),
    "modernbert": ("model.", []),
    "vit": ("vit.", ["embeddings.mask_token"]),
    "deit": ("deit.", ["embeddings.mask_token"]),
}


@pytest.mark.parametrize("case", BUFFERS)
@pytest.mark.parametrize("bare", [False, True])
def test_old_files_load_like_new_ones(case, bare, tmp_path):
    prefix, buffers = BUFFERS[case]
    expected = loaded(case, {}, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path) | {prefix + name: np.ones((1, 1), np.float32) for name in buffers}
    if bare:
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    save_file(tensors, path)
    model = load_model(tmp_path / "model")
    assert model.config == expected.config
    leaves = dict(flatten(model.params))
    for name, leaf in flatten(expected.params):
        np.testing.assert_array_equal(leaves[name], leaf, err_msg=name)


@pytest.mark.parametrize("case", ["gpt2", "gpt_neo", "opt"])
def test_a_copy_of_the_embedding_must_be_one(case, tmp_path):
    loaded(case, {}, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    embedding = next(t for n, t in tensors.items() if n.endswith(("wte.weight", "tokens.weight")))
    save_file(tensors | {"lm_head.weight": embedding}, path)
    load_model(tmp_path / "model")
    save_file(tensors | {"lm_head.weight": embedding + 1}, path)
    with pytest.raises(ValueError, match=r"lm_head.weight is not the copy of embed/tokens"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("key", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_a_cap_that_is_null_is_none_and_one_that_is_absent_is_missing(key):
    name = {"attn": "attn_softcap", "final": "logit_softcap"}[key.split("_")[0]]
    assert described("gemma2", {key: None}) == described("gemma2", {}).replace(**{name: None})
    config = {k: v for k, v in families.reference("gemma2").config.items() if k != key}
    with pytest.raises(ValueError, match=f"missing key {key}"):
        read_config(schema_of("gemma2"), Described(config, {}), "float32")


def test_qwen_has_windows_from_a_layer_on_where_it_lists_none():
    changes = {"layer_types": None, "max_window_layers": 2}
    assert described("qwen2_windows", changes).windows == (0, 0, 64)
    assert described("qwen2_windows", changes | {"use_sliding_window": False}).windows == ()


def test_gemma_3_with_images_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="unknown model_type 'gemma3'"):
        loaded("gemma3_text", {"model_type": "gemma3", "text_config": {}}, tmp_path / "model")


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [
        ("mistral", {"windows": (64, 64, 0)}, "one window in all layers"),
        ("qwen3", {"windows": (64, 32, 0)}, "one window size"),
        ("gemma2", {"attn_scale": 0.3}, "attn_scale to be a whole number"),
        ("gemma2", {"embed_scale": 1.0}, "embed_scale to be 6.0"),
        ("llama_biases", {"ropes": (None,)}, "one rotary encoding"),
        ("gemma3_text", {"ropes": (None,)}, "one rotary encoding for full_attention"),
    ],
)
def test_what_a_format_cannot_name_is_not_written(case, fields, message):
    with pytest.raises(ValueError, match=message):
        write_config(schema_of(case), described(case, {}).replace(**fields))


@pytest.mark.parametrize("case", ["bert", "roberta", "distilbert"])
def test_norms_of_the_first_years_load(case, tmp_path):
    expected = loaded(case, {}, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(path)
    for new, name in old.items():
        tensors = {key.replace(new, name): tensor for key, tensor in tensors.items()}
    assert any(key.endswith("gamma") for key in tensors)
    save_file(tensors, path)
    np.testing.assert_array_equal(answer(load_model(tmp_path / "model")), answer(expected))


def test_bert_files_repeat_the_decoder_and_carry_the_next_sentence_head(tmp_path):
    expected = loaded("bert", {}, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors |= {
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"],
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"],
        "cls.seq_relationship.weight": np.zeros((2, 36), np.float32),
        "cls.seq_relationship.bias": np.zeros(2, np.float32),
    }
    save_file(tensors, path)
    np.testing.assert_array_equal(answer(load_model(tmp_path / "model")), answer(expected))
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"] + 1
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"decoder\.bias is not the copy of unembed/bias"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("case", "tensor", "message"),
    [
        ("bert", "classifier.weight", "a classifier of sentences or tokens"),
        ("bert_backbone", "qa_outputs.weight", "a head that answers questions"),
        ("roberta", "classifier.dense.weight", "a classifier of sentences or tokens"),
        ("distilbert", "pre_classifier.weight", "a classifier of sentences or tokens"),
        ("modernbert", "classifier.weight", "a classifier of sentences or tokens"),
        ("vit_backbone", "decoder.0.weight", "it predicts masked patches"),
        ("deit", "cls_classifier.weight", "DeiTForImageClassificationWithTeacher"),
        ("dinov2", "classifier.weight", "a classifier of the first token and the mean"),
    ],
)
def test_heads_that_the_model_does_not_have_are_refused_by_name(case, tensor, message, tmp_path):
    path = families.materialise(case, tmp_path / "model") / "model.safetensors"
    save_file(load_file(path) | {tensor: np.zeros((2, 36), np.float32)}, path)
    with pytest.raises(ValueError, match=f"{tensor}: {message}"):
        load_model(tmp_path / "model")


def test_roberta_keeps_the_padding_token_that_its_positions_begin_after(tmp_path):
    model = loaded("roberta", {"pad_token_id": 2}, tmp_path / "model")
    export(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert written["pad_token_id"] == 2
    assert load_model(tmp_path / "out").config == model.config


# Models of two stacks: another value changes the config (and each of its fields is read).
PAIRS: dict[str, dict[str, Any]] = {
    "t5": {
        "d_model": 40,
        "d_kv": 16,
        "d_ff": 64,
        "num_heads": 3,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "vocab_size": 96,
        "layer_norm_epsilon": 0.1,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 30,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "scale_decoder_outputs": False,
        "n_positions": 60,
    },
    "bart": {
        "d_model": 48,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 3,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 8,
        "decoder_ffn_dim": 8,
        "vocab_size": 96,
        "activation_function": "relu",
        "max_position_embeddings": 100,
        "scale_embedding": True,
        "tie_word_embeddings": False,
        "normalize_before": True,
    },
    "clip": {
        "projection_dim": 8,
        "text_config.hidden_size": 48,
        "text_config.hidden_act": "gelu",
        "text_config.eos_token_id": 7,
        "text_config.layer_norm_eps": 0.1,
        "text_config.max_position_embeddings": 80,
        "vision_config.hidden_act": "gelu",
        "vision_config.image_size": 48,
        "vision_config.patch_size": 4,
        "vision_config.num_channels": 1,
        "vision_config.intermediate_size": 8,
    },
}


@pytest.mark.parametrize("case", PAIRS)
def test_keys_of_two_stacks_count_or_are_refused(case):
    plain = described(case, {})
    for key, value in PAIRS[case].items():
        try:
            assert described(case, {key: value}) != plain, key
        except ValueError:
            continue
    for key in ("attention_kind", "text_config.attention_kind")[: 1 + (case == "clip")]:
        with pytest.raises(ValueError, match="unknown key attention_kind"):
            described(case, {key: "new"})
