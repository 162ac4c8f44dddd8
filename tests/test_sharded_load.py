"""Loading: into the shards of a mesh, of fake devices and of two processes; and from the hub."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from devices import free_address, launch, on_eight_devices, result

import jaxheads as jh
from jaxheads.convert import load_model
from jaxheads.convert.fill import _copy
from jaxheads.convert.hub import download, parse_id
from jaxheads.convert.place import by_axes
from jaxheads.model.parameters import flatten, parameter_table

KINDS = ("huggingface", "gguf", "native")
SHAPE = {"n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "head_dim": 8, "d_model": 32, "d_mlp": 64}


def config(**changes: Any) -> jh.ModelConfig:
    return jh.ModelConfig(**SHAPE | {"vocab_size": 20, "context_length": 64} | changes)


def write(kind: str, path: Path, config: jh.ModelConfig) -> Path:
    """A checkpoint of random weights: bfloat16 in several files, or quantised, or native."""
    if kind == "gguf":
        return write_gguf(path.with_suffix(".gguf"), config)
    model = jh.Transformer.random(config, jax.random.key(0), "bfloat16")
    if kind == "native":
        return jh.save(model, None, path)
    path = jh.export(model, path, max_shard_bytes=20_000)
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def write_gguf(path: Path, config: jh.ModelConfig) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.n_layers)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_mlp)
    writer.add_context_length(config.context_length)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    d, f = config.d_model, config.d_mlp
    q, k = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes = {"token_embd": (config.vocab_size, d), "output_norm": (d,)}
    block = {"attn_q": (q, d), "attn_k": (k, d), "attn_v": (k, d), "attn_output": (d, q)}
    block |= {"ffn_gate": (f, d), "ffn_up": (f, d), "ffn_down": (d, f)}
    block |= {"attn_norm": (d,), "ffn_norm": (d,)}
    for layer in range(config.n_layers):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        quant = gguf.GGMLQuantizationType.Q8_0 if len(shape) == 2 else None
        packed = gguf.quants.quantize(values, quant) if quant else values
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# What the other processes do.


def on_a_mesh(folder: str) -> dict[str, Any]:
    """Loads every kind of checkpoint onto a mesh of 2 x 4, and onto one device."""
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=auto)
    tokens = np.random.default_rng(0).integers(0, 20, (2, 16))
    forward = jax.jit(lambda model, ids: model(ids).logits)
    found: dict[str, Any] = {}
    for kind in KINDS:
        path = write(kind, Path(folder) / kind, config())
        whole, sharded = load_model(path), load_model(path, mesh=mesh)
        pairs = dict(zip(*map(tuple, zip(*flatten(whole.params), strict=True)), strict=True))
        leaves = dict(flatten(sharded.params))
        with jax.set_mesh(mesh):
            logits = np.asarray(forward(sharded, tokens))
        found[kind] = {
            "specs": {p: [*leaf.sharding.spec] for p, leaf in leaves.items()},
            "parts": {p: leaf.addressable_shards[0].data.shape for p, leaf in leaves.items()},
            "devices": sorted({len(leaf.sharding.device_set) for leaf in leaves.values()}),
            "alone": sorted({len(leaf.sharding.device_set) for leaf in pairs.values()}),
            "different": [
                path
                for path, leaf in leaves.items()
                if leaf.dtype != pairs[path].dtype
                or np.asarray(leaf).tobytes() != np.asarray(pairs[path]).tobytes()
            ],
            "dtypes": sorted({str(leaf.dtype) for leaf in leaves.values()}),
            "error": float(np.abs(logits - forward(whole, tokens)).max()),
            "size": float(np.abs(logits).max()),
        }
    few = load_model(write("huggingface", Path(folder) / "few", config(n_kv_heads=2)), mesh=mesh)
    found["few"] = [*dict(flatten(few.params))["blocks/attn/k"].sharding.spec]
    donate = jax.jit(lambda params: jax.tree.map(lambda x: x * 2, params), donate_argnums=0)
    params = load_model(path, mesh=mesh).params
    before = jax.tree.map(np.array, params)
    doubled = donate(params)
    found["donated"] = [
        path
        for (path, new), (_, old) in zip(flatten(doubled), flatten(before), strict=True)
        if not all(np.array_equal(s.data, 2 * old[s.index]) for s in new.addressable_shards)
    ]
    return found


def one_of_two_processes(folder: str, address: str, number: int) -> dict[str, Any]:
    """Loads half of a model, and says how much of the file its memory saw."""
    from jaxheads.convert.readers import Reader
    from jaxheads.convert.safetensors_files import SafetensorsReader

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=number)
    kept: list[np.ndarray] = []
    read = SafetensorsReader.read

    def read_and_keep(reader: Reader, name: str) -> np.ndarray:
        kept.append(read(reader, name))
        return kept[-1]

    def seen() -> int:
        """Bytes of mapped files in memory; what is kept stays mapped."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile")) << 10

    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    load_model(folder, mesh=mesh)  # warms up: libraries are mapped files too
    SafetensorsReader.read = read_and_keep
    start = seen()
    half = load_model(folder, mesh=mesh)
    middle = seen()
    whole = load_model(folder)
    end = seen()
    leaf = half.params["embed"]["tokens"]
    mine = leaf.addressable_shards
    return {
        "half": middle - start,
        "whole": end - middle,
        "shards": [[shard.index[0].start or 0, shard.data.shape[0]] for shard in mine],
        "equal": all(
            np.array_equal(shard.data, whole.params["embed"]["tokens"][shard.index])
            for shard in mine
        ),
    }


# Fake devices.


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return on_eight_devices(on_a_mesh, str(tmp_path_factory.mktemp("sharded")))


@pytest.mark.parametrize("kind", KINDS)
def test_every_leaf_is_sharded_by_the_rules(found, kind):
    rules = {"H": "tensor", "K": "tensor", "F": "tensor", "V": "tensor", "D": "fsdp"}
    ways = {"tensor": 4, "fsdp": 2, None: 1}
    for path, leaf in parameter_table(config()).items():
        wanted = [rules.get(axis) for axis in leaf.axes]
        assert found[kind]["specs"][path] == wanted, path
        parts = [size // ways[over] for size, over in zip(leaf.shape, wanted, strict=True)]
        assert found[kind]["parts"][path] == parts, path
    assert found[kind]["devices"] == [8] and found[kind]["alone"] == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_shards_are_the_whole_bit_for_bit_and_the_model_runs(found, kind):
    assert found[kind]["different"] == []
    assert found[kind]["dtypes"] == ["bfloat16" if kind == "native" else "float32"]
    assert found[kind]["error"] < 1e-5 * max(1, found[kind]["size"])


def test_few_key_heads_stay_whole_over_many_devices(found):
    assert found["few"] == [None, "fsdp", None, None]


def test_copies_on_several_devices_can_be_donated(found):
    assert found["donated"] == []


# Two processes.


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_reads_only_what_its_devices_hold(tmp_path):
    vocabulary = 1 << 18  # 32 MB, most of the file
    model = jh.Transformer.random(config(vocab_size=vocabulary), jax.random.key(0))
    path = jh.export(model, tmp_path / "hf")
    address = free_address()
    processes = [launch(one_of_two_processes, str(path), address, i) for i in range(2)]
    size = (path / "model.safetensors").stat().st_size
    for number, process in enumerate(processes):
        facts = result(process)
        assert facts["equal"]
        assert facts["shards"] == [[number * vocabulary // 2, vocabulary // 2]]
        assert 0.9 * size < facts["whole"] < 1.1 * size  # so the meter works
        assert 0.4 * size < facts["half"] < 0.6 * size


# Memory of a real model.


def memory_and_seconds() -> dict[str, float]:
    """Peak growth of memory over the weights, and seconds, of loading SmolLM2 from GGUF."""
    import resource
    import time

    import psutil

    jax.numpy.zeros(3).block_until_ready()
    before, start = psutil.Process().memory_info().rss, time.process_time()
    model, _ = jh.load("smollm2-135m-instruct")
    jax.block_until_ready(jax.tree.leaves(model.params))
    seconds = time.process_time() - start  # of CPU, so that a busy machine does not fail it
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    return {"growth": (peak - before) / weights, "seconds": seconds}


@pytest.mark.slow
def test_loading_needs_little_more_memory_than_the_weights():
    facts = result(launch(memory_and_seconds))
    assert facts["growth"] <= 2.2
    assert facts["seconds"] <= 15


# Rules, without any device.


def mesh_of(**axes: int) -> Any:
    return jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes))


def spec(mesh: Any, axes: str, shape: tuple[int, ...], **rules: str) -> tuple:
    place = by_axes(mesh, rules) if rules else by_axes(mesh)
    return tuple(place("blocks/x", tuple(axes.split()), shape).spec)


def test_two_axes_with_one_mesh_axis_are_settled_in_order():
    mesh = mesh_of(x=2)
    assert spec(mesh, "L D H Dh", (3, 4, 6, 8), H="x", D="x") == (None, None, "x", None)
    assert spec(mesh, "L F D", (3, 4, 6), D="x", F="x") == (None, "x", None)
    assert spec(mesh, "V D", (4, 6), D="x", V="x") == ("x", None)
    assert spec(mesh, "L D", (3, 4), D="x", F="x") == (None, "x")
    # K that stays whole claims nothing.
    assert spec(mesh, "L D K Dh", (3, 4, 1, 8), K="x", D="x") == (None, "x", None, None)


def test_rules_that_a_mesh_cannot_follow():
    assert spec(mesh_of(tensor=2), "L D H Dh", (3, 5, 6, 8)) == (None, None, "tensor", None)
    with pytest.raises(ValueError, match=r"no rule shards .* axes are tp, .* fsdp, tensor"):
        by_axes(mesh_of(tp=2))
    with pytest.raises(ValueError, match=r"unknown axis of a rule 'heads'.*Known: H, K, F, V, D"):
        by_axes(mesh_of(tensor=2), {"heads": "tensor"})
    message = r"blocks/x of shape \(6, 4\).*H = 6 is not a multiple of the 4 devices.*'tensor'"
    with pytest.raises(ValueError, match=message):
        spec(mesh_of(tensor=4), "H Dh", (6, 4))
    with pytest.raises(ValueError, match="K = 6 is not a multiple"):
        spec(mesh_of(tensor=4), "K Dh", (6, 4))


def test_what_cannot_be_sharded_is_refused_before_anything_is_read(tmp_path):
    path = write("huggingface", tmp_path / "hf", config())
    mesh = jax.make_mesh((1,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    assert load_model(path, mesh=mesh).config == load_model(path).config
    with pytest.raises(ValueError, match="no rule shards anything"):
        load_model(path, mesh=mesh, rules={"H": "tp"})
    with pytest.raises(ValueError, match="rules were given without a mesh"):
        load_model(path, rules={"H": "tensor"})


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32")])
def test_tiled_copies_are_copies(dtypes):
    stored, wanted = dtypes
    rng = np.random.default_rng(0)
    cases = [((6, 5, 4), (2, 0, 1)), ((1100, 40), (1, 0)), ((7, 1, 9), (2, 1, 0)), ((3,), (0,))]
    cases += [((4, 6, 8, 2), (3, 1, 0, 2)), ((0, 4), (1, 0)), ((), ())]
    for shape, order in cases:
        whole = rng.standard_normal(shape).astype(jax.numpy.dtype(stored)).transpose(order)
        for source in (whole, whole[tuple(slice(n // 3, None) for n in whole.shape)]):
            target = np.zeros(source.shape, wanted)
            _copy(target, source)
            np.testing.assert_array_equal(target, source.astype(wanted))


# The hub.

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def lay_out(cache: Path, repo: str, source: Path) -> Path:
    """A cache as huggingface_hub leaves it: blobs, links to them, and the main branch."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, root / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_ids_of_the_hub():
    assert parse_id("org/name-1.5_b") == ("org/name-1.5_b", None)
    assert parse_id("org/name:file.Q4_K.gguf") == ("org/name", "file.Q4_K.gguf")
    for other in ("name", "a/b/c", "/name", "org/", "org/name:file.bin", "org/name:", "~/a b"):
        assert parse_id(other) is None, other


def test_a_model_in_the_cache_is_loaded_without_a_connection(tmp_path, monkeypatch):
    path = write("huggingface", tmp_path / "hf", config())
    write_gguf(path / "small.gguf", config())
    snapshot = lay_out(tmp_path / "cache", "org/name", path)
    here = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    assert download("org/name", **here) == snapshot
    assert download("org/name", revision=COMMIT, **here) == snapshot
    assert download("org/name", "small.gguf", **here) == snapshot / "small.gguf"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, local in (("org/name", path), ("org/name:small.gguf", path / "small.gguf")):
        ours, theirs = load_model(name).params, load_model(local).params
        assert all(map(np.array_equal, *map(jax.tree.leaves, (ours, theirs))))
    with pytest.raises(ValueError, match=r"cannot load org/other .*hf download org/other"):
        load_model("org/other")


def test_what_is_not_there_says_how_to_get_it(tmp_path):
    here = {"cache_dir": tmp_path, "local_files_only": True}
    cases = [
        (("org/name",), {}, "org/name from the Hugging Face hub: not in the local cache"),
        (("org/name",), {}, r"hf download org/name --include 'config.json' .*safetensors"),
        (("org/name",), {"revision": "v2"}, "hf download org/name --revision v2"),
        (("org/name", "a.gguf"), {}, "cannot load org/name:a.gguf .*hf download org/name a.gguf"),
        (("org/na--me",), {}, "HFValidationError"),
        (("org/name", "../../a.gguf"), {}, "leads out of the repository"),
    ]
    for arguments, more, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            download(*arguments, **more, **here)
        assert error.value.__cause__ is None and error.value.__context__ is None
        assert ".bin" not in str(error.value)
    (tmp_path / "empty").mkdir()
    lay_out(tmp_path, "org/name", tmp_path / "empty")
    with pytest.raises(ValueError, match=r"has no config.json with safetensors .*org/name:FILE"):
        download("org/name", **here)
